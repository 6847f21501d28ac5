//! The quality that a partition of one layer loses.

mod gram;
#[cfg(feature = "linalg")]
mod low_rank;
mod perturbed;
mod product;
mod weight_sharing;

use std::fmt::Debug;

use ndarray::ArrayView2;

use crate::error::Result;
use crate::heads::{HeadSource, Needs};
use crate::partition::Partition;
use crate::spec::{Registry, Spec};

pub use gram::squared_distances;
#[cfg(feature = "linalg")]
pub use low_rank::{LowRankError, LowRankSharing, Residuals};
pub use perturbed::PerturbedSharing;
pub use weight_sharing::{WeightSharing, WeightSharingError};

/// The fitness functions of this crate by name.
pub static FITNESS: Registry<dyn FitnessKind> = Registry::new(
    "fitness",
    &[
        ("wse", |spec| Ok(Box::new(WeightSharing::from_spec(spec)?))),
        ("pgqa", |spec| Ok(Box::new(PerturbedSharing::from_spec(spec)?))),
        #[cfg(feature = "linalg")]
        ("low-rank", |spec| Ok(Box::new(LowRankSharing::from_spec(spec)?))),
    ],
);

/// The quality lost by a partition of one layer; bound to that layer when it is made.
///
/// Smaller is better; errors are finite and not negative.
pub trait FitnessFn: Debug + Send + Sync {
    /// Number of KV heads of the layer, H.
    fn n_heads(&self) -> usize;

    /// The error of a partition.
    ///
    /// # Errors
    /// [`Error::PartitionSize`](crate::Error::PartitionSize) when it covers another number of heads, and
    /// whatever the fitness itself can fail with.
    fn evaluate(&self, partition: &Partition) -> Result<f64>;

    /// What the error is a share of, in the same unit: makes layers comparable
    /// ([`CostScale::EnergyShare`](crate::allocator::CostScale::EnergyShare)). `None` where there is no such thing.
    fn energy(&self) -> Option<f64> {
        None
    }

    /// The fitness as a sum over groups, where it is one: opens clustering and exact search.
    fn separable(&self) -> Option<&dyn SeparableFitness> {
        None
    }
}

/// A fitness that is a sum of errors of groups.
pub trait SeparableFitness: FitnessFn {
    /// The error of one group; `members` ascending; 0 for a single head. Costly ones memoise behind `&self`.
    ///
    /// # Errors
    /// Whatever the fitness itself can fail with.
    fn group_error(&self, members: &[usize]) -> Result<f64>;

    /// D (H, H), symmetric with a zero diagonal, where `error(g) = Σ_{i,j∈g} D_ij / 2|g|` holds exactly.
    fn pairwise(&self) -> Option<ArrayView2<'_, f64>> {
        None
    }

    /// A D that approximates the error, `error(g) ≈ c_|g| Σ_{i<j∈g} D_ij` with [`proxy_scale`](Self::proxy_scale): good
    /// enough to start a search from.
    fn pairwise_proxy(&self) -> Option<ArrayView2<'_, f64>> {
        self.pairwise()
    }

    /// `c_m` of the proxy for groups of `size` heads, at least 1: `1/m`, as in [`pairwise`](Self::pairwise), where the
    /// error does not grow with the size of groups in another way than distances tell.
    fn proxy_scale(&self, size: usize) -> f64 {
        1.0 / size as f64
    }

    /// What a group of `size` heads costs of the questions that a search may ask: 1 where all are cheap.
    fn group_cost(&self, _size: usize) -> u64 {
        1
    }
}

/// A kind of fitness: makes the [`FitnessFn`] of each layer.
pub trait FitnessKind: Debug + Send + Sync {
    /// Its name and settings, as plans record them.
    fn spec(&self) -> Spec;

    /// The fitness function of a layer.
    ///
    /// # Errors
    /// What reading the layer and the fitness itself can fail with.
    fn of(&self, source: &dyn HeadSource, layer: usize) -> Result<Box<dyn FitnessFn>>;

    /// What it makes use of besides keys and values.
    fn needs(&self) -> Needs;
}
