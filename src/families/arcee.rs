use super::decoder::Decoder;
use super::names::{Biases, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// Arcee (AFM): as Llama, with MLPs that have no gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arcee;

impl Family for Arcee {
    fn model_types(&self) -> &'static [&'static str] {
        &["arcee"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let (biased, mlp) = (config.flag("attention_bias")?, config.flag("mlp_bias")?);
        let decoder = Decoder {
            names: Names { mlp: MlpNames::Plain(["mlp.up_proj", "mlp.down_proj"]), ..Names::llama("model.") },
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp, ..Biases::default() },
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            ..Decoder::llama(config, tensors)
        };
        decoder
            .acting(&["hidden_act"], Activation::ReluSquared)
            .with_rope(|rope| rope.positions = 4096)
            .architecture()
    }
}
