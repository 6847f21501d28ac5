use super::{KvPooler, pool_rows};
use crate::error::Result;
use crate::heads::{Heads, Pooled};
use crate::partition::Partition;
use crate::spec::Spec;

/// The lowest head of each group, unchanged: what is lost without any merging (ablation).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FirstHead;

impl KvPooler for FirstHead {
    fn spec(&self) -> Spec {
        Spec::new("first")
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        pool_rows(heads, partition, |rows, out| out.copy_from_slice(rows[0]))
    }
}
