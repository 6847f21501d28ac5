use super::decoder::Decoder;
use super::names::Biases;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture};

/// Seed-OSS: as Llama, with biases of queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedOss;

impl Family for SeedOss {
    fn model_types(&self) -> &'static [&'static str] {
        &["seed_oss"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.given_flag("attention_bias")?.unwrap_or(true);
        let (outputs, mlp) = (config.flag("attention_out_bias")?, config.flag("mlp_bias")?);
        let decoder = Decoder {
            kv_heads: Some(8),
            head_dim: Some(128),
            biases: Biases { queries_keys_values: biased, outputs, mlp, ..Biases::default() },
            ..Decoder::llama(config, tensors)
        };
        decoder
            .acting(&["hidden_act"], Activation::Silu)
            .with_rope(|rope| rope.positions = 524_288)
            .architecture()
    }
}
