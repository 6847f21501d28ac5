use super::decoder::Decoder;
use super::names::{Biases, MlpNames, Names};
use super::norms::NormRule;
use super::rope;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// GLM-4 of 2024: as Llama, with gate and up in one tensor, and heads of which half turns, interleaved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glm;

impl Family for Glm {
    fn model_types(&self) -> &'static [&'static str] {
        &["glm"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        glm(config, tensors)?.architecture()
    }
}

/// GLM-4-0414, GLM-Z1: as GLM, with norms behind attention and MLP, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Glm4;

impl Family for Glm4 {
    fn model_types(&self) -> &'static [&'static str] {
        &["glm4"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let decoder = glm(config, tensors)?;
        let names = Names {
            attention_output_norm: Some("post_self_attn_layernorm"),
            mlp_output_norm: Some("post_mlp_layernorm"),
            ..decoder.names.clone()
        };
        Decoder { names, ..decoder }.architecture()
    }
}

fn glm<'a>(config: &'a Config, tensors: &'a dyn TensorIndex) -> Result<Decoder<'a>, FileError> {
    let biased = config.given_flag("attention_bias")?.unwrap_or(true);
    let decoder = Decoder {
        names: Names {
            mlp: MlpNames::Joined(["mlp.gate_up_proj", "mlp.down_proj"]),
            ..Names::llama("model.")
        },
        kv_heads: Some(2),
        head_dim: Some(128),
        biases: Biases { queries_keys_values: biased, ..Biases::default() },
        norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1.5625e-7), offset: 0.0 },
        ..Decoder::llama(config, tensors)
    };
    let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
    Ok(decoder.with_rope(|rope| {
        (rope.partial, rope.partial_key) = (0.5, Some("partial_rotary_factor"));
        (rope.pairs, rope.positions) = (rope::interleaved, 131_072);
    }))
}
