//! Rules that merge the KV heads of a layer.

mod first;
#[cfg(feature = "linalg")]
mod low_rank;
mod mean;
#[cfg(feature = "linalg")]
mod procrustes;

use std::fmt::Debug;
use std::sync::Arc;

use ndarray::{Array2, Array3};

use crate::error::{Error, Result};
use crate::heads::{Heads, Needs, Pooled, Projection};
use crate::partition::Partition;
use crate::spec::{Registry, Spec};

pub use first::FirstHead;
#[cfg(feature = "linalg")]
pub use low_rank::LowRankPooler;
pub use mean::MeanPooler;
#[cfg(feature = "linalg")]
pub use procrustes::ProcrustesPooler;

/// The poolers of this crate by name: those that a plan can ask for.
pub static POOLERS: Registry<dyn KvPooler> = Registry::new(
    "pooler",
    &[
        ("mean", |spec| spec.only(&[]).map(|()| Box::new(MeanPooler) as _)),
        ("first", |spec| spec.only(&[]).map(|()| Box::new(FirstHead) as _)),
        #[cfg(feature = "linalg")]
        ("procrustes", |spec| Ok(Box::new(ProcrustesPooler::from_spec(spec)?))),
        #[cfg(feature = "linalg")]
        ("low-rank", |spec| Ok(Box::new(LowRankPooler::from_spec(spec)?))),
    ],
);

/// A rule that merges the KV heads of one layer, group by group.
///
/// Pooling is per layer, so that what a layer needs once is computed once.
pub trait KvPooler: Debug + Send + Sync {
    /// Its name and settings, as plans record them and [`POOLERS`] makes it again.
    fn spec(&self) -> Spec;

    /// What it makes use of besides keys and values.
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }

    /// The shared heads: row g of key and value belongs to group g.
    ///
    /// # Errors
    /// [`Error::PartitionSize`] when the partition is of another number of heads, and whatever the rule itself
    /// can fail with.
    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled>;

    /// The shared heads of several partitions, as [`KvPooler::pool`] makes them one by one: what they have in common can be
    /// computed once.
    ///
    /// # Errors
    /// As [`KvPooler::pool`].
    fn pool_each(&self, heads: &Heads, partitions: &[&Partition]) -> Result<Vec<Pooled>> {
        partitions.iter().map(|partition| self.pool(heads, partition)).collect()
    }
}

impl<P: KvPooler + ?Sized> KvPooler for Arc<P> {
    fn spec(&self) -> Spec {
        (**self).spec()
    }

    fn needs(&self) -> Needs {
        (**self).needs()
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        (**self).pool(heads, partition)
    }

    fn pool_each(&self, heads: &Heads, partitions: &[&Partition]) -> Result<Vec<Pooled>> {
        (**self).pool_each(heads, partitions)
    }
}

/// Pools keys and values head by head with one linear rule; the query side stays.
///
/// `merge(rows, out)` writes the shared row of a group, given the same row of all its members.
fn pool_rows(heads: &Heads, partition: &Partition, merge: impl Fn(&[&[f32]], &mut [f32])) -> Result<Pooled> {
    if partition.n_heads() != heads.n_heads() {
        return Err(Error::PartitionSize { expected: heads.n_heads(), found: partition.n_heads() });
    }
    let groups = partition.groups();
    let pool = |projection: &Projection| -> Result<Projection> {
        let (_, h, d) = projection.weight().dim();
        let weight = pool_flat(projection.weight_slice(), h * d, &groups, &merge);
        let bias = projection.bias_slice().map(|b| pool_flat(b, h, &groups, &merge));
        let shaped = |e: ndarray::ShapeError| Error::plugin(e);
        Projection::new(
            Array3::from_shape_vec((groups.len(), h, d), weight).map_err(shaped)?,
            bias.map(|b| Array2::from_shape_vec((groups.len(), h), b)).transpose().map_err(shaped)?,
        )
    };
    Ok(Pooled::new(pool(heads.key())?, pool(heads.value())?))
}

fn pool_flat(
    rows: &[f32],
    row_len: usize,
    groups: &[Vec<usize>],
    merge: impl Fn(&[&[f32]], &mut [f32]),
) -> Vec<f32> {
    let mut pooled = vec![0.0; groups.len() * row_len];
    for (group, out) in groups.iter().zip(pooled.chunks_exact_mut(row_len)) {
        let members: Vec<_> = group.iter().map(|&i| &rows[i * row_len..][..row_len]).collect();
        merge(&members, out);
    }
    pooled
}
