use std::fmt::Debug;

use super::Config;
use crate::files::FileError;
use crate::model::Architecture;

/// A layout of checkpoints: what makes an [`Architecture`] of a configuration and the names of tensors.
///
/// All that is known of model types, keys of config.json and tensor names is known here. This crate has those of
/// [`FAMILIES`](crate::families::FAMILIES); [`Checkpoint::open_as`](super::Checkpoint::open_as) takes others.
pub trait Family: Debug + Send + Sync {
    /// The `model_type`s that it describes.
    fn model_types(&self) -> &'static [&'static str];

    /// The model, or why it cannot be dealt with. Tensors that the description names are checked afterwards: that they are
    /// there, of that shape, and of a type that can be read.
    ///
    /// # Errors
    /// [`FileError::ConfigMissing`], [`FileError::ConfigValue`], [`FileError::Unsupported`]; [`Config`] words them.
    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError>;
}

/// The tensors of a checkpoint, by name.
pub trait TensorIndex {
    /// The shape of a tensor; `None` where there is none of that name.
    fn shape(&self, name: &str) -> Option<&[usize]>;

    /// All names, sorted.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// Whether two tensors hold the same numbers; as far as it is known: unless said otherwise, whether they have one shape.
    fn equal(&self, a: &str, b: &str) -> bool {
        self.shape(a) == self.shape(b)
    }

    /// The name, where there is such a tensor.
    fn existing(&self, name: String) -> Option<String> {
        self.shape(&name).is_some().then_some(name)
    }
}
