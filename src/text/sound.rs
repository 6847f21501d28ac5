//! What the library that reads tokenizer.json takes for granted, and panics where it is not so.

use std::path::Path;

use serde_json::Value;

use crate::error::shown;
use crate::files::FileError;

/// Checks that a tokenizer is JSON, that merges make tokens, and that templates for one text are made of that text and of tokens that
/// they list.
///
/// # Errors
/// [`FileError::Json`], [`FileError::ConfigValue`].
pub(super) fn check(path: &Path, text: &[u8]) -> Result<(), FileError> {
    // All of it: what is skipped is not looked at.
    let file: Value = serde_json::from_slice(text).map_err(|source| FileError::json(path, text, source))?;
    let wrong = |key, expected: &str, found| FileError::ConfigValue {
        path: path.to_path_buf(),
        key,
        expected: expected.to_string(),
        found,
    };
    if let Some(found) = idle(&file["model"]) {
        return Err(wrong("model.merges", "pairs of tokens that make a token", found));
    }
    match stray(&file["post_processor"]) {
        Some(found) => Err(wrong(
            "post_processor.single",
            "made of sequence A and of tokens in its `special_tokens`",
            found,
        )),
        None => Ok(()),
    }
}

/// A merge that makes no token of the vocabulary.
fn idle(model: &Value) -> Option<String> {
    let vocab = model.get("vocab")?.as_object()?;
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    let pair = |merge: &Value| match merge {
        // As a file of merges begins.
        Value::String(line) if line.starts_with("#version") => None,
        Value::String(pair) => pair.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
        pair => Some((pair.get(0)?.as_str()?.to_string(), pair.get(1)?.as_str()?.to_string())),
    };
    let pairs = model.get("merges")?.as_array()?.iter().filter_map(pair);
    let makes = |(a, b): &(String, String)| {
        let rest = b.strip_prefix(prefix);
        rest.is_some_and(|rest| vocab.contains_key(&format!("{a}{rest}")))
    };
    pairs.into_iter().find(|pair| !makes(pair)).map(|(a, b)| format!("{} and {}", shown(&a), shown(&b)))
}

/// What a template has and should not have.
fn stray(step: &Value) -> Option<String> {
    let listed = |id: &str| step["special_tokens"].get(id).is_some();
    let id = |piece: &Value, kind: &str| Some(piece.get(kind)?.get("id")?.as_str()?.to_string());
    let unlisted = |piece: &Value| {
        let token = id(piece, "SpecialToken").filter(|id| !listed(id));
        token.map(|id| shown(&id)).or_else(|| id(piece, "Sequence").filter(|id| id != "A"))
    };
    let own =
        step.get("single").and_then(Value::as_array).and_then(|pieces| pieces.iter().find_map(unlisted));
    let inner = || step.get("processors")?.as_array()?.iter().find_map(stray);
    own.or_else(inner)
}
