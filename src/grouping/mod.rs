//! Rules that form groups without a search: the baselines.

mod dynamic_key_norm;
mod key_norm;
mod uniform;

use std::fmt::Debug;

use crate::error::Result;
use crate::heads::{Heads, Needs};
use crate::partition::Partition;
use crate::spec::{Registry, Spec};

pub use dynamic_key_norm::DynamicKeyNorm;
pub use key_norm::KeyNorm;
pub use uniform::UniformGqa;

/// The rules of this crate by name.
pub static GROUPINGS: Registry<dyn Grouping> = Registry::new(
    "grouping",
    &[
        ("uniform", |spec| spec.only(&[]).map(|()| Box::new(UniformGqa) as _)),
        ("key-norm", |spec| spec.only(&[]).map(|()| Box::new(KeyNorm) as _)),
        ("key-norm-ema", |spec| Ok(Box::new(DynamicKeyNorm::from_spec(spec)?))),
    ],
);

/// A rule that puts the KV heads of one layer into k groups.
pub trait Grouping: Debug + Send + Sync {
    /// Its name and settings, as plans record them.
    fn spec(&self) -> Spec;

    /// The partition into k groups; `None` where the rule has no such partition.
    ///
    /// # Errors
    /// [`Error::GroupCount`](crate::Error::GroupCount) for k outside `1..=H`.
    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>>;

    /// What it makes use of besides keys and values.
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }
}
