//! What a checkpoint says of its forward pass: read, or refused by name.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::{Device, Tensor};
use serde_json::Value;

use super::RuntimeError;
use crate::checkpoint::{Checkpoint, FileError};

/// Model types whose forward pass this is.
const MODEL_TYPES: &[&str] = &["llama", "mistral", "qwen2"];
const EMBEDDING: &str = "model.embed_tokens.weight";

/// What the forward pass takes from config.json besides the shapes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    /// ε of the RMS norms.
    pub(super) epsilon: f32,
    /// Tokens that the model has positions for.
    pub(super) positions: usize,
    /// Tokens that a token may look back at, itself included; `None`: all.
    pub(super) sliding_window: Option<usize>,
}

impl Settings {
    pub(super) fn read(checkpoint: &Checkpoint) -> Result<Self, RuntimeError> {
        let config = checkpoint.config();
        let model_type = config.model_type.as_str();
        let unsupported = |what: String, hint: &str| -> RuntimeError {
            let path = checkpoint.path().join("config.json");
            FileError::Unsupported { path, what, hint: hint.to_string() }.into()
        };
        if !MODEL_TYPES.contains(&model_type) {
            let what = format!("running model_type {model_type:?}");
            return Err(unsupported(what, &format!("those that can be run are {}", MODEL_TYPES.join(", "))));
        }
        let get = |key: &str| config.raw.get(key).filter(|v| !v.is_null());
        let activation = get("hidden_act").map_or("silu", |v| v.as_str().unwrap_or("?"));
        if !["silu", "swish"].contains(&activation) {
            return Err(unsupported(format!("the activation {activation:?} (`hidden_act`)"), "silu is"));
        }
        for key in ["layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"] {
            if get(key).is_some() && get("rms_norm_eps").is_none() {
                return Err(unsupported(format!("a layer norm (`{key}`)"), "RMS norms (`rms_norm_eps`) are"));
            }
        }
        // Transformers 4 says `rope_scaling`, 5 `rope_parameters`; both name a type.
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(Value::Object(rope)) = get(key) else { continue };
            let kind = rope.get("rope_type").or(rope.get("type")).and_then(Value::as_str);
            let scaled = kind.map_or(key == "rope_scaling", |kind| kind != "default");
            if scaled {
                let what = format!("rope scaling {:?} (`{key}`)", kind.unwrap_or("of no type"));
                return Err(unsupported(what, "models without it are"));
            }
        }
        let number = |key: &'static str, default: u64| -> Result<usize, RuntimeError> {
            let Some(value) = get(key) else { return Ok(default as usize) };
            let found = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
            found.ok_or_else(|| wrong(checkpoint, key, "a whole number from 1 on", value).into())
        };
        let epsilon = match get("rms_norm_eps") {
            None => 1e-6,
            Some(value) => match value.as_f64().filter(|&e| e > 0.0 && e < 1.0) {
                Some(epsilon) => epsilon as f32,
                None => return Err(wrong(checkpoint, "rms_norm_eps", "between 0 and 1", value).into()),
            },
        };
        // Defaults of transformers where a key is absent.
        let (positions, sliding) = match model_type {
            "mistral" => (131_072, config.raw.get("sliding_window").is_none_or(|v| !v.is_null())),
            "qwen2" => (32_768, get("use_sliding_window").and_then(Value::as_bool).unwrap_or(false)),
            _ => (2048, false),
        };
        if sliding && model_type == "qwen2" {
            return Err(unsupported(
                "a sliding window in some layers (`use_sliding_window`)".into(),
                "none is",
            ));
        }
        Ok(Self {
            epsilon,
            positions: number("max_position_embeddings", positions)?,
            sliding_window: if sliding { Some(number("sliding_window", 4096)?) } else { None },
        })
    }
}

fn wrong(checkpoint: &Checkpoint, key: &'static str, expected: &str, found: &Value) -> FileError {
    let (path, expected) = (checkpoint.path().join("config.json"), expected.to_string());
    FileError::ConfigValue { path, key, expected, found: found.to_string() }
}

/// Size of the vocabulary: rows of the input embedding.
pub(super) fn vocabulary_size(checkpoint: &Checkpoint) -> Result<usize, RuntimeError> {
    let config = checkpoint.config();
    match config.raw.get("vocab_size").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()) {
        Some(size) => Ok(size),
        None => Ok(checkpoint.tensor(EMBEDDING)?.shape()[0]),
    }
}

/// The tensors of a checkpoint outside its attention, each to be taken by somebody.
#[derive(Debug)]
pub(super) struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    names: BTreeSet<&'a str>,
    left: RefCell<BTreeSet<&'a str>>,
}

impl<'a> Weights<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint) -> Self {
        let names: BTreeSet<_> = checkpoint.tensor_names().collect();
        Self { checkpoint, left: RefCell::new(names.clone()), names }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// A tensor, of that shape.
    pub(super) fn take(&self, name: &str, shape: &[usize]) -> Result<Tensor, RuntimeError> {
        let array = self.checkpoint.tensor(name)?;
        if array.shape() != shape {
            let (tensor, expected, found) = (name.to_string(), shape.to_vec(), array.shape().to_vec());
            let path = self.checkpoint.path().to_path_buf();
            return Err(FileError::TensorShape { path, tensor, expected, found }.into());
        }
        self.seen(name);
        Ok(Tensor::from_vec(array.into_iter().collect::<Vec<f32>>(), shape, &Device::Cpu)?)
    }

    /// The input embedding, (vocabulary, d).
    pub(super) fn embedding(&self) -> Result<Tensor, RuntimeError> {
        let (rows, hidden) = (vocabulary_size(self.checkpoint)?, self.checkpoint.config().hidden);
        self.take(EMBEDDING, &[rows, hidden])
    }

    /// Rows of a weight: for what config.json need not say.
    pub(super) fn rows(&self, name: &str) -> Result<usize, RuntimeError> {
        Ok(self.checkpoint.tensor(name)?.shape()[0])
    }

    /// A tensor was read in another way.
    pub(super) fn seen(&self, name: &str) {
        self.left.borrow_mut().remove(name);
    }

    /// Checks that nothing is left that would have changed the result.
    pub(super) fn finish(self) -> Result<(), RuntimeError> {
        let left = self.left.into_inner();
        // Frequencies follow from the configuration; a tied output embedding may be stored twice.
        let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
        match left.into_iter().find(|name| !harmless(name)) {
            None => Ok(()),
            Some(name) => {
                let what = if name.contains("norm") { "the norm" } else { "the tensor" };
                let (path, what) = (self.checkpoint.path().to_path_buf(), format!("{what} {name}"));
                let hint = "the forward pass of the Llama family has no place for it".to_string();
                Err(FileError::Unsupported { path, what, hint }.into())
            }
        }
    }
}
