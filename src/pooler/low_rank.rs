use super::KvPooler;
use crate::error::Result;
use crate::heads::{Heads, Needs, Pooled};
use crate::low_rank::{self, Metric, SharedGroup, pool_groups};
use crate::partition::Partition;
use crate::spec::Spec;

/// The best low-rank fit of each group's heads under the layer's inputs; queries and outputs turn to match.
///
/// A group keeps one value head, the best rank-h approximation of all its `O_i V_i C^½`, and one key head, at every
/// rotated frequency the best rank-1 approximation of its `√w_i κ_i C^½` (docs/method.md, "Low-rank sharing"). What the
/// group loses is [`LowRankError`](crate::fitness::LowRankError). C is the moment that the layer carries; without one inputs are
/// taken as white and the weights alone decide. Shared values, unrotated keys and the keys of each frequency have the root
/// mean square of the members'; groups of one head are copied bit for bit. f64 throughout, rounded once.
///
/// An output bias, where the layer has one, makes up for the mean of what is lost.
///
/// # Errors
/// [`Error::NoQueries`](crate::Error::NoQueries) for a layer without queries and outputs,
/// [`Error::Moment`](crate::Error::Moment) for a moment with negative eigenvalues.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankPooler {
    /// Added to the moment of every input, as a share of their mean square: keeps directions that a short calibration
    /// text never showed.
    pub ridge: f64,
}

impl Default for LowRankPooler {
    fn default() -> Self {
        Self { ridge: low_rank::RIDGE }
    }
}

impl LowRankPooler {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["ridge"])?;
        Ok(Self { ridge: spec.number("ridge")?.unwrap_or(low_rank::RIDGE) })
    }
}

impl KvPooler for LowRankPooler {
    fn spec(&self) -> Spec {
        Spec::new("low-rank").with("ridge", self.ridge)
    }

    fn needs(&self) -> Needs {
        Needs::QUERIES_AND_MOMENT
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        Ok(self.pool_each(heads, &[partition])?.swap_remove(0))
    }

    fn pool_each(&self, heads: &Heads, partitions: &[&Partition]) -> Result<Vec<Pooled>> {
        let metric = Metric::new(heads, self.ridge)?;
        let (values, keys) = (low_rank::values(heads, &metric)?, low_rank::keys(heads, &metric)?);
        let share = |members: &[usize]| {
            let value = values.fit(members)?;
            let (rotated, unrotated) = keys.fit(members)?;
            Ok(SharedGroup::new(value, rotated, unrotated))
        };
        partitions.iter().map(|partition| pool_groups(heads, partition, &metric, share)).collect()
    }
}
