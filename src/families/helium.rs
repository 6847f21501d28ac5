use super::decoder::Decoder;
use super::names::Biases;
use super::norms::NormRule;
use super::rope;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// Helium: as Llama, with interleaved rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Helium;

impl Family for Helium {
    fn model_types(&self) -> &'static [&'static str] {
        &["helium"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let (biased, mlp) = (config.flag("attention_bias")?, config.flag("mlp_bias")?);
        let decoder = Decoder {
            kv_heads: Some(20),
            head_dim: Some(128),
            biases: Biases { queries_keys_values: biased, mlp, ..Biases::default() },
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-8), offset: 0.0 },
            ..Decoder::llama(config, tensors)
        };
        decoder
            .acting(&["hidden_act"], Activation::Silu)
            .with_rope(|rope| {
                (rope.theta, rope.pairs, rope.positions) = (100_000.0, rope::interleaved, 4096);
            })
            .architecture()
    }
}
