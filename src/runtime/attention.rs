//! Attention on the KV heads that are there: query heads are ordered group by group, so that nothing is copied
//! back to the heads of a group.

use std::ops::Range;

use candle_core::{Device, Tensor};
use half::bf16;
use ndarray::Array3;

use super::cache::Past;
use super::handed::Handed;
use super::layer::{biased, linear};
use super::norms::HeadNorms;
use super::ops::{CausalSoftmax, KeptMask, capped, times, visible};
use super::pass::Pass;
use super::rope::Rope;
use super::tiles::Tile;
use crate::error::{Error, Result};
use crate::heads::{Heads, Pooled, Projection};
use crate::model::{Alibi, AttentionSpec, Mask};
use crate::plan::{Below, Sharing};

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
    /// Query heads (times `scale`), then key heads, then value heads: ((n_q + 2k)·h, d).
    pub(super) qkv: Tensor,
    pub(super) bias: Option<Tensor>,
    /// (d, n_q·h).
    pub(super) output: Tensor,
    pub(super) output_bias: Option<Tensor>,
    blocks: Vec<Block>,
    pub(super) query_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    mask: Mask,
    /// What products of queries and keys are multiplied by, where the rows of the queries have it in them; else 1.
    pub(super) scale: f64,
    /// What they are multiplied by where that has to wait for the norm of the queries; else 1.
    pub(super) scale_after: f64,
    /// What scores are bounded to.
    pub(super) cap: Option<f64>,
    pub(super) norms: HeadNorms,
    /// For the query heads in their order here.
    alibi: Option<Alibi>,
    /// The query heads of the source in the order in which they lie here, and the groups.
    pub(super) query_order: Vec<usize>,
    pub(super) kv_order: Vec<usize>,
    /// The head of the layer below that each group reads, in the order of the groups here, where the layer has no keys and values.
    pub(super) below: Option<Vec<usize>>,
    /// Which of queries, keys, values and outputs have a bias.
    pub(super) biased: [bool; 4],
}

impl Attention {
    /// The attention of a layer, as it is or with shared heads.
    pub(super) fn new(
        heads: &Heads,
        shared: Option<(&Pooled, Sharing<'_>)>,
        spec: &AttentionSpec,
        norms: HeadNorms,
        device: &Device,
    ) -> Result<Self> {
        let (n_heads, queries) = (heads.n_heads(), heads.queries_per_head());
        let mut groups: Vec<(usize, Vec<usize>)> = match shared {
            Some((_, sharing)) => sharing.groups.groups().into_iter().enumerate().collect(),
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
        let read = groups.iter().map(|&(group, _)| group);
        let below = shared.map_or(spec.below.as_deref(), |(_, sharing)| sharing.below.map(Below::heads));
        let below = below.map(|heads| read.clone().map(|group| heads[group]).collect::<Vec<_>>());
        // Behind those of its own groups lie the heads that the layer above alone reads.
        let further = groups.len()..shared.map_or(n_heads, |(pooled, _)| pooled.key.n_heads());
        let kv_order: Vec<usize> = if below.is_some() { Vec::new() } else { read.chain(further).collect() };
        let members: Vec<&[usize]> = groups.iter().map(|(_, members)| &members[..]).collect();
        let norms = norms.ordered(&query_order, &members, heads.key().head_dim()).map_err(Error::plugin)?;
        let (scale, scale_after) = if norms.query.is_some() { (1.0, spec.scale) } else { (spec.scale, 1.0) };

        let pooled = shared.map(|(pooled, _)| pooled);
        let query = pooled.and_then(|p| p.query.as_ref()).or(heads.query()).ok_or(Error::NoQueries)?;
        let output = match pooled.and_then(|p| p.output.as_ref()) {
            Some(output) => output.view(),
            None => heads.output().ok_or(Error::NoQueries)?,
        };
        let (key, value) = pooled.map_or((heads.key(), heads.value()), |p| (&p.key, &p.value));
        let (head_dim, inputs) = (key.head_dim(), key.inputs());
        let parts = [(query, &query_order, scale), (key, &kv_order, 1.0), (value, &kv_order, 1.0)];
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
            output_bias: output_bias.as_ref().map(|b| tensor(b.to_vec(), &[b.len()])).transpose()?,
            blocks,
            query_heads: query_order.len(),
            kv_heads: kv_order.len(),
            head_dim,
            mask: spec.mask,
            scale,
            scale_after,
            cap: spec.cap,
            alibi: spec.alibi.as_ref().map(|alibi| Alibi {
                slopes: query_order.iter().map(|&q| alibi.slopes[q]).collect(),
                ..alibi.clone()
            }),
            norms,
            biased: [
                query.bias().is_some(),
                key.bias().is_some(),
                value.bias().is_some(),
                output_bias.is_some(),
            ],
            query_order,
            kv_order,
            below,
        })
    }

