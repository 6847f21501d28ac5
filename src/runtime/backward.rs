//! A layer, run backward: from the gradient of what it gives to that of what it reads and of its attention's weights.
//!
//! Written by hand, layer by layer: what the layer computes on the way ([`Trace`]) is kept from the forward pass where there is
//! room; else nothing but its input is, and the layer is computed again. The runtime's fused steps record nothing from which a
//! framework could differentiate.

use candle_core::{Result, Tensor};

use super::attention::{Attention, joined};
use super::layer::{Layer, Normed, normed};
use super::mlp::Above;
use super::ops::{
    CausalSoftmax, capped_backward, combined, layer_norm_backward, rms_norm_backward, scores_backward, times,
};
use super::pass::Pass;
use super::rest::Rest;
use super::rope::Rope;
use super::tiles::Tile;
use super::trace::Trace;
use super::weights::LayerWeights;
use crate::model::{Block, NormKind};
use crate::plan::Trained;

/// What a layer passes back.
#[derive(Debug)]
pub(crate) struct Backward {
    /// Gradient of what the layer reads, (N, d).
    pub(crate) input: Tensor,
    /// Gradients of the weights, where they were asked for.
    pub(crate) weights: Option<LayerWeights>,
}

impl Normed {
    /// What passes back through the norm.
    pub(super) fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        match self.kind {
            NormKind::Rms => rms_norm_backward(x, &self.weight, self.epsilon, gradient),
            NormKind::Layer => layer_norm_backward(x, &self.weight, self.epsilon, gradient),
        }
    }

    /// Gradients of its weights, which lie as they do.
    fn weights_backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Self> {
        let plain = Self { weight: self.weight.ones_like()?, bias: self.bias.zeros_like()?, ..self.clone() };
        Ok(Self { weight: (plain.of(x)? * gradient)?.sum(0)?, bias: gradient.sum(0)?, ..plain })
    }
}

/// What passes back through a norm that may not be there; the gradients of its weights go to `of`, where they are asked for.
fn through(
    norm: &Option<Normed>,
    of: Option<&mut Option<Normed>>,
    x: &Tensor,
    gradient: &Tensor,
) -> Result<Tensor> {
    let Some(norm) = norm else { return Ok(gradient.clone()) };
    if let Some(of) = of {
        *of = Some(norm.weights_backward(x, gradient)?);
    }
    norm.backward(x, gradient)
}

impl Layer {
    /// Layer number `i` on x (N, d), where `gradient` (N, d) is that of what it gives; with gradients of the weights of its attention,
    /// or of all of `block`, if any. Without a trace it is computed again.
    pub(super) fn backward(
        &self,
        (i, block): (usize, &Block),
        (x, trace): (&Tensor, Option<Trace>),
        gradient: &Tensor,
        pass: &Pass,
        trained: Option<Trained>,
    ) -> Result<Backward> {
        let rest = &self.rest;
        let mut of = (trained == Some(Trained::All)).then(|| rest.clone());
        let Trace { input, kept, output, sum, y, above } =
            trace.map_or_else(|| self.trace(i, x, pass), Ok)?;
        let (read, above) = (if rest.parallel { x } else { &y }, above.as_ref());
        let gradient = match &rest.sum_norms[1] {
            None => gradient.clone(),
            norm => {
                let of = of.as_mut().map(|of| &mut of.sum_norms[1]);
                through(norm, of, &rest.mlp_sum(&y, read, above)?, gradient)?
            }
        };
        let of_read = rest.feed_forward_backward((read, above), &gradient, of.as_mut())?;
        // What the sum behind the attention, and the stream before it, are given.
        let of_y = if rest.parallel { gradient } else { combined(&gradient, 1.0, &of_read, 1.0)? };
        let of_sum = through(&rest.sum_norms[0], of.as_mut().map(|of| &mut of.sum_norms[0]), &sum, &of_y)?;
        let of_x = if rest.parallel { combined(&of_sum, 1.0, &of_read, 1.0)? } else { of_sum.clone() };
        let of_added = times(of_sum, rest.residual)?;
        let of_norm = of.as_mut().map(|of| &mut of.attention_output_norm);
        let attention = through(&rest.attention_output_norm, of_norm, &output, &of_added)?;
        let of_all = self.attention.backward(&kept, &attention, pass.rope(i))?;
        let mut weights = trained
            .map(|_| self.attention.weights_backward(&input, &kept, &of_all, &attention))
            .transpose()?;
        let of_input = of_all.matmul(&self.attention.qkv)?;
        let of_norm = of.as_mut().map(|of| &mut of.attention_norm);
        let of_input = through(&rest.attention_norm, of_norm, x, &of_input)?;
        if let (Some(weights), Some(of)) = (&mut weights, of) {
            weights.rest = of.trained(block)?;
        }
        Ok(Backward { input: combined(&of_x, 1.0, &of_input, 1.0)?, weights })
    }
}

