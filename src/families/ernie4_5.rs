use super::decoder::Decoder;
use super::names::Biases;
use super::norms::NormRule;
use super::rope;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// ERNIE 4.5, the dense ones: as Llama, with interleaved rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ernie45;

impl Family for Ernie45 {
    fn model_types(&self) -> &'static [&'static str] {
        &["ernie4_5"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.flag("use_bias")?;
        let decoder = Decoder {
            kv_heads: Some(2),
            head_dim: Some(128),
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp: biased, ..Biases::default() },
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            tied: true,
            ..Decoder::llama(config, tensors)
        };
        decoder
            .acting(&["hidden_act"], Activation::Silu)
            .with_rope(|rope| {
                (rope.theta, rope.pairs, rope.positions) = (500_000.0, rope::interleaved, 131_072);
            })
            .architecture()
    }
}
