use super::decoder::Decoder;
use super::names::{Biases, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// StableLM: as Llama, with layer norms and heads of which a quarter turns; that of 12B has a norm for each head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StableLm;

impl Family for StableLm {
    fn model_types(&self) -> &'static [&'static str] {
        &["stablelm"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let parallel = config.flag("use_parallel_residual")?;
        let mlp_norm = if parallel { "input_layernorm" } else { "post_attention_layernorm" };
        let decoder = Decoder {
            names: Names {
                mlp_norm: Some(mlp_norm),
                head_norms: ["q_layernorm.norms", "k_layernorm.norms"],
                ..Names::llama("model.")
            },
            head_norms: config.flag("qk_layernorm")?.then_some(NormOver::OwnHead),
            kv_heads: Some(32),
            biases: Biases { queries_keys_values: config.flag("use_qkv_bias")?, ..Biases::default() },
            norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_eps", 1e-5), offset: 0.0 },
            parallel,
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder
            .with_rope(|rope| {
                (rope.partial, rope.partial_key) = (0.25, Some("partial_rotary_factor"));
                rope.positions = 4096;
            })
            .architecture()
    }
}
