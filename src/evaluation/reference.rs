use candle_core::Tensor;

use super::scores::{Read, scores};
use super::trial::Reading;
use super::{Evaluation, Tally, comparable, last};
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
    pub(super) model: &'a Model,
    /// What the output embedding reads.
    pub(super) read: Reading<'a>,
    evaluation: Evaluation,
}

impl<'a> Reference<'a> {
    /// The source reads the text. Progress is stage `"evaluate"`.
    ///
    /// # Errors
    /// As [`evaluate`](super::evaluate()).
    pub fn new(model: &'a Model, windows: &'a Windows, run: Run<'_>) -> Result<Self, RuntimeError> {
        let mut tally = Tally::default();
        let mut read = Reading::new(model, windows)?;
        tally.timed(|| (0..model.n_layers()).try_for_each(|_| read.pass_layer(model)))?;
        run.step("evaluate", 0, 1)?;
        read.inputs = tally.timed(|| last(model, std::mem::take(&mut read.inputs)))?;
        for (tokens, own) in read.parts(model) {
            let mut own = [Read::new(model, own)];
            let scores = scores(&mut own, tokens, windows.length())?;
            scores.into_iter().for_each(|scores| tally.add(&own[0], scores, windows.length()));
        }
        run.step("evaluate", 1, 1)?;
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
        let (windows, length, mut tally) = (self.read.windows, self.read.windows.length(), Tally::default());
        let (mut done, total) = (0, windows.count() as u64);
        for (tokens, theirs) in self.read.parts(model) {
            run.step("evaluate", done, total)?;
            let own = tally.timed(|| last(model, model.rows(tokens, tokens.len() / length)?))?;
            self.score(&mut tally, model, tokens, [&own, theirs])?;
            done += (tokens.len() / length) as u64;
        }
        run.step("evaluate", total, total)?;
        tally.finish(model)
    }

    /// KL(source ‖ model) in nats per token, for a model whose layers below are those that `read` has gone through.
    pub(super) fn divergence(&self, read: &Reading<'_>, model: &Model) -> Result<f64, RuntimeError> {
        let mut tally = Tally::default();
        for ((tokens, inputs), (_, theirs)) in read.parts(model).zip(self.read.parts(model)) {
            let own = last(model, read.through(model, inputs)?)?;
            self.score(&mut tally, model, tokens, [&own, theirs])?;
        }
        let divergence = tally.finish(model)?.divergence.ok_or(RuntimeError::NoPredictions)?;
        Ok(divergence.kl)
    }

    /// Adds the scores of some windows, of which the output embeddings of a model and of the source read these tensors.
    pub(super) fn score(
        &self,
        tally: &mut Tally,
        model: &Model,
        tokens: &[u32],
        [own, theirs]: [&[Tensor]; 2],
    ) -> Result<(), RuntimeError> {
        let window = self.read.windows.length();
        let mut read = [Read::new(self.model, theirs), Read::new(model, own)];
        let scores = scores(&mut read, tokens, window)?;
        scores.into_iter().skip(1).for_each(|scores| tally.add(&read[1], scores, window));
        Ok(())
    }
}
