//! Families of models: the one place that knows model types, keys of config.json and names of tensors. A new family is a
//! file here and its line in [`FAMILIES`].

mod llama;
mod mistral;
mod qwen2;

use std::path::Path;

use crate::checkpoint::{Checkpoint, Family};
use crate::files::FileError;

pub use llama::Llama;
pub use mistral::Mistral;
pub use qwen2::Qwen2;

/// The families of this crate.
pub static FAMILIES: &[&dyn Family] = &[&Llama, &Mistral, &Qwen2];

impl Checkpoint {
    /// Opens a directory with config.json and model.safetensors, or shards and their index, of one of [`FAMILIES`].
    ///
    /// The files must not be shortened or rewritten while the checkpoint is open.
    ///
    /// ```
    /// use qcqa::checkpoint::Checkpoint;
    /// use qcqa::heads::HeadSource;
    ///
    /// let model = Checkpoint::open("tests/data/novels-1m")?;
    /// assert_eq!(model.architecture().kv_heads(), [8, 8, 8, 8]);
    /// assert_eq!(model.heads(3)?.key().weight().dim(), (8, 16, 128));
    /// # Ok::<(), qcqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Checkpoint::open_as`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FileError> {
        Self::open_as(path, FAMILIES)
    }
}
