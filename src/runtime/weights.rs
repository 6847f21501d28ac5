//! The weights of an attention layer, taken out, changed and put back.

use candle_core::{Result as Candle, Tensor};
use ndarray::{Array1, Array2, Array3};

use super::aside::Own;
use super::attention::Attention;
use super::backward::Backward;
use super::ops::{combined, times};
use super::{Model, Pass, RuntimeError};
use crate::error::Error;
use crate::heads::{Pooled, Projection};

/// The weights of an attention layer, or their gradients, in the order in which [`Attention`] has its heads: queries
/// (n_q·h, d), keys and values (k·h, d), outputs (d, n_q·h), then the biases that there are.
#[derive(Debug, Clone)]
pub(crate) struct AttentionWeights {
    pub(crate) matrices: [Tensor; 4],
    pub(crate) biases: [Option<Tensor>; 4],
    /// Width of a head, h.
    pub(crate) head_dim: usize,
}

impl AttentionWeights {
    /// All tensors: the matrices, then the biases that there are.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.matrices.iter().chain(self.biases.iter().flatten())
    }

    /// Other tensors in the places of these, one for each, in the order of [`AttentionWeights::tensors`].
    pub(crate) fn map<E>(&self, mut other: impl FnMut(&Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        let [q, k, v, o] = &self.matrices;
        let matrices = [other(q)?, other(k)?, other(v)?, other(o)?];
        let mut bias = |of: &Option<Tensor>| of.as_ref().map(&mut other).transpose();
        let [q, k, v, o] = &self.biases;
        let biases = [bias(q)?, bias(k)?, bias(v)?, bias(o)?];
        Ok(Self { matrices, biases, head_dim: self.head_dim })
    }

    /// All of them added up, one after the other; `None` of none.
    pub(crate) fn sum(all: Vec<Self>) -> Candle<Option<Self>> {
        let mut all = all.into_iter();
        let first = all.next();
        first.map(|first| all.try_fold(first, |sum, more| sum.plus(&more))).transpose()
    }

    /// These and others, added up.
    pub(crate) fn plus(&self, others: &Self) -> Candle<Self> {
        let mut others = others.tensors();
        self.map(|own| others.next().map_or(Ok(own.clone()), |other| combined(own, 1.0, other, 1.0)))
    }
}

impl Attention {
    /// The weights, without the scale of the scores.
    fn weights(&self) -> Candle<AttentionWeights> {
        self.parted(&self.qkv, &self.output, self.bias.as_ref(), self.output_bias.clone(), self.scale.recip())
    }

    /// Numbers that lie as the weights do, taken apart; those of queries are multiplied by `factor`.
    pub(super) fn parted(
        &self,
        qkv: &Tensor,
        output: &Tensor,
        bias: Option<&Tensor>,
        output_bias: Option<Tensor>,
        factor: f64,
    ) -> Candle<AttentionWeights> {
        let (n_q, k, h) = (self.query_heads, self.kv_heads, self.head_dim);
        let parts = [(0, n_q, factor), (n_q, k, 1.0), (n_q + k, k, 1.0)];
        let part = |of: &Tensor, (first, heads, factor): (usize, usize, f64)| {
            times(of.narrow(0, first * h, heads * h)?, factor)
        };
        let [q, key, v] = parts.map(|at| part(qkv, at));
        let of_bias = |i: usize| bias.filter(|_| self.biased[i]).map(|b| part(b, parts[i])).transpose();
        let biases = [of_bias(0)?, of_bias(1)?, of_bias(2)?, output_bias];
        Ok(AttentionWeights { matrices: [q?, key?, v?, output.clone()], biases, head_dim: h })
    }

    /// This attention with other weights.
    fn with_weights(&self, weights: &AttentionWeights) -> Candle<Self> {
        let ([q, k, v, output], [of_q, of_k, of_v, output_bias]) = (&weights.matrices, &weights.biases);
        let qkv = Tensor::cat(&[&times(q.clone(), self.scale)?, k, v], 0)?;
        let bias = match &self.bias {
            None => None,
            Some(bias) => {
                let (queries, keys) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim);
                let or = |own: &Option<Tensor>, first: usize, n: usize, scale: f64| match own {
                    Some(own) => times(own.clone(), scale),
                    None => bias.narrow(0, first, n),
                };
                let parts = [
                    or(of_q, 0, queries, self.scale)?,
                    or(of_k, queries, keys, 1.0)?,
                    or(of_v, queries + keys, keys, 1.0)?,
                ];
                Some(Tensor::cat(&parts, 0)?)
            }
        };
        let mut other = self.clone();
        (other.qkv, other.bias) = (qkv, bias);
        (other.output, other.output_bias) = (output.clone(), output_bias.clone());
        Ok(other)
    }
}

