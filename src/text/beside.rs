//! What files beside tokenizer.json say of the same tokens, where transformers reads them, too.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use super::RuntimeError;
use crate::files::{FileError, json_where_there, without_mark};

/// A map of tokens is a tenth of it.
const LIMIT: u64 = 64 << 20;
/// Says how a text is read.
const CONFIG: &str = "tokenizer_config.json";
/// Files that name tokens, with what their keys are where those are the tokens themselves.
const NAMING: [(&str, bool); 3] =
    [(CONFIG, false), ("special_tokens_map.json", false), ("added_tokens.json", true)];
/// Tokenizers of transformers that go by their configuration, and not by tokenizer.json, in the space before a text.
const OWN_SPACE: [&str; 2] = ["GPT2Tokenizer", "Qwen2Tokenizer"];

/// Tokens that a file beside tokenizer.json names, and tokenizer.json does not add to its vocabulary.
#[derive(Debug)]
pub(super) struct Elsewhere(Vec<(String, PathBuf)>);

impl Elsewhere {
    /// Reads the files that there are.
    pub(super) fn read(tokenizer: &Tokenizer, file: &Path, text: &[u8]) -> Result<Self, RuntimeError> {
        let mut elsewhere = Vec::new();
        let added = tokenizer.get_added_tokens_decoder();
        for (name, keys) in NAMING {
            let path = file.with_file_name(name);
            let Some(value) = json_where_there(&path, LIMIT)? else { continue };
            let mut tokens = Vec::new();
            match &value {
                Value::Object(map) if keys => tokens.extend(map.keys().cloned()),
                Value::Object(map) => map.iter().for_each(|(key, value)| named(key, value, &mut tokens)),
                _ => {}
            }
            tokens.retain(|token| !token.is_empty() && added.values().all(|known| known.content != *token));
            elsewhere.extend(tokens.into_iter().map(|token| (token, path.clone())));
            if name == CONFIG {
                check_space(&path, &value, text)?;
            }
        }
        Ok(Self(elsewhere))
    }

    /// Checks that a text has none of these tokens, which transformers would take whole.
    pub(super) fn check(&self, text: &str) -> Result<(), RuntimeError> {
        match self.0.iter().find(|(token, _)| text.contains(token.as_str())) {
            None => Ok(()),
            Some((token, path)) => {
                Err(RuntimeError::TokenElsewhere { path: path.clone(), token: token.clone() })
            }
        }
    }
}

/// The tokens that a key of a configuration names.
fn named(key: &str, value: &Value, tokens: &mut Vec<String>) {
    match value {
        _ if key == "added_tokens_decoder" || key.ends_with("_special_tokens") => match value {
            Value::Object(map) => map.values().for_each(|value| tokens.extend(content(value))),
            Value::Array(list) => list.iter().for_each(|value| tokens.extend(content(value))),
            _ => {}
        },
        _ if key.ends_with("_token") => tokens.extend(content(value)),
        _ => {}
    }
}

/// A token as text, or as an object with its content.
fn content(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// Checks that configuration and tokenizer.json agree in whether a text begins with a space that is not its own.
fn check_space(path: &Path, config: &Value, tokenizer: &[u8]) -> Result<(), FileError> {
    const KEY: &str = "add_prefix_space";
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let Ok(tokenizer) = serde_json::from_slice::<Value>(without_mark(tokenizer)) else { return Ok(()) };
    let adds = |pre: &Value| pre.get(KEY).and_then(Value::as_bool);
    let stored = tokenizer
        .get("pre_tokenizer")
        .and_then(|pre| adds(pre).or_else(|| pre.get("pretokenizers")?.as_array()?.iter().find_map(adds)));
    let given = config.get(KEY).and_then(Value::as_bool).unwrap_or(false);
    match stored {
        Some(stored) if stored != given && OWN_SPACE.iter().any(|own| class.starts_with(own)) => {
            let (path, expected) = (path.to_path_buf(), format!("{stored}, as in tokenizer.json"));
            Err(FileError::ConfigValue { path, key: KEY, expected, found: given.to_string() })
        }
        _ => Ok(()),
    }
}
