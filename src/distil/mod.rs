//! Distillation: shared heads that learn from their source.
//!
//! Minimises the mean of KL(source ‖ shared) over the tokens of a calibration text by queries, keys, values and outputs of
//! all layers, or by their norms and MLPs, too ([`Trained`]), from wherever pooling and refits have left them (docs/method.md, "Distillation"). Memory is what enters
//! every layer for a few windows, on a GPU with room what it computes on the way, one layer's way back, the descent's memory of what is
//! trained, and what the source gives for windows that come again; all weights that are not trained are the source's own.

mod known;
mod state;
mod trainer;
mod usual;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::state::{SavedState, StateFile};
use self::trainer::Trainer;
use self::usual::Usual;
use crate::descent::{Descent, Fall, Order, share};
use crate::error::{Error, Result};
use crate::plan::{Distillation, SharedHeads, Trained};
use crate::run::{Precision, Run};
use crate::runtime::Model;
use crate::text::{RuntimeError, Windows};

pub use trainer::{Gradient, gradient};

/// Steps over which the rate rises, where there are ten times as many.
const WARM_UP: u64 = 20;
/// Windows trained on for each window of validation between two validations: a tenth of the time at most goes there.
const TRAINED_PER_VALIDATED: usize = 3;
/// Validations in a row, in the second half of the steps, that may be worse than the best before it is called off.
const PATIENCE: usize = 3;
/// Between two writings of the state.
const SAVE_EVERY: Duration = Duration::from_secs(180);
/// Of this form are states, and what a descent remembers in them.
const STATES: &str = "2";
/// Steps by which the time of one is known.
const TIMED: u64 = 2;

/// How long to distil.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Until about this many tokens were read, the same ones again where the text has fewer.
    Tokens(u64),
    /// About this long: the first steps tell how many there will be.
    Time(Duration),
}

/// A distillation to be run.
///
/// ```
/// use std::time::Duration;
///
/// use qcqa::descent::Descent;
/// use qcqa::distil::{Distill, Effort};
///
/// let tokens = Distill::new(Effort::Tokens(2_000_000));
/// let minutes = Distill::new(Effort::Time(Duration::from_secs(1800))).descent(Descent::AdamW);
/// assert_ne!(tokens, minutes);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Distill {
    effort: Effort,
    descent: Option<Descent>,
    rate: Option<f64>,
    batch: Option<usize>,
    trained: Trained,
    state: Option<PathBuf>,
}

/// Shared heads after distillation, and how that went.
#[derive(Debug)]
#[non_exhaustive]
pub struct Distilled<'a> {
    /// The shared heads, for outputs and the runtime.
    pub shared: SharedHeads<'a>,
    /// KL(source ‖ shared) on validation, in nats a token, by tokens trained on: at the start, now and then, and at the end.
    pub course: Vec<(u64, f64)>,
    /// KL(source ‖ shared) on the windows of every step, in nats a token, before that step.
    pub losses: Vec<f64>,
    /// Tokens trained on in a second, validation left out; 0 where none was.
    pub tokens_per_second: f64,
    /// Whether it was broken off; what was best until then is there.
    pub interrupted: bool,
}

impl Distill {
    /// A distillation of this length.
    pub fn new(effort: Effort) -> Self {
        let trained = Trained::Attention;
        Self { effort, descent: None, rate: None, batch: None, trained, state: None }
    }

    /// Replaces the descent; by the number of tokens unless said: [`Descent::AdamW`] for few, [`Descent::Muon`] for many.
    pub fn descent(self, descent: Descent) -> Self {
        Self { descent: Some(descent), ..self }
    }

    /// Replaces the highest rate; by start and length unless said.
    pub fn rate(self, rate: f64) -> Self {
        Self { rate: Some(rate), ..self }
    }

    /// Replaces the number of windows of a step; by the number of tokens unless said.
    pub fn batch(self, windows: usize) -> Self {
        Self { batch: Some(windows), ..self }
    }

    /// Trains this: the attention of all layers, or their norms and MLPs, too, which go by Adam at a tenth of the rate. What was trained
    /// of these before stays as it is where attention alone is.
    pub fn train(self, trained: Trained) -> Self {
        Self { trained, ..self }
    }

