//! A layer, run backward: from the gradient of what it gives to that of what it reads and of its attention's weights.
//!
//! Written by hand, layer by layer: nothing but the layer's input is kept from the forward pass, and the layer is computed
//! again. The runtime's fused steps record nothing from which a framework could differentiate.

use candle_core::{Result, Tensor};

use super::attention::{Attention, Pass, joined};
use super::layer::{Layer, Normed, linear};
use super::ops::{rms_norm_backward, softmax_backward, swiglu_backward};
use super::rope::Rope;
use super::weights::AttentionWeights;

/// What a layer passes back.
#[derive(Debug)]
pub(crate) struct Backward {
    /// Gradient of what the layer reads, (N, d).
    pub(crate) input: Tensor,
    /// Gradient of what its attention puts out, (N, d).
    pub(crate) attention: Tensor,
    /// What its attention puts out, (N, d).
    pub(crate) output: Tensor,
    /// Gradients of the weights of its attention, where they were asked for.
    pub(crate) weights: Option<AttentionWeights>,
}

impl Normed {
    /// What passes back through the norm.
    pub(super) fn backward(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        rms_norm_backward(x, &self.weight, self.epsilon, gradient)
    }
}

impl Layer {
    /// Layer number `i` on x (N, d), where `gradient` (N, d) is that of what it gives.
    pub(super) fn backward(
        &self,
        i: usize,
        x: &Tensor,
        gradient: &Tensor,
        pass: &Pass,
        weights: bool,
    ) -> Result<Backward> {
        let input = self.attention_input(x)?;
        let (kept, output) = self.attention.kept(&input, pass, pass.rope(i))?;
        let y = (x + &output)?;
        let gates = linear(&self.mlp_norm.of(&y)?, &self.gate_up, &self.gate_up_bias)?;
        let of_gates = swiglu_backward(&gates, &gradient.matmul(&self.down)?)?;
        let attention = (gradient + self.mlp_norm.backward(&y, &of_gates.matmul(&self.gate_up)?)?)?;
        let of_all = self.attention.backward(&kept, &attention, pass.rope(i))?;
        let weights = weights.then(|| self.attention.weights_backward(&input, &kept, &of_all, &attention));
        let of_input = of_all.matmul(&self.attention.qkv)?;
        let input = (&attention + self.attention_norm.backward(x, &of_input)?)?;
        let weights = weights.transpose()?;
        Ok(Backward { input, attention, output, weights })
    }
}

/// What attention computes on the way, for the way back.
pub(super) struct Kept {
    /// Of every block: queries (B, groups, r·T, h), keys and values (B, groups, T, h), probabilities (B, groups, r·T, T).
    blocks: Vec<[Tensor; 4]>,
    /// What query heads read, (N, n_q·h).
    pub(super) heads: Tensor,
}

impl Attention {
    /// What it computes of x (N, d), and its output (N, d).
    pub(super) fn kept(&self, x: &Tensor, pass: &Pass, rope: &Rope) -> Result<(Kept, Tensor)> {
        let [query, keys, values] = self.project(x, pass, rope)?;
        let softmax = self.softmax(pass, pass.positions());
        let blocks = self.places().map(|place| {
            let [query, keys, values] = place.of(&query, &keys, &values)?;
            let probabilities = place.probabilities(&query, &keys, &softmax)?;
            Ok([query, keys, values, probabilities])
        });
        let blocks: Vec<[Tensor; 4]> = blocks.collect::<Result<_>>()?;
        let read = blocks.iter().map(|[_, _, values, probabilities]| probabilities.matmul(values));
        let heads = self.side_by_side(read, pass)?;
        let output = self.write(&heads)?;
        Ok((Kept { blocks, heads }, output))
    }

    /// From the gradient (N, d) of its output to that of queries, keys and values before they turn, (N, (n_q + 2k)·h).
    pub(super) fn backward(&self, kept: &Kept, gradient: &Tensor, rope: &Rope) -> Result<Tensor> {
        let h = self.head_dim;
        let (batch, _, _, len) = kept.blocks[0][3].dims4()?;
        let of_heads = gradient.matmul(&self.output)?;
        let of_heads = of_heads.reshape((batch, len, self.query_heads, h))?.transpose(1, 2)?;
        let (mut of_query, mut of_keys, mut of_values) = (Vec::new(), Vec::new(), Vec::new());
        for (place, [query, keys, values, probabilities]) in self.places().zip(&kept.blocks) {
            let of_read = place.queries(&of_heads)?;
            of_values.push(probabilities.t()?.matmul(&of_read)?);
            let of_scores = softmax_backward(probabilities, of_read.matmul(&values.t()?)?)?;
            of_query.push(of_scores.matmul(keys)?.reshape((batch, (), len, h))?);
            of_keys.push(of_scores.t()?.matmul(query)?);
        }
        of_query.extend(of_keys);
        let turned = rope.apply_back(&joined(&of_query)?.contiguous()?)?;
        let of_all = joined(&[&[turned][..], &of_values].concat())?.transpose(1, 2)?.contiguous()?;
        of_all.reshape((batch * len, (self.query_heads + 2 * self.kv_heads) * h))
    }

    /// Sums over tokens of what every weight is given times what it is worth.
    pub(super) fn weights_backward(
        &self,
        x: &Tensor,
        kept: &Kept,
        of_all: &Tensor,
        of_output: &Tensor,
    ) -> Result<AttentionWeights> {
        let bias = self.bias.as_ref().map(|_| of_all.sum(0)).transpose()?;
        let output_bias = self.output_bias.as_ref().map(|_| of_output.sum(0)).transpose()?;
        let qkv = of_all.t()?.matmul(x)?;
        self.parted(&qkv, &of_output.t()?.matmul(&kept.heads)?, bias.as_ref(), output_bias, self.scale)
    }
}
