//! What the model's inputs are known to be, as the command line is given it.

use std::path::{Path, PathBuf};

use clap::Args;
use qcqa::calibration::{Calibration, Extent, Origin, TextSource, read_texts};
use qcqa::checkpoint::Checkpoint;
use qcqa::pipeline::Preset;
use qcqa::plan::{Plan, SharedHeads, read_plan};
use qcqa::pooler::POOLERS;
use qcqa::refit;
use qcqa::runtime::{Model, RuntimeError};
use qcqa::text::Texts;
use qcqa::{Error, HeadSource, Run};

use crate::Done;
use crate::args::{from_one, path};
use crate::hints::{CliError, about, of_calibration};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Calibration")]
pub(super) struct CalibrationArgs {
    /// Texts like those it will read, or moments; `self`: its own text
    ///
    /// Several have equal shares of the windows, unless they say `novels.txt:3 manual.txt:1`. Of each text an eighth of the
    /// windows fits nothing: it chooses, and shows what became of the model. `self`, where no text is at hand, is a poor
    /// substitute (a file of that name is ./self). `qcqa calibrate` writes moments.
    #[arg(long, value_name = "FILE", num_args = 1.., value_parser = path())]
    pub(super) calibration: Vec<PathBuf>,
    /// The most windows to read, of all texts together, spaced over the whole of each
    #[arg(long, value_name = "N", default_value = "128", value_parser = from_one())]
    #[arg(allow_negative_numbers = true)]
    #[arg(hide_short_help = true)]
    calibration_windows: usize,
    /// Tokens of each of these windows, as far as the model will look back [default: all that it has positions for, at most 512]
    #[arg(long, value_name = "N", value_parser = from_one())]
    #[arg(allow_negative_numbers = true)]
    #[arg(hide_short_help = true)]
    calibration_context: Option<usize>,
}

/// So many windows, of so many tokens where that is said.
pub(super) fn extent(windows: usize, context: Option<usize>) -> Extent {
    let extent = Extent::new(windows);
    context.map_or(extent, |tokens| extent.of_tokens(tokens))
}

/// What stands for a text that the model writes itself; reports call it so, too.
pub(super) const OWN: &str = "self";

/// A text as it was given: PATH, PATH:SHARE, or self. A path that exists as it stands has no share.
pub(super) fn text_source(given: &Path) -> TextSource {
    let parts = given.to_str().filter(|_| !given.exists()).and_then(|text| text.rsplit_once(':'));
    let parts = parts.and_then(|(path, share)| Some((Path::new(path), share.parse::<usize>().ok()?)));
    let (path, share) = parts.unwrap_or((given, 1));
    let whole = if path == Path::new(OWN) { TextSource::model() } else { TextSource::file(path) };
    whole.with_share(share)
}

impl CalibrationArgs {
    /// Whether there is one.
    pub(super) fn is_given(&self) -> bool {
        !self.calibration.is_empty()
    }

    /// What a command came to; what is no moment is told of this file.
    pub(super) fn named(&self, done: Done) -> Done {
        done.map_err(|error| match &self.calibration[..] {
            [path] if error.moment => about(path, error),
            _ => error,
        })
    }

