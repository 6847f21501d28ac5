use std::path::PathBuf;

use crate::error::Error;
use crate::files::FileError;
use crate::run::Device;

/// What can go wrong when a model is run: one variant for each rule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// A text is not UTF-8.
    #[error("{}: not UTF-8 at byte {at}; convert the text (token ids are accepted instead)", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Where it stops being UTF-8.
        at: usize,
    },
    /// A text has fewer tokens than one window.
    #[error("the text has {found} tokens, but one window takes {needed}; give a longer text")]
    TextTooShort {
        /// Tokens of the text.
        found: usize,
        /// Tokens of a window.
        needed: usize,
    },
    /// What is wrong with one of several texts.
    #[error("{name}: {source}")]
    InText {
        /// The text.
        name: String,
        /// What is wrong.
        source: Box<RuntimeError>,
    },
    /// A text that says nothing new.
    #[error(
        "{name}: it repeats itself or a text before it: of {read} windows read {distinct} {}; give a text that goes on",
        if *distinct == 1 { "is new" } else { "are new" }
    )]
    TextRepeats {
        /// The text.
        name: String,
        /// Windows read.
        read: usize,
        /// Windows among them that differ from all before.
        distinct: usize,
    },
    /// Moments, together with texts or with other moments.
    #[error("{}: holds moments, which stand alone; give them alone, or the texts that they were measured on", path.display())]
    MomentsAmong {
        /// The file of moments.
        path: PathBuf,
    },
    /// Next tokens of a model that predicts none.
    #[error(
        "an encoder predicts no next token: it has no perplexity, no cache and nothing to distil; its hidden states can be compared with its source's"
    )]
    NoPredictions,
    /// A token that the model has no embedding for.
    #[error("token id {id} is not in the model's vocabulary of {vocabulary}; {hint}")]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
        /// What to do instead.
        hint: &'static str,
    },
    /// A file of token ids ends within one.
    #[error("{}: {bytes} bytes are no whole number of {width}-byte token ids (little-endian)", path.display())]
    IdBytes {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: usize,
        /// Bytes of an id.
        width: usize,
    },
    /// A file in which every second token id is 0: of wider ones, read in halves.
    #[error("{}: every second {width}-byte token id is 0, as in wider ids that are read in halves; write ids of {width} bytes, little-endian", path.display())]
    IdWidth {
        /// The file.
        path: PathBuf,
        /// Bytes of an id.
        width: usize,
    },
    /// A text has a token in it that tokenizer.json does not know, and a file beside it does.
    #[error(
        "{}: names the token {token:?}, which is in the text, but tokenizer.json does not have it and would read it as words; save the tokenizer again (save_pretrained)",
        path.display()
    )]
    TokenElsewhere {
        /// The file that names it.
        path: PathBuf,
        /// The token.
        token: String,
    },
    /// A model without tokenizer.json.
    #[error("{} is missing{found}; token ids are accepted instead, u16 or u32, little-endian", path.display())]
    NoTokenizer {
        /// Where it should be.
        path: PathBuf,
        /// What is there of other forms, and what to do; or nothing.
        found: &'static str,
    },
    /// A tokenizer that cannot be read, or that cannot read the text.
    #[error("{}: {source}; token ids are accepted instead, u16 or u32, little-endian", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A line of a file of multiple choice items that is none.
    #[error("{}, line {line}: {rule}", path.display())]
    Choice {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong.
        rule: String,
    },
    /// A model computes NaN or infinities.
    #[error("{what}: NaN or infinite; the weights overflow f32 somewhere in the model")]
    NotFinite {
        /// What was computed.
        what: String,
    },
    /// More tokens than the model has positions for, or rows of different lengths.
    #[error("{found} tokens do not fit: the model takes 1 to {expected} of them in a row")]
    Positions {
        /// The most tokens.
        expected: usize,
        /// Tokens given.
        found: usize,
    },
    /// Models that are compared read different tokens.
    #[error(
        "the source has a vocabulary of {expected} tokens, the model that is compared with it one of {found}; only models of one vocabulary can be compared"
    )]
    Vocabulary {
        /// Tokens of the source.
        expected: usize,
        /// Tokens of the other model.
        found: usize,
    },
    /// A device that is not there, or models that are compared on different ones.
    #[error("cannot run the model on {device}: {reason}")]
    Device {
        /// The device.
        device: Device,
        /// Why not.
        reason: String,
    },
    /// Something is wrong with a file: with the checkpoint, a text, or a file of moments.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tensor library failed.
    #[error("while running the model: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A rule of the library was broken.
    #[error(transparent)]
    Core(#[from] Error),
}

impl From<RuntimeError> for Error {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::Core(error) => error,
            RuntimeError::File(error) => error.into(),
            error => Self::plugin(error),
        }
    }
}
