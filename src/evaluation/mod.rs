//! How well models do: perplexity and divergence from the source on [windows](Windows) of text, [hidden states](hidden_distance)
//! of encoders, [multiple choice](Choices), and [how much each layer pays](Sensitivity) for being grouped.
//!
//! Sums over tokens are taken in f64 and in the order of the text: results do not depend on the number of threads.

mod cached;
mod choices;
mod fisher;
mod hidden;
mod items;
mod pairs;
mod recall;
mod reference;
mod scores;
mod sensitivity;
mod trial;

use std::time::{Duration, Instant};

use candle_core::Tensor;
use rayon::prelude::*;

use self::scores::{Read, Score, scores};
use crate::error::Result;
use crate::run::Run;
use crate::runtime::{KvCache, Model, Steps};
use crate::text::{RuntimeError, Windows};

pub use cached::{Cached, Stretch};
pub use choices::{Accuracy, Choice, Choices};
pub use hidden::{HiddenDistance, hidden_distance};
pub use items::{Item, Items};
pub use pairs::PairSensitivity;
pub use recall::{Preparation, Recall, head_importance, recall};
pub use reference::Reference;
pub use sensitivity::Sensitivity;
pub use trial::{Trial, choose_model};

/// How well a model predicts a text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Mean negative log-likelihood of tokens 2… of each window, in nats.
    pub loss: f64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Windows read.
    pub windows: u64,
    /// Tokens read in a second of this model's forward pass.
    pub tokens_per_second: f64,
    /// Bytes of keys and values kept for each token, at four bytes a number.
    pub kv_bytes_per_token: usize,
    /// How far its predictions are from the source's; `None` where it was not compared.
    pub divergence: Option<Divergence>,
}

/// How far a model's predictions are from those of its source, over the tokens predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Divergence {
    /// Mean Kullback–Leibler divergence KL(source ‖ model), in nats.
    pub kl: f64,
    /// Share of tokens for which both hold the same token the most likely.
    pub same_top: f64,
}

