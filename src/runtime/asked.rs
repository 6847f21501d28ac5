//! Attention that some tokens of every window ask for: gradients of a layer's weights for a fraction of the work.

use candle_core::{Result as Candle, Tensor};

use super::attention::Attention;
use super::layer::{linear, times};
use super::ops::KeptMask;
use super::pass::Pass;
use super::rope::Rope;
use super::weights::AttentionWeights;
use super::{Model, RuntimeError};

/// Every n-th token of a window, from one on: those whose queries are computed, while all tokens have keys and values.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Places in the window, ascending.
    pub(super) places: Vec<u32>,
    /// Where they stand.
    pub(super) positions: Vec<usize>,
    /// What hides keys from them.
    pub(super) mask: KeptMask,
}

impl Asked {
    /// Those of a pass.
    pub(crate) fn every(n: usize, first: usize, pass: &Pass) -> Self {
        let places: Vec<u32> =
            (first..pass.positions().len()).step_by(n.max(1)).map(|place| place as u32).collect();
        let positions = places.iter().map(|&place| pass.positions()[place as usize]).collect();
        Self { places, positions, mask: KeptMask::default() }
    }

    /// Their rows of windows of T tokens, (B·T, d) → (B·t, d).
    pub(crate) fn rows(&self, all: &Tensor, pass: &Pass) -> Candle<Tensor> {
        let (n, d) = all.dims2()?;
        let tokens = pass.positions().len();
        let places = Tensor::new(&self.places[..], all.device())?;
        all.reshape((n / tokens, tokens, d))?.index_select(&places, 1)?.reshape(((), d))
    }
}

impl Attention {
    /// Gradients of the weights on x (N, d), where `gradient` makes that of the output at the tokens asked for, (B·t, d), of that output.
    fn backward_at(
        &self,
        x: &Tensor,
        asked: &Asked,
        pass: &Pass,
        rope: &Rope,
        gradient: impl FnOnce(&Tensor) -> Candle<Tensor>,
    ) -> Candle<AttentionWeights> {
        let (n_q, k, h) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim);
        let (len, turn) = (pass.positions().len(), rope.at(&asked.places)?);
        let own = asked.rows(x, pass)?;
        let part = |from: usize, n: usize, x: &Tensor| {
            let bias = self.bias.as_ref().map(|bias| bias.narrow(0, from, n)).transpose()?;
            linear(x, &self.qkv.narrow(0, from, n)?, &bias)
        };
        let heads = |rows: &Tensor, len: usize| {
            rows.reshape(((), len, rows.dim(1)? / h, h))?.transpose(1, 2)?.contiguous()
        };
        let rows = |heads: &Tensor| {
            let (batch, n, len, h) = heads.dims4()?;
            heads.transpose(1, 2)?.contiguous()?.reshape((batch * len, n * h))
        };

        let [query, key, value] = [part(0, n_q, &own)?, part(n_q, k, x)?, part(n_q + k, k, x)?];
        let [normed_query, normed_key] = self.norms.of([&query, &key])?;
        let normed_query = times(normed_query, self.scale_after)?;
        let turned = [
            turn.apply(&heads(&normed_query, asked.places.len())?)?,
            rope.apply(&heads(&normed_key, len)?)?,
            heads(&value, len)?,
        ];
        let softmax = self.softmax_of(&asked.positions, pass.positions(), Some(&asked.mask));
        let kept = self.kept_of(turned, softmax, pass.positions())?;
        let output = self.write(&kept.heads)?;
        let of_output = gradient(&output)?;
        let [of_query, of_key, of_value] = self.backward_of(&kept, &of_output)?;
        let of_query = times(rows(&turn.apply_back(&of_query.contiguous()?)?)?, self.scale_after)?;
        let of_key = rows(&rope.apply_back(&of_key.contiguous()?)?)?;
        let [of_query, of_key] = self.norms.backward([&query, &key], [of_query, of_key])?;
        let of_value = rows(&of_value)?;

        let products = [of_query.t()?.matmul(&own)?, of_key.t()?.matmul(x)?, of_value.t()?.matmul(x)?];
        let sums =
            || [&of_query, &of_key, &of_value].map(|of| of.sum(0)).into_iter().collect::<Candle<Vec<_>>>();
        let bias = self.bias.as_ref().map(|_| Tensor::cat(&sums()?, 0)).transpose()?;
        let output_bias = self.output_bias.as_ref().map(|_| of_output.sum(0)).transpose()?;
        let output = of_output.t()?.matmul(&kept.heads)?;
        self.parted(&Tensor::cat(&products, 0)?, &output, bias.as_ref(), output_bias, self.scale)
    }
}

impl Model {
    /// Gradients of the weights of the attention of layer `i` on `input`, (N, d), where `gradient` makes that of its output at the tokens
    /// asked for, (B·t, d), of that output.
    pub(crate) fn attention_backward(
        &self,
        i: usize,
        input: &Tensor,
        asked: &Asked,
        pass: &Pass,
        gradient: impl FnOnce(&Tensor) -> Candle<Tensor>,
    ) -> Result<AttentionWeights, RuntimeError> {
        Ok(self.attention(i)?.backward_at(input, asked, pass, pass.rope(i), gradient)?)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::error::Error;

    /// What all tokens give where those that do not ask have no gradient.
    fn slowly(
        model: &Model,
        i: usize,
        input: &Tensor,
        asked: &Asked,
        pass: &Pass,
    ) -> Result<AttentionWeights, RuntimeError> {
        let attention = model.attention(i)?;
        let (kept, output) = attention.kept(input, pass, pass.rope(i))?;
        let len = pass.positions().len();
        let share = |row: usize| if asked.places.contains(&((row % len) as u32)) { 1.0f32 } else { 0.0 };
        let shares: Vec<f32> = (0..output.dim(0)?).map(share).collect();
        let gradient =
            output.broadcast_mul(&Tensor::from_vec(shares, (output.dim(0)?, 1), output.device())?)?;
        let of_all = attention.backward(&kept, &gradient, pass.rope(i))?;
        Ok(attention.weights_backward(input, &kept, &of_all, &gradient)?)
    }

    #[test]
    fn some_tokens_give_what_all_give_where_the_others_have_no_gradient() -> Result<(), RuntimeError> {
        // Norms of queries and keys are those of another model, which is not always there.
        let others = std::env::var_os("QCQA_MODELS").map(|models| Path::new(&models).join("novels-qwen3-7m"));
        for path in [Path::new("tests/data/novels-1m").to_path_buf()].into_iter().chain(others) {
            let model = Model::load(&Checkpoint::open(path)?)?;
            let (len, windows) = (9, 2);
            let pass = model.pass(len, 0)?;
            let tokens: Vec<u32> = (0..(len * windows) as u32).map(|t| t * t % 997).collect();
            let input = model.attention_input(1, &model.embed(&tokens, &pass)?)?;
            for (n, first) in [(1, 0), (2, 1), (4, 3), (20, 5)] {
                let asked = Asked::every(n, first, &pass);
                let found =
                    model.attention_backward(1, &input, &asked, &pass, |output| Ok(output.clone()))?;
                let expected = slowly(&model, 1, &input, &asked, &pass)?;
                for (found, expected) in found.tensors().zip(expected.tensors()) {
                    let most = |t: &Tensor| t.abs()?.max_all()?.to_scalar::<f32>();
                    let apart = most(&(found - expected).map_err(Error::plugin)?)?;
                    assert!(apart < 1e-5 * most(expected)?, "{n}, {first}: {apart}");
                }
            }
        }
        Ok(())
    }
}
