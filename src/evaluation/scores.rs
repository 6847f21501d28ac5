//! Predictions, scored on the device that made them.

use candle_core::{DType, IndexOp, Tensor};
use rayon::prelude::*;

use crate::runtime::{Predicted, largest, numbers_on_cpu, sum_of_exp, sum_of_exp_apart};
use crate::text::RuntimeError;

/// Logits that are scored at once: 256 MB.
const PART_LOGITS: usize = 1 << 26;

/// How well one token was foretold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Score {
    /// Its negative log-likelihood, in nats.
    pub(super) loss: f64,
    /// KL(source ‖ model) where it was foretold, and whether both held the same token the likeliest there.
    pub(super) against: Option<(f64, bool)>,
}

/// Scores of tokens 2… of each window, in the order of the text. `logits`, and those of the source where there are any, are
/// (tokens, vocabulary) over whole windows.
pub(super) fn scores(
    logits: &Tensor,
    source: Option<&Tensor>,
    tokens: &[u32],
    window: usize,
) -> Result<Vec<Score>, RuntimeError> {
    let by = if logits.device().is_cpu() { by_rows } else { by_tensors };
    by(logits, source, tokens, window)
}

/// One place after the other, shared out over the threads.
fn by_rows(
    logits: &Tensor,
    source: Option<&Tensor>,
    tokens: &[u32],
    window: usize,
) -> Result<Vec<Score>, RuntimeError> {
    let vocabulary = logits.dims2()?.1;
    // As they lie: a window's are large.
    let (logits, source) = (logits.contiguous()?, source.map(Tensor::contiguous).transpose()?);
    let (own, theirs) = (logits.storage_and_layout(), source.as_ref().map(Tensor::storage_and_layout));
    let logits = numbers_on_cpu(&own.0, own.1)?;
    let source = theirs.as_ref().map(|(storage, layout)| numbers_on_cpu(storage, layout)).transpose()?;
    let scored = |t: usize| {
        let own = &logits[t * vocabulary..][..vocabulary];
        let score = Scored::of(own);
        let against = source.map(|source| {
            let theirs = &source[t * vocabulary..][..vocabulary];
            let Scored { log_sum, most, top } = Scored::of(theirs);
            let apart = sum_of_exp_apart(theirs, most, own) * (f64::from(most) - log_sum).exp();
            (apart - (log_sum - score.log_sum), top == score.top)
        });
        Score { loss: score.log_sum - f64::from(own[tokens[t + 1] as usize]), against }
    };
    let predicting: Vec<usize> = predicting(tokens, window).collect();
    Ok(predicting.into_par_iter().map(scored).collect())
}

/// Places whose next token is of the same window.
fn predicting(tokens: &[u32], window: usize) -> impl Iterator<Item = usize> {
    (0..tokens.len()).filter(move |t| (t + 1) % window != 0)
}

/// What is needed of the logits of one place.
struct Scored {
    /// `ln Σ exp(logit)`.
    log_sum: f64,
    /// The largest logit.
    most: f32,
    /// The likeliest token; the first of equals.
    top: usize,
}

impl Scored {
    fn of(logits: &[f32]) -> Self {
        let most = largest(logits);
        let top = logits.iter().position(|&l| l == most).unwrap_or(0);
        Self { log_sum: f64::from(most) + sum_of_exp(logits, most).ln(), most, top }
    }
}

/// All places at once, by tensors: only scores leave the device. Of tokens equally likely any may be the likeliest.
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
    let step = (PART_LOGITS / vocabulary.max(1)).max(1);
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

    proptest! {
        /// What other devices compute is what the CPU computes; the definition is in tests/runtime_evaluate.rs.
        #[test]
        fn both_ways_agree(
            windows in 1usize..4, window in 2usize..9, vocabulary in 2usize..40, seed in 0usize..1000, compared: bool,
        ) {
            let n = windows * window;
            let tokens: Vec<u32> = (0..n).map(|t| ((t * 31 + seed) % vocabulary) as u32).collect();
            let logits = |shift: usize| {
                // No two numbers of a row are equal.
                let number = |i: usize| ((i * 7919 + seed * shift) % 10007) as f32 / 500.0 - 10.0;
                Tensor::from_vec((0..n * vocabulary).map(number).collect(), (n, vocabulary), &Device::Cpu).unwrap()
            };
            let (own, source) = (logits(17), compared.then(|| logits(29)));
            let rows = by_rows(&own, source.as_ref(), &tokens, window).unwrap();
            let tensors = by_tensors(&own, source.as_ref(), &tokens, window).unwrap();
            prop_assert_eq!((rows.len(), tensors.len()), (n - windows, n - windows));
            for (a, b) in rows.iter().zip(&tensors) {
                prop_assert!((a.loss - b.loss).abs() < 1e-6);
                prop_assert_eq!(a.against.is_some(), compared);
                let ((kl, same), (other_kl, other_same)) =
                    (a.against.unwrap_or_default(), b.against.unwrap_or_default());
                prop_assert!((kl - other_kl).abs() < 1e-5 * kl.max(1.0) && same == other_same);
            }
        }
    }
}
