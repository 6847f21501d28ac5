use std::time::Instant;

use candle_core::Tensor;
use rayon::prelude::*;

use super::trial::Reading;
use super::{Evaluation, Tally, comparable};
use crate::error::Result;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Windows};

/// A source that has read a text: models are compared with it one after the other, and it runs once. What it holds is what
/// leaves its last layer, (tokens, d) in f32, and no logits.
///
/// ```
/// use qcqa::Run;
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::evaluation::Reference;
/// use qcqa::runtime::Model;
/// use qcqa::text::Windows;
///
/// let model = Model::load(&Checkpoint::open("tests/data/novels-1m")?)?;
/// let windows = Windows::new((0..64).map(|t| t * t % 1021).collect(), 32)?;
/// let reference = Reference::new(&model, &windows, Run::new(0))?;
/// let (before, after) = (reference.source(), reference.compare(&model, Run::new(0))?);
/// assert_eq!((after.loss, after.divergence.map(|d| d.kl)), (before.loss, Some(0.0)));
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
#[derive(Debug)]
pub struct Reference<'a> {
    model: &'a Model,
    /// Behind the last layer.
    read: Reading<'a>,
    evaluation: Evaluation,
}

impl<'a> Reference<'a> {
    /// The source reads the text. Progress is stage `"evaluate"`.
    ///
    /// # Errors
    /// As [`evaluate`](super::evaluate()).
    pub fn new(model: &'a Model, windows: &'a Windows, run: Run<'_>) -> Result<Self, RuntimeError> {
        let mut tally = Tally::default();
        let start = Instant::now();
        let mut read = Reading::new(model, windows)?;
        (0..model.n_layers()).try_for_each(|_| read.pass_layer(model))?;
        tally.time += start.elapsed();
        batches(model, &read, run, |tokens, logits| {
            let logits = tally.logits(tokens, tokens.len() / windows.length(), || Ok(logits))?;
            tally.add(tokens, &logits, None, windows.length())
        })?;
        Ok(Self { model, evaluation: tally.finish(model)?, read })
    }

    /// How well the source reads it.
    pub fn source(&self) -> &Evaluation {
        &self.evaluation
    }

    /// How well another model reads it, and how far that is from the source. Progress is stage `"evaluate"`.
    ///
    /// # Errors
    /// As [`evaluate_against`](super::evaluate_against()).
    pub fn compare(&self, model: &Model, run: Run<'_>) -> Result<Evaluation, RuntimeError> {
        comparable(self.model, model)?;
        let (mut tally, length) = (Tally::default(), self.read.windows.length());
        batches(self.model, &self.read, run, |tokens, source| {
            let rows = tokens.len() / length;
            let logits = tally.logits(tokens, rows, || model.rows(tokens, rows))?;
            tally.add(tokens, &logits, Some(&source), length)
        })?;
        tally.finish(model)
    }
}

/// Tokens and the source's logits of some windows at a time.
fn batches(
    model: &Model,
    read: &Reading<'_>,
    run: Run<'_>,
    mut take: impl FnMut(&[u32], Vec<Tensor>) -> Result<(), RuntimeError>,
) -> Result<(), RuntimeError> {
    let (windows, length) = (read.windows, read.windows.length());
    // What is read abreast is in one part.
    let (parts, abreast) = ((model.batch(length) / model.abreast(length)).max(1), model.abreast(length));
    let (size, total) = (parts * abreast, windows.count() as u64);
    run.step("evaluate", 0, total)?;
    for (i, (tokens, last)) in windows.batches(size).zip(read.inputs.chunks(parts)).enumerate() {
        let logits = last.par_iter().map(|x| model.logits_from(model.n_layers(), x, &read.pass));
        take(tokens, logits.collect::<Result<_, _>>()?)?;
        run.step("evaluate", ((i + 1) * size).min(windows.count()) as u64, total)?;
    }
    Ok(())
}
