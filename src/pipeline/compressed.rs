use std::path::Path;
use std::sync::Arc;

use super::{Compress, Fronts};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
#[cfg(feature = "runtime")]
use crate::evaluation::{Evaluation, evaluate_against};
use crate::files::{FileError, WriteOptions};
use crate::front::Front;
use crate::heads::HeadSource;
use crate::output::{Report, Target, convert};
use crate::plan::{Plan, SharedHeads};
use crate::run::Run;

/// A compressed model, ready to be written.
#[derive(Debug)]
#[non_exhaustive]
pub struct Compressed<'a> {
    /// The model that it is made of.
    pub model: &'a Checkpoint,
    /// The front of every layer that the plan was chosen from.
    pub fronts: Vec<Front>,
    /// The plan, and the shared heads that it makes.
    pub shared: SharedHeads<'a>,
    /// What it does to the model on the calibration text, where there is one.
    #[cfg(feature = "runtime")]
    pub effect: Option<Effect>,
    target: &'a dyn Target,
}

/// A model before and after, on one text.
#[cfg(feature = "runtime")]
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Effect {
    /// The source.
    pub before: Evaluation,
    /// The model with shared heads, with how far it is from its source.
    pub after: Evaluation,
}

impl<'a> Compress<'a> {
    /// Compresses a checkpoint: searches, plans, makes the shared heads, and measures what they do where there is a
    /// calibration text. Nothing is written yet. Without a target it is made for [`Expanded`](crate::targets::Expanded).
    ///
    /// ```no_run
    /// use qcqa::budget::Budget;
    /// use qcqa::checkpoint::Checkpoint;
    /// use qcqa::files::WriteOptions;
    /// use qcqa::pipeline::{Compress, Preset};
    /// use qcqa::targets::Stock;
    /// use qcqa::Run;
    ///
    /// let model = Checkpoint::open("model")?;
    /// let compress = Compress::new(Preset::QcqaEc).budget(Budget::Fraction(0.5)).target(&Stock);
    /// let compressed = compress.run(&model, Run::new(0))?;
    /// compressed.write("out".as_ref(), WriteOptions::default(), Run::new(0))?;
    /// # Ok::<(), qcqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Compress::search`] and [`Fronts::plan`]; what pooling, refitting and running the model report.
    pub fn run(&self, model: &'a Checkpoint, run: Run<'_>) -> Result<Compressed<'a>> {
        let source = self.source(model);
        let searched = self.search(source, run)?;
        let plan = searched.plan(self.budget, run)?;
        let Fronts { fronts, .. } = searched;
        let shared = self.shared(&plan, source, run)?;
        #[cfg(feature = "runtime")]
        let effect = self.effect(&shared, run)?;
        Ok(Compressed {
            model,
            fronts,
            shared,
            #[cfg(feature = "runtime")]
            effect,
            target: self.target.unwrap_or(&crate::targets::Expanded),
        })
    }

    /// Where the heads come from: the checkpoint, or the calibration of it.
    fn source(&self, model: &'a Checkpoint) -> &'a dyn HeadSource {
        #[cfg(feature = "runtime")]
        if let Some(calibration) = self.calibration {
            return calibration;
        }
        model
    }

    /// The shared heads of a plan of this compression, refitted as it says.
    ///
    /// # Errors
    /// As [`SharedHeads::with_pooler`]; what refitting reports.
    pub fn shared(&self, plan: &Plan, source: &'a dyn HeadSource, run: Run<'_>) -> Result<SharedHeads<'a>> {
        let shared = SharedHeads::with_pooler(plan, source, Box::new(Arc::clone(&self.pooler)))?;
        #[cfg(feature = "runtime")]
        if let (Some(level), Some((model, windows))) =
            (plan.pooling.refit, self.calibration.and_then(|c| c.text()))
        {
            return Ok(crate::refit::refit(shared, model, windows, level, run)?.shared);
        }
        let _ = run;
        Ok(shared)
    }

    #[cfg(feature = "runtime")]
    fn effect(&self, shared: &SharedHeads<'_>, run: Run<'_>) -> Result<Option<Effect>> {
        let Some((source, windows)) = self.calibration.and_then(|c| c.text()) else { return Ok(None) };
        let model = source.with_shared(shared)?;
        let (before, after) = evaluate_against(source, &[&model], windows, run)?;
        Ok(after.into_iter().next().map(|after| Effect { before, after }))
    }
}

impl Compressed<'_> {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        self.shared.plan()
    }

    /// Writes the model in the form of the target, as [`convert`] does.
    ///
    /// # Errors
    /// As [`convert`].
    pub fn write(&self, out: &Path, options: WriteOptions, run: Run<'_>) -> Result<Report, FileError> {
        convert(self.model, &self.shared, self.target, out, options, run)
    }
}
