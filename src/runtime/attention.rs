//! Attention on the KV heads that are there: query heads are ordered group by group, so that nothing is copied
//! back to the heads of a group.

use candle_core::{Device, Tensor};
use ndarray::Array3;

use super::cache::LayerCache;
use super::ops::{CausalSoftmax, visible};
use super::rope::Rope;
use crate::error::{Error, Result};
use crate::heads::{Heads, Pooled, Projection};
use crate::model::AttentionSpec;
use crate::partition::Partition;

/// Groups of equally many query heads, side by side: one batched product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    groups: usize,
    /// Query heads of each group.
    queries: usize,
}

/// The attention of one layer.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    /// Query heads (times the scale of the scores), then key heads, then value heads: ((n_q + 2k)·h, d).
    qkv: Tensor,
    bias: Option<Tensor>,
    /// (d, n_q·h).
    output: Tensor,
    output_bias: Option<Tensor>,
    blocks: Vec<Block>,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Positions that a query may look back at, its own included.
    reach: usize,
}

/// What all layers of one forward pass share.
#[derive(Debug)]
pub(crate) struct Pass {
    /// Where the new tokens of each row stand, ascending.
    pub(super) positions: Vec<usize>,
    /// Of every layer.
    pub(super) ropes: Vec<Rope>,
}

impl Pass {
    /// How positions turn the heads of a layer.
    pub(crate) fn rope(&self, layer: usize) -> &Rope {
        &self.ropes[layer]
    }

    /// Where the new tokens of each row stand, ascending.
    pub(crate) fn positions(&self) -> &[usize] {
        &self.positions
    }
}

impl Attention {
    /// The attention of a layer, as it is or with shared heads.
    pub(super) fn new(
        heads: &Heads,
        shared: Option<(&Pooled, &Partition)>,
        spec: &AttentionSpec,
        device: &Device,
    ) -> Result<Self> {
        let (n_heads, queries) = (heads.n_heads(), heads.queries_per_head());
        let mut groups: Vec<(usize, Vec<usize>)> = match shared {
            Some((_, partition)) => partition.groups().into_iter().enumerate().collect(),
            None => (0..n_heads).map(|head| (head, vec![head])).collect(),
        };
        groups.sort_by_key(|(_, members)| members.len());
        let mut blocks: Vec<Block> = Vec::new();
        for (_, members) in &groups {
            let queries = members.len() * queries;
            match blocks.last_mut().filter(|b| b.queries == queries) {
                Some(block) => block.groups += 1,
                None => blocks.push(Block { groups: 1, queries }),
            }
        }
        let query_order: Vec<usize> = (groups.iter().flat_map(|(_, members)| members))
            .flat_map(|head| head * queries..(head + 1) * queries)
            .collect();
        let kv_order: Vec<usize> = groups.iter().map(|&(group, _)| group).collect();

        let pooled = shared.map(|(pooled, _)| pooled);
        let query = pooled.and_then(|p| p.query.as_ref()).or(heads.query()).ok_or(Error::NoQueries)?;
        let output = match pooled.and_then(|p| p.output.as_ref()) {
            Some(output) => output.view(),
            None => heads.output().ok_or(Error::NoQueries)?,
        };
        let (key, value) = pooled.map_or((heads.key(), heads.value()), |p| (&p.key, &p.value));
        let (head_dim, inputs) = (key.head_dim(), key.inputs());
        let parts = [(query, &query_order, spec.scale), (key, &kv_order, 1.0), (value, &kv_order, 1.0)];
        let rows = |bias: bool| -> Vec<f32> {
            parts.iter().flat_map(|&(p, order, scale)| scaled_rows(p, bias, order, scale)).collect()
        };
        let tensor = |numbers: Vec<f32>, shape: &[usize]| {
            Tensor::from_vec(numbers, shape, device).map_err(Error::plugin)
        };
        let all = (query_order.len() + 2 * kv_order.len()) * head_dim;
        let any_bias = parts.iter().any(|(p, ..)| p.bias().is_some());
        // (n_q, d, h) → (d, n_q, h), in the order of the query heads.
        let columns: Array3<f32> = output.select(ndarray::Axis(0), &query_order).permuted_axes([1, 0, 2]);
        let output_bias =
            pooled.and_then(|p| p.output_bias.as_ref()).map(|b| b.view()).or(heads.output_bias());
        Ok(Self {
            qkv: tensor(rows(false), &[all, inputs])?,
            bias: any_bias.then(|| tensor(rows(true), &[all])).transpose()?,
            output: tensor(
                columns.iter().copied().collect(),
                &[output.dim().1, query_order.len() * head_dim],
            )?,
            output_bias: output_bias.map(|b| tensor(b.to_vec(), &[b.len()])).transpose()?,
            blocks,
            query_heads: query_order.len(),
            kv_heads: kv_order.len(),
            head_dim,
            reach: spec.mask.reach(),
        })
    }

