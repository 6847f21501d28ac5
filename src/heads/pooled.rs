use ndarray::{Array1, Array3};

use super::{Heads, Projection};
use crate::error::{Error, Result};
use crate::partition::Partition;

/// What a pooler makes of a layer: k shared heads, and the query side where it changed.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Pooled {
    /// Shared keys, (k, h, d); row g belongs to group g of the partition.
    pub key: Projection,
    /// Shared values, (k, h, d).
    pub value: Projection,
    /// Query heads in the source's order, (H·r, h, d); `None` where unchanged.
    pub query: Option<Projection>,
    /// Output projection in the source's order, (H·r, d, h); `None` where unchanged.
    pub output: Option<Array3<f32>>,
    /// Bias of the output projection, (D); `None` where unchanged.
    pub output_bias: Option<Array1<f32>>,
}

impl Pooled {
    /// Shared keys and values, with nothing else changed.
    pub fn new(key: Projection, value: Projection) -> Self {
        Self { key, value, query: None, output: None, output_bias: None }
    }

    /// Adds query heads (H·r, h, d) and the output projection (H·r, d, h), in the source's order.
    pub fn with_queries(self, query: Projection, output: Array3<f32>) -> Self {
        Self { query: Some(query), output: Some(output), ..self }
    }

    /// Checks that this is what `heads` may become under a partition.
    ///
    /// # Errors
    /// [`Error::PartitionSize`] for a partition of another number of heads, [`Error::Shape`] naming the tensor,
    /// [`Error::NotFinite`].
    pub fn check(&self, heads: &Heads, partition: &Partition) -> Result<()> {
        self.check_kept(heads, partition, partition.n_groups())
    }

    /// As [`Pooled::check`], of k shared heads, of which those beyond the groups are read by another layer.
    pub(crate) fn check_kept(&self, heads: &Heads, partition: &Partition, k: usize) -> Result<()> {
        let (n_heads, h, d) = heads.key().weight().dim();
        if partition.n_heads() != n_heads {
            return Err(Error::PartitionSize { expected: n_heads, found: partition.n_heads() });
        }
        for (what, pooled, source) in
            [("pooled key", &self.key, heads.key()), ("pooled value", &self.value, heads.value())]
        {
            if pooled.weight().dim() != (k, h, d) {
                return Err(Error::shape(what, &[k, h, d], pooled.weight().shape()));
            }
            same_bias(what, pooled, source)?;
            pooled.check_finite(what)?;
        }
        if let (Some(pooled), Some(source)) = (&self.query, heads.query()) {
            if pooled.weight().dim() != source.weight().dim() {
                return Err(Error::shape("pooled query", source.weight().shape(), pooled.weight().shape()));
            }
            same_bias("pooled query", pooled, source)?;
            pooled.check_finite("pooled query")?;
        }
        if let (Some(pooled), Some(source)) = (&self.output, heads.output()) {
            if pooled.dim() != source.dim() {
                return Err(Error::shape("pooled output", source.shape(), pooled.shape()));
            }
            if !pooled.iter().all(|v| v.is_finite()) {
                return Err(Error::NotFinite { what: "pooled output".to_string() });
            }
        }
        if let Some(pooled) = &self.output_bias {
            let expected = heads.output_bias().map_or(0, |bias| bias.len());
            if pooled.len() != expected {
                return Err(Error::shape("pooled output bias", &[expected], pooled.shape()));
            }
            if !pooled.iter().all(|v| v.is_finite()) {
                return Err(Error::NotFinite { what: "pooled output bias".to_string() });
            }
        }
        Ok(())
    }
}

/// A pooled projection has a bias exactly where its source has one.
fn same_bias(what: &str, pooled: &Projection, source: &Projection) -> Result<()> {
    if pooled.bias().is_some() == source.bias().is_some() {
        return Ok(());
    }
    let shape = |p: &Projection| p.bias().map_or(vec![0, 0], |b| b.shape().to_vec());
    Err(Error::shape(format!("{what} bias"), &shape(source), &shape(pooled)))
}
