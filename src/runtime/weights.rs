//! The weights of a layer, taken out, changed and put back.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{Result as Candle, Tensor};
use ndarray::{Array1, Array2, Array3};

use super::attention::Attention;
use super::backward::Backward;
use super::layer::Weights;
use super::ops::{combined, times};
use super::rest::Rest;
use super::trace::Trace;
use super::{Model, Pass, RuntimeError};
use crate::error::{Error, shown};
use crate::heads::{Pooled, Projection};
use crate::model::Block;
use crate::plan::{Others, Trained};
use crate::run::Precision;
use crate::text::forward_of;

/// The weights of a layer that are trained, or their gradients: of the attention, in the order in which [`Attention`] has its heads,
/// queries (n_q·h, d), keys and values (k·h, d), outputs (d, n_q·h), then the biases that there are; then, where all are trained, those
/// of norms and MLP.
#[derive(Debug, Clone)]
pub(crate) struct LayerWeights {
    pub(crate) matrices: [Tensor; 4],
    pub(crate) biases: [Option<Tensor>; 4],
    pub(crate) rest: Vec<Tensor>,
    /// Width of a head, h.
    pub(crate) head_dim: usize,
}

impl LayerWeights {
    /// All tensors: the matrices, then the biases that there are, then the rest.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.matrices.iter().chain(self.biases.iter().flatten()).chain(&self.rest)
    }

    /// How many of these are the attention's.
    pub(crate) fn of_attention(&self) -> usize {
        self.matrices.len() + self.biases.iter().flatten().count()
    }

    /// Other tensors in the places of these, one for each, in the order of [`LayerWeights::tensors`].
    pub(crate) fn map<E>(&self, mut other: impl FnMut(&Tensor) -> Result<Tensor, E>) -> Result<Self, E> {
        let [q, k, v, o] = &self.matrices;
        let matrices = [other(q)?, other(k)?, other(v)?, other(o)?];
        let mut bias = |of: &Option<Tensor>| of.as_ref().map(&mut other).transpose();
        let [q, k, v, o] = &self.biases;
        let biases = [bias(q)?, bias(k)?, bias(v)?, bias(o)?];
        let rest = self.rest.iter().map(other).collect::<Result<_, E>>()?;
        Ok(Self { matrices, biases, rest, head_dim: self.head_dim })
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
    fn weights(&self) -> Candle<LayerWeights> {
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
    ) -> Candle<LayerWeights> {
        let (n_q, k, h) = (self.query_heads, self.kv_heads, self.head_dim);
        let parts = [(0, n_q, factor), (n_q, k, 1.0), (n_q + k, k, 1.0)];
        let part = |of: &Tensor, (first, heads, factor): (usize, usize, f64)| {
            times(of.narrow(0, first * h, heads * h)?, factor)
        };
        let [q, key, v] = parts.map(|at| part(qkv, at));
        let of_bias = |i: usize| bias.filter(|_| self.biased[i]).map(|b| part(b, parts[i])).transpose();
        let biases = [of_bias(0)?, of_bias(1)?, of_bias(2)?, output_bias];
        let matrices = [q?, key?, v?, output.clone()];
        Ok(LayerWeights { matrices, biases, rest: Vec::new(), head_dim: h })
    }

    /// This attention with other weights.
    fn with_weights(&self, weights: &LayerWeights) -> Candle<Self> {
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
    pub(crate) fn attention_weights(&self, i: usize) -> Result<LayerWeights, RuntimeError> {
        self.own_keys(i, "taking weights out")?;
        Ok(self.attention(i)?.weights()?)
    }

    /// The weights of layer `i` that are trained.
    pub(crate) fn trained_weights(&self, i: usize, trained: Trained) -> Result<LayerWeights, RuntimeError> {
        let weights = self.attention_weights(i)?;
        Ok(match trained {
            Trained::Attention => weights,
            Trained::All => LayerWeights { rest: self.rest(i)?.trained(self.block(i)?)?, ..weights },
        })
    }

    /// Puts other weights into layer `i`: into its attention, and where there are more into the rest.
    pub(crate) fn set_weights(&mut self, i: usize, weights: &LayerWeights) -> Result<(), RuntimeError> {
        let attention = self.attention(i)?.with_weights(weights)?;
        self.attention[i] = Some(attention.into());
        if !weights.rest.is_empty() {
            let rest = self.rest(i)?.with_trained(self.block(i)?, &weights.rest);
            self.rest[i] = Some(Arc::new(rest));
        }
        Ok(())
    }

    /// Layer `i`, run backward on what it read, (N, d), and its trace where there is one, from the gradient (N, d) of what it gave.
    pub(crate) fn backward(
        &self,
        i: usize,
        on: (&Tensor, Option<Trace>),
        gradient: &Tensor,
        pass: &Pass,
        trained: Option<Trained>,
    ) -> Result<Backward, RuntimeError> {
        // What is handed on has gradients from above.
        [i, i + 1].into_iter().try_for_each(|i| self.own_keys(i, "a gradient"))?;
        Ok(self.whole(i)?.backward((i, self.block(i)?), on, gradient, pass, trained)?)
    }

    /// What the attention of layer `i` reads of `input`, (N, d), before its output projection, (N, n_q·h) in the order of
    /// [`LayerWeights`], and what it puts out, (N, d).
    pub(crate) fn attention_reads(
        &self,
        i: usize,
        input: &Tensor,
        pass: &Pass,
    ) -> Result<(Tensor, Tensor), RuntimeError> {
        let (kept, output) = self.attention(i)?.kept(input, pass, pass.rope(i))?;
        Ok((kept.heads, output))
    }

    /// What this model has in the place of its checkpoint's norms and MLPs, as files store it, rounded to their types; `None` for
    /// nothing.
    pub(crate) fn stored_rest(&self) -> Result<Option<Others>, RuntimeError> {
        let mut all = Others::new();
        for (i, rest) in self.rest.iter().enumerate() {
            let Some(rest) = rest else { continue };
            for (name, mut numbers) in rest.stored(self.block(i)?, false)? {
                let dtype = self.checkpoint.dtype_of(&name)?;
                numbers.iter_mut().for_each(|number| *number = dtype.round(*number));
                all.insert(name, numbers);
            }
        }
        Ok((!all.is_empty()).then_some(all))
    }

    /// Gradients of what is trained of layer `i` besides its attention, as files store it.
    pub(crate) fn stored_gradients(&self, i: usize, of: &LayerWeights) -> Result<Others, RuntimeError> {
        let block = self.block(i)?;
        self.rest(i)?.with_trained(block, &of.rest).stored(block, true)
    }

    /// This model with other norms and MLPs, as files store them; what is not among them is the checkpoint's.
    pub(super) fn with_rest(mut self, others: &Others) -> Result<Self, RuntimeError> {
        let blocks = &forward_of(&self.checkpoint)?.blocks;
        let known: BTreeSet<&str> = blocks.iter().flat_map(Block::own_tensors).collect();
        if let Some(name) = others.keys().find(|name| !known.contains(name.as_str())) {
            let expected = "one of a layer's norms or of its MLP, which nothing else reads";
            return Err(Error::setting("tensor", shown(name), expected).into());
        }
        for i in 0..self.n_layers() {
            let block = self.block(i)?;
            if !block.own_tensors().iter().any(|name| others.contains_key(*name)) {
                continue;
            }
            let weights = Weights { others: Some(others), ..Weights::of(&self.checkpoint, &self.device) };
            let rest = Rest::load(&weights, block)?;
            let rest = if self.precision == Precision::Bf16 { rest.rounding() } else { rest };
            self.rest[i] = Some(Arc::new(rest));
        }
        Ok(self)
    }

    /// The shared heads of layer `i` as they are now, in the order of the source's heads and of the groups.
    pub(crate) fn pooled(&self, i: usize) -> Result<Pooled, RuntimeError> {
        self.laid_out(i, &self.attention_weights(i)?)
    }

    /// Weights of layer `i`, or gradients, in the order of the source's heads and of the groups.
    pub(crate) fn laid_out(&self, i: usize, weights: &LayerWeights) -> Result<Pooled, RuntimeError> {
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