    /// The files that are read; that a directory is none is said when it is.
    pub(super) fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.sources().into_iter().filter_map(|source| match source.origin {
            Origin::File(path) if !path.is_dir() => Some(path),
            _ => None,
        })
    }

    pub(super) fn sources(&self) -> Vec<TextSource> {
        self.calibration.iter().map(|given| text_source(given)).collect()
    }

    fn extent(&self) -> Extent {
        extent(self.calibration_windows, self.calibration_context)
    }

    /// What went wrong with it, told of the file where there is one.
    fn failed(&self, error: RuntimeError) -> CliError {
        match &self.sources()[..] {
            [TextSource { origin: Origin::File(path), .. }] => of_calibration(path, error),
            _ => error.into(),
        }
    }

    /// The calibration, where one is given.
    pub(super) fn open<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        run: Run<'_>,
    ) -> Result<Option<Calibration<'a>>, CliError> {
        let open = || Calibration::open(checkpoint, &self.sources(), self.extent(), run);
        self.is_given().then(open).transpose().map_err(|error| self.failed(error))
    }

    /// As [`CalibrationArgs::open`]; `across`: with what calibrated sharing across layers takes besides.
    pub(super) fn open_for<'a>(
        &self,
        across: bool,
        checkpoint: &'a Checkpoint,
        run: Run<'_>,
    ) -> Result<Option<Calibration<'a>>, CliError> {
        match self.open(checkpoint, run)? {
            Some(opened) if across => {
                opened.with_cross_moments(run).map(Some).map_err(|error| self.failed(error))
            }
            opened => Ok(opened),
        }
    }

    /// The texts, in their roles, and the model that reads them.
    pub(super) fn texts(&self, checkpoint: &Checkpoint, run: Run<'_>) -> Result<(Model, Texts), CliError> {
        if !self.is_given() {
            return Err(CliError::usage("--calibration FILE is missing: the text to learn from"));
        }
        let read = read_texts(checkpoint, &self.sources(), self.extent(), run);
        read.map_err(|error| self.failed(error))
    }

    /// The calibration that a plan was made with, where its pooler uses moments.
    pub(super) fn of_plan<'a>(
        &self,
        plan: &Plan,
        plan_file: &Path,
        checkpoint: &'a Checkpoint,
        run: Run<'_>,
    ) -> Result<Option<Calibration<'a>>, CliError> {
        let pooler = POOLERS.make(&plan.pooling.pooler).map_err(|e| about(plan_file, e))?;
        if !pooler.needs().moment {
            return Ok(None);
        }
        if !self.is_given() {
            let expected = plan.pooling.calibration.clone();
            return match expected {
                None => Ok(None),
                expected => Err(about(plan_file, Error::PlanCalibration { expected, found: None })),
            };
        }
        let opened = Calibration::for_plan(checkpoint, &self.sources(), plan, self.extent(), run);
        opened.map(Some).map_err(|error| match error {
            RuntimeError::Core(error @ Error::PlanCalibration { .. }) => about(plan_file, error),
            error => self.failed(error),
        })
    }
}

/// Reads a plan for this model: what does not fit is found before anything is computed.
pub(super) fn plan_for(checkpoint: &Checkpoint, file: &Path) -> Result<Plan, CliError> {
    let plan = read_plan(file)?;
    plan.source.check_same(&checkpoint.id()?).map_err(|e| about(file, e))?;
    // Methods of others have names of their own.
    if let Ok(method) = plan.method.name.parse::<Preset>() {
        method.check(&plan).map_err(|e| about(file, e))?;
    }
    if plan.pooling.distilled.is_some() {
        return Err(about(file, Error::PlanDistilled));
    }
    let pooler = POOLERS.make(&plan.pooling.pooler).map_err(|e| about(file, e))?;
    if plan.pooling.refit.is_some() && !pooler.needs().moment {
        let pooler = plan.pooling.pooler.name().to_string();
        return Err(about(file, Error::RefitPooler { pooler }));
    }
    Ok(plan)
}

/// The shared heads of a plan, refitted as it says.
pub(super) fn shared<'a>(
    plan: &Plan,
    plan_file: &Path,
    checkpoint: &'a Checkpoint,
    calibration: Option<&'a Calibration<'a>>,
    run: Run<'_>,
) -> Result<SharedHeads<'a>, CliError> {
    let shared = match calibration {
        Some(calibration) => refit::apply(plan, calibration, run).map_err(Error::from),
        None => SharedHeads::new(plan, checkpoint),
    };
    shared.map_err(|error| match error {
        error @ (Error::PlanRefit { .. } | Error::PlanCalibration { .. }) => about(plan_file, error),
        error => error.into(),
    })
}

/// What is lost without a calibration, where the pooler would use one, or that one was given for nothing.
pub(super) fn note(
    plan: &Plan,
    calibration: Option<&Calibration<'_>>,
) -> Result<Option<&'static str>, CliError> {
    let calibrated = POOLERS.make(&plan.pooling.pooler)?.needs().moment;
    Ok(match calibration {
        None if calibrated => Some(
            "note: without --calibration FILE (a text, or moments) shared heads fit the weights alone; on novels-1m with \
             neighbour groups at half the cache that was perplexity 36.3 instead of 29.1",
        ),
        Some(_) if plan.method.calibration.is_none() => Some(
            "note: the calibration had no part in this plan: use --method low-rank, or --pooler low-rank",
        ),
        _ => None,
    })
}
