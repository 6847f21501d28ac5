use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::RuntimeError;
use super::load::vocabulary_size;
use crate::checkpoint::Checkpoint;

/// The tokenizer of a model, tokenizer.json.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    path: PathBuf,
    size: usize,
}

impl Vocabulary {
    /// Reads tokenizer.json beside the weights.
    ///
    /// # Errors
    /// [`RuntimeError::NoTokenizer`], [`RuntimeError::Tokenizer`].
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, RuntimeError> {
        let path = checkpoint.path().join("tokenizer.json");
        if !path.is_file() {
            return Err(RuntimeError::NoTokenizer { path });
        }
        let failed = |source| RuntimeError::Tokenizer { path: path.clone(), source };
        let mut tokenizer = Tokenizer::from_file(&path).map_err(failed)?;
        // A whole text is wanted, not what fits a model.
        tokenizer.with_truncation(None).map_err(failed)?.with_padding(None);
        Ok(Self { tokenizer, size: vocabulary_size(checkpoint)?, path })
    }

    /// The tokens of a text, with the special ones that the tokenizer puts around it.
    ///
    /// # Errors
    /// [`RuntimeError::Tokenizer`]; [`RuntimeError::TokenOutOfRange`] when the model has no embedding for one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, RuntimeError> {
        let encoding = self.tokenizer.encode_fast(text, true);
        let encoding =
            encoding.map_err(|source| RuntimeError::Tokenizer { path: self.path.clone(), source })?;
        let ids = encoding.get_ids().to_vec();
        within(&ids, self.size, "tokenizer.json belongs to another model")?;
        Ok(ids)
    }
}

/// Reads a text.
///
/// # Errors
/// [`RuntimeError::Io`], [`RuntimeError::NotUtf8`].
pub fn read_text(path: &Path) -> Result<String, RuntimeError> {
    utf8(path, fs::read(path).map_err(|e| RuntimeError::io("read", path, e))?)
}

/// The text of a file that was read already.
pub(super) fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String, RuntimeError> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        RuntimeError::NotUtf8 { path: path.to_path_buf(), at }
    })
}

/// Bytes of a stored token id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdWidth {
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

impl IdWidth {
    /// Two bytes where they hold every id of the vocabulary, else four: what tokenising scripts write.
    pub fn for_vocabulary(size: usize) -> Self {
        if size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }
}

/// Reads little-endian token ids for a model with a vocabulary of `vocabulary`.
///
/// # Errors
/// [`RuntimeError::Io`], [`RuntimeError::IdBytes`], [`RuntimeError::TokenOutOfRange`].
pub fn read_ids(path: &Path, width: IdWidth, vocabulary: usize) -> Result<Vec<u32>, RuntimeError> {
    let bytes = fs::read(path).map_err(|e| RuntimeError::io("read", path, e))?;
    let width_bytes = if width == IdWidth::U16 { 2 } else { 4 };
    if bytes.len() % width_bytes != 0 {
        let (path, bytes) = (path.to_path_buf(), bytes.len());
        return Err(RuntimeError::IdBytes { path, bytes, width: width_bytes });
    }
    let ids: Vec<u32> = match width {
        IdWidth::U16 => bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect(),
        IdWidth::U32 => bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    };
    within(&ids, vocabulary, "check the width of the ids, u16 or u32")?;
    Ok(ids)
}

pub(super) fn within(ids: &[u32], vocabulary: usize, hint: &'static str) -> Result<(), RuntimeError> {
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        Some(&id) => Err(RuntimeError::TokenOutOfRange { id, vocabulary, hint }),
        None => Ok(()),
    }
}

/// A text in windows of equal length that do not overlap; what is left at the end is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    length: usize,
}

impl Windows {
    /// The windows of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for windows of fewer than 2 tokens, which predict nothing;
    /// [`RuntimeError::TextTooShort`] when there is not one window.
    pub fn new(mut tokens: Vec<u32>, length: usize) -> Result<Self, RuntimeError> {
        if length < 2 {
            let (value, expected) = (length.to_string(), "at least 2 tokens");
            return Err(crate::Error::Setting { name: "window", value, expected }.into());
        }
        if tokens.len() < length {
            return Err(RuntimeError::TextTooShort { found: tokens.len(), needed: length });
        }
        tokens.truncate(tokens.len() / length * length);
        Ok(Self { tokens, length })
    }

    /// The first `n` windows, or all where there are fewer; the first one also for n = 0, as there is no empty text.
    pub fn first(mut self, n: usize) -> Self {
        self.tokens.truncate(n.max(1).saturating_mul(self.length));
        self
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.length
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens of all windows, one after the other.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens of up to `n` windows at a time.
    pub(super) fn batches(&self, n: usize) -> impl ExactSizeIterator<Item = &[u32]> {
        self.tokens.chunks(n * self.length)
    }
}
