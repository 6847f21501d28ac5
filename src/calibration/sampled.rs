//! Windows that a model writes itself.

use ndarray::{Array2, ArrayView1};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::Checkpoint;
use crate::run::Run;
use crate::runtime::{KvCache, Model};
use crate::text::{RuntimeError, Vocabulary, Windows};

/// Windows written at once: always as many, whatever the machine, so that the text does not depend on it.
const ROWS: usize = 16;

/// `n` windows of so many tokens sampled from a model at temperature 1, window i with `run.fork(i)`. The first token of each is drawn evenly from
/// those that the tokenizer does not call special, of a model without one from all: begun with what stands at the start of
/// every text, an instruct model writes little else than answers. Progress is stage `"sample"`.
pub(super) fn windows(
    checkpoint: &Checkpoint,
    model: &Model,
    [n, length]: [usize; 2],
    run: Run<'_>,
) -> Result<Windows, RuntimeError> {
    let mut firsts = match Vocabulary::open(checkpoint) {
        Ok(words) => words.ordinary(),
        Err(RuntimeError::NoTokenizer { .. }) => Vec::new(),
        Err(error) => return Err(error),
    };
    if firsts.is_empty() {
        firsts.extend(0..model.vocabulary() as u32);
    }
    let total = n.div_ceil(ROWS) as u64;
    let mut tokens = Vec::with_capacity(n * length);
    for (batch, start) in (0..n).step_by(ROWS).enumerate() {
        let mut rngs: Vec<ChaCha8Rng> = (start..start + ROWS).map(|i| run.fork(i as u64).rng()).collect();
        let first = rngs.iter_mut().map(|rng| firsts[rng.random_range(0..firsts.len())]);
        let mut written = vec![first.collect::<Vec<u32>>()];
        let mut cache = KvCache::default();
        while let Some(last) = written.last().filter(|_| written.len() < length) {
            let done = batch as u64 * length as u64 + written.len() as u64;
            run.step("sample", done, total * length as u64)?;
            let last = Array2::from_shape_fn((ROWS, 1), |(row, _)| last[row]);
            let logits = model.extend(&mut cache, last.view())?;
            let next = rngs.iter_mut().zip(logits.outer_iter()).map(|(rng, row)| drawn(row.row(0), rng));
            written.push(next.collect());
        }
        let row = |row: usize| written.iter().map(move |tokens| tokens[row]);
        tokens.extend((0..ROWS.min(n - start)).flat_map(row));
    }
    run.step("sample", total * length as u64, total * length as u64)?;
    Windows::new(tokens, length)
}

/// A token by its probability.
fn drawn(logits: ArrayView1<'_, f32>, rng: &mut ChaCha8Rng) -> u32 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, &l| most.max(l));
    let weight = |logit: &f32| f64::from(logit - most).exp();
    let sum: f64 = logits.iter().map(weight).sum();
    let mut left = rng.random::<f64>() * sum;
    let at = logits.iter().position(|logit| {
        left -= weight(logit);
        left < 0.0
    });
    at.unwrap_or(logits.len() - 1) as u32
}