    /// KV heads that are computed and kept, k.
    pub(super) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Numbers of keys and values that a token leaves in the cache.
    pub(super) fn kept_numbers(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }

    /// Inputs (B·T, d) → outputs (B·T, d).
    pub(super) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        rope: &Rope,
        past: Option<&mut LayerCache>,
    ) -> candle_core::Result<Tensor> {
        let (n_q, k, h) = (self.query_heads, self.kv_heads, self.head_dim);
        let len = pass.positions.len();
        let batch = x.dim(0)? / len;
        let mut all = x.matmul(&self.qkv.t()?)?;
        if let Some(bias) = &self.bias {
            all = all.broadcast_add(bias)?;
        }
        let all = all.reshape((batch, len, n_q + 2 * k, h))?.transpose(1, 2)?;
        let turned = rope.apply(&all.narrow(1, 0, n_q + k)?.contiguous()?)?;
        let query = turned.narrow(1, 0, n_q)?;
        let mut keys = turned.narrow(1, n_q, k)?.contiguous()?;
        let mut values = all.narrow(1, n_q + k, k)?.contiguous()?;
        let mut seen = pass.positions();
        if let Some(past) = past {
            (keys, values, seen) = past.extend(keys, values, seen)?;
        }
        let visible = visible(pass.positions(), seen, self.reach);
        let softmax = CausalSoftmax { visible, keys: seen.len() };
        let (mut group, mut first, mut outputs) = (0, 0, Vec::with_capacity(self.blocks.len()));
        for &Block { groups, queries } in &self.blocks {
            let query = query.narrow(1, first, groups * queries)?;
            outputs.push(self.attend(&query, &keys, &values, (group, groups), &softmax)?);
            group += groups;
            first += groups * queries;
        }
        let heads = if let [one] = &outputs[..] { one.clone() } else { Tensor::cat(&outputs, 1)? };
        // (B, n_q, T, h) → (B·T, n_q·h).
        let heads = heads.transpose(1, 2)?.contiguous()?.reshape((batch * len, n_q * h))?;
        let output = heads.matmul(&self.output.t()?)?;
        self.output_bias.as_ref().map_or(Ok(output.clone()), |bias| output.broadcast_add(bias))
    }

    /// Query heads (B, groups·r, T, h) of groups `first..first + groups` → what they read, the same shape. The
    /// queries of a group are rows of one product with its keys.
    fn attend(
        &self,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        (first, groups): (usize, usize),
        softmax: &CausalSoftmax,
    ) -> candle_core::Result<Tensor> {
        let (batch, heads, len, h) = query.dims4()?;
        let own =
            |t: &Tensor| if groups == self.kv_heads { Ok(t.clone()) } else { t.narrow(1, first, groups) };
        let (keys, values) = (own(keys)?.contiguous()?, own(values)?.contiguous()?);
        let rows = heads / groups * len;
        let query = query.contiguous()?.reshape((batch, groups, rows, h))?;
        // (B, groups, r·T, S), where row i belongs to token i mod T.
        let scores = query.matmul(&keys.t()?)?;
        softmax.of(scores)?.matmul(&values)?.reshape((batch, heads, len, h))
    }
}

/// Weights or biases of the heads `order` of a projection, one after the other; 0 for a bias that is not there.
fn scaled_rows<'a>(
    projection: &'a Projection,
    bias: bool,
    order: &'a [usize],
    scale: f64,
) -> impl Iterator<Item = f32> + 'a {
    let h = projection.head_dim();
    let (rows, len) = match (bias, projection.bias_slice()) {
        (false, _) => (projection.weight_slice(), h * projection.inputs()),
        (true, Some(bias)) => (bias, h),
        (true, None) => (&[][..], h),
    };
    order.iter().flat_map(move |&head| {
        (head * len..(head + 1) * len).map(move |i| {
            let value = rows.get(i).copied().unwrap_or(0.0);
            if scale == 1.0 { value } else { (f64::from(value) * scale) as f32 }
        })
    })
}