    /// KV heads that are computed and kept, k.
    pub(super) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Inputs (B·T, d) → outputs (B·T, d), and the keys and values that were read. Where the layer has none of its own these are
    /// among `below`, those of the layer below, and nothing is added to the past.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        rope: &Rope,
        past: Option<&mut Past>,
        below: Option<&Handed>,
    ) -> candle_core::Result<(Tensor, Handed)> {
        if let Some(Past::Chosen(rows)) = past {
            return self.forward_through(rows, x, pass, rope, below);
        }
        let (query, handed) = self.read(x, pass, rope, past, below)?;
        let seen = &handed.positions[..];
        let tiles = Tile::all(self.softmax(pass, seen), query.device());
        let outputs = self.places().map(|place| {
            let [query, keys, values] = place.of(&query, &handed.keys, &handed.values)?;
            let read = tiles.iter().map(|tile| {
                let (query, keys) = (tile.of_queries(&query)?, tile.of_keys(&keys)?);
                let scores = self.scores(place, [&query, &keys], &seen[tile.keys.clone()])?;
                tile.softmax.of(scores, self.sinks(place))?.matmul(&tile.of_keys(&values)?)
            });
            Tile::joined(&tiles, &read.collect::<candle_core::Result<Vec<_>>>()?)
        });
        let output = self.write(&self.side_by_side(outputs, pass.positions.len())?)?;
        Ok((output, handed))
    }

    /// Inputs (B·T, d) → queries (B, n_q, T, h), keys and values (B, k, T, h), turned by their positions.
    pub(super) fn project(&self, x: &Tensor, pass: &Pass, rope: &Rope) -> candle_core::Result<[Tensor; 3]> {
        self.turned(&self.projected(x)?, pass, rope)
    }

    /// Inputs (N, d) → queries, keys and values side by side, (N, (n_q + 2k)·h).
    pub(super) fn projected(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        linear(x, &self.qkv, &self.bias)
    }

    /// What was projected, normed and turned by positions.
    pub(super) fn turned(
        &self,
        projected: &Tensor,
        pass: &Pass,
        rope: &Rope,
    ) -> candle_core::Result<[Tensor; 3]> {
        let (n_q, k, h) = (self.query_heads, self.kv_heads, self.head_dim);
        let len = pass.positions.len();
        let batch = projected.dim(0)? / len;
        let all = self.normed(projected)?.reshape((batch, len, n_q + 2 * k, h))?.transpose(1, 2)?;
        let turned = rope.apply(&all.narrow(1, 0, n_q + k)?.contiguous()?)?;
        let keys = turned.narrow(1, n_q, k)?.contiguous()?;
        Ok([turned.narrow(1, 0, n_q)?, keys, all.narrow(1, n_q + k, k)?.contiguous()?])
    }

    /// Queries, keys and values side by side, (N, (n_q + 2k)·h), the former two through their norms.
    fn normed(&self, all: &Tensor) -> candle_core::Result<Tensor> {
        if self.norms.is_empty() {
            return Ok(all.clone());
        }
        let [query, key, value] = self.parts(all)?;
        let [query, key] = self.norms.of([&query, &key])?;
        Tensor::cat(&[times(query, self.scale_after)?, key, value], 1)
    }

    /// What passes back through these norms, from what was projected and the gradient of what they made of it.
    pub(super) fn normed_backward(&self, all: &Tensor, gradient: &Tensor) -> candle_core::Result<Tensor> {
        let ([query, key, _], [of_query, of_key, of_value]) = (self.parts(all)?, self.parts(gradient)?);
        let of_query = times(of_query, self.scale_after)?;
        let [of_query, of_key] = self.norms.backward([&query, &key], [of_query, of_key])?;
        Tensor::cat(&[of_query, of_key, of_value], 1)
    }

    /// Queries, keys and values of what lies side by side, (N, ·).
    fn parts(&self, all: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let (n_q, k) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim);
        Ok([all.narrow(1, 0, n_q)?, all.narrow(1, n_q, k)?, all.narrow(1, n_q + k, k)?])
    }

    /// How well a block's queries (B, groups, r·T, h) match keys (B, groups, S, h) at the positions `seen`, (B, groups, r·T, S).
    pub(super) fn scores(
        &self,
        place: Place,
        [query, keys]: [&Tensor; 2],
        seen: &[usize],
    ) -> candle_core::Result<Tensor> {
        let mut scores = query.matmul(&keys.t()?)?;
        if let Some(alibi) = &self.alibi {
            let ((batch, groups, rows, s), Block { queries, .. }) = (scores.dims4()?, place.block);
            let biases = biases(alibi, place.first_query..place.first_query + groups * queries, seen);
            let biases = Tensor::from_vec(biases, (1, groups, queries, 1, s), scores.device())?;
            let apart = scores.reshape((batch, groups, queries, rows / queries, s))?;
            scores = apart.broadcast_add(&biases)?.reshape((batch, groups, rows, s))?;
        }
        self.cap.map_or(Ok(scores.clone()), |cap| capped(&scores, cap))
    }

    /// The softmax of new tokens over those at the positions `seen`.
    pub(super) fn softmax(&self, pass: &Pass, seen: &[usize]) -> CausalSoftmax {
        let own = seen.len() == pass.positions().len();
        self.softmax_of(pass.positions(), seen, pass.masks.get(&self.mask.reach()).filter(|_| own))
    }

    /// The softmax of tokens at some positions over those at the positions `seen`; `kept` is for the mask of just these.
    pub(super) fn softmax_of(
        &self,
        asked: &[usize],
        seen: &[usize],
        kept: Option<&KeptMask>,
    ) -> CausalSoftmax {
        let visible = match self.mask {
            Mask::Whole => vec![0..seen.len(); asked.len()],
            mask => visible(asked, seen, mask.reach()),
        };
        CausalSoftmax { visible, keys: seen.len(), kept: kept.filter(|_| self.mask != Mask::Whole).cloned() }
    }

    /// The sinks of a block's query heads; none where the model has none.
    pub(super) fn sinks(&self, place: Place) -> &[f32] {
        let all = &self.norms.sinks[..];
        let heads = place.block.groups * place.block.queries;
        if all.is_empty() { all } else { &all[place.first_query..][..heads] }
    }

    /// Where each block's groups and query heads begin.
    pub(super) fn places(&self) -> impl Iterator<Item = Place> {
        let mut next = Place { first_group: 0, first_query: 0, block: Block { groups: 0, queries: 0 } };
        self.blocks.iter().map(move |&block| {
            let Block { groups, queries } = next.block;
            let (first_group, first_query) = (next.first_group + groups, next.first_query + groups * queries);
            next = Place { first_group, first_query, block };
            next
        })
    }

    /// What the query heads of every block read, (B, groups, r·T, h) → (B·T, n_q·h).
    pub(super) fn side_by_side(
        &self,
        blocks: impl Iterator<Item = candle_core::Result<Tensor>>,
        len: usize,
    ) -> candle_core::Result<Tensor> {
        let h = self.head_dim;
        let heads = |block: candle_core::Result<Tensor>| {
            let block = block?;
            block.reshape((block.dim(0)?, (), len, h))
        };
        let heads = joined(&blocks.map(heads).collect::<candle_core::Result<Vec<_>>>()?)?;
        heads.transpose(1, 2)?.contiguous()?.reshape(((), self.query_heads * h))
    }

    /// What query heads read, (N, n_q·h) → (N, d).
    pub(super) fn write(&self, heads: &Tensor) -> candle_core::Result<Tensor> {
        biased(heads.matmul(&self.output.t()?)?, &self.output_bias)
    }
}

