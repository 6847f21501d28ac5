use super::decoder::Decoder;
use super::kinds::{window, windows};
use super::names::Names;
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// EXAONE 4: norms behind attention and MLP and on each head's queries and keys; where some layers look back 4096 tokens only, only these know positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exaone4;

impl Family for Exaone4 {
    fn model_types(&self) -> &'static [&'static str] {
        &["exaone4"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let window = window(config, 4096)?;
        let pattern = config.get("sliding_window_pattern");
        let every = match pattern {
            None => 4,
            Some(value) => match (value.as_u64(), value.as_str()) {
                (Some(every), _) => every as usize,
                // "LLLG": every fourth sees all.
                (_, Some(letters)) => letters.len(),
                _ => return Err(config.wrong("sliding_window_pattern", "a number or letters", value)),
            },
        };
        let slides = |layer: usize| window.is_some() && every > 0 && (layer + 1) % every != 0;
        let mut layers = windows(config, tensors, window, slides)?;
        if window.is_some() {
            layers.turned = layers.windows.iter().map(Option::is_some).collect();
        }
        let decoder = Decoder {
            names: Names::llama("model.").normed_behind(),
            kv_heads: Some(32),
            layers,
            head_norms: Some(NormOver::Head),
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            ..Decoder::llama(config, tensors)
        };
        decoder.acting(&["hidden_act"], Activation::Silu).architecture()
    }
}
