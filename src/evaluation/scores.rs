//! Predictions, scored where they are made, and let go of: on the CPU some of the vocabulary at a time, elsewhere some of the tokens.

use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::{DType, IndexOp, Layout, Tensor};
use rayon::prelude::*;

use crate::runtime::{Model, Predicted, largest, numbers_on_cpu, sum_of_exp, sum_of_exp_apart};
use crate::text::RuntimeError;

/// Logits of each model that are there at once on the CPU: 16 MB.
const PART: usize = 1 << 22;
/// Those of a token that its sums take at a time: they are the same however the vocabulary is parted.
const CHUNK: usize = 256;
/// Logits that are scored at once on a GPU: 256 MB.
const GPU_PART: usize = 1 << 26;

/// How well one token was foretold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Score {
    /// Its negative log-likelihood, in nats.
    pub(super) loss: f64,
    /// KL(source ‖ model) where it was foretold, and whether both held the same token the likeliest there.
    pub(super) against: Option<(f64, bool)>,
}

/// Whole windows on their way into the output embedding of a model that read them: (tokens, d) each, as many in all but the last.
#[derive(Debug)]
pub(super) struct Read<'a> {
    pub(super) model: &'a Model,
    pub(super) last: &'a [Tensor],
    /// What their logits took.
    pub(super) time: Duration,
}

impl<'a> Read<'a> {
    pub(super) fn new(model: &'a Model, last: &'a [Tensor]) -> Self {
        Self { model, last, time: Duration::ZERO }
    }

    /// Logits of some of the vocabulary for some of the tensors; the clock runs.
    fn logits(&mut self, tensors: Range<usize>, rows: Range<usize>) -> Result<Vec<Tensor>, RuntimeError> {
        let start = Instant::now();
        let head = self.model.output_rows(rows.clone())?;
        let of = |x: &Tensor| Ok(self.model.predicted(x, &head, rows.start)?.contiguous()?);
        let logits = self.model.each(&self.last[tensors], of)?;
        logits.iter().try_for_each(|logits| logits.device().synchronize())?;
        self.time += start.elapsed();
        Ok(logits)
    }
}