    /// A file that holds the state every few minutes, and at the end. Where there is one, of the same distillation, it goes on from
    /// there, to the same result as if it had not ended. It stays until [`Distill::forget`]: whoever dies while the result is
    /// written has lost nothing.
    pub fn state(self, path: PathBuf) -> Self {
        Self { state: Some(path), ..self }
    }

    /// Distils shared heads of `source` on `fit`, and keeps those that are nearest to it on `validation`: maybe those that
    /// there were, never worse ones. Progress is stage `"distil"`; where the observer breaks, what was best is the result.
    ///
    /// The same seed gives the same result on any number of threads.
    ///
    /// ```
    /// use qcqa::Run;
    /// use qcqa::checkpoint::Checkpoint;
    /// use qcqa::distil::{Distill, Effort};
    /// use qcqa::heads::HeadSource;
    /// use qcqa::partition::Partition;
    /// use qcqa::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
    /// use qcqa::runtime::Model;
    /// use qcqa::spec::Spec;
    /// use qcqa::text::Windows;
    ///
    /// let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
    /// let model = Model::load(&checkpoint)?;
    /// let pairs = Partition::from_groups(8, &[[0, 1], [2, 3], [4, 5], [6, 7]])?;
    /// let by_hand = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
    /// let (pooling, layers) = (Pooling::new(Spec::new("mean")), vec![LayerPlan::new(pairs, 0.0); 4]);
    /// let plan = Plan::new(checkpoint.id()?, by_hand, pooling, layers, 0.5, 0)?;
    ///
    /// let windows = |first: u32| Windows::new((first..first + 256).map(|t| t * t % 1021).collect(), 64);
    /// let shared = SharedHeads::new(&plan, &checkpoint)?;
    /// let distilled =
    ///     Distill::new(Effort::Tokens(2048)).run(&model, shared, &windows(0)?, Some(&windows(999)?), Run::new(0))?;
    /// let (start, end) = (distilled.course[0].1, distilled.course[distilled.course.len() - 1].1);
    /// assert!(end < start);
    /// # Ok::<(), qcqa::text::RuntimeError>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::PlanSource`] unless the heads are of this model; [`Error::Setting`] for a rate, batch or effort of 0, and for
    /// [`Trained::All`] of a model with experts; as
    /// [`SharedHeads::layer`] and [`Model::with_shared`]; [`RuntimeError::NotFinite`]; [`FileError`](crate::files::FileError)
    /// where the state cannot be written or is of something else.
    pub fn run<'a>(
        &self,
        source: &Model,
        shared: SharedHeads<'a>,
        fit: &Windows,
        validation: Option<&Windows>,
        run: Run<'_>,
    ) -> Result<Distilled<'a>, RuntimeError> {
        shared.plan().no_pairs("distillation")?;
        self.check_model(source)?;
        let model = source.with_shared(&shared)?;
        let work = self.work(&Usual::new(self.effort, source, &shared, fit.length()), fit, validation)?;
        let file = self.state.as_ref().map(|path| {
            let key = work.key(self, &shared, source.precision(), run.seed());
            key.map(|key| StateFile { path: path.clone(), key })
        });
        let file = file.transpose()?;
        let mut trainer = Trainer::new(source, model, work.descent, self.trained)?;
        trainer.keep(work.total.map(|total| total * work.batch as u64), fit, validation);
        let mut state = match file.as_ref().map(|file| file.read(&mut trainer)).transpose()?.flatten() {
            Some(state) => state,
            None => work.begin(&mut trainer)?,
        };
        let mut pace = Pace::default();
        let interrupted = self.steps(&work, &mut trainer, &mut state, file.as_ref(), &mut pace, run)?;
        if let (false, Some(file)) = (interrupted, &file) {
            // Whether all steps were needed or not: there are no more.
            state.total = Some(state.step);
            // Where that cannot be written, the result, which is to be had without it, is not lost for it.
            let _ = file.write(&trainer, &state);
        }
        let model = work.best(trainer, &state)?;
        let layers = (0..model.n_layers()).map(|i| model.pooled(i)).collect::<Result<_, _>>()?;
        let before = shared.done().distilled.as_ref().map_or(Trained::Attention, |before| before.trained);
        let (tokens, steps) = (state.best_step * work.step_tokens(), state.best_step);
        let calibration = fit.fingerprint(source.id());
        let shared = match steps {
            0 => shared,
            _ => {
                let distilled = Distillation::new(tokens, steps, calibration);
                let distilled = distilled.with_trained(before.max(self.trained));
                shared.distilled(layers, distilled).with_others(model.stored_rest()?)
            }
        };
        let tokens_per_second =
            pace.steps as f64 * work.step_tokens() as f64 / pace.time.as_secs_f64().max(1e-9);
        Ok(Distilled { shared, course: state.course, losses: state.losses, tokens_per_second, interrupted })
    }

    /// Refuses a model of which this cannot train what it is asked to.
    pub(crate) fn check_model(&self, source: &Model) -> Result<(), RuntimeError> {
        if self.trained == Trained::All && source.has_experts()? {
            return Err(Error::setting("train", "all", "attention: experts are not trained").into());
        }
        Ok(())
    }

    /// Goes on until the end, or until it is broken off.
    fn steps(
        &self,
        work: &Work<'_>,
        trainer: &mut Trainer<'_>,
        state: &mut SavedState,
        file: Option<&StateFile>,
        pace: &mut Pace,
        run: Run<'_>,
    ) -> Result<bool, RuntimeError> {
        let (began, mut saved, mut order) =
            (Instant::now(), Instant::now(), Order::new(work.fit.count(), run));
        let texts: Vec<&[u32]> = work.fit.batches(1).collect();
        while state.total.is_none_or(|total| state.step < total) {
            let detail = state.detail();
            let total = state.total.unwrap_or(state.step + TIMED) * work.step_tokens();
            match run.step_with("distil", state.step * work.step_tokens(), total, &detail) {
                Err(Error::Cancelled) => {
                    file.map(|file| file.write(trainer, state)).transpose()?;
                    return Ok(true);
                }
                other => other?,
            }
            let numbers = order.batch(state.step, work.batch).into_iter();
            let windows: Vec<(usize, &[u32])> = numbers.map(|n| (n, texts[n])).collect();
            let share = share(state.step, state.total, WARM_UP, Fall::Cosine);
            let gone = state.total.map_or(0.0, |total| state.step as f64 / total as f64);
            let began_step = Instant::now();
            let loss = trainer.step(&windows, state.step, work.rate * share, work.pull * (1.0 - gone))?;
            pace.add(began_step.elapsed());
            if !loss.is_finite() {
                return Err(RuntimeError::NotFinite { what: "the divergence while distilling".to_string() });
            }
            state.losses.push(loss);
            state.step += 1;
            if let (None, Effort::Time(time), TIMED..) = (state.total, self.effort, state.step) {
                let one = began.elapsed().div_f64(state.step as f64).as_secs_f64() * work.with_validation();
                state.total = Some(((time.as_secs_f64() / one) as u64).max(state.step));
            }
            let last = state.total == Some(state.step);
            if (last || state.step % work.interval == 0) && work.validate(trainer, state)? {
                break;
            }
            if !last && saved.elapsed() >= SAVE_EVERY {
                file.map(|file| file.write(trainer, state)).transpose()?;
                saved = Instant::now();
            }
        }
        let done = state.step * work.step_tokens();
        run.step_with("distil", done, done, &state.detail()).or_else(|e| match e {
            Error::Cancelled => Ok(()),
            e => Err(e),
        })?;
        Ok(false)
    }

    fn work<'w>(
        &self,
        usual: &Usual,
        fit: &'w Windows,
        validation: Option<&'w Windows>,
    ) -> Result<Work<'w>, RuntimeError> {
        let rate = self.rate.unwrap_or(usual.rate);
        if !(rate > 0.0 && rate.is_finite()) {
            return Err(Error::setting("rate", rate, "above 0 and finite").into());
        }
        let batch = self.batch.unwrap_or(usual.batch);
        if batch == 0 {
            return Err(Error::setting("batch", batch, "at least 1 window").into());
        }
        let total = match self.effort {
            Effort::Tokens(0) => return Err(Error::setting("tokens", 0, "at least 1").into()),
            Effort::Time(time) if time.is_zero() => return Err(Error::setting("time", "0", "above 0").into()),
            Effort::Tokens(tokens) => Some((tokens / (batch * fit.length()) as u64).max(1)),
            Effort::Time(_) => None,
        };
        let validated = validation.map_or(0, Windows::count);
        let interval = (TRAINED_PER_VALIDATED * validated).div_ceil(batch).max(1) as u64;
        let descent = self.descent.unwrap_or(usual.descent);
        Ok(Work { fit, validation, descent, batch, rate, pull: usual.pull, total, interval })
    }
}