impl Rest {
    /// What passes back through the MLP and its norms, (N, d), from the gradient of the stream that it is added to; gradients of weights
    /// go to `of`, where they are asked for.
    fn feed_forward_backward(
        &self,
        (read, above): (&Tensor, Option<&Above>),
        gradient: &Tensor,
        mut of: Option<&mut Self>,
    ) -> Result<Tensor> {
        let input = normed(&self.mlp_norm, read)?;
        let of_added = times(gradient.clone(), self.residual)?;
        let of_made = match &self.mlp_output_norm {
            None => of_added,
            norm => {
                let of = of.as_deref_mut().map(|of| &mut of.mlp_output_norm);
                through(norm, of, &self.mlp.made(&input, above)?, &of_added)?
            }
        };
        let (of_input, of_mlp) = self.mlp.backward(&input, above, &of_made, of.is_some())?;
        if let (Some(of), Some(of_mlp)) = (of.as_deref_mut(), of_mlp) {
            of.mlp = of_mlp;
        }
        through(&self.mlp_norm, of.map(|of| &mut of.mlp_norm), read, &of_input)
    }
}

/// What attention computes on the way, for the way back.
pub(super) struct Kept {
    /// Queries, keys and values before norms and rotation, (N, (n_q + 2k)·h), where there are norms.
    projected: Option<Tensor>,
    /// Tokens of a window that ask, and those that they look at.
    asked: usize,
    seen: usize,
    tiles: Vec<Tile>,
    /// Of every block those of every tile.
    blocks: Vec<Vec<KeptTile>>,
    /// What query heads read, (N, n_q·h).
    pub(super) heads: Tensor,
}

impl Kept {
    /// All that it holds.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let tiles = self.blocks.iter().flatten();
        let of_tiles = tiles.flat_map(|KeptTile { query, keys, values, probabilities, scores }| {
            [query, keys, values, probabilities].into_iter().chain(scores)
        });
        self.projected.iter().chain([&self.heads]).chain(of_tiles)
    }
}

/// Of groups with equally many query heads, at some tokens.
struct KeptTile {
    /// (B, groups, r·t, h).
    query: Tensor,
    /// (B, groups, s, h).
    keys: Tensor,
    /// (B, groups, s, h).
    values: Tensor,
    /// (B, groups, r·t, s).
    probabilities: Tensor,
    /// Scores where they are bounded, as the probabilities.
    scores: Option<Tensor>,
}

impl Attention {
    /// What it computes of x (N, d), and its output (N, d).
    pub(super) fn kept(&self, x: &Tensor, pass: &Pass, rope: &Rope) -> Result<(Kept, Tensor)> {
        let (projected, seen) = (self.projected(x)?, pass.positions());
        let turned = self.turned(&projected, pass, rope)?;
        let mut kept = self.kept_of(turned, self.softmax(pass, seen), seen)?;
        kept.projected = (!self.norms.is_empty()).then_some(projected);
        let output = self.write(&kept.heads)?;
        Ok((kept, output))
    }

    /// What it computes of queries (B, n_q, t, h), and of keys and values (B, k, S, h) at the positions `seen`.
    pub(super) fn kept_of(
        &self,
        [query, keys, values]: [Tensor; 3],
        softmax: CausalSoftmax,
        seen: &[usize],
    ) -> Result<Kept> {
        let asked = softmax.visible.len();
        let tiles = Tile::all(softmax, query.device());
        let blocks = self.places().map(|place| {
            let [query, keys, values] = place.of(&query, &keys, &values)?;
            let tile = |tile: &Tile| {
                let (query, keys) = (tile.of_queries(&query)?, tile.of_keys(&keys)?);
                let scores = self.scores(place, [&query, &keys], &seen[tile.keys.clone()])?;
                // The softmax overwrites what it reads.
                let kept = self.cap.map(|_| scores.copy()).transpose()?;
                let probabilities = tile.softmax.of(scores, self.sinks(place))?;
                Ok(KeptTile { probabilities, query, keys, values: tile.of_keys(&values)?, scores: kept })
            };
            tiles.iter().map(tile).collect()
        });
        let blocks: Vec<Vec<KeptTile>> = blocks.collect::<Result<_>>()?;
        let read = blocks.iter().map(|block| {
            let read = block.iter().map(|tile| tile.probabilities.matmul(&tile.values));
            Tile::joined(&tiles, &read.collect::<Result<Vec<_>>>()?)
        });
        let heads = self.side_by_side(read, asked)?;
        Ok(Kept { projected: None, asked, seen: seen.len(), tiles, blocks, heads })
    }

