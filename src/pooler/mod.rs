//! Rules that merge the KV heads of a layer.

mod first;
#[cfg(feature = "linalg")]
mod low_rank;
mod mean;
#[cfg(feature = "linalg")]
mod procrustes;

use std::fmt::Debug;

use ndarray::{Array2, Array3};

use crate::{Error, Heads, Partition, Pooled, Projection, Result};

pub use first::FirstHead;
#[cfg(feature = "linalg")]
pub use low_rank::LowRankPooler;
pub use mean::MeanPooler;
#[cfg(feature = "linalg")]
pub use procrustes::ProcrustesPooler;

/// A rule that merges the KV heads of one layer, group by group.
///
/// Pooling is per layer, so that what a layer needs once is computed once.
pub trait KvPooler: Debug + Send + Sync {
    /// The shared heads: row g of key and value belongs to group g.
    ///
    /// # Errors
    /// [`Error::PartitionSize`] when the partition is of another number of heads, and whatever the rule itself
    /// can fail with.
    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled>;
}

/// What makes the shared heads of layer i from its heads, where a [`KvPooler`] alone does not know enough: it adds the
/// moments of the layer's inputs, or hands out what was refitted.
pub type PoolLayer<'a> = dyn Fn(usize, &Heads) -> Result<Pooled> + 'a;

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
    Ok(Pooled {
        key: pool(heads.key())?,
        value: pool(heads.value())?,
        query: None,
        output: None,
        output_bias: None,
    })
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