impl Model {
    /// The weights of the attention of layer `i`.
    pub(crate) fn attention_weights(&self, i: usize) -> Result<AttentionWeights, RuntimeError> {
        self.own_keys(i, "taking weights out")?;
        Ok(self.attention(i)?.weights()?)
    }

    /// Puts other weights into the attention of layer `i`.
    pub(crate) fn set_attention_weights(
        &mut self,
        i: usize,
        weights: &AttentionWeights,
    ) -> Result<(), RuntimeError> {
        let attention = self.attention(i)?.with_weights(weights)?;
        self.attention[i] = Some(Own::Held(Box::new(attention)));
        Ok(())
    }

    /// Layer `i`, run backward on what it read, (N, d), from the gradient (N, d) of what it gave.
    pub(crate) fn backward(
        &self,
        i: usize,
        x: &Tensor,
        gradient: &Tensor,
        pass: &Pass,
        weights: bool,
    ) -> Result<Backward, RuntimeError> {
        // What is handed on has gradients from above.
        [i, i + 1].into_iter().try_for_each(|i| self.own_keys(i, "a gradient"))?;
        Ok(self.whole(i)?.backward(i, x, gradient, pass, weights)?)
    }

    /// What the attention of layer `i` reads of `input`, (N, d), before its output projection, (N, n_q·h) in the order of
    /// [`AttentionWeights`], and what it puts out, (N, d).
    pub(crate) fn attention_reads(
        &self,
        i: usize,
        input: &Tensor,
        pass: &Pass,
    ) -> Result<(Tensor, Tensor), RuntimeError> {
        let (kept, output) = self.attention(i)?.kept(input, pass, pass.rope(i))?;
        Ok((kept.heads, output))
    }

    /// The shared heads of layer `i` as they are now, in the order of the source's heads and of the groups.
    pub(crate) fn pooled(&self, i: usize) -> Result<Pooled, RuntimeError> {
        self.laid_out(i, &self.attention_weights(i)?)
    }

    /// Weights of layer `i`, or gradients, in the order of the source's heads and of the groups.
    pub(crate) fn laid_out(&self, i: usize, weights: &AttentionWeights) -> Result<Pooled, RuntimeError> {
        let attention = &self.attention(i)?;
        let h = attention.head_dim;
        let ([q, k, v, output], [of_q, of_k, of_v, of_output]) = (&weights.matrices, &weights.biases);
        let projection = |rows: &Tensor, bias: &Option<Tensor>, order: &[usize]| -> Result<_, RuntimeError> {
            let place = places(order);
            let (rows, bias) = (array2(rows)?, bias.as_ref().map(Tensor::to_vec1::<f32>).transpose()?);
            let shape = (order.len(), h, rows.ncols());
            let weight = Array3::from_shape_fn(shape, |(n, r, c)| rows[[place[n] * h + r, c]]);
            let bias = bias.map(|b| Array2::from_shape_fn((order.len(), h), |(n, r)| b[place[n] * h + r]));
            Ok(Projection::new(weight, bias)?)
        };
        let (columns, place) = (array2(output)?, places(&attention.query_order));
        let shape = (place.len(), columns.nrows(), h);
        let output = Array3::from_shape_fn(shape, |(n, row, c)| columns[[row, place[n] * h + c]]);
        let (groups, queries) = (&attention.kv_order, &attention.query_order);
        let pooled = Pooled::new(projection(k, of_k, groups)?, projection(v, of_v, groups)?);
        let mut pooled = pooled.with_queries(projection(q, of_q, queries)?, output);
        pooled.output_bias = of_output.as_ref().map(|b| b.to_vec1().map(Array1::from_vec)).transpose()?;
        Ok(pooled)
    }
}

/// Of each number in `order` where it stands.
fn places(order: &[usize]) -> Vec<usize> {
    let mut places = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &n)| places[n] = place);
    places
}

fn array2(matrix: &Tensor) -> Result<Array2<f32>, RuntimeError> {
    let numbers = matrix.contiguous()?.flatten_all()?.to_vec1()?;
    Ok(Array2::from_shape_vec(matrix.dims2()?, numbers).map_err(Error::plugin)?)
}