    /// From the gradient (N, d) of its output to that of queries, keys and values as projected, (N, (n_q + 2k)·h).
    pub(super) fn backward(&self, kept: &Kept, gradient: &Tensor, rope: &Rope) -> Result<Tensor> {
        let [of_query, of_keys, of_values] = self.backward_of(kept, gradient)?;
        let turned = rope.apply_back(&joined(&[of_query, of_keys])?.contiguous()?)?;
        let of_all = joined(&[turned, of_values])?.transpose(1, 2)?.contiguous()?;
        let (batch, len, heads, h) = of_all.dims4()?;
        let of_all = of_all.reshape((batch * len, heads * h))?;
        kept.projected.as_ref().map_or(Ok(of_all.clone()), |all| self.normed_backward(all, &of_all))
    }

    /// From the gradient (B·t, d) of its output to that of queries (B, n_q, t, h), keys and values (B, k, S, h), normed and turned.
    pub(super) fn backward_of(&self, kept: &Kept, gradient: &Tensor) -> Result<[Tensor; 3]> {
        let of_heads = gradient.matmul(&self.output)?;
        let by_head =
            |of: &Tensor, h: usize| of.reshape(((), kept.asked, self.query_heads, h))?.transpose(1, 2);
        let worth = match of_heads.device().is_cpu() {
            true => None,
            false => {
                let each = (&of_heads * &kept.heads)?.reshape(((), self.head_dim))?;
                Some(by_head(&each.sum_keepdim(1)?, 1)?)
            }
        };
        let of_heads = by_head(&of_heads, self.head_dim)?;
        let (mut of_query, mut of_keys, mut of_values) = (Vec::new(), Vec::new(), Vec::new());
        for (place, block) in self.places().zip(&kept.blocks) {
            let of_read = place.queries(&of_heads)?;
            let worth = worth.as_ref().map(|worth| place.queries(worth)).transpose()?;
            let [mut of_q, mut of_k, mut of_v] = [const { Vec::new() }; 3];
            for (tile, KeptTile { query, keys, values, probabilities, scores }) in
                kept.tiles.iter().zip(block)
            {
                let of_read = tile.of_queries(&of_read)?;
                of_v.push(probabilities.t()?.matmul(&of_read)?);
                let worth = worth.as_ref().map(|worth| tile.of_queries(worth)).transpose()?;
                let mut of_scores = scores_backward(probabilities, &of_read, values, worth.as_ref())?;
                if let (Some(cap), Some(scores)) = (self.cap, scores) {
                    of_scores = capped_backward(scores, cap, &of_scores)?;
                }
                of_q.push(of_scores.matmul(keys)?);
                of_k.push(of_scores.t()?.matmul(query)?);
            }
            of_query.push(Tile::joined(&kept.tiles, &of_q)?);
            of_keys.push(Tile::summed(&kept.tiles, &of_k, kept.seen)?);
            of_values.push(Tile::summed(&kept.tiles, &of_v, kept.seen)?);
        }
        Ok([joined(&of_query)?, joined(&of_keys)?, joined(&of_values)?])
    }

    /// Sums over tokens of what every weight is given times what it is worth.
    pub(super) fn weights_backward(
        &self,
        x: &Tensor,
        kept: &Kept,
        of_all: &Tensor,
        of_output: &Tensor,
    ) -> Result<LayerWeights> {
        let bias = self.bias.as_ref().map(|_| of_all.sum(0)).transpose()?;
        let output_bias = self.output_bias.as_ref().map(|_| of_output.sum(0)).transpose()?;
        let qkv = of_all.t()?.matmul(x)?;
        self.parted(&qkv, &of_output.t()?.matmul(&kept.heads)?, bias.as_ref(), output_bias, self.scale)
    }
}
