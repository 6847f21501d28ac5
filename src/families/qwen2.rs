use super::llama::{self, Biases, Defaults, sliding_layers, window};
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Architecture, Mask};

/// Qwen1.5 and Qwen2: as Llama, with biases on query, key and value, 32 KV heads unless config.json says otherwise, and a window
/// in some layers where it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qwen2;

impl Family for Qwen2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        const KEY: &str = "sliding_window";
        let none = config.raw().get(KEY).is_some_and(|value| value.is_null());
        let used = config.flag("use_sliding_window")? && !none;
        // Those from this one on, unless the types of all are given.
        let first = config.index("max_window_layers")?.unwrap_or(28);
        let layers = sliding_layers(config)?;
        let slides = |layer: usize| match &layers {
            Some(layers) => layers.get(layer).copied().unwrap_or(false),
            None => used && layer >= first,
        };
        if layers.as_ref().is_some_and(|layers| layers.contains(&true)) && !used {
            let expected = "true beside a `sliding_window` where `layer_types` has sliding layers";
            return Err(config.wrong("use_sliding_window", expected, "no such thing"));
        }
        let window = if used { window(config)? } else { usize::MAX };
        let mask = |layer| if slides(layer) { Mask::Sliding { window } } else { Mask::Causal };
        let biases = Biases { queries_keys_values: true, outputs: false, mlp: false };
        llama::describe(config, tensors, Defaults { kv_heads: Some(32), positions: 32_768, biases }, &mask)
    }
}
