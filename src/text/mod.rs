//! Texts: tokenised, or read as token ids, cut into windows, and given [roles](Texts).

mod beside;
mod error;
mod roles;
mod sound;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tokenizers::{Encoding, Tokenizer};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::files::{FileError, fingerprint, is_there, mistaken, no_text, sha256, without_mark};
use crate::heads::HeadSource;
use crate::model::{Forward, ModelId};

use beside::Elsewhere;
pub use error::RuntimeError;
pub use roles::{Text, Texts, WholeText};
pub(crate) use roles::{shared_out, windows_that_fit};

/// The tokenizer of a model, tokenizer.json.
///
/// ```
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::text::Vocabulary;
///
/// let words = Vocabulary::open(&Checkpoint::open("tests/data/novels-1m")?)?;
/// assert!(words.encode("It was a long time before he spoke.")?.iter().all(|&id| id < 1024));
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    path: PathBuf,
    size: usize,
    elsewhere: Elsewhere,
}

impl Vocabulary {
    /// Reads tokenizer.json beside the weights.
    ///
    /// # Errors
    /// [`RuntimeError::NoTokenizer`], [`RuntimeError::Tokenizer`]; [`FileError::ConfigValue`] where tokenizer_config.json has
    /// another text in mind, or merges and templates are of other tokens; [`FileError::Json`]; [`FileError::Unsupported`] for a model that cannot be run.
    pub fn open(checkpoint: &Checkpoint) -> Result<Self, RuntimeError> {
        let size = forward_of(checkpoint)?.vocabulary;
        let path = checkpoint.path().join("tokenizer.json");
        if !is_there(&path)? {
            return Err(RuntimeError::NoTokenizer { found: others(checkpoint.path()), path });
        }
        let failed = |source| RuntimeError::Tokenizer { path: path.clone(), source };
        let text = read_file(&path)?;
        sound::check(&path, without_mark(&text))?;
        let mut tokenizer = Tokenizer::from_bytes(without_mark(&text)).map_err(failed)?;
        // A whole text is wanted, not what fits a model.
        tokenizer.with_truncation(None).map_err(failed)?.with_padding(None);
        let elsewhere = Elsewhere::read(&tokenizer, &path, &text)?;
        Ok(Self { tokenizer, size, path, elsewhere })
    }

    /// The tokens that a text may be made of: all that the model has an embedding and the tokenizer a word for, but those that it
    /// calls special.
    pub fn ordinary(&self) -> Vec<u32> {
        let added = self.tokenizer.get_added_tokens_decoder();
        let special = |id: &u32| added.get(id).is_some_and(|token| token.special);
        let known = |id: &u32| self.tokenizer.id_to_token(*id).is_some();
        (0..self.size as u32).filter(|id| known(id) && !special(id)).collect()
    }

    /// Tokens that are a word, or begin one, of two letters or more with a large first one.
    pub(crate) fn capitalised(&self) -> Result<BTreeSet<u32>, RuntimeError> {
        self.those(|text| {
            let mut letters = text.strip_prefix(' ').unwrap_or(text).chars();
            letters.next().is_some_and(char::is_uppercase)
                && letters.clone().count() > 0
                && letters.all(char::is_alphabetic)
        })
    }

    /// Tokens that end with a small letter.
    pub(crate) fn ending_small(&self) -> Result<BTreeSet<u32>, RuntimeError> {
        self.those(|text| text.chars().next_back().is_some_and(char::is_lowercase))
    }

    /// Ordinary tokens whose text is such.
    fn those(&self, is_such: impl Fn(&str) -> bool) -> Result<BTreeSet<u32>, RuntimeError> {
        let mut such = BTreeSet::new();
        for id in self.ordinary() {
            let text = self.tokenizer.decode(&[id], false);
            if is_such(&text.map_err(|source| RuntimeError::Tokenizer { path: self.path.clone(), source })?) {
                such.insert(id);
            }
        }
        Ok(such)
    }

    /// The tokens of a text, with the special ones that the tokenizer puts around it.
    ///
    /// # Errors
    /// [`RuntimeError::Tokenizer`]; [`RuntimeError::TokenElsewhere`] for a token that only a file beside tokenizer.json names;
    /// [`RuntimeError::TokenOutOfRange`] when the model has no embedding for one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, RuntimeError> {
        self.encoded(text, |encoding| encoding.get_ids().len())
    }

    /// The tokens of a text that goes on: as [`Vocabulary::encode`], without the special ones that the tokenizer puts after it.
    ///
    /// # Errors
    /// As [`Vocabulary::encode`].
    pub fn encode_open(&self, text: &str) -> Result<Vec<u32>, RuntimeError> {
        let added = |encoding: &Encoding| {
            encoding.get_special_tokens_mask().iter().rev().take_while(|&&added| added == 1).count()
        };
        // A text of none has no end.
        self.encoded(text, |encoding| match encoding.get_ids().len() - added(encoding) {
            0 => encoding.get_ids().len(),
            own => own,
        })
    }

    fn encoded(&self, text: &str, count: impl Fn(&Encoding) -> usize) -> Result<Vec<u32>, RuntimeError> {
        self.elsewhere.check(text)?;
        let encoding = self.tokenizer.encode_fast(text, true);
        let encoding =
            encoding.map_err(|source| RuntimeError::Tokenizer { path: self.path.clone(), source })?;
        let ids = encoding.get_ids()[..count(&encoding)].to_vec();
        within(
            &ids,
            self.size,
            "it belongs to another model, or has tokens added that the model has no embedding for",
        )
        .map_err(|error| RuntimeError::InText {
            name: self.path.display().to_string(),
            source: Box::new(error),
        })?;
        Ok(ids)
    }
}

