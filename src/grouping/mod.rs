//! Rules that form groups without a search: the baselines.

mod key_norm;
mod uniform;

use std::fmt::Debug;

use crate::{Heads, Partition, Result};

pub use key_norm::KeyNorm;
pub use uniform::UniformGqa;

/// A rule that puts the KV heads of one layer into k groups.
pub trait Grouping: Debug + Send + Sync {
    /// The partition into k groups; `None` where the rule has no such partition.
    ///
    /// # Errors
    /// [`Error::GroupCount`](crate::Error::GroupCount) for k outside `1..=H`.
    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>>;
}
