//! The output embedding, in blocks: what predictions differ by, and its gradient, without the logits of a whole text.

use std::ops::Range;

use candle_core::{DType, Result as Candle, Tensor};
use candle_nn::ops::softmax_last_dim;
use ndarray::{Array3, ArrayView2};
use rayon::prelude::*;

use super::layer::{linear, normed, normed_backward};
use super::model::numbers;
use super::ops::{
    capped, capped_backward, exp, largest, numbers_on_cpu, sum_of_exp, sum_of_exp_apart, times,
};
use super::{Model, RuntimeError};
use crate::error::Error;

/// Numbers of logits held at once, of each of two models.
const BLOCK_LOGITS: usize = 1 << 22;
/// Numbers of an output embedding that are in memory at a time where it is in files.
const PART: usize = 1 << 23;
/// On a device with memory to spare and products that want to be large.
const DEVICE_BLOCK_LOGITS: usize = 1 << 27;

impl Model {
    /// What the output embedding reads of what the last layer gives, (N, d) → (N, d).
    pub(crate) fn last(&self, x: &Tensor) -> Candle<Tensor> {
        normed(&self.ends.norm, x)
    }

    /// Hidden states (B, T, d) of B rows of T tokens: what the output embedding reads, of an encoder what it gives.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn hidden_states(&self, tokens: ArrayView2<'_, u32>) -> Result<Array3<f32>, RuntimeError> {
        let (batch, len) = tokens.dim();
        let flat: Vec<u32> = tokens.iter().copied().collect();
        let parts = self.rows(&flat, batch)?.into_iter().map(|x| numbers(&self.last(&x)?));
        let parts: Vec<Vec<f32>> = parts.collect::<Result<_, RuntimeError>>()?;
        Ok(Array3::from_shape_vec((batch, len, self.width()), parts.concat()).map_err(Error::plugin)?)
    }

    /// What the last layer gives, (N, d) → logits (N, vocabulary); some of the output embedding is in memory at a time where it is in
    /// files.
    pub(crate) fn head(&self, x: &Tensor) -> Result<Tensor, RuntimeError> {
        let rows = if self.in_files() { PART / self.width().max(1) } else { self.vocabulary() };
        self.head_in_parts(x, rows.max(1))
    }

    /// As [`Model::head`], so many rows of the output embedding at a time.
    fn head_in_parts(&self, x: &Tensor, rows: usize) -> Result<Tensor, RuntimeError> {
        let (x, vocabulary) = (self.last(x)?, self.vocabulary());
        if rows >= vocabulary {
            return Ok(self.predicted(&x, &self.output_embedding()?, 0)?);
        }
        let made = Tensor::zeros((x.dim(0)?, vocabulary), x.dtype(), &self.device)?;
        for first in (0..vocabulary).step_by(rows) {
            let head = self.output_rows(first..vocabulary.min(first + rows))?;
            made.slice_set(&self.predicted(&x, &head, first)?, 1, first)?;
        }
        Ok(made)
    }

    /// What passes back through [`Model::last`], (N, d).
    pub(crate) fn last_backward(&self, x: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        normed_backward(&self.ends.norm, x, gradient)
    }

    /// Logits (N, n) of what the output embedding reads, (N, d), for those n of the vocabulary from `first` on whose rows these are,
    /// (n, d).
    pub(crate) fn predicted(&self, x: &Tensor, rows: &Tensor, first: usize) -> Candle<Tensor> {
        let bias =
            self.ends.head_bias.as_ref().map(|bias| bias.narrow(0, first, rows.dim(0)?)).transpose()?;
        let logits = times(linear(x, rows, &bias)?, self.ends.logit_scale)?;
        self.ends.logit_cap.map_or(Ok(logits.clone()), |cap| capped(&logits, cap))
    }

    /// Rows of the output embedding, (n, d).
    pub(crate) fn output_rows(&self, rows: Range<usize>) -> Result<Tensor, RuntimeError> {
        self.shelf.head(rows)
    }

    /// From logits and their gradient, (N, vocabulary), to that of what the output embedding read, (N, d).
    fn predicted_backward(&self, made: &Tensor, gradient: Tensor, head: &Tensor) -> Candle<Tensor> {
        let gradient = match self.ends.logit_cap {
            Some(cap) => capped_backward(made, cap, &gradient)?,
            None => gradient,
        };
        times(gradient, self.ends.logit_scale)?.matmul(head)
    }

    /// KL(source ‖ this) of every token, from what the output embeddings of both read, (N, d). The two models share their
    /// output embedding.
    pub(crate) fn divergences(&self, source: &Tensor, own: &Tensor) -> Result<Vec<f64>, RuntimeError> {
        let mut divergences = Vec::new();
        self.compared(source, own, |found, _, _| {
            divergences.extend(found);
            Ok(())
        })?;
        Ok(divergences)
    }

    /// [`Model::divergences`], and the gradient (N, d) of their sum with respect to what this model's embedding reads.
    pub(crate) fn divergence(
        &self,
        source: &Tensor,
        own: &Tensor,
    ) -> Result<(Vec<f64>, Tensor), RuntimeError> {
        let (mut divergences, mut gradients, head) = (Vec::new(), Vec::new(), self.output_embedding()?);
        self.compared(source, own, |found, logits, back| {
            divergences.extend(found);
            gradients.push(self.predicted_backward(logits, back, &head)?);
            Ok(())
        })?;
        Ok((divergences, Tensor::cat(&gradients, 0)?))
    }

    /// Block by block the divergence of every token, this model's logits, and the gradient with respect to them.
    fn compared(
        &self,
        source: &Tensor,
        own: &Tensor,
        mut take: impl FnMut(Vec<f64>, &Tensor, Tensor) -> Candle<()>,
    ) -> Result<(), RuntimeError> {
        let head = self.output_embedding()?;
        for (first, n) in self.blocks(own.dim(0)?) {
            let logits = |x: &Tensor| self.predicted(&x.narrow(0, first, n)?, &head, 0);
            let (source, own) = (logits(source)?, logits(own)?);
            let (found, back) = divergence(&source, &own)?;
            take(found, &own, back)?;
        }
        Ok(())
    }

    /// Gradient (N, d) of `Σ_t ln p(y_t)` with respect to what the output embedding reads, (N, d), where the y_t are drawn
    /// from the model's own predictions by `draw`, one number of [0, 1) a token.
    pub(crate) fn drawn_gradient(&self, own: &Tensor, draw: &[f32]) -> Result<Tensor, RuntimeError> {
        let (mut gradients, head) = (Vec::new(), self.output_embedding()?);
        for (first, n) in self.blocks(own.dim(0)?) {
            let logits = self.predicted(&own.narrow(0, first, n)?, &head, 0)?;
            let probabilities: Vec<f32> = softmax_last_dim(&logits)?.flatten_all()?.to_vec1()?;
            let vocabulary = self.vocabulary();
            let mut back = probabilities;
            back.par_chunks_exact_mut(vocabulary).zip(&draw[first..first + n]).for_each(|(row, &at)| {
                let drawn = drawn(row, at);
                row.iter_mut().for_each(|p| *p = -*p);
                row[drawn] += 1.0;
            });
            let back = Tensor::from_vec(back, (n, vocabulary), own.device())?;
            gradients.push(self.predicted_backward(&logits, back, &head)?);
        }
        Ok(Tensor::cat(&gradients, 0)?)
    }

    /// Blocks of tokens whose logits are few enough, as (first, number).
    fn blocks(&self, tokens: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let most = if self.device.is_cpu() { BLOCK_LOGITS } else { DEVICE_BLOCK_LOGITS };
        let n = (most / self.vocabulary().max(1)).max(1);
        (0..tokens).step_by(n).map(move |first| (first, n.min(tokens - first)))
    }
}