/// Steps of this run, and their time.
#[derive(Debug, Default)]
struct Pace {
    steps: u64,
    time: Duration,
}

impl Pace {
    fn add(&mut self, time: Duration) {
        (self.steps, self.time) = (self.steps + 1, self.time + time);
    }
}

/// What a distillation works on.
#[derive(Debug)]
struct Work<'w> {
    fit: &'w Windows,
    validation: Option<&'w Windows>,
    descent: Descent,
    /// Windows of a step.
    batch: usize,
    rate: f64,
    pull: f64,
    /// Steps in all, once they are known.
    total: Option<u64>,
    /// Steps from one validation to the next.
    interval: u64,
}

impl Work<'_> {
    fn step_tokens(&self) -> u64 {
        (self.batch * self.fit.length()) as u64
    }

    /// Time with validation for the time without, roughly: a validation is two forward passes, a step four.
    fn with_validation(&self) -> f64 {
        let validated = self.validation.map_or(0, Windows::count) as f64;
        1.0 + validated / 2.0 / (self.interval as f64 * self.batch as f64)
    }

    /// What one distillation is told from another by.
    fn key(
        &self,
        distill: &Distill,
        shared: &SharedHeads<'_>,
        precision: Precision,
        seed: u64,
    ) -> Result<String, RuntimeError> {
        let digest = |windows: &Windows| windows.fingerprint(&shared.plan().source);
        let texts = [Some(self.fit), self.validation].map(|windows| windows.map(digest));
        let (Distill { effort, .. }, descent) = (distill, self.descent);
        // States of before there was a choice are of attention alone.
        let all = if distill.trained == Trained::All { " all" } else { "" };
        Ok(format!(
            "{STATES}{all} {seed} {effort:?} {descent:?} {precision:?} {} {} {texts:?} {:?}",
            self.batch,
            self.rate,
            shared.record()
        ))
    }

    fn begin(&self, trainer: &mut Trainer<'_>) -> Result<SavedState, RuntimeError> {
        let mut state =
            SavedState { total: self.total, best: trainer.weights.clone(), ..SavedState::default() };
        if let Some(validation) = self.validation {
            state.course.push((0, trainer.divergence(validation)?));
        }
        Ok(state)
    }

    /// Measures where the model stands, and keeps it where it is the best so far; whether there is nothing to hope for.
    fn validate(&self, trainer: &mut Trainer<'_>, state: &mut SavedState) -> Result<bool, RuntimeError> {
        let best = state.course.iter().map(|&(_, kl)| kl).fold(f64::INFINITY, f64::min);
        let kl = match self.validation {
            Some(validation) => trainer.divergence(validation)?,
            None => f64::NEG_INFINITY,
        };
        if kl < best {
            (state.best, state.best_step, state.worse) = (trainer.weights.clone(), state.step, 0);
        } else {
            state.worse += 1;
        }
        if self.validation.is_some() {
            state.course.push((state.step * self.step_tokens(), kl));
        }
        let second_half = state.total.is_some_and(|total| 2 * state.step > total);
        Ok(second_half && state.worse >= PATIENCE)
    }

    /// The model with the best weights.
    fn best(&self, trainer: Trainer<'_>, state: &SavedState) -> Result<Model, RuntimeError> {
        let mut model = trainer.model;
        for (i, weights) in state.best.iter().enumerate() {
            model.set_weights(i, weights)?;
        }
        Ok(model)
    }
}
