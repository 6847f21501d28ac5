//! A plan, put on a model that is already there.

use super::attention::Attention;
use super::norms::HeadNorms;
use super::{Model, RuntimeError};
use crate::checkpoint::Dtype;
use crate::error::Error;
use crate::files::FileError;
use crate::heads::{Heads, Pooled, Projection};
use crate::partition::Partition;
use crate::plan::{Layers, SharedHeads, Sharing};
use crate::run::{Run, map_ordered};

/// Layers that are made side by side: what one thread does of one goes on beside what all do of another, and several
/// layers in f64 are in memory; of a model whose weights stay in files one.
const ABREAST: usize = 4;

impl Model {
    /// This model under a plan, with the numbers that a conversion would write: shared heads are rounded to the type of the
    /// stored keys and values. All that the plan leaves is shared with this model.
    ///
    /// # Errors
    /// [`Error::PlanSource`] for a plan of another model; as [`SharedHeads::layer`] and [`Model::with_layer`].
    pub fn with_shared(&self, shared: &SharedHeads<'_>) -> Result<Self, RuntimeError> {
        self.watched_with_shared(shared, Run::new(0))
    }

    /// As [`Model::with_shared`]. Progress is stage `"pool"`.
    pub(crate) fn watched_with_shared(
        &self,
        shared: &SharedHeads<'_>,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        shared.plan().source.check_same(self.id())?;
        let made = |i: usize| {
            let (heads, pooled) = shared.layer(i)?;
            Ok((heads, vec![(shared.sharing(i), pooled)]))
        };
        let model = self.with_each(1, made, run)?.swap_remove(0);
        match shared.others() {
            Some(others) => model.with_rest(others),
            None => Ok(model),
        }
    }

    /// As many models as `made` gives shared heads for a layer. Progress is stage `"pool"`.
    pub(crate) fn with_each<'p>(
        &self,
        models: usize,
        made: impl Fn(usize) -> Result<(Heads, Vec<(Sharing<'p>, Pooled)>), RuntimeError> + Sync + Send,
        run: Run<'_>,
    ) -> Result<Vec<Self>, RuntimeError> {
        let (n, mut all) = (self.n_layers(), vec![self.clone(); models]);
        let abreast = if self.in_files() { 1 } else { ABREAST };
        for first in (0..n).step_by(abreast) {
            run.step("pool", first as u64, n as u64)?;
            let layers = map_ordered(abreast.min(n - first), |layer| {
                let (heads, pooled) = made(first + layer)?;
                let own = |(sharing, pooled)| self.shared_attention(&heads, sharing, pooled);
                pooled.into_iter().map(own).collect::<Result<Vec<_>, RuntimeError>>()
            });
            for (layer, found) in layers.into_iter().enumerate() {
                for (model, attention) in all.iter_mut().zip(found?) {
                    model.attention[first + layer] = Some(attention.into());
                    model.lay_aside(first + layer)?;
                }
            }
        }
        run.step("pool", n as u64, n as u64)?;
        Ok(all)
    }

    /// This model with shared heads in the layer that `heads`, the source's, are of; all other weights are shared with it.
    ///
    /// # Errors
    /// [`Error::NoLayer`]; as [`Pooled::check`]; [`FileError::Overflow`] when a shared value does not fit the stored type.
    pub fn with_layer(
        &self,
        heads: &Heads,
        partition: &Partition,
        pooled: Pooled,
    ) -> Result<Self, RuntimeError> {
        pooled.check(heads, partition)?;
        let attention = self.shared_attention(heads, partition.into(), pooled)?;
        let mut model = self.clone();
        model.attention[heads.layer()] = Some(attention.into());
        Ok(model)
    }

    /// This model with shared heads in the layer that `heads`, the source's, are of, of which the layer above may read some, or which are those of
    /// the layer below.
    pub(crate) fn with_sharing(
        &self,
        heads: &Heads,
        sharing: Sharing<'_>,
        pooled: Pooled,
    ) -> Result<Self, RuntimeError> {
        let mut model = self.clone();
        let attention = self.shared_attention(heads, sharing, pooled)?;
        model.attention[heads.layer()] = Some(attention.into());
        Ok(model)
    }

    /// Takes over layer `i` of another that is made of the same source, in as little memory as layers of this one take.
    pub(crate) fn take_layer(&mut self, other: &Self, i: usize) -> Result<(), RuntimeError> {
        *self = self.with_layer_of(other, i);
        self.lay_aside(i)
    }

    /// This model with layer `i` of another that is made of the same source.
    pub(crate) fn with_layer_of(&self, other: &Self, i: usize) -> Self {
        let mut model = self.clone();
        model.attention[i].clone_from(&other.attention[i]);
        model.rest[i].clone_from(&other.rest[i]);
        model
    }

    /// Whether [`Model::stored_heads`] are what a conversion would write. Not of a model stored in f32: the scale of the scores,
    /// which the queries hold here, costs their last digit; shorter numbers are found again by rounding.
    pub(crate) fn tells_heads(&self) -> bool {
        self.dtype != Dtype::F32
    }

    /// The shared heads of layer `i`, rounded to the type of the stored keys and values.
    pub(crate) fn stored_heads(&self, i: usize) -> Result<Pooled, RuntimeError> {
        Ok(rounded(self.pooled(i)?, self.dtype, i)?)
    }

    fn shared_attention(
        &self,
        heads: &Heads,
        sharing: Sharing<'_>,
        pooled: Pooled,
    ) -> Result<Attention, RuntimeError> {
        let (i, layers) = (heads.layer(), self.n_layers());
        let spec = self.specs.get(i).ok_or(Error::NoLayer { layer: i, layers })?;
        let groups = sharing.groups;
        pooled.check_kept(heads, groups, pooled.key.n_heads().max(groups.n_groups()))?;
        let pooled = rounded(pooled, self.dtype, i)?;
        // Without norms and sinks nothing is read.
        let norms = match spec.norms.iter().all(Option::is_none) && spec.sinks.is_none() {
            true => HeadNorms::default(),
            false => self.shelf.layer(i)?.attention.norms,
        };
        Ok(Attention::new(heads, Some((&pooled, sharing)), spec, norms, &self.device)?)
    }
}

impl Layers for Model {
    fn shared_heads(&self, layer: usize) -> Result<Pooled, Error> {
        Ok(self.stored_heads(layer)?)
    }
}

/// Shared heads as they would be stored.
fn rounded(pooled: Pooled, dtype: Dtype, layer: usize) -> Result<Pooled, FileError> {
    let round = |what: &str, value: &mut f32| -> Result<(), FileError> {
        let stored = dtype.round(*value);
        if !stored.is_finite() {
            let (tensor, dtype) = (format!("{what} of layer {layer}"), dtype.name());
            return Err(FileError::Overflow { tensor, dtype, value: *value });
        }
        *value = stored;
        Ok(())
    };
    let projection = |what: &str, projection: Projection| -> Result<Projection, FileError> {
        let (mut weight, mut bias) = projection.into_parts();
        weight.iter_mut().chain(bias.iter_mut().flatten()).try_for_each(|value| round(what, value))?;
        Ok(Projection::new(weight, bias)?)
    };
    let Pooled { key, value, query, mut output, mut output_bias } = pooled;
    output.iter_mut().flatten().try_for_each(|value| round("output projection", value))?;
    output_bias.iter_mut().flatten().try_for_each(|value| round("output bias", value))?;
    let (key, value) = (projection("keys", key)?, projection("values", value)?);
    let query = query.map(|query| projection("queries", query)).transpose()?;
    Ok(Pooled { key, value, query, output, output_bias })
}
