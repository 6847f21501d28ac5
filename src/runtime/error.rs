use std::path::{Path, PathBuf};

use crate::checkpoint::FileError;

/// What can go wrong when a model is run: one variant for each rule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A text is not UTF-8.
    #[error("{}: not UTF-8 at byte {at}; convert the text, or give token ids (`--ids FILE` of eval, compare and calibrate)", path.display())]
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
    /// A model without tokenizer.json.
    #[error("{} is missing; token ids are accepted instead (`--ids FILE` of eval, compare and calibrate), u16 or u32, little-endian", path.display())]
    NoTokenizer {
        /// Where it should be.
        path: PathBuf,
    },
    /// A tokenizer that cannot be read, or that cannot read the text.
    #[error("{}: {source}; token ids are accepted instead (`--ids FILE` of eval, compare and calibrate), u16 or u32, little-endian", path.display())]
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
    /// A file of moments that is not one.
    #[error("{}: not a whole safetensors file: {source}; make it again with `qcqa calibrate`", path.display())]
    MomentsHeader {
        /// The file.
        path: PathBuf,
        /// What the header breaks.
        source: safetensors::SafeTensorError,
    },
    /// A tensor of a file of moments is missing, or of another type or shape.
    #[error("{}: tensor {tensor} must be {expected}, found {found}", path.display())]
    MomentsTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Type and shape.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A matrix that is no second moment.
    #[error("{}: tensor {tensor} {rule}; make it again with `qcqa calibrate`", path.display())]
    MomentsValue {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// Moments of another model.
    #[error(
        "the moments are of another model: {what} is {found}, this model's is {expected}; calibrate this one"
    )]
    MomentsModel {
        /// What differs.
        what: &'static str,
        /// Of the model at hand.
        expected: String,
        /// Of the moments.
        found: String,
    },
    /// A plan and the calibration given with it do not belong together.
    #[error("the plan was made {}; {}", made_from(expected, found), way_out(expected, found))]
    PlanCalibration {
        /// Fingerprint of the calibration that the plan was made with; `None` for weights alone.
        expected: Option<String>,
        /// Fingerprint of the calibration given.
        found: Option<String>,
    },
    /// A rule of the checkpoint was broken.
    #[error(transparent)]
    Checkpoint(#[from] FileError),
    /// The tensor library failed.
    #[error("while running the model: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A rule of the library was broken.
    #[error(transparent)]
    Core(#[from] crate::Error),
}

fn made_from(expected: &Option<String>, found: &Option<String>) -> String {
    match (expected, found) {
        (Some(expected), Some(found)) => format!("with the calibration {expected}, but {found} was given"),
        (Some(expected), None) => format!("with the calibration {expected}, but none was given"),
        (None, _) => "from weights alone, but a calibration was given".to_string(),
    }
}

fn way_out(expected: &Option<String>, found: &Option<String>) -> &'static str {
    match (expected, found) {
        (Some(_), Some(_)) => {
            "give the text that it was made with, read to as many windows (`--calibration-windows`), or its moments, or \
             search again with this one"
        }
        (Some(_), None) => "give that text or its moments with `--calibration FILE`",
        (None, _) => "leave `--calibration` out, or search again with it",
    }
}

impl RuntimeError {
    pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

impl From<RuntimeError> for crate::Error {
    fn from(error: RuntimeError) -> Self {
        match error {
            RuntimeError::Core(error) => error,
            RuntimeError::Checkpoint(error) => error.into(),
            error => Self::plugin(error),
        }
    }
}
