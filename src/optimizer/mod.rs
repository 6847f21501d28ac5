//! Searches for the best partition of a layer at every number of groups.

mod auto;
mod bounds;
mod exact;
mod local_search;
mod matching;
mod nsga2;

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
pub use local_search::LocalSearch;
pub use nsga2::Nsga2;

/// The optimizers of this crate by name; `ward` is an old name of `local`.
pub static OPTIMIZERS: Registry<dyn Optimizer> = Registry::new(
    "optimizer",
    &[
        ("auto", |spec| Ok(Box::new(Auto::from_spec(spec)?))),
        ("exact", |spec| Ok(Box::new(Exact::from_spec(spec)?))),
        ("local", |spec| Ok(Box::new(LocalSearch::from_spec(spec)?))),
        ("nsga2", |spec| Ok(Box::new(Nsga2::from_spec(spec)?))),
        ("ward", |spec| Ok(Box::new(LocalSearch::from_spec(spec)?))),
    ],
);

/// A search for the best partition of a layer at every number of groups that the space holds.
///
/// An optimizer sees neither tensors nor files: it scores partitions by the fitness and offers them to a
/// front.
///
/// ```
/// use qcqa::{FitnessFn, Optimizer, Result, Run};
/// use qcqa::front::Front;
/// use qcqa::partition::{Partition, SearchSpace};
/// use qcqa::spec::Spec;
///
/// /// Neighbouring heads share, whatever that costs.
/// #[derive(Debug)]
/// struct Neighbours;
///
/// impl Optimizer for Neighbours {
///     fn spec(&self) -> Spec {
///         Spec::new("neighbours")
///     }
///
///     fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, _: Run<'_>) -> Result<Front> {
///         let mut front = Front::new(fitness)?;
///         let n = fitness.n_heads();
///         for k in space.group_counts(n)? {
///             let labels: Vec<usize> = (0..n).map(|head| head * k / n).collect();
///             let partition = Partition::from_labels(&labels)?;
///             front.offer(&partition, fitness.evaluate(&partition)?)?;
///         }
///         Ok(front)
///     }
/// }
/// ```
pub trait Optimizer: Debug + Send + Sync {
    /// Its name and settings, as plans record them.
    fn spec(&self) -> Spec;

    /// The best partition found for each k of the space; k = H, no sharing, always among them.
    ///
    /// A seed gives one front, on any number of threads.
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
