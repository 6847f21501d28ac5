use candle_core::Tensor;
use rayon::prelude::*;

use super::optimizer::{Memory, Optimizer};
use crate::error::Result;
use crate::runtime::{AttentionWeights, Model, Pass};
use crate::text::{RuntimeError, Windows};

/// A model on its way towards its source: weights, and what the optimizer remembers of them.
#[derive(Debug)]
pub(super) struct Trainer<'a> {
    pub(super) source: &'a Model,
    pub(super) model: Model,
    pub(super) optimizer: Optimizer,
    pub(super) memory: Vec<Memory>,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(source: &'a Model, model: Model, optimizer: Optimizer) -> Result<Self, RuntimeError> {
        let layers = 0..model.n_layers();
        let memory = layers.map(|i| Ok(optimizer.memory(&model.attention_weights(i)?)?));
        Ok(Self { source, memory: memory.collect::<Result<_, RuntimeError>>()?, model, optimizer })
    }

    /// Goes one step on some windows, and gives the mean KL(source ‖ model) over their tokens before it.
    pub(super) fn step(&mut self, windows: &[&[u32]], step: u64, rate: f64) -> Result<f64, RuntimeError> {
        let (divergence, gradients) = self.gradients(windows)?;
        for (i, (gradients, memory)) in gradients.iter().zip(&mut self.memory).enumerate() {
            let (weights, h) = (self.model.attention_weights(i)?, self.model.head_dim(i));
            let weights = self.optimizer.step(&weights, gradients, memory, (step, rate, h))?;
            self.model.set_attention_weights(i, &weights)?;
        }
        Ok(divergence)
    }

    /// The mean KL(source ‖ model) over the tokens of some windows, and its gradient for the weights of every layer.
    ///
    /// Windows are added up one after the other, whoever computes them: as many threads as there are give one sum.
    pub(super) fn gradients(&self, windows: &[&[u32]]) -> Result<(f64, Vec<AttentionWeights>), RuntimeError> {
        let (mut divergence, mut tokens) = (0.0, 0);
        let mut sums: Vec<Option<AttentionWeights>> = vec![None; self.model.n_layers()];
        for windows in windows.chunks(self.model.windows_at_once()) {
            let chunks = Chunk::of(&self.model, windows)?;
            for found in self.chunk_gradients(&chunks, &mut sums)? {
                tokens += found.len();
                divergence += found.into_iter().sum::<f64>();
            }
        }
        let share = 1.0 / tokens.max(1) as f64;
        let mean = |sum: AttentionWeights| Ok(sum.map(|tensor| tensor.affine(share, 0.0))?);
        let gradients = sums.into_iter().flatten().map(mean).collect::<Result<_, RuntimeError>>()?;
        Ok((divergence * share, gradients))
    }

    /// Adds the gradients of the sum over the tokens of some windows to `sums`, and gives the divergence of every token.
    fn chunk_gradients(
        &self,
        chunks: &[Chunk],
        sums: &mut [Option<AttentionWeights>],
    ) -> Result<Vec<Vec<f64>>, RuntimeError> {
        let (source, model) = (self.source, &self.model);
        let forward = |chunk: &Chunk| {
            let theirs = source.last(&source.hidden(&chunk.tokens, &chunk.pass)?)?;
            let inputs = model.layer_inputs(&chunk.tokens, &chunk.pass)?;
            let last = &inputs[model.n_layers()];
            let (divergences, gradient) = model.divergence(&theirs, &model.last(last)?)?;
            let gradient = model.last_backward(last, &gradient)?;
            Ok((divergences, inputs, gradient))
        };
        let forward = chunks.par_iter().map(forward).collect::<Result<Vec<_>, RuntimeError>>()?;
        let (mut divergences, mut inputs, mut gradients) = (Vec::new(), Vec::new(), Vec::new());
        for (found, of, gradient) in forward {
            divergences.push(found);
            inputs.push(of);
            gradients.push(gradient);
        }
        for (i, sum) in sums.iter_mut().enumerate().rev() {
            let layer = |((chunk, inputs), gradient): ((&Chunk, &mut Vec<Tensor>), &Tensor)| {
                inputs.truncate(i + 1);
                Ok(model.backward(i, &inputs[i], gradient, &chunk.pass, true)?)
            };
            let back = chunks.par_iter().zip(&mut inputs).zip(&gradients).map(layer);
            let back = back.collect::<Result<Vec<_>, RuntimeError>>()?;
            gradients.clear();
            for back in back {
                gradients.push(back.input);
                if let Some(weights) = back.weights {
                    *sum = Some(match sum.take() {
                        Some(sum) => sum.plus(&weights)?,
                        None => weights,
                    });
                }
            }
        }
        Ok(divergences)
    }

    /// The mean KL(source ‖ model) over the tokens predicted of some windows, all but the last of each.
    pub(super) fn divergence(&self, windows: &Windows) -> Result<f64, RuntimeError> {
        let of = |chunk: &Chunk| -> Result<(f64, usize), RuntimeError> {
            let last = |model: &Model| Ok::<_, RuntimeError>(model.last(&model.hidden(&chunk.tokens, &chunk.pass)?)?);
            let divergences = self.model.divergences(&last(self.source)?, &last(&self.model)?)?;
            let of_window = |window: &[f64]| (window[..window.len() - 1].iter().sum::<f64>(), window.len() - 1);
            let windows = divergences.chunks(windows.length()).map(of_window);
            Ok(windows.fold((0.0, 0), |(sum, all): (f64, usize), (part, n)| (sum + part, all + n)))
        };
        let texts: Vec<&[u32]> = windows.batches(1).collect();
        let (mut sum, mut tokens) = (0.0, 0);
        for windows in texts.chunks(self.model.windows_at_once()) {
            let chunks = Chunk::of(&self.model, windows)?;
            for (part, n) in chunks.par_iter().map(of).collect::<Result<Vec<_>, _>>()? {
                sum += part;
                tokens += n;
            }
        }
        Ok(sum / tokens.max(1) as f64)
    }
}

/// Windows that are computed together.
#[derive(Debug)]
struct Chunk {
    tokens: Vec<u32>,
    pass: Pass,
}

impl Chunk {
    /// Windows of equal length, each on its own where the model shares windows out over threads, else all in one.
    fn of(model: &Model, windows: &[&[u32]]) -> Result<Vec<Self>, RuntimeError> {
        let length = windows.first().map_or(0, |window| window.len());
        let chunk = |windows: &[&[u32]]| {
            Ok(Self { tokens: windows.concat(), pass: model.pass(windows.len(), length, 0)? })
        };
        windows.chunks(model.windows_in_one(windows.len())).map(chunk).collect()
    }
}
