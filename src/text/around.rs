//! What tokenizer.json puts around a text.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::shown;
use crate::files::FileError;

/// Checks that templates for one text are made of that text and of tokens that they list: what reads them takes that for granted.
///
/// # Errors
/// [`FileError::ConfigValue`], [`FileError::Json`].
pub(super) fn check(path: &Path, text: &[u8]) -> Result<(), FileError> {
    #[derive(Deserialize)]
    struct File {
        post_processor: Option<Value>,
    }
    let file: File = serde_json::from_slice(text).map_err(|source| FileError::json(path, text, source))?;
    match file.post_processor.as_ref().and_then(stray) {
        None => Ok(()),
        Some(found) => Err(FileError::ConfigValue {
            path: path.to_path_buf(),
            key: "post_processor.single",
            expected: "made of sequence A and of tokens in its `special_tokens`".to_string(),
            found,
        }),
    }
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
