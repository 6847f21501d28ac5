//! Rotary positions.

use candle_core::{D, Device, Tensor};
use candle_nn::rotary_emb;

use crate::model::Rotation;

/// Cosines and sines of a row of positions, (T, dims/2) each; `None` without rotation.
#[derive(Debug)]
pub(super) struct Rope {
    rotation: Rotation,
    tables: Option<(Tensor, Tensor)>,
}

impl Rope {
    /// The angles of positions `start..start + len`: position · theta^(−2f/dims), multiplied in f32 as
    /// transformers does.
    pub(super) fn new(rotation: Rotation, theta: f64, start: usize, len: usize) -> candle_core::Result<Self> {
        let dims = rotation.dims();
        if dims == 0 {
            return Ok(Self { rotation, tables: None });
        }
        let frequency = |f: usize| theta.powf(-2.0 * f as f64 / dims as f64) as f32;
        let frequencies: Vec<f32> = (0..dims / 2).map(frequency).collect();
        let angles: Vec<f64> = (start..start + len)
            .flat_map(|position| frequencies.iter().map(move |&f| f64::from(position as f32 * f)))
            .collect();
        let table = |turn: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&a| turn(a) as f32).collect();
            Tensor::from_vec(values, (len, dims / 2), &Device::Cpu)
        };
        Ok(Self { rotation, tables: Some((table(f64::cos)?, table(f64::sin)?)) })
    }

    /// Cosines and sines of every position and frequency, (T, dims/2) each, one row after the other; empty without
    /// rotation.
    pub(super) fn tables(&self) -> candle_core::Result<[Vec<f32>; 2]> {
        let Some((cos, sin)) = &self.tables else { return Ok([Vec::new(), Vec::new()]) };
        Ok([cos.flatten_all()?.to_vec1()?, sin.flatten_all()?.to_vec1()?])
    }

    /// The rotation.
    pub(super) fn rotation(&self) -> Rotation {
        self.rotation
    }

    /// Turns heads (B, n, T, h), contiguous.
    pub(super) fn apply(&self, heads: &Tensor) -> candle_core::Result<Tensor> {
        let Some((cos, sin)) = &self.tables else { return Ok(heads.clone()) };
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