/// The index at which the running sum of the probabilities passes `at`.
fn drawn(probabilities: &[f32], at: f32) -> usize {
    let mut sum = 0.0;
    let passed = probabilities.iter().position(|p| {
        sum += p;
        sum > at
    });
    passed.unwrap_or(probabilities.len() - 1)
}

/// KL(p ‖ q) of the rows of two blocks of logits (n, V), and q − p, its gradient with respect to the logits of q.
fn divergence(p: &Tensor, q: &Tensor) -> Candle<(Vec<f64>, Tensor)> {
    if !p.device().is_cpu() {
        return divergence_by_tensors(p, q);
    }
    let (n, vocabulary) = p.dims2()?;
    let ((of_p, at_p), (of_q, at_q)) = (p.storage_and_layout(), q.storage_and_layout());
    let (of_p, of_q) = (numbers_on_cpu(&of_p, at_p)?, numbers_on_cpu(&of_q, at_q)?);
    let mut back = vec![0.0; n * vocabulary];
    let rows = of_p.par_chunks_exact(vocabulary).zip(of_q.par_chunks_exact(vocabulary));
    let divergences = back.par_chunks_exact_mut(vocabulary).zip(rows).map(|(back, (p, q))| row(p, q, back));
    let divergences = divergences.collect();
    Ok((divergences, Tensor::from_vec(back, (n, vocabulary), p.device())?))
}

/// [`divergence`], of candle's operations.
fn divergence_by_tensors(p: &Tensor, q: &Tensor) -> Candle<(Vec<f64>, Tensor)> {
    let (of_p, of_q) = (Predicted::of(p)?, Predicted::of(q)?);
    Ok((of_p.against(&of_q)?.to_vec1()?, (of_q.shares - of_p.shares)?))
}

