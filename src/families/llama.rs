use super::decoder::Decoder;
use super::names::Biases;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture};

/// Llama 1 to 3, CodeLlama, SmolLM, and what follows them: split projections, RoPE half-split over the whole head, RMS norms,
/// gated MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Llama;

impl Family for Llama {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.flag("attention_bias")?;
        let mlp = config.flag("mlp_bias")?;
        let biases = Biases { queries_keys_values: biased, outputs: biased, mlp, ..Biases::default() };
        let decoder = Decoder { biases, ..Decoder::llama(config, tensors) };
        decoder.acting(&["hidden_act"], Activation::Silu).architecture()
    }
}
