use super::decoder::Decoder;
use super::names::Biases;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture};

/// Granite 3: as Llama, with multipliers of embeddings, scores, what layers add, and logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granite;

impl Family for Granite {
    fn model_types(&self) -> &'static [&'static str] {
        &["granite"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let number = |key| Ok::<_, FileError>(config.positive(key)?.unwrap_or(1.0));
        let biased = config.flag("attention_bias")?;
        let mlp = config.flag("mlp_bias")?;
        let decoder = Decoder {
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp, ..Biases::default() },
            scale: Some(number("attention_multiplier")?),
            residual: number("residual_multiplier")?,
            embedding_scale: number("embedding_multiplier")?,
            logit_scale: number("logits_scaling")?.recip(),
            ..Decoder::llama(config, tensors)
        };
        decoder.acting(&["hidden_act"], Activation::Silu).architecture()
    }
}
