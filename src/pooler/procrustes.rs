use super::KvPooler;
use crate::error::Result;
use crate::heads::{Heads, Needs, Pooled};
use crate::low_rank::{self, Metric, SharedGroup, pool_groups};
use crate::partition::Partition;
use crate::spec::Spec;

/// The mean of a group's heads after turning them towards one another: orthogonal alignment (Schönemann 1966,
/// doi:10.1007/BF02289451; of several at once, Gower 1975, doi:10.1007/BF02291478), as published for merging attention
/// heads (arXiv 2412.20677).
///
/// Values turn by any orthogonal map, which the output undoes; keys by one phase for each rotated frequency, and by any
/// orthogonal map where nothing rotates, which the query undoes. How well heads agree is measured under the moment that
/// the layer carries, or C = I. The published alternative to [`LowRankPooler`](super::LowRankPooler), which may also
/// stretch and weighs heads by who reads them.
///
/// # Errors
/// As [`LowRankPooler`](super::LowRankPooler).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcrustesPooler {
    /// Rounds in which each head in turn is aligned with the mean of the others.
    pub rounds: usize,
    /// As [`LowRankPooler::ridge`](super::LowRankPooler::ridge).
    pub ridge: f64,
}

impl Default for ProcrustesPooler {
    fn default() -> Self {
        Self { rounds: 8, ridge: low_rank::RIDGE }
    }
}

impl ProcrustesPooler {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["rounds", "ridge"])?;
        let own = Self::default();
        Ok(Self {
            rounds: spec.count("rounds")?.unwrap_or(own.rounds),
            ridge: spec.number("ridge")?.unwrap_or(own.ridge),
        })
    }
}

impl KvPooler for ProcrustesPooler {
    fn spec(&self) -> Spec {
        Spec::new("procrustes").with("rounds", self.rounds).with("ridge", self.ridge)
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
            let value = values.align(members, self.rounds)?;
            let (rotated, unrotated) = keys.align(members, self.rounds)?;
            Ok(SharedGroup::new(value, rotated, unrotated))
        };
        partitions.iter().map(|partition| pool_groups(heads, partition, &metric, share)).collect()
    }
}
