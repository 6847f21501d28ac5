use super::decoder::Decoder;
use super::kinds::windows;
use super::names::Biases;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormOver};

/// Qwen1.5, Qwen2, Qwen2.5: as Llama, with biases on query, key and value, 32 KV heads unless config.json says otherwise, and
/// a window in the upper layers where it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qwen2;

impl Family for Qwen2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biases = Biases { queries_keys_values: true, ..Biases::default() };
        let layers = windows_of(config, tensors)?;
        let decoder = Decoder { kv_heads: Some(32), biases, layers, ..Decoder::llama(config, tensors) };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder.with_rope(|rope| rope.positions = 32_768).architecture()
    }
}

/// Qwen3: as Qwen2, without biases unless config.json asks for them, heads of 128, and a norm on each head's queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qwen3;

impl Family for Qwen3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.flag("attention_bias")?;
        let decoder = Decoder {
            kv_heads: Some(32),
            head_dim: Some(128),
            biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
            layers: windows_of(config, tensors)?,
            head_norms: Some(NormOver::Head),
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder.with_rope(|rope| rope.positions = 32_768).architecture()
    }
}

/// The window of the layers from `max_window_layers` on, where `use_sliding_window`.
fn windows_of(config: &Config, tensors: &dyn TensorIndex) -> Result<super::names::LayerKinds, FileError> {
    let window = match config.flag("use_sliding_window")? {
        false => None,
        true => config.count("sliding_window")?.or(match config.raw().contains_key("sliding_window") {
            true => None,
            false => Some(4096),
        }),
    };
    let first = config.index("max_window_layers")?.unwrap_or(28);
    windows(config, tensors, window, |layer| layer >= first)
}
