//! Hugging Face model directories: read and checked.
//!
//! [`Checkpoint::open`] maps and checks a directory of a known [family](crate::families); its layers are
//! [`Heads`](crate::heads::Heads) or, without decoding a layer whole, [`HeadRows`](crate::heads::HeadRows). Weights are
//! BF16, F16 or F32.
//!
//! Files are hostile until checked: nothing is allocated from a count that the files do not back.

mod config;
mod dtype;
mod family;
mod layout;
mod lookup;
mod read;
mod rows;
mod shards;

pub use config::Config;
pub use dtype::Dtype;
pub use family::{Family, TensorIndex};
pub use read::Checkpoint;

pub(crate) use layout::columns_of;
pub(crate) use shards::{Entry, INDEX, Shards};

/// The configuration of a model, in its directory.
pub(crate) const CONFIG: &str = "config.json";
