//! How long keys are.

use candle_core::{DType, Tensor};

use super::attention::Attention;
use super::layer::linear;
use super::model::Model;
use crate::text::RuntimeError;

impl Attention {
    /// Inputs (N, d) → squared lengths of the keys as they are projected, (N, k).
    fn key_squares(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (first, rows) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim);
        let part = |of: &Tensor| of.narrow(0, first, rows);
        let keys = linear(x, &part(&self.qkv)?, &self.bias.as_ref().map(part).transpose()?)?;
        keys.sqr()?.reshape((x.dim(0)?, self.kv_heads, self.head_dim))?.sum(2)
    }
}

impl Model {
    /// The mean squared length of every key head of layer `i` over each window of `length` tokens of what its attention reads,
    /// (windows · length, d): a row for each window, as [`KeyEnergies`](crate::heads::KeyEnergies) has it. Products are f32, sums
    /// over tokens f64.
    pub(crate) fn key_energies(
        &self,
        i: usize,
        input: &Tensor,
        length: usize,
    ) -> Result<Vec<Vec<f64>>, RuntimeError> {
        let attention = self.attention(i)?;
        let squares = attention.key_squares(input)?.to_dtype(DType::F64)?;
        let windows = squares.reshape(((), length, attention.kv_heads))?.sum(1)?;
        let mean = |sums: Vec<f64>| {
            let mut row = vec![0.0; sums.len()];
            attention.kv_order.iter().zip(sums).for_each(|(&head, sum)| row[head] = sum / length as f64);
            row
        };
        Ok(windows.to_vec2::<f64>()?.into_iter().map(mean).collect())
    }
}
