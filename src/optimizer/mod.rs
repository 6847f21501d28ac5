//! Searches for the best partition of a layer at every number of groups.

mod bounds;
mod exact;
mod local_search;
mod matching;
mod nsga2;

use std::fmt::Debug;

use crate::fitness::FitnessFn;
use crate::{Front, Result, Run, SearchSpace};

#[cfg(feature = "linalg")]
pub use bounds::spectral_bounds;
pub use bounds::{attach_bounds, nearest_bounds};
pub use exact::Exact;
pub use local_search::LocalSearch;
pub use nsga2::Nsga2;

/// A search for the best partition of a layer at every number of groups that the space holds.
pub trait Optimizer: Debug + Send + Sync {
    /// The best partition found for each k of the space; k = H, no sharing, always among them.
    ///
    /// The same seed gives the same front on any number of threads.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for settings out of range,
    /// [`Error::Cancelled`](crate::Error::Cancelled), and whatever the fitness reports.
    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front>;
}
