use half::{bf16, f16};

use super::RuntimeError;
use crate::checkpoint::{Dtype, FileError};
use crate::heads::{Pooled, Projection};

/// What a pooler made, as it would be stored.
pub(super) fn rounded(pooled: Pooled, dtype: Dtype, layer: usize) -> Result<Pooled, RuntimeError> {
    let round = |what: &str, value: &mut f32| -> Result<(), RuntimeError> {
        let stored = match dtype {
            Dtype::Bf16 => bf16::from_f32(*value).to_f32(),
            Dtype::F16 => f16::from_f32(*value).to_f32(),
            Dtype::F32 => *value,
        };
        if !stored.is_finite() {
            let (tensor, dtype) = (format!("{what} of layer {layer}"), dtype.name());
            return Err(FileError::Overflow { tensor, dtype, value: *value }.into());
        }
        *value = stored;
        Ok(())
    };
    let projection = |what: &str, projection: Projection| -> Result<Projection, RuntimeError> {
        let (mut weight, mut bias) = projection.into_parts();
        weight.iter_mut().chain(bias.iter_mut().flatten()).try_for_each(|value| round(what, value))?;
        Ok(Projection::new(weight, bias)?)
    };
    let Pooled { key, value, query, mut output, mut output_bias } = pooled;
    output.iter_mut().flatten().try_for_each(|value| round("output projection", value))?;
    output_bias.iter_mut().flatten().try_for_each(|value| round("output bias", value))?;
    Ok(Pooled {
        key: projection("keys", key)?,
        value: projection("values", value)?,
        query: query.map(|query| projection("queries", query)).transpose()?,
        output,
        output_bias,
    })
}
