//! A plan, put on a model that is already there.

use super::attention::Attention;
use super::norms::HeadNorms;
use super::{Model, RuntimeError};
use crate::checkpoint::Dtype;
use crate::error::Error;
use crate::files::FileError;
use crate::heads::{Heads, Pooled, Projection};
use crate::partition::Partition;
use crate::plan::SharedHeads;

impl Model {
    /// This model under a plan, with the numbers that a conversion would write: shared heads are rounded to the type of the
    /// stored keys and values. All that the plan leaves is shared with this model.
    ///
    /// # Errors
    /// [`Error::PlanSource`] for a plan of another model; as [`SharedHeads::layer`] and [`Model::with_layer`].
    pub fn with_shared(&self, shared: &SharedHeads<'_>) -> Result<Self, RuntimeError> {
        shared.plan().source.check_same(self.id())?;
        (0..self.n_layers()).try_fold(self.clone(), |model, i| {
            let (heads, pooled) = shared.layer(i)?;
            model.with_layer(&heads, shared.groups(i), pooled)
        })
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
        let (i, layers) = (heads.layer(), self.n_layers());
        let mut model = self.clone();
        let spec = self.specs.get(i).ok_or(Error::NoLayer { layer: i, layers })?;
        pooled.check(heads, partition)?;
        let pooled = rounded(pooled, self.dtype, i)?;
        // Without norms and sinks nothing is read.
        let norms = match spec.norms.iter().all(Option::is_none) && spec.sinks.is_none() {
            true => HeadNorms::default(),
            false => self.shelf.layer(i)?.attention.norms,
        };
        let shared = Some((&pooled, partition));
        model.attention[i] = Some(Attention::new(heads, shared, spec, norms, &self.device)?);
        Ok(model)
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