/// Rows of logits, (N, vocabulary), elsewhere than on the CPU.
#[derive(Debug)]
pub(crate) struct Predicted<'a> {
    logits: &'a Tensor,
    /// The probabilities.
    shares: Tensor,
    /// `ln Σ exp(logit)` of every row, (N), in f64.
    pub(crate) log_sums: Tensor,
}

impl<'a> Predicted<'a> {
    /// On a GPU to take a number off each row takes ten times as long as a difference of two blocks: the logarithms of the sums
    /// are found at the likeliest token, and go into what is summed at the end.
    pub(crate) fn of(logits: &'a Tensor) -> Candle<Self> {
        let shares = softmax_last_dim(&logits.contiguous()?)?;
        let [most, share] = [logits, &shares].map(|of| of.max(1)?.to_dtype(DType::F64));
        Ok(Self { logits, log_sums: (most? - share?.log()?)?, shares })
    }

    /// KL(these ‖ others) of every row, (N), in f64.
    pub(crate) fn against(&self, others: &Predicted<'_>) -> Candle<Tensor> {
        let apart = (&self.shares * (self.logits - others.logits)?)?.sum(1)?.to_dtype(DType::F64)?;
        apart + (&others.log_sums - &self.log_sums)?
    }
}

/// KL of one row, and q − p into `back`.
fn row(p: &[f32], q: &[f32], back: &mut [f32]) -> f64 {
    let (most_p, most_q) = (largest(p), largest(q));
    let (sum_p, sum_q) = (sum_of_exp(p, most_p), sum_of_exp(q, most_q));
    let apart = sum_of_exp_apart(p, most_p, q);
    let (share_p, share_q) = ((1.0 / sum_p) as f32, (1.0 / sum_q) as f32);
    for ((back, p), q) in back.iter_mut().zip(p).zip(q) {
        *back = exp(q - most_q) * share_q - exp(p - most_p) * share_p;
    }
    apart / sum_p - (f64::from(most_p) + sum_p.ln()) + (f64::from(most_q) + sum_q.ln())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::Checkpoint;

    /// Of weights that are held or in files, with a bias for every token.
    #[test]
    fn parts_of_an_output_embedding_predict_what_the_whole_does() -> Result<(), RuntimeError> {
        let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
        let (mut held, mut read) = (Model::load(&checkpoint)?, Model::open_by_layers(&checkpoint)?);
        let all = held.vocabulary();
        let bias = Tensor::arange(0f32, all as f32, &Device::Cpu)?;
        for model in [&mut held, &mut read] {
            let ends = std::sync::Arc::get_mut(&mut model.ends).expect("nobody else has it");
            ends.head_bias = Some(bias.clone());
        }
        let x = Tensor::randn(0f32, 1.0, (3, held.width()), &Device::Cpu)?;
        let whole = held.head(&x)?.to_vec2::<f32>()?;
        assert!(whole.iter().all(|row| row[all - 1] > all as f32 / 2.0), "the bias counts");
        for rows in [1, 7, all - 1, all, 2 * all] {
            for model in [&held, &read] {
                let parts = model.head_in_parts(&x, rows)?.to_vec2::<f32>()?;
                for (whole, part) in whole.iter().flatten().zip(parts.iter().flatten()) {
                    assert!((whole - part).abs() < 1e-5 * (1.0 + whole.abs()), "{rows}");
                }
            }
        }
        Ok(())
    }

    proptest! {
        /// What other devices compute is what the CPU computes, and both are the definition.
        #[test]
        fn both_ways_agree(n in 1usize..6, vocabulary in 1usize..50, seed in 0usize..1000) {
            let logits = |seed: usize| -> Vec<f32> {
                (0..n * vocabulary).map(|i| ((i * 7919 + seed * 31) % 801) as f32 / 40.0 - 10.0).collect()
            };
            let rows = [logits(seed), logits(seed + 7)];
            let [p, q] = [&rows[0], &rows[1]]
                .map(|logits| Tensor::from_slice(logits, (n, vocabulary), &Device::Cpu).unwrap());
            let found = [divergence(&p, &q).unwrap(), divergence_by_tensors(&p, &q).unwrap()];
            let shares = |row: &[f32]| -> Vec<f64> {
                let exps: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
                let sum: f64 = exps.iter().sum();
                exps.into_iter().map(|e| e / sum).collect()
            };
            for row in 0..n {
                let [p, q] = [0, 1].map(|i| shares(&rows[i][row * vocabulary..][..vocabulary]));
                let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
                for (divergences, back) in &found {
                    prop_assert!((divergences[row] - kl).abs() < 1e-4 * (1.0 + kl));
                    let back: Vec<f32> = back.get(row).unwrap().to_vec1().unwrap();
                    for ((back, p), q) in back.iter().zip(&p).zip(&q) {
                        prop_assert!((f64::from(*back) - (q - p)).abs() < 1e-6);
                    }
                }
            }
        }
    }
}
