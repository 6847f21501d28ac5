use std::path::Path;

use serde_json::{Map, Value};

use super::FileError;
use super::families::Family;
use crate::Partition;

/// What config.json says about the attention of a model. Transformers 4 and 5 are both understood.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// `model_type`.
    pub model_type: String,
    /// Layers, L.
    pub n_layers: usize,
    /// Width of the model, d.
    pub hidden: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// KV heads of a layer, H; divides the query heads.
    pub kv_heads: usize,
    /// Dimensions of a head, h; even.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the output embedding is the input embedding.
    pub tie_word_embeddings: bool,
    /// All of config.json, in its order.
    pub raw: Map<String, Value>,
}

/// Reads the values of one config.json; `null` is as good as missing.
struct Reader<'a> {
    path: &'a Path,
    raw: &'a Map<String, Value>,
}

impl Config {
    pub(super) fn parse(path: &Path, text: &[u8]) -> Result<(Self, &'static Family), FileError> {
        let raw: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|source| FileError::Json { path: path.to_path_buf(), source })?;
        let read = Reader { path, raw: &raw };
        let model_type = match read.get("model_type") {
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(read.wrong("model_type", "a string", other)),
            None => return Err(read.missing("model_type")),
        };
        let Some(family) = Family::of(&model_type) else {
            let hint = format!("supported are {}", Family::names());
            return Err(read.unsupported(format!("model_type {model_type:?}"), hint));
        };
        if read.get("quantization_config").is_some() {
            let hint = "convert the model before it is quantised".to_string();
            return Err(read.unsupported("a quantised model (`quantization_config`)".to_string(), hint));
        }
        if let Some(factor) = read.rope("partial_rotary_factor").filter(|f| f.as_f64() != Some(1.0)) {
            let hint = "all dimensions of a head must turn".to_string();
            return Err(
                read.unsupported(format!("a partial rotation (`partial_rotary_factor` {factor})"), hint)
            );
        }

        let n_layers = read.required("num_hidden_layers")?;
        let hidden = read.required("hidden_size")?;
        let query_heads = read.required("num_attention_heads")?;
        // As transformers has it: an absent key takes the family's default, an explicit null the query heads.
        let kv_heads = match raw.get("num_key_value_heads") {
            None => (family.default_kv_heads)(query_heads),
            Some(Value::Null) => query_heads,
            Some(_) => read.required("num_key_value_heads")?,
        };
        if query_heads % kv_heads != 0 {
            let expected = format!("a divisor of the {query_heads} query heads (`num_attention_heads`)");
            return Err(read.wrong("num_key_value_heads", expected, kv_heads));
        }
        if kv_heads > Partition::MAX_HEADS {
            return Err(read.wrong(
                "num_key_value_heads",
                format!("at most {}", Partition::MAX_HEADS),
                kv_heads,
            ));
        }
        let head_dim = match read.count("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden % query_heads == 0 => hidden / query_heads,
            None => {
                let expected =
                    format!("a multiple of the {query_heads} query heads where `head_dim` is not given");
                return Err(read.wrong("hidden_size", expected, hidden));
            }
        };
        if head_dim % 2 != 0 || query_heads.checked_mul(head_dim).is_none() {
            return Err(read.wrong("head_dim", "an even number of dimensions", head_dim));
        }
        let rope_theta = match read.rope("rope_theta") {
            None => 10_000.0,
            Some(theta) => match theta.as_f64() {
                Some(number) if number > 0.0 && number.is_finite() => number,
                _ => return Err(read.wrong("rope_theta", "a number above 0", theta)),
            },
        };
        let tie_word_embeddings = match read.get("tie_word_embeddings") {
            None => false,
            Some(Value::Bool(tied)) => *tied,
            Some(other) => return Err(read.wrong("tie_word_embeddings", "true or false", other)),
        };
        let config = Self {
            model_type,
            n_layers,
            hidden,
            query_heads,
            kv_heads,
            head_dim,
            rope_theta,
            tie_word_embeddings,
            raw,
        };
        Ok((config, family))
    }

    /// Query heads of each KV head, r.
    pub fn queries_per_head(&self) -> usize {
        self.query_heads / self.kv_heads
    }
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|v| !v.is_null())
    }

    /// A value at top level (transformers 4) or in `rope_parameters` (transformers 5).
    fn rope(&self, key: &str) -> Option<&Value> {
        let nested = || self.get("rope_parameters")?.get(key).filter(|v| !v.is_null());
        self.get(key).or_else(nested)
    }

    /// A number from 1 on, where it is given.
    fn count(&self, key: &'static str) -> Result<Option<usize>, FileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        number.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 1 on", value))
    }

    fn required(&self, key: &'static str) -> Result<usize, FileError> {
        self.count(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &'static str) -> FileError {
        FileError::ConfigMissing { path: self.path.to_path_buf(), key }
    }

    fn wrong(&self, key: &'static str, expected: impl Into<String>, found: impl ToString) -> FileError {
        let (expected, found) = (expected.into(), found.to_string());
        FileError::ConfigValue { path: self.path.to_path_buf(), key, expected, found }
    }

    fn unsupported(&self, what: String, hint: String) -> FileError {
        FileError::Unsupported { path: self.path.to_path_buf(), what, hint }
    }
}
