use super::llama::{self, Biases, Defaults};
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Architecture, Mask};

/// Mistral: as Llama, but 8 KV heads unless config.json says otherwise, and a window of 4096 tokens unless it is null.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mistral;

impl Family for Mistral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mistral"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        const KEY: &str = "sliding_window";
        let mask = match config.raw().get(KEY) {
            Some(value) if value.is_null() => Mask::Causal,
            _ => Mask::Sliding { window: config.count(KEY)?.unwrap_or(4096) },
        };
        let biases = Biases { queries_keys_values: false, outputs: false, mlp: false };
        llama::describe(config, tensors, Defaults { kv_heads: Some(8), positions: 131_072, biases }, Ok(mask))
    }
}
