use serde_json::Value;

use super::decoder::Decoder;
use super::kinds::windows;
use super::names::Biases;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture};

/// SmolLM3: as Llama, but every fourth layer knows no positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmolLm3;

impl Family for SmolLm3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["smollm3"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        const KEY: &str = "no_rope_layers";
        let every = config.count("no_rope_layer_interval")?.unwrap_or(4);
        let listed = match config.get(KEY) {
            None => None,
            Some(value) => match value.as_array().filter(|list| list.iter().all(Value::is_u64)) {
                Some(list) if list.len() >= config.required("num_hidden_layers")? => Some(list),
                _ => return Err(config.wrong(KEY, "a list of 0 and 1, one for each layer", value)),
            },
        };
        let turned = |layer: usize| match listed {
            Some(list) => list.get(layer).and_then(Value::as_u64) != Some(0),
            None => (layer + 1) % every != 0,
        };
        let used = config.flag("use_sliding_window")? || config.get("layer_types").is_some();
        let window = if used { config.count("sliding_window")? } else { None };
        let mut layers = windows(config, tensors, window, |layer| !turned(layer))?;
        layers.turned = (0..layers.windows.len()).map(turned).collect();
        let biased = config.flag("attention_bias")?;
        let mlp = config.flag("mlp_bias")?;
        let decoder = Decoder {
            kv_heads: Some(4),
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp, ..Biases::default() },
            layers,
            tied: true,
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder.with_rope(|rope| (rope.theta, rope.positions) = (2_000_000.0, 32_768)).architecture()
    }
}