/// Tensors of heads (B, n, …) one after the other.
pub(super) fn joined(heads: &[Tensor]) -> candle_core::Result<Tensor> {
    if let [one] = heads { Ok(one.clone()) } else { Tensor::cat(heads, 1) }
}

/// A block, and where its groups and query heads begin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    first_group: usize,
    first_query: usize,
    block: Block,
}

impl Place {
    /// The groups of the block, each as a block of its own.
    pub(super) fn each(self) -> impl Iterator<Item = Self> {
        let Block { groups, queries } = self.block;
        (0..groups).map(move |group| Self {
            first_group: self.first_group + group,
            first_query: self.first_query + group * queries,
            block: Block { groups: 1, queries },
        })
    }

    /// The block's part of queries (B, n_q, T, h), keys and values (B, k, S, h): (B, groups, r·T, h), (B, groups, S, h). The
    /// queries of a group are rows of one product with its keys, where row i belongs to token i mod T.
    pub(super) fn of(
        &self,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<[Tensor; 3]> {
        let own = |t: &Tensor| t.narrow(1, self.first_group, self.block.groups)?.contiguous();
        Ok([self.queries(query)?, own(keys)?, own(values)?])
    }

    /// The block's part of what belongs to query heads, (B, n_q, T, h) → (B, groups, r·T, h).
    pub(super) fn queries(&self, heads: &Tensor) -> candle_core::Result<Tensor> {
        let Block { groups, queries } = self.block;
        let (batch, _, len, h) = heads.dims4()?;
        let own = heads.narrow(1, self.first_query, groups * queries)?.contiguous()?;
        own.reshape((batch, groups, queries * len, h))
    }
}

/// What scores of some query heads get for keys at these positions, head by head.
fn biases(alibi: &Alibi, queries: Range<usize>, seen: &[usize]) -> Vec<f32> {
    let slopes = alibi.slopes[queries].iter();
    let of = |&slope: &f32| {
        seen.iter().map(move |&position| match alibi.rounded {
            false => slope * position as f32,
            true => {
                let bias = bf16::from_f32(bf16::from_f32(slope).to_f32() * position as f32).to_f32();
                (f64::from(bias) * alibi.factor) as f32
            }
        })
    };
    slopes.flat_map(of).collect()
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
