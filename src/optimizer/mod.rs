//! Searches for the best partition of a layer at every number of groups.

mod auto;
mod bounds;
mod exact;
mod matching;
mod nsga2;
mod ward;

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::Result;
use crate::fitness::FitnessFn;
use crate::front::Front;
use crate::partition::SearchSpace;
use crate::run::Run;
use crate::spec::{Registry, Spec};

pub use auto::Auto;
#[cfg(feature = "linalg")]
pub use bounds::spectral_bounds;
pub use bounds::{attach_bounds, nearest_bounds};
pub use exact::Exact;
pub use nsga2::Nsga2;
pub(crate) use nsga2::engine;
pub use ward::Ward;

/// The optimizers of this crate by name; `ward` is an old name of `local`.
pub static OPTIMIZERS: Registry<dyn Optimizer> = Registry::new(
    "optimizer",
    &[
        ("auto", |spec| Ok(Box::new(Auto::from_spec(spec)?))),
        ("exact", |spec| Ok(Box::new(Exact::from_spec(spec)?))),
        ("local", |spec| Ok(Box::new(Ward::from_spec(spec)?))),
        ("nsga2", |spec| Ok(Box::new(Nsga2::from_spec(spec)?))),
        ("ward", |spec| Ok(Box::new(Ward::from_spec(spec)?))),
    ],
);

/// A search for the best partition of a layer at every number of groups that the space holds.
pub trait Optimizer: Debug + Send + Sync {
    /// Its name and settings, as plans record them.
    fn spec(&self) -> Spec;

    /// The best partition found for each k of the space; k = H, no sharing, always among them.
    ///
    /// The same seed gives the same front on any number of threads.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for settings out of range,
    /// [`Error::Cancelled`](crate::Error::Cancelled), and whatever the fitness reports.
    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front>;
}

impl<O: Optimizer + ?Sized> Optimizer for Arc<O> {
    fn spec(&self) -> Spec {
        (**self).spec()
    }

    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front> {
        (**self).optimize(fitness, space, run)
    }
}
