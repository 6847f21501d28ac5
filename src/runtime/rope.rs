//! Rotary positions.

use candle_core::{D, Device, Tensor};
use candle_nn::rotary_emb;

use crate::model::{Rotary, Rotation};

/// Cosines and sines of a row of positions, (T, dims/2) each; `None` without rotation. Cloning shares them.
#[derive(Debug, Clone)]
pub(crate) struct Rope {
    rotation: Rotation,
    tables: Option<[Tensor; 2]>,
}

impl Rope {
    /// The angles of these positions, ascending, position · frequency, multiplied in f32 as transformers does.
    pub(super) fn new(
        rotary: Option<&Rotary>,
        positions: &[usize],
        device: &Device,
    ) -> candle_core::Result<Self> {
        let Some(rotary) = rotary.filter(|r| r.rotation.dims() > 0) else {
            return Ok(Self { rotation: Rotation::None, tables: None });
        };
        let (rotation, factor) = (rotary.rotation, rotary.factor);
        let frequencies = rotary.frequencies_of(positions.last().map_or(0, |last| last + 1));
        let angle = |&position: &usize| frequencies.iter().map(move |&f| f64::from(position as f32 * f));
        let angles: Vec<f64> = positions.iter().flat_map(angle).collect();
        let table = |turn: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&a| (turn(a) * factor) as f32).collect();
            Tensor::from_vec(values, (positions.len(), rotation.dims() / 2), device)
        };
        Ok(Self { rotation, tables: Some([table(f64::cos)?, table(f64::sin)?]) })
    }

    /// For the tokens at these places of the row alone.
    pub(super) fn at(&self, places: &Tensor) -> candle_core::Result<Self> {
        let of = |[cos, sin]: &[Tensor; 2]| {
            Ok::<_, candle_core::Error>([cos.index_select(places, 0)?, sin.index_select(places, 0)?])
        };
        Ok(Self { rotation: self.rotation, tables: self.tables.as_ref().map(of).transpose()? })
    }

    /// Turns heads (B, n, T, h), contiguous.
    pub(super) fn apply(&self, heads: &Tensor) -> candle_core::Result<Tensor> {
        let Some([cos, sin]) = &self.tables else { return Ok(heads.clone()) };
        self.turn(heads, cos, sin)
    }

    /// Turns them back, as gradients are.
    pub(super) fn apply_back(&self, heads: &Tensor) -> candle_core::Result<Tensor> {
        let Some([cos, sin]) = &self.tables else { return Ok(heads.clone()) };
        self.turn(heads, cos, &sin.neg()?)
    }

    fn turn(&self, heads: &Tensor, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
        let (dims, head_dim) = (self.rotation.dims(), heads.dim(D::Minus1)?);
        let turn = |part: &Tensor| match self.rotation {
            Rotation::Interleaved { .. } => rotary_emb::rope_i(part, cos, sin),
            _ => rotary_emb::rope(part, cos, sin),
        };
        if dims == head_dim {
            return turn(heads);
        }
        let turned = turn(&heads.narrow(D::Minus1, 0, dims)?.contiguous()?)?;
        Tensor::cat(&[&turned, &heads.narrow(D::Minus1, dims, head_dim - dims)?.contiguous()?], D::Minus1)
    }
}
