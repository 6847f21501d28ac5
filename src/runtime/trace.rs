//! What layers compute on the way, for the way back: kept as far as there is room, so that it is not computed again.

use std::collections::HashSet;

use candle_core::{Result as Candle, Tensor};

use super::backward::Kept;
use super::layer::Layer;
use super::mlp::Above;
use super::pass::Pass;
use super::{Model, RuntimeError};

/// What a layer computes on the way, for the way back.
pub(crate) struct Trace {
    /// What the attention reads, (N, d), after the norm.
    pub(super) input: Tensor,
    pub(super) kept: Kept,
    /// What the attention gives, (N, d).
    pub(super) output: Tensor,
    /// The stream with that, (N, d), before its norm and behind it.
    pub(super) sum: Tensor,
    pub(super) y: Tensor,
    /// Of an MLP, where it was computed.
    pub(super) above: Option<Above>,
}

impl Trace {
    /// Numbers that it holds beside x, which the layer reads; what a norm that is not there passes on counts once.
    fn numbers(&self, x: &Tensor) -> usize {
        let mut seen = HashSet::from([x.id()]);
        let stream = [&self.input, &self.output, &self.sum, &self.y].into_iter();
        let all = stream.chain(self.kept.tensors()).chain(self.above.iter().flat_map(Above::tensors));
        all.filter(|tensor| seen.insert(tensor.id())).map(Tensor::elem_count).sum()
    }
}

impl Layer {
    /// What layer number `i` computes of x (N, d) as far as its MLP: what that computes again, the way back does with weights that it
    /// widens once.
    pub(super) fn trace(&self, i: usize, x: &Tensor, pass: &Pass) -> Candle<Trace> {
        let input = self.rest.attention_input(x)?;
        let (kept, output) = self.attention.kept(&input, pass, pass.rope(i))?;
        let sum = self.rest.attention_sum(x, &output)?;
        let y = self.rest.behind(&sum)?;
        Ok(Trace { input, kept, output, sum, y, above: None })
    }

    /// What layer number `i`, which has keys and values of its own, gives of x, (N, d) each, and all that it computes on the way.
    fn traced(&self, i: usize, x: &Tensor, pass: &Pass) -> Candle<(Tensor, Trace)> {
        let trace = self.trace(i, x, pass)?;
        let read = if self.rest.parallel { x } else { &trace.y };
        let (given, above) = self.rest.added_with_above(&trace.y, read)?;
        Ok((given, Trace { above, ..trace }))
    }
}

/// A text that has been through all layers, and what is there for its way back.
pub(crate) struct There {
    /// What enters every layer that it has yet to go back through, and what the last of these gives, (N, d) each.
    pub(crate) inputs: Vec<Tensor>,
    /// Of the first layers.
    traces: Vec<Trace>,
    /// Numbers of further traces.
    room: usize,
}

impl There {
    /// The trace of layer `i`, the next on the way back, where it was kept; what was above it goes.
    pub(crate) fn trace(&mut self, i: usize) -> Option<Trace> {
        self.inputs.truncate(i + 1);
        if self.traces.len() > i { self.traces.pop() } else { None }
    }

    /// Through layer `i`.
    fn go(&mut self, model: &Model, i: usize, pass: &Pass) -> Result<(), RuntimeError> {
        let x = &self.inputs[i];
        if self.room == 0 {
            self.inputs.push(model.layer(i, x, pass)?);
            return Ok(());
        }
        model.own_keys(i, "running a layer alone")?;
        let (given, trace) = model.whole(i)?.traced(i, x, pass)?;
        // Layers are alike: the first for which there is no room is the last that is tried.
        self.room = match self.room.checked_sub(trace.numbers(x)) {
            Some(left) => {
                self.traces.push(trace);
                left
            }
            None => 0,
        };
        self.inputs.push(given);
        Ok(())
    }
}

