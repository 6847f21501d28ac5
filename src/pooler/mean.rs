use super::{KvPooler, pool_rows};
use crate::error::Result;
use crate::heads::{Heads, Pooled};
use crate::partition::Partition;
use crate::spec::Spec;

/// The mean of a group's keys and of its values: what GQA (arXiv 2305.13245) and QCQA (arXiv 2406.10247) do.
///
/// Summed in f64, rounded once; a group of one head is copied bit for bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MeanPooler;

impl KvPooler for MeanPooler {
    fn spec(&self) -> Spec {
        Spec::new("mean")
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        pool_rows(heads, partition, |rows, out| match rows {
            [alone] => out.copy_from_slice(alone),
            _ => {
                let size = rows.len() as f64;
                for (i, mean) in out.iter_mut().enumerate() {
                    *mean = (rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / size) as f32;
                }
            }
        })
    }
}
