use super::decoder::Decoder;
use super::kinds::{window, windows};
use super::names::only;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture};

/// Mistral, Nemo, Small, and the text part of Small 3.1: as Llama, but 8 KV heads unless config.json says otherwise, and a window of 4096 tokens unless it is
/// null or `layer_types` say where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mistral;

impl Family for Mistral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mistral", "mistral3"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        // With pictures the text part has a configuration of its own.
        let (inner, whole) = (config.inner("text_config"), config);
        let (config, nested) = (inner.as_ref().unwrap_or(whole), inner.is_some());
        only(config, nested, "mistral")?;
        let window = window(config, 4096)?;
        let layers = windows(config, tensors, window, |_| true)?;
        let mut decoder = Decoder { kv_heads: Some(8), layers, ..Decoder::llama(config, tensors) };
        if nested {
            decoder = decoder.within(whole);
        }
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder.with_rope(|rope| rope.positions = 131_072).architecture()
    }
}