impl Model {
    /// Some texts through all layers, with traces of the first layers that are at most `room` numbers, all texts together.
    pub(crate) fn there(
        &self,
        texts: &[&[u32]],
        pass: &Pass,
        room: usize,
    ) -> Result<Vec<There>, RuntimeError> {
        // Each has its share, so that what is kept does not depend on who is first.
        let room = room / texts.len().max(1);
        let begin =
            |tokens: &&[u32]| Ok(There { inputs: vec![self.embed(tokens, pass)?], traces: Vec::new(), room });
        let mut all = self.each(texts, begin)?;
        for i in 0..self.n_layers() {
            self.share_out(&mut all, |there| there.go(self, i, pass))?;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::model::{Block, Norm};
    use crate::plan::Trained;
    use crate::runtime::backward::Backward;
    use crate::runtime::layer::{Normed, normed};
    use crate::runtime::mlp::Hidden;

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// All that passes back.
    fn parts(back: &Backward) -> Vec<Vec<f32>> {
        let weights = back.weights.iter().flat_map(|weights| weights.tensors());
        [&back.input].into_iter().chain(weights).map(numbers).collect()
    }

    /// A layer, and it with what other families have: an MLP beside the attention, norms behind outputs, norms behind sums.
    fn kinds(model: &Model, i: usize) -> Vec<(Layer, Block)> {
        let (layer, block) = (model.whole(i).unwrap(), model.block(i).unwrap().clone());
        let add = |of: &mut Option<Normed>, named: &mut Option<Norm>, name: &str| {
            let like = layer.rest.mlp_norm.clone().unwrap();
            *of = Some(Normed { weight: like.weight.affine(0.7, 0.1).unwrap(), ..like });
            *named = block.mlp_norm.clone().map(|norm| Norm { weight: Some(name.to_string()), ..norm });
        };
        let mut all = vec![(layer.clone(), block.clone()); 4];
        for (layer, block) in &mut all[1..] {
            (layer.rest.residual, block.residual) = (0.6, 0.6);
        }
        (all[1].0.rest.parallel, all[1].1.parallel) = (true, true);
        let (Layer { rest, .. }, named) = &mut all[2];
        add(&mut rest.attention_output_norm, &mut named.attention_output_norm, "attention output");
        add(&mut rest.mlp_output_norm, &mut named.mlp_output_norm, "output of the MLP");
        for i in 0..2 {
            let (Layer { rest, .. }, named) = &mut all[3];
            add(&mut rest.sum_norms[i], &mut named.sum_norms[i], ["sum", "other sum"][i]);
        }
        all
    }

    /// With a trace a layer gives what it gives without, and passes the same back: bit for bit, and with gates and values apart, as on
    /// a GPU, but for rounding.
    #[test]
    fn what_is_kept_is_what_is_computed_again() {
        let others = std::env::var_os("QCQA_MODELS").map(|models| Path::new(&models).join("novels-qwen3-7m"));
        for path in [Path::new("tests/data/novels-1m").to_path_buf()].into_iter().chain(others) {
            let model = Model::load(&Checkpoint::open(path).unwrap()).unwrap();
            let pass = model.pass(9, 0).unwrap();
            let tokens: Vec<u32> = (0..18u32).map(|t| t * t % 997).collect();
            let (i, x) = (1, model.layer(0, &model.embed(&tokens, &pass).unwrap(), &pass).unwrap());
            let gradient = (&x * 0.3).unwrap().sin().unwrap();
            for (n, (layer, block)) in kinds(&model, i).into_iter().enumerate() {
                let expected = layer.forward(i, &x, &pass, None, None).unwrap().0;
                let back = |trace, trained| {
                    parts(&layer.backward((i, &block), (&x, trace), &gradient, &pass, trained).unwrap())
                };
                for trained in [None, Some(Trained::Attention), Some(Trained::All)] {
                    let (given, trace) = layer.traced(i, &x, &pass).unwrap();
                    assert_eq!(numbers(&given), numbers(&expected), "{n}");
                    let again = back(None, trained);
                    assert!(back(Some(trace), trained) == again, "{n}, {trained:?}");

                    let mut trace = layer.trace(i, &x, &pass).unwrap();
                    let read = if layer.rest.parallel { &x } else { &trace.y };
                    let (input, Hidden::Dense(mlp)) =
                        (normed(&layer.rest.mlp_norm, read).unwrap(), &layer.rest.mlp)
                    else {
                        panic!("one MLP")
                    };
                    trace.above = Some(mlp.apart(&input, &mlp.up).unwrap());
                    let apart = back(Some(trace), trained);
                    assert_eq!(apart.len(), again.len());
                    for (found, expected) in apart.iter().zip(&again) {
                        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * most + 1e-7;
                        assert!(found.iter().zip(expected).all(near), "{n}, {trained:?}");
                    }
                }
            }
        }
    }

    /// As many layers as there is room for leave traces, of as many numbers as their tensors have.
    #[test]
    fn traces_keep_to_their_room() {
        let model = Model::load(&Checkpoint::open("tests/data/novels-1m").unwrap()).unwrap();
        let (pass, tokens) = (model.pass(9, 0).unwrap(), (1..19).collect::<Vec<u32>>());
        let texts: Vec<&[u32]> = tokens.chunks(9).collect();
        let layer = model.whole(0).unwrap();
        let (Hidden::Dense(mlp), attention) = (&layer.rest.mlp, &layer.attention) else { panic!("one MLP") };
        let (queries, both) = (attention.query_heads, 2 * attention.kv_heads());
        // Input, output, and the stream; queries, keys, values, what they read and the shares of it; gates and values.
        let of_attention = (2 * queries + both) * attention.head_dim + queries * 9;
        let one = 9 * (3 * model.width() + of_attention + mlp.up.dim(0).unwrap());
        for (room, layers) in [(0, 0), (2 * one - 1, 0), (2 * one, 1), (6 * one + 1, 3), (usize::MAX, 4)] {
            let plain = model.there(&texts, &pass, 0).unwrap();
            for (mut there, plain) in model.there(&texts, &pass, room).unwrap().into_iter().zip(plain) {
                let inputs = there.inputs.iter().zip(&plain.inputs);
                assert!(inputs.map(|(a, b)| (numbers(a), numbers(b))).all(|(a, b)| a == b), "{room}");
                let back: Vec<bool> = (0..4).rev().map(|i| there.trace(i).is_some()).collect();
                assert_eq!(back, [3, 2, 1, 0].map(|i| i < layers), "{room}");
                assert_eq!((there.inputs.len(), there.traces.len()), (1, 0));
            }
        }
    }
}