impl Evaluation {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// Reads a text: mean negative log-likelihood of tokens 2… of each window. Progress is stage `"evaluate"`.
///
/// ```
/// use qcqa::Run;
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::evaluation::evaluate;
/// use qcqa::runtime::Model;
/// use qcqa::text::{Vocabulary, Windows, read_text};
///
/// let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
/// let model = Model::load(&checkpoint)?;
/// let text = read_text("tests/data/novels-1m/evaluation.txt".as_ref())?;
/// let windows = Windows::new(Vocabulary::open(&checkpoint)?.encode(&text)?, model.window())?.first(2);
/// assert!(evaluate(&model, &windows, Run::new(0))?.perplexity() < 40.0);
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
///
/// # Errors
/// [`RuntimeError::TokenOutOfRange`], [`RuntimeError::Positions`], [`RuntimeError::NotFinite`]; [`RuntimeError::NoPredictions`] of an
/// encoder; [`Error::Cancelled`](crate::Error::Cancelled).
pub fn evaluate(model: &Model, windows: &Windows, run: Run<'_>) -> Result<Evaluation, RuntimeError> {
    Ok(evaluate_against(model, &[], windows, run)?.0)
}

/// Reads a text as [`evaluate`] does, but by way of the [`KvCache`], which takes `chunk` tokens of a
/// window at a time: what a model computes that serves a prompt in pieces. The numbers are those of [`evaluate`] but for
/// rounding.
///
/// # Errors
/// [`Error::Setting`](crate::Error::Setting) for a chunk of 0 tokens; as [`evaluate`].
pub fn evaluate_through_cache(
    model: &Model,
    windows: &Windows,
    chunk: usize,
    run: Run<'_>,
) -> Result<Evaluation, RuntimeError> {
    let steps = Steps::new(chunk, 0)?;
    let read = |model: &Model, tokens: &[u32], rows| {
        let row = |tokens: &[u32]| model.row_by_cache(tokens, steps, KvCache::default(), |_| ());
        tokens.par_chunks_exact(tokens.len() / rows).map(row).collect()
    };
    Ok(read_all(model, &[], windows, &read, run)?.0)
}

/// Reads a text with a source and models made of it, and compares their predictions with its own; the source runs once.
/// Progress is stage `"evaluate"`.
///
/// # Errors
/// As [`evaluate`]; [`RuntimeError::Vocabulary`] when a model has another vocabulary than the source,
/// [`RuntimeError::Device`] when it runs elsewhere.
pub fn evaluate_against(
    source: &Model,
    models: &[&Model],
    windows: &Windows,
    run: Run<'_>,
) -> Result<(Evaluation, Vec<Evaluation>), RuntimeError> {
    read_all(source, models, windows, &Model::rows, run)
}

/// Gives what the last layer makes of some rows of tokens, in parts of whole rows: (tokens of the part, d).
type ReadRows<'a> = dyn Fn(&Model, &[u32], usize) -> Result<Vec<Tensor>, RuntimeError> + 'a;

fn read_all(
    source: &Model,
    models: &[&Model],
    windows: &Windows,
    read: &ReadRows<'_>,
    run: Run<'_>,
) -> Result<(Evaluation, Vec<Evaluation>), RuntimeError> {
    models.iter().try_for_each(|model| comparable(source, model))?;
    let total = windows.count() as u64 * (models.len() as u64 + 1);
    let mut tallies = vec![Tally::default(); models.len() + 1];
    let mut done = 0;
    run.step("evaluate", done, total)?;
    for tokens in windows.batches(source.together(windows.length())) {
        let rows = tokens.len() / windows.length();
        let mut step = || {
            done += rows as u64;
            run.step("evaluate", done, total)
        };
        let mut all = Vec::with_capacity(tallies.len());
        for (model, tally) in [source].iter().chain(models).zip(&mut tallies) {
            all.push((*model, tally.timed(|| last(model, read(model, tokens, rows)?))?));
            step()?;
        }
        let mut read: Vec<Read<'_>> = all.iter().map(|(model, last)| Read::new(model, last)).collect();
        let scores = scores(&mut read, tokens, windows.length())?;
        for ((tally, read), scores) in tallies.iter_mut().zip(&read).zip(scores) {
            tally.add(read, scores, windows.length());
        }
    }
    let all = [source].into_iter().chain(models.iter().copied()).zip(tallies);
    let mut evaluations = all.map(|(model, tally)| tally.finish(model)).collect::<Result<Vec<_>, _>>()?;
    Ok((evaluations.remove(0), evaluations))
}

/// Checks that two models read the same tokens, on one device.
fn comparable(source: &Model, model: &Model) -> Result<(), RuntimeError> {
    let (expected, found) = (source.vocabulary(), model.vocabulary());
    if expected != found {
        return Err(RuntimeError::Vocabulary { expected, found });
    }
    if model.device() != source.device() {
        let reason = format!("the source, which it is compared with, runs on {}", source.device());
        return Err(RuntimeError::Device { device: model.device(), reason });
    }
    Ok(())
}

/// Sums over the tokens predicted so far.
#[derive(Debug, Clone, Default)]
struct Tally {
    loss: f64,
    kl: f64,
    same: u64,
    tokens: u64,
    windows: u64,
    read: u64,
    compared: bool,
    time: Duration,
    /// Loss and divergence of tokens 2… of the windows, summed over these, one for each place.
    by_place: Vec<[f64; 2]>,
}

/// What the output embedding reads, of what the last layer gives.
fn last(model: &Model, read: Vec<Tensor>) -> Result<Vec<Tensor>, RuntimeError> {
    read.into_iter().map(|x| Ok(model.last(&x)?)).collect()
}

impl Tally {
    /// Something that the model computes; the clock runs.
    fn timed<T>(&mut self, compute: impl FnOnce() -> Result<T, RuntimeError>) -> Result<T, RuntimeError> {
        let start = Instant::now();
        let made = compute()?;
        self.time += start.elapsed();
        Ok(made)
    }

    /// Adds the scores of some windows, in the order of the text.
    fn add(&mut self, read: &Read<'_>, scores: Vec<Score>, window: usize) {
        let windows = scores.len() / (window - 1).max(1);
        self.read += (windows * window) as u64;
        self.windows += windows as u64;
        self.time += read.time;
        self.by_place.resize(window - 1, [0.0; 2]);
        for (i, score) in scores.into_iter().enumerate() {
            self.loss += score.loss;
            let place = &mut self.by_place[i % (window - 1)];
            *place = [place[0] + score.loss, place[1] + score.against.map_or(0.0, |(kl, _)| kl)];
            if let Some((kl, same)) = score.against {
                self.kl += kl;
                self.same += u64::from(same);
                self.compared = true;
            }
            self.tokens += 1;
        }
    }

    fn finish(self, model: &Model) -> Result<Evaluation, RuntimeError> {
        let n = self.tokens as f64;
        let divergence = Divergence { kl: (self.kl / n).max(0.0), same_top: self.same as f64 / n };
        if !(self.loss.is_finite() && self.kl.is_finite()) {
            return Err(RuntimeError::NotFinite { what: "the loss of the model".to_string() });
        }
        Ok(Evaluation {
            loss: self.loss / n,
            tokens: self.tokens,
            windows: self.windows,
            tokens_per_second: self.read as f64 / self.time.as_secs_f64().max(f64::MIN_POSITIVE),
            kv_bytes_per_token: model.kv_bytes_per_token(),
            divergence: self.compared.then_some(divergence),
        })
    }
}
