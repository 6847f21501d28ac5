use super::decoder::Decoder;
use super::kinds::{window, windows};
use super::names::{Biases, Names};
use super::norms::NormRule;
use super::rope;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// Command R and R+: attention and MLP in parallel behind one layer norm, interleaved rotation, scaled logits; R+ has a norm for each head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cohere;

impl Family for Cohere {
    fn model_types(&self) -> &'static [&'static str] {
        &["cohere"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        cohere(config, tensors)?.with_rope(|rope| rope.theta = 500_000.0).architecture()
    }
}

/// Command R7B, Command A: as Command R, but three of four layers look back 4096 tokens only, and only these know positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cohere2;

impl Family for Cohere2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["cohere2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let window = window(config, 4096)?;
        let every = config.count("sliding_window_pattern")?.unwrap_or(4);
        let mut layers = windows(config, tensors, window, |layer| (layer + 1) % every != 0)?;
        layers.turned = layers.windows.iter().map(Option::is_some).collect();
        Decoder { layers, ..cohere(config, tensors)? }.architecture()
    }
}

fn cohere<'a>(config: &'a Config, tensors: &'a dyn TensorIndex) -> Result<Decoder<'a>, FileError> {
    let biased = config.flag("attention_bias")?;
    let scale = match config.get("logit_scale") {
        None => 0.0625,
        Some(value) => value.as_f64().ok_or_else(|| config.wrong("logit_scale", "a number", value))?,
    };
    let decoder = Decoder {
        names: Names { mlp_norm: Some("input_layernorm"), ..Names::llama("model.") },
        biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
        norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_eps", 1e-5), offset: 0.0 },
        head_norms: config.flag("use_qk_norm")?.then_some(NormOver::OwnHead),
        parallel: true,
        logit_scale: scale,
        tied: true,
        ..Decoder::llama(config, tensors)
    };
    let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
    Ok(decoder.with_rope(|rope| (rope.pairs, rope.positions) = (rope::interleaved, 8192)))
}
