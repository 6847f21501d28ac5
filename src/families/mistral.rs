use super::llama::{self, Biases, Defaults, sliding_layers, window};
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Architecture, Mask};

/// Mistral: as Llama, but 8 KV heads unless config.json says otherwise, and a window of 4096 tokens unless it is null or
/// `layer_types` say where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mistral;

impl Family for Mistral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mistral"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        const KEY: &str = "sliding_window";
        let (layers, none) = (sliding_layers(config)?, config.raw().get(KEY).is_some_and(|v| v.is_null()));
        let slides = layers.as_ref().map_or(!none, |layers| layers.contains(&true));
        let sliding = if slides { Mask::Sliding { window: window(config)? } } else { Mask::Causal };
        let mask = |layer: usize| match layers.as_ref().and_then(|layers| layers.get(layer)) {
            Some(false) => Mask::Causal,
            _ => sliding,
        };
        let biases = Biases { queries_keys_values: false, outputs: false, mlp: false };
        llama::describe(config, tensors, Defaults { kv_heads: Some(8), positions: 131_072, biases }, &mask)
    }
}
