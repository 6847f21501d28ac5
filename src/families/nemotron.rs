use super::decoder::Decoder;
use super::names::{Biases, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// Nemotron, Minitron: layer norms that store w − 1, squared ReLU without a gate, heads of which half turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nemotron;

impl Family for Nemotron {
    fn model_types(&self) -> &'static [&'static str] {
        &["nemotron"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.flag("attention_bias")?;
        let mlp = config.flag("mlp_bias")?;
        let decoder = Decoder {
            names: Names { mlp: MlpNames::Plain(["mlp.up_proj", "mlp.down_proj"]), ..Names::llama("model.") },
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp, ..Biases::default() },
            norms: NormRule { kind: NormKind::Layer, epsilon: ("norm_eps", 1e-5), offset: 1.0 },
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::ReluSquared);
        decoder
            .with_rope(|rope| {
                (rope.partial, rope.partial_key) = (0.5, Some("partial_rotary_factor"));
                rope.positions = 4096;
            })
            .architecture()
    }
}