/// Tokenizers in other forms, and what to do with them; or nothing.
fn others(directory: &Path) -> &'static str {
    let is_there = |name: &&&str| directory.join(name).is_file();
    match ["tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"].iter().find(is_there)
    {
        Some(_) => {
            ", but a tokenizer in another form is: save its fast form (save_pretrained of AutoTokenizer does)"
        }
        None => "",
    }
}

/// What a checkpoint's model does besides attention.
///
/// # Errors
/// [`FileError::Unsupported`] for a model that cannot be run.
pub(crate) fn forward_of(checkpoint: &Checkpoint) -> Result<&Forward, FileError> {
    checkpoint.architecture().forward.as_ref().map_err(|unsupported| FileError::Unsupported {
        path: checkpoint.config().path().to_path_buf(),
        unsupported: unsupported.clone(),
    })
}

/// Reads a text.
///
/// # Errors
/// [`FileError::Io`], [`RuntimeError::NotUtf8`].
pub fn read_text(path: &Path) -> Result<String, RuntimeError> {
    utf8(path, read_file(path)?)
}

/// The bytes of a file or a pipe.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, FileError> {
    fs::read(path).map_err(|e| FileError::io("read", path, e))
}

/// The text of a file that was read already, without a byte-order mark.
pub(crate) fn utf8(path: &Path, bytes: Vec<u8>) -> Result<String, RuntimeError> {
    // Of an empty text it is said elsewhere that it is too short.
    if let Some(what) = no_text(&bytes).filter(|_| !bytes.is_empty()) {
        return Err(FileError::Mistaken { path: path.to_path_buf(), what }.into());
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        RuntimeError::NotUtf8 { path: path.to_path_buf(), at }
    })?;
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    Ok(text)
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
/// [`FileError::Io`], [`RuntimeError::IdBytes`], [`RuntimeError::TokenOutOfRange`].
pub fn read_ids(path: &Path, width: IdWidth, vocabulary: usize) -> Result<Vec<u32>, RuntimeError> {
    let bytes = read_file(path)?;
    // Four-byte ids of a small vocabulary look as UTF-16 does.
    if let Some(what) = mistaken(&bytes).filter(|what| what.contains("NumPy")) {
        return Err(FileError::Mistaken { path: path.to_path_buf(), what }.into());
    }
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
    let halves = ids.chunks_exact(2);
    let padded = halves.len() > 8 && halves.remainder().is_empty() && halves.clone().all(|half| half[1] == 0);
    if padded && ids.iter().any(|&id| id != 0) {
        return Err(RuntimeError::IdWidth { path: path.to_path_buf(), width: width_bytes });
    }
    Ok(ids)
}

/// Checks that a model has an embedding for every token.
pub(crate) fn within(ids: &[u32], vocabulary: usize, hint: &'static str) -> Result<(), RuntimeError> {
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        Some(&id) => Err(RuntimeError::TokenOutOfRange { id, vocabulary, hint }),
        None => Ok(()),
    }
}

/// A text in windows of equal length that do not overlap; what is left at the end is dropped.
///
/// ```
/// use qcqa::text::Windows;
///
/// let windows = Windows::new((0..11).collect(), 4)?;
/// assert_eq!((windows.count(), windows.length(), windows.tokens().len()), (2, 4, 8));
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    length: usize,
}

impl Windows {
    /// The windows of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] for windows of fewer than 2 tokens, which predict nothing;
    /// [`RuntimeError::TextTooShort`] when there is not one window.
    pub fn new(mut tokens: Vec<u32>, length: usize) -> Result<Self, RuntimeError> {
        if length < 2 {
            return Err(Error::setting("window", length, "at least 2 tokens").into());
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

    /// `n` windows, spaced over the whole text (window `i·count/n` for each i), or all where there are fewer; the first one also
    /// for n = 0, as there is no empty text.
    pub fn spaced(&self, n: usize) -> Self {
        let (total, length) = (self.count(), self.length);
        let n = n.clamp(1, total);
        let window = |i: usize| &self.tokens[i * total / n * length..][..length];
        Self { tokens: (0..n).flat_map(window).copied().collect(), length }
    }

    /// These windows, each of `length` tokens; `None` of none.
    pub(crate) fn gathered<'w>(windows: impl Iterator<Item = &'w [u32]>, length: usize) -> Option<Self> {
        let tokens = windows.flatten().copied().collect();
        Self::new(tokens, length).ok()
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

    /// What plans call the moments of `model` that are measured on these windows: SHA-256 over the fingerprint of the model,
    /// the length of a window and the token ids (docs/calibration.md).
    pub fn fingerprint(&self, model: &ModelId) -> String {
        fingerprint(self.digest(model))
    }

    pub(crate) fn digest(&self, model: &ModelId) -> [u8; 32] {
        sha256([
            model.fingerprint.clone().unwrap_or_default().into_bytes(),
            (self.length as u64).to_le_bytes().to_vec(),
            self.tokens.iter().flat_map(|t| t.to_le_bytes()).collect(),
        ])
    }

    /// The tokens of up to `n` windows at a time.
    pub(crate) fn batches(&self, n: usize) -> impl ExactSizeIterator<Item = &[u32]> {
        self.tokens.chunks(n * self.length)
    }
}
