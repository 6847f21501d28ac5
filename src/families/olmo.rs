use super::decoder::Decoder;
use super::kinds::{window, windows};
use super::names::{Biases, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// OLMo 1: layer norms without weights. Models whose queries, keys and values are clipped (`clip_qkv`) are refused: merged heads would
/// be clipped elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Olmo;

impl Family for Olmo {
    fn model_types(&self) -> &'static [&'static str] {
        &["olmo"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        unclipped(config)?;
        let decoder = Decoder {
            names: Names::llama("model."),
            head_norms: None,
            // A constant of the family, under no key.
            norms: NormRule { kind: NormKind::Layer, epsilon: ("", 1e-5), offset: 0.0 },
            bare_norms: true,
            ..olmo(config, tensors)?
        };
        decoder.architecture()
    }
}

/// OLMo 2: norms behind attention and MLP instead of before them, and over all queries and all keys of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Olmo2;

impl Family for Olmo2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["olmo2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        olmo(config, tensors)?.architecture()
    }
}

/// OLMo 3: as OLMo 2, but three of four layers look back 4096 tokens only, and turn by frequencies of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Olmo3;

impl Family for Olmo3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["olmo3"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let window = window(config, 4096)?;
        let mut layers = windows(config, tensors, window, |layer| (layer + 1) % 4 != 0)?;
        layers.ropes_by_kind(config, tensors, |layer| (layer + 1) % 4 != 0)?;
        let decoder = Decoder { layers, ..olmo(config, tensors)? };
        let theta = 500_000.0;
        let sliding = Some(("sliding_attention", theta));
        decoder.with_rope(|rope| (rope.theta, rope.of_kind) = (theta, sliding)).architecture()
    }
}

fn olmo<'a>(config: &'a Config, tensors: &'a dyn TensorIndex) -> Result<Decoder<'a>, FileError> {
    let biased = config.flag("attention_bias")?;
    let decoder = Decoder {
        names: Names::llama("model.").normed_behind(),
        biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
        head_norms: Some(NormOver::Width),
        norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
        ..Decoder::llama(config, tensors)
    };
    Ok(decoder.acting(&["hidden_act"], Activation::Silu))
}

/// Refuses queries, keys and values that are clipped.
pub(super) fn unclipped(config: &Config) -> Result<(), FileError> {
    match config.get("clip_qkv") {
        None => Ok(()),
        Some(clip) => {
            let what = format!("clipped projections (`clip_qkv` {clip})");
            Err(config.unsupported(what, "models without it are"))
        }
    }
}
