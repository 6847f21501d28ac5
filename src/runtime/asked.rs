//! Attention that some tokens of every window ask for: gradients of a layer's weights for a fraction of the work.

use candle_core::{Device, Result as Candle, Tensor};

use super::attention::Attention;
use super::layer::linear;
use super::ops::{KeptMask, times};
use super::pass::Pass;
use super::rope::Rope;
use super::weights::LayerWeights;
use super::{Model, RuntimeError};

/// Every n-th token of a window, from one on: those whose queries a layer computes, while all tokens have keys and values.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    /// Places in the window, ascending, on the device; `None` where all are asked.
    places: Option<Tensor>,
    /// Where they stand.
    positions: Vec<usize>,
    /// How their queries turn.
    turn: Rope,
    /// What hides keys from them.
    mask: KeptMask,
}

impl Asked {
    /// Those of a pass, for a layer that turns as `rope` does.
    fn every([n, first]: [usize; 2], pass: &Pass, rope: &Rope, device: &Device) -> Candle<Self> {
        let places: Vec<u32> =
            (first..pass.positions().len()).step_by(n.max(1)).map(|place| place as u32).collect();
        let positions: Vec<usize> = places.iter().map(|&place| pass.positions()[place as usize]).collect();
        let all = positions.len() == pass.positions().len();
        let places = if all { None } else { Some(Tensor::new(places, device)?) };
        let turn = places.as_ref().map_or(Ok(rope.clone()), |places| rope.at(places))?;
        Ok(Self { places, positions, turn, mask: KeptMask::default() })
    }