/// Scores of tokens 2… of each window by every model, in the order of the text; all but the first are compared with that one.
pub(super) fn scores(
    read: &mut [Read<'_>],
    tokens: &[u32],
    window: usize,
) -> Result<Vec<Vec<Score>>, RuntimeError> {
    let Some(first) = read.first() else { return Ok(Vec::new()) };
    let (model, size) = (first.model, first.last.first().map_or(1, |x| x.dims()[0]).max(1));
    if first.last.iter().all(|x| x.device().is_cpu()) {
        let rows = (PART / tokens.len().max(1) / CHUNK).max(1) * CHUNK;
        return by_parts(read, tokens, window, rows);
    }
    let mut all = vec![Vec::new(); read.len()];
    for (tokens, tensors) in parts(tokens, size, model.batch(window) * window) {
        let logits = read.iter_mut().map(|read| read.logits(tensors.clone(), 0..read.model.vocabulary()));
        let logits = logits.collect::<Result<Vec<_>, _>>()?;
        for (i, tokens) in tokens.chunks(size).enumerate() {
            for (scores, (model, own)) in all.iter_mut().zip(logits.iter().enumerate()) {
                let source = (model > 0).then(|| &logits[0][i]);
                scores.extend(by_tensors(&own[i], source, tokens, window)?);
            }
        }
    }
    Ok(all)
}

/// Tokens, of which each tensor has `size`, in parts of at most so many, or of one tensor.
fn parts(tokens: &[u32], size: usize, most: usize) -> impl Iterator<Item = (&[u32], Range<usize>)> {
    let tensors = (most / size).max(1);
    tokens.chunks(tensors * size).enumerate().map(move |(i, tokens)| {
        let first = i * tensors;
        (tokens, first..first + tokens.len().div_ceil(size))
    })
}

/// Some `rows` of the vocabulary after the other, a multiple of [`CHUNK`]; tokens are shared out over the threads.
fn by_parts(
    read: &mut [Read<'_>],
    tokens: &[u32],
    window: usize,
    rows: usize,
) -> Result<Vec<Vec<Score>>, RuntimeError> {
    let (models, vocabulary) = (read.len(), read[0].model.vocabulary());
    let mut sums = vec![Sums::default(); tokens.len() * models];
    for first in (0..vocabulary).step_by(rows) {
        let part = first..vocabulary.min(first + rows);
        let logits = read.iter_mut().map(|read| read.logits(0..read.last.len(), part.clone()));
        add(&mut sums, &logits.collect::<Result<Vec<_>, _>>()?, tokens, part)?;
    }
    Ok((0..models).map(|model| scored(&sums, models, model, tokens, window)).collect())
}

/// The scores by one of several models, of the sums of every token and model.
fn scored(sums: &[Sums], models: usize, model: usize, tokens: &[u32], window: usize) -> Vec<Score> {
    let score = |t: usize| {
        let (source, own) = (&sums[t * models], &sums[t * models + model]);
        let kl = || own.apart / source.sum - (source.log_sum() - own.log_sum());
        let against = (model > 0).then(|| (kl(), own.top == source.top));
        Score { loss: own.log_sum() - f64::from(own.came), against }
    };
    predicting(tokens, window).map(score).collect()
}

/// Adds what every model says of some of the vocabulary to the sums of every token and model. Logits are of each model by tensor.
fn add(
    sums: &mut [Sums],
    logits: &[Vec<Tensor>],
    tokens: &[u32],
    part: Range<usize>,
) -> Result<(), RuntimeError> {
    let stored = logits.iter().map(|of| of.iter().map(Tensor::storage_and_layout).collect());
    let stored: Vec<Vec<(_, &Layout)>> = stored.collect();
    let numbers = stored.iter().map(|of| of.iter().map(|(held, at)| numbers_on_cpu(held, at)).collect());
    let numbers: Vec<Vec<&[f32]>> = numbers.collect::<candle_core::Result<_>>()?;
    let size = logits[0].first().map_or(1, |logits| logits.dims()[0]).max(1);
    sums.par_chunks_exact_mut(logits.len()).enumerate().for_each(|(t, sums)| {
        let row = |model: usize| &numbers[model][t / size][t % size * part.len()..][..part.len()];
        let next = tokens.get(t + 1).map(|&next| next as usize);
        for at in (0..part.len()).step_by(CHUNK) {
            let chunk = at..part.len().min(at + CHUNK);
            let (source, own) = sums.split_at_mut(1);
            let theirs = &row(0)[chunk.clone()];
            let less = source[0].take(theirs, part.start + at, next);
            for (model, sums) in own.iter_mut().enumerate() {
                let own = &row(model + 1)[chunk.clone()];
                sums.take(own, part.start + at, next);
                sums.apart = sums.apart * less + sum_of_exp_apart(theirs, source[0].scale(), own);
            }
        }
    });
    Ok(())
}

/// What is known of the logits of one place by one model, as far as they were seen.
#[derive(Debug, Clone, Copy)]
struct Sums {
    /// The largest.
    most: f32,
    /// The likeliest token; the first of equals.
    top: usize,
    /// `Σ exp(logit − most)`.
    sum: f64,
    /// Of the token that came.
    came: f32,
    /// `Σ exp(logit of the source − its most) (logit of the source − logit)`.
    apart: f64,
}

impl Default for Sums {
    fn default() -> Self {
        Self { most: f32::NEG_INFINITY, top: 0, sum: 0.0, came: f32::NAN, apart: 0.0 }
    }
}

impl Sums {
    /// Takes the logits of the tokens from `first` on; gives what sums to the largest so far are multiplied by.
    fn take(&mut self, logits: &[f32], first: usize, came: Option<usize>) -> f64 {
        let (most, mut less) = (largest(logits), 1.0);
        if most > self.most {
            less = (f64::from(self.most) - f64::from(most)).exp();
            (self.most, self.top) = (most, first + logits.iter().position(|&l| l == most).unwrap_or(0));
        }
        self.sum = self.sum * less + sum_of_exp(logits, self.scale());
        if let Some(&logit) = came.and_then(|came| logits.get(came.checked_sub(first)?)) {
            self.came = logit;
        }
        less
    }

    /// What is taken off before exponentials: the largest, where any was above −∞.
    fn scale(&self) -> f32 {
        if self.most > f32::NEG_INFINITY { self.most } else { 0.0 }
    }

    /// `ln Σ exp(logit)`.
    fn log_sum(&self) -> f64 {
        f64::from(self.scale()) + self.sum.ln()
    }
}

/// Places whose next token is of the same window.
fn predicting(tokens: &[u32], window: usize) -> impl Iterator<Item = usize> {
    (0..tokens.len()).filter(move |t| (t + 1) % window != 0)
}

/// All places of one tensor at once: only scores leave the device. Of tokens equally likely any may be the likeliest.
fn by_tensors(
    logits: &Tensor,
    source: Option<&Tensor>,
    tokens: &[u32],
    window: usize,
) -> Result<Vec<Score>, RuntimeError> {
    let (n, vocabulary) = logits.dims2()?;
    // Nothing follows the last token; it is left out below.
    let next: Vec<u32> = tokens.iter().skip(1).chain(tokens.last()).copied().collect();
    let next = Tensor::from_vec(next, (n, 1), logits.device())?;
    let step = (GPU_PART / vocabulary.max(1)).max(1);
    let (mut losses, mut against) = (Vec::with_capacity(n), Vec::new());
    for start in (0..n).step_by(step) {
        let part = start..(start + step).min(n);
        let (own, next) = (logits.i(part.clone())?, next.i(part.clone())?);
        let of_own = Predicted::of(&own)?;
        let came = own.gather(&next, 1)?.flatten_all()?.to_dtype(DType::F64)?;
        losses.extend((&of_own.log_sums - came)?.to_vec1::<f64>()?);
        if let Some(source) = source {
            let theirs = source.i(part)?;
            let kl = Predicted::of(&theirs)?.against(&of_own)?.to_vec1::<f64>()?;
            let same = theirs.argmax(1)?.eq(&own.argmax(1)?)?.to_vec1::<u8>()?;
            against.extend(kl.into_iter().zip(same.into_iter().map(|same| same == 1)));
        }
    }
    let score = |t: usize| Score { loss: losses[t], against: against.get(t).copied() };
    Ok(predicting(tokens, window).map(score).collect())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_are_whole_tensors_however_few_windows_the_last_has() {
        let tokens: Vec<u32> = (0..40).collect();
        for (size, most) in [(12, 20), (12, 24), (16, 3), (40, 40), (36, 99)] {
            let found: Vec<(&[u32], Range<usize>)> = parts(&tokens, size, most).collect();
            assert_eq!(found.iter().flat_map(|(tokens, _)| tokens.to_vec()).collect::<Vec<_>>(), tokens);
            for (tokens, tensors) in &found {
                assert_eq!(tokens[0] as usize, tensors.start * size);
                assert!(tokens.len() <= most.max(size) && tokens.len().div_ceil(size) == tensors.len());
            }
            assert_eq!(found.last().unwrap().1.end, 40usize.div_ceil(size));
        }
    }

    proptest! {
        /// What other devices compute is what the CPU computes, in however many parts; the definition is in tests/runtime_evaluate.rs.
        #[test]
        fn all_ways_agree(
            windows in 1usize..4, window in 2usize..9, vocabulary in 2usize..1400, seed in 0usize..1000, models in 1usize..4,
            rows in 1usize..7,
        ) {
            let n = windows * window;
            let tokens: Vec<u32> = (0..n).map(|t| ((t * 31 + seed) % vocabulary) as u32).collect();
            let logits = |model: usize| {
                // No two numbers of a row are equal.
                let number = |i: usize| ((i * 7919 + seed * 17 * (model + 1)) % 10007) as f32 / 500.0 - 10.0;
                Tensor::from_vec((0..n * vocabulary).map(number).collect(), (n, vocabulary), &Device::Cpu).unwrap()
            };
            let all: Vec<Tensor> = (0..models).map(logits).collect();
            let sums = |rows: usize| {
                let mut sums = vec![Sums::default(); n * models];
                for first in (0..vocabulary).step_by(rows) {
                    let part = first..vocabulary.min(first + rows);
                    // Windows are tensors of their own.
                    let tensor = |of: &Tensor, i: usize| {
                        of.i((i * window..(i + 1) * window, part.clone())).unwrap().contiguous().unwrap()
                    };
                    let parts: Vec<Vec<Tensor>> =
                        all.iter().map(|of| (0..windows).map(|i| tensor(of, i)).collect()).collect();
                    add(&mut sums, &parts, &tokens, part).unwrap();
                }
                sums
            };
            let (whole, parted) = (sums(1 << 20), sums(rows * CHUNK));
            prop_assert_eq!(format!("{whole:?}"), format!("{parted:?}"));
            for model in 0..models {
                let source = (model > 0).then(|| &all[0]);
                let tensors = by_tensors(&all[model], source, &tokens, window).unwrap();
                let rows = scored(&whole, models, model, &tokens, window);
                prop_assert_eq!((rows.len(), tensors.len()), (n - windows, n - windows));
                for (a, b) in rows.iter().zip(&tensors) {
                    prop_assert!((a.loss - b.loss).abs() < 1e-5);
                    prop_assert_eq!(a.against.is_some(), model > 0);
                    let ((kl, same), (other_kl, other_same)) =
                        (a.against.unwrap_or_default(), b.against.unwrap_or_default());
                    prop_assert!((kl - other_kl).abs() < 1e-5 * kl.max(1.0) && same == other_same);
                }
            }
        }
    }
}
