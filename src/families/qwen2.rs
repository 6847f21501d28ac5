use super::llama::{self, Biases, Defaults};
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Architecture, Mask, Unsupported};

/// Qwen1.5 and Qwen2: as Llama, with biases on query, key and value, and 32 KV heads unless config.json says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qwen2;

impl Family for Qwen2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let sliding = config.get("use_sliding_window").and_then(serde_json::Value::as_bool).unwrap_or(false);
        let mask = match sliding {
            true => {
                Err(Unsupported::new("a sliding window in some layers (`use_sliding_window`)", "none is"))
            }
            false => Ok(Mask::Causal),
        };
        let biases = Biases { queries_keys_values: true, outputs: false, mlp: false };
        llama::describe(config, tensors, Defaults { kv_heads: Some(32), positions: 32_768, biases }, mask)
    }
}