    /// Their rows of windows of T tokens, (B·T, d) → (B·t, d).
    pub(crate) fn rows(&self, all: &Tensor, pass: &Pass) -> Candle<Tensor> {
        let Some(places) = &self.places else { return Ok(all.clone()) };
        let (n, d) = all.dims2()?;
        let tokens = pass.positions().len();
        all.reshape((n / tokens, tokens, d))?.index_select(places, 1)?.reshape(((), d))
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
    ) -> Candle<LayerWeights> {
        let (n_q, k, h) = (self.query_heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim);
        let (len, turn) = (pass.positions().len(), &asked.turn);
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
            turn.apply(&heads(&normed_query, asked.positions.len())?)?,
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
    /// Every n-th token, from one on, for layer `i`.
    pub(crate) fn asked(&self, i: usize, n: usize, first: usize, pass: &Pass) -> Result<Asked, RuntimeError> {
        Ok(Asked::every([n, first], pass, pass.rope(i), self.place())?)
    }

    /// Gradients of the weights of the attention of layer `i` on `input`, (N, d), where `gradient` makes that of its output at the tokens
    /// asked for, (B·t, d), of that output.
    pub(crate) fn attention_backward(
        &self,
        i: usize,
        input: &Tensor,
        asked: &Asked,
        pass: &Pass,
        gradient: impl FnOnce(&Tensor) -> Candle<Tensor>,
    ) -> Result<LayerWeights, RuntimeError> {
        Ok(self.attention(i)?.backward_at(input, asked, pass, pass.rope(i), gradient)?)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ndarray::{Array1, Array2, Array3};

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::heads::{Heads, Pooled, Projection};
    use crate::model::{Alibi, AttentionSpec, Mask};
    use crate::partition::Partition;
    use crate::plan::Sharing;
    use crate::runtime::norms::HeadNorms;

    /// What all tokens give where those that do not ask have no gradient.
    fn slowly(
        attention: &Attention,
        input: &Tensor,
        asked: &Asked,
        pass: &Pass,
        rope: &Rope,
    ) -> Candle<LayerWeights> {
        let (kept, output) = attention.kept(input, pass, rope)?;
        let len = pass.positions().len();
        let share = |row: usize| if asked.positions.contains(&(row % len)) { 1.0f32 } else { 0.0 };
        let shares: Vec<f32> = (0..output.dim(0)?).map(share).collect();
        let shares = Tensor::from_vec(shares, (output.dim(0)?, 1), output.device())?;
        let gradient = output.broadcast_mul(&shares)?;
        let of_all = attention.backward(&kept, &gradient, rope)?;
        attention.weights_backward(input, &kept, &of_all, &gradient)
    }

    #[track_caller]
    fn agree(attention: &Attention, input: &Tensor, pass: &Pass, rope: &Rope) {
        for (n, first) in [(1, 0), (2, 1), (4, 3), (20, 5)] {
            let asked = Asked::every([n, first], pass, rope, &Device::Cpu).unwrap();
            let found =
                attention.backward_at(input, &asked, pass, rope, |output| Ok(output.clone())).unwrap();
            let expected = slowly(attention, input, &asked, pass, rope).unwrap();
            assert_eq!(found.tensors().count(), expected.tensors().count());
            let most = |t: &Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // Some gradients are 0 but for rounding: a bias of keys moves all scores of a query alike.
            let all = expected.tensors().map(most).fold(0.0, f32::max);
            for (i, (found, expected)) in found.tensors().zip(expected.tensors()).enumerate() {
                let apart = most(&(found - expected).unwrap());
                assert!(apart < 1e-5 * all, "every {n} from {first} on, tensor {i}: {apart} of {all}");
            }
        }
    }

    #[test]
    fn some_tokens_give_what_all_give_where_the_others_have_no_gradient() {
        // Norms of queries and keys are those of another model, which is not always there.
        let others = std::env::var_os("QCQA_MODELS").map(|models| Path::new(&models).join("novels-qwen3-7m"));
        for path in [Path::new("tests/data/novels-1m").to_path_buf()].into_iter().chain(others) {
            let model = Model::load(&Checkpoint::open(path).unwrap()).unwrap();
            let pass = model.pass(9, 0).unwrap();
            let tokens: Vec<u32> = (0..18u32).map(|t| t * t % 997).collect();
            let input = model.attention_input(1, &model.embed(&tokens, &pass).unwrap()).unwrap();
            agree(&model.attention(1).unwrap(), &input, &pass, pass.rope(1));
        }
    }

    /// Biases, bounded scores, linear biases, a window that slides, whole texts; heads of their own and groups of 1 and 3.
    #[test]
    fn whatever_an_attention_has() {
        let (heads, queries, h, d, len) = (4, 2, 4, 8, 9);
        let number = |i: usize| ((i * 7919 + 31) % 401) as f32 / 400.0 - 0.5;
        let projection = |n: usize, seed: usize| {
            let weight = Array3::from_shape_fn((n, h, d), |(a, b, c)| number(seed + (a * h + b) * d + c));
            Projection::new(weight, Some(Array2::from_shape_fn((n, h), |(a, b)| number(seed + 7 * a + b))))
                .unwrap()
        };
        let output =
            Array3::from_shape_fn((heads * queries, d, h), |(a, b, c)| number((a * d + b) * h + c + 5));
        let of_heads = Heads::new(projection(heads, 11), projection(heads, 13)).unwrap();
        let of_heads = of_heads.with_queries(projection(heads * queries, 17), output).unwrap();
        let of_heads = of_heads.with_output_bias(Array1::from_shape_fn(d, number)).unwrap();
        let pass =
            Model::load(&Checkpoint::open("tests/data/novels-1m").unwrap()).unwrap().pass(len, 0).unwrap();
        let rope = Rope::new(None, pass.positions(), &Device::Cpu).unwrap();
        let input =
            Tensor::from_vec((0..2 * len * d).map(|i| number(3 * i)).collect(), (2 * len, d), &Device::Cpu);
        let input = input.unwrap();
        let groups = Partition::from_labels(&[0, 1, 1, 1]).unwrap();
        let pooled = Pooled::new(projection(2, 19), projection(2, 23));
        for (mask, alibi, cap) in [
            (Mask::Causal, true, Some(0.5)),
            (Mask::Sliding { window: 3 }, false, None),
            (Mask::Whole, true, None),
        ] {
            let mut spec = AttentionSpec::new(heads * queries, heads, h);
            (spec.mask, spec.cap) = (mask, cap);
            spec.alibi = alibi.then(|| Alibi::new(Alibi::usual(heads * queries)));
            for shared in [None, Some((&pooled, Sharing { groups: &groups, below: None }))] {
                let attention = Attention::new(&of_heads, shared, &spec, HeadNorms::default(), &Device::Cpu);
                agree(&attention.unwrap(), &input, &pass, &rope);
            }
        }
    }
}
