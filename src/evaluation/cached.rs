use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use rayon::prelude::*;

use super::{Evaluation, Reference, Tally, comparable, last};
use crate::run::Run;
use crate::runtime::{CachePolicy, KvCache, Model, Steps};
use crate::text::RuntimeError;

/// How well a model reads a text through a cache, and what the cache held.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Cached {
    /// Of the predictions that the model made so.
    pub evaluation: Evaluation,
    /// Bytes that the cache held at the end of a window, mean over the windows.
    pub bytes: f64,
    /// The most bytes that it held after a step.
    pub most_bytes: usize,
    /// The predictions of the windows' stretches, as far as these go.
    pub stretches: Vec<Stretch>,
}

impl Cached {
    /// KL(source ‖ model), by which mixtures are chosen: what is further from its source may still read one text better.
    pub(crate) fn kl(&self) -> f64 {
        self.evaluation.divergence.map_or(f64::INFINITY, |divergence| divergence.kl)
    }
}

/// Predictions of tokens at some places of their windows.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Stretch {
    /// The places, from 0.
    pub places: Range<usize>,
    /// Mean negative log-likelihood, in nats.
    pub loss: f64,
    /// Mean KL(source ‖ model), in nats.
    pub kl: f64,
}

/// Ends of the stretches that are told apart.
const STRETCHES: [usize; 7] = [128, 512, 1024, 2048, 4096, 8192, usize::MAX];

/// The stretches of windows, of sums over `windows` of them for each place but the first.
fn stretches(sums: &[[f64; 2]], windows: u64) -> Vec<Stretch> {
    let mut from = 0;
    let ends = STRETCHES.iter().map(|&end| end.min(sums.len() + 1));
    let of = ends.filter_map(|end| {
        let places = std::mem::replace(&mut from, end)..end;
        // Nothing predicts the first token.
        let own = &sums[places.start.max(1) - 1..end - 1];
        let mean = |part: usize| {
            own.iter().map(|sums| sums[part]).sum::<f64>() / (own.len() as f64 * windows as f64)
        };
        (!own.is_empty()).then(|| Stretch { places, loss: mean(0), kl: mean(1).max(0.0) })
    });
    of.collect()
}

impl Reference<'_> {
    /// How well a model reads the text through a cache of this policy, a window after the other from an empty one, and how far that is
    /// from the source, which reads whole windows. Progress is stage `"evaluate"`.
    ///
    /// # Errors
    /// As [`Reference::compare`]; what the policy reports.
    pub fn compare_through(
        &self,
        model: &Model,
        policy: &Arc<dyn CachePolicy>,
        steps: Steps,
        run: Run<'_>,
    ) -> Result<Cached, RuntimeError> {
        comparable(self.model, model)?;
        let (windows, length, mut tally) = (self.read.windows, self.read.windows.length(), Tally::default());
        let abreast = model.abreast(length);
        let (done, total) = (AtomicU64::new(0), windows.count() as u64);
        let (mut at_the_end, mut most_bytes) = (0, 0);
        run.step("evaluate", 0, total)?;
        // As many windows as keep the threads busy; what is read abreast of the source is one tensor.
        let together = (2 * rayon::current_num_threads()).div_ceil(abreast);
        for (tokens, theirs) in windows.batches(together * abreast).zip(self.read.inputs.chunks(together)) {
            let row = |tokens: &[u32]| {
                let (mut last, mut most) = (0, 0);
                let held = |bytes: usize| (last, most) = (bytes, bytes.max(most));
                let read = model.row_by_cache(tokens, steps, KvCache::shared(policy.clone()), held)?;
                run.step("evaluate", done.fetch_add(1, Ordering::Relaxed) + 1, total)?;
                Ok((read, last, most))
            };
            let rows = tally.timed(|| {
                tokens.par_chunks_exact(length).map(row).collect::<Result<Vec<_>, RuntimeError>>()
            })?;
            for (_, last, most) in &rows {
                at_the_end += last;
                most_bytes = most_bytes.max(*most);
            }
            let rows: Vec<Tensor> = rows.into_iter().map(|(read, ..)| read).collect();
            let own = rows
                .chunks(abreast)
                .map(|rows| Tensor::cat(rows, 0))
                .collect::<candle_core::Result<Vec<_>>>()?;
            let own = tally.timed(|| last(model, own))?;
            self.score(&mut tally, model, tokens, [&own, theirs])?;
        }
        Ok(Cached {
            bytes: at_the_end as f64 / total as f64,
            most_bytes,
            stretches: stretches(&tally.by_place, total),
            evaluation: tally.finish(model)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_means_of_their_places() {
        let sums: Vec<[f64; 2]> = (1..600).map(|place| [2.0 * place as f64, 4.0]).collect();
        let found = stretches(&sums, 2);
        let expected = [(0..128, 64.0), (128..512, 319.5), (512..600, 555.5)];
        assert_eq!(found.len(), expected.len());
        for (stretch, (places, loss)) in found.iter().zip(expected) {
            assert_eq!((stretch.places.clone(), stretch.loss, stretch.kl), (places, loss, 2.0));
        }
    }
}
