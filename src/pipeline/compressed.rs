use std::path::Path;

#[cfg(feature = "runtime")]
use super::stages::Made;
use super::{Compress, Fronts};
#[cfg(feature = "runtime")]
use super::{LimitCost, Stage, TextEffect};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
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
    /// The front of every layer that the plan was chosen from: of the k of its budget alone, where nothing else was searched.
    pub fronts: Vec<Front>,
    /// The plan, and the shared heads that it makes.
    pub shared: SharedHeads<'a>,
    /// The stages that were measured on the windows that validate, of which the least was kept; empty where there are none.
    #[cfg(feature = "runtime")]
    pub stages: Vec<Stage>,
    /// What it does to the model, on each calibration text that has windows which validate.
    #[cfg(feature = "runtime")]
    pub effects: Vec<TextEffect>,
    /// KL(source ‖ shared) on validation by tokens of distillation; empty without one.
    #[cfg(feature = "runtime")]
    pub course: Vec<(u64, f64)>,
    /// Whether the distillation was broken off: what was best until then is here, and may be written.
    #[cfg(feature = "runtime")]
    pub interrupted: bool,
    /// What the target's limits cost, where that was asked for ([`Compress::weighing_limits`]), windows validate, and nothing was
    /// broken off; `None`, too, where the target holds whatever the model allows.
    #[cfg(feature = "runtime")]
    pub limit_cost: Option<LimitCost>,
    target: &'a dyn Target,
}

impl<'a> Compress<'a> {
    /// Compresses a checkpoint: searches, plans, makes the shared heads, and measures what they do where a calibration text has
    /// windows that validate: of the stages that were gone through the one nearest to the source is kept, and is what the plan
    /// then says. Nothing is written yet. Without a target it is made for [`Expanded`](crate::targets::Expanded).
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
        let searched = self.search_for(source, Some(self.budget), run)?;
        #[cfg_attr(not(feature = "runtime"), expect(unused_variables))]
        let (plan, model_under_it) = searched.planned(self.budget, run)?;
        #[cfg(feature = "runtime")]
        let Made { shared, model: kept, stages, course, interrupted } =
            self.made(&plan, source, model_under_it, run)?;
        #[cfg(feature = "runtime")]
        let run = if self.distil.is_some() { run.to_the_end() } else { run };
        #[cfg(feature = "runtime")]
        let limit_cost = match self.weighs_limits && !interrupted {
            true => self.limit_cost(&searched, &plan, &stages, source, run)?,
            false => None,
        };
        #[cfg(not(feature = "runtime"))]
        let shared = self.shared(&plan, source, run)?;
        let Fronts { fronts, .. } = searched;
        Ok(Compressed {
            model,
            fronts,
            #[cfg(feature = "runtime")]
            effects: self.effects(kept.as_ref(), &stages, run)?,
            shared,
            #[cfg(feature = "runtime")]
            stages,
            #[cfg(feature = "runtime")]
            course,
            #[cfg(feature = "runtime")]
            interrupted,
            #[cfg(feature = "runtime")]
            limit_cost,
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

    /// The shared heads of a plan of this compression: refitted as it says, or as far as an earlier stage where that is nearer
    /// to the source on the windows that validate. [`SharedHeads::plan`] says what was kept.
    ///
    /// # Errors
    /// As [`SharedHeads::with_pooler`]; what refitting and running the model report.
    pub fn shared(&self, plan: &Plan, source: &'a dyn HeadSource, run: Run<'_>) -> Result<SharedHeads<'a>> {
        #[cfg(feature = "runtime")]
        return Ok(self.made(plan, source, None, run)?.shared);
        #[cfg(not(feature = "runtime"))]
        {
            let _ = run;
            SharedHeads::with_pooler(plan, source, Box::new(std::sync::Arc::clone(&self.pooler)))
        }
    }
}

impl<'a> Compressed<'a> {
    /// The plan.
    pub fn plan(&self) -> &Plan {
        self.shared.plan()
    }

    /// To be written in another form, which holds the plan where [`check_plan`](crate::output::check_plan) says so.
    pub fn for_target(self, target: &'a dyn Target) -> Self {
        Self { target, ..self }
    }

    /// Writes the model in the form of the target, as [`convert`] does.
    ///
    /// # Errors
    /// As [`convert`].
    pub fn write(&self, out: &Path, options: WriteOptions, run: Run<'_>) -> Result<Report, FileError> {
        convert(self.model, &self.shared, self.target, out, options, run)
    }
}
