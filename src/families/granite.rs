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
        let number = |key: &'static str| match config.get(key) {
            None => Ok(1.0),
            Some(value) => match value.as_f64().filter(|n| n.is_finite() && *n > 0.0) {
                Some(number) => Ok(number),
                None => Err(config.wrong(key, "a number above 0", value)),
            },
        };
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
