//! What the model's inputs are known to be, as the command line is given it.

use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::methods::PoolerName;
use super::output::{bytes, evaluation_json, kv_bytes, percent, table};
use super::{CliError, Done, about};
use crate::checkpoint::Checkpoint;
use crate::runtime::{
    self, Calibration, Model, Refit, RuntimeError, Windows, evaluate_against, made_with, pool_layers,
};
use crate::{KvPooler, Plan, PoolLayer, Run};

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Calibration")]
pub(super) struct CalibrationArgs {
    /// Text like those that the model will read, or moments of one that `qcqa calibrate` wrote
    #[arg(long, value_name = "FILE")]
    pub(super) calibration: Option<PathBuf>,
    /// The most windows of the text to read
    #[arg(long, value_name = "N", default_value = "128", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    calibration_windows: usize,
}

impl CalibrationArgs {
    /// What a command came to; what is no moment is told of this file.
    pub(super) fn named(&self, done: Done) -> Done {
        done.map_err(|error| match (error, &self.calibration) {
            (error @ CliError::Moment(_), Some(path)) => about(path, error),
            (error, _) => error,
        })
    }

    /// The calibration, where one is given.
    pub(super) fn open(
        &self,
        checkpoint: &Checkpoint,
        run: Run<'_>,
    ) -> Result<Option<Calibration>, CliError> {
        let open = |path: &Path| {
            Calibration::open(path, checkpoint, self.calibration_windows, run).map_err(|e| about(path, e))
        };
        self.calibration.as_deref().map(open).transpose()
    }

    /// The calibration that a plan was made with, where its pooler uses moments: with a text where the plan refits.
    pub(super) fn of_plan(
        &self,
        plan: &Plan,
        plan_file: &Path,
        pooler: PoolerName,
        checkpoint: &Checkpoint,
        run: Run<'_>,
    ) -> Result<Option<Calibration>, CliError> {
        if !pooler.uses_moments() {
            return Ok(None);
        }
        let opened = match &self.calibration {
            None => made_with(plan, None).map(|()| None),
            Some(path) => {
                Calibration::of_plan(path, plan, checkpoint, self.calibration_windows, run).map(Some)
            }
        };
        let calibration = opened.map_err(|error| match (&error, &self.calibration) {
            (RuntimeError::PlanCalibration { .. }, _) => about(plan_file, CliError::Usage(error.to_string())),
            (_, Some(path)) => about(path, error),
            (_, None) => error.into(),
        })?;
        refit_text(plan, calibration.as_ref()).map_err(|e| about(plan_file, e))?;
        Ok(calibration)
    }
}

/// The refits, by the names of [`Refit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RefitName {
    /// Nothing
    None,
    /// The output projection
    Output,
    /// Queries and keys on attention scores, then values and the output projection
    Full,
}

/// The refit that a plan records: the one asked for, or full where the pooler is calibrated and a text is there.
pub(super) fn refit_of(
    asked: Option<RefitName>,
    pooler: PoolerName,
    calibration: Option<&Calibration>,
) -> Result<Option<Refit>, CliError> {
    let possible = pooler.uses_moments() && calibration.is_some_and(|c| c.text().is_some());
    match asked {
        Some(RefitName::None) => Ok(None),
        None if !possible => Ok(None),
        Some(_) if !possible => Err(CliError::Usage(
            "--refit runs the model on a text: give --calibration TEXT (moments do not suffice), and --pooler low-rank or \
             procrustes"
                .to_string(),
        )),
        Some(RefitName::Output) => Ok(Some(Refit::Output)),
        None | Some(RefitName::Full) => Ok(Some(Refit::Full)),
    }
}

/// What a plan asks to be fitted again, and on what; `None` where it asks for nothing.
fn refit_text<'a>(
    plan: &Plan,
    calibration: Option<&'a Calibration>,
) -> Result<Option<(Refit, &'a Model, &'a Windows)>, CliError> {
    let level = plan.method.refit.as_deref().unwrap_or(Refit::None.name());
    match (level.parse().map_err(CliError::Usage)?, calibration.and_then(Calibration::text)) {
        (Refit::None, _) => Ok(None),
        (refit, Some((source, windows))) => Ok(Some((refit, source, windows))),
        (_, None) => Err(CliError::Usage(format!(
            "the plan asks for the refit {level:?}, which runs the model on the text that it was calibrated on: give \
             --calibration TEXT (moments do not suffice)"
        ))),
    }
}

/// What makes the shared heads of every layer of a plan: all that is evaluated and written comes from here.
pub(super) fn pooling<'a>(
    checkpoint: &Checkpoint,
    plan: &'a Plan,
    name: PoolerName,
    pooler: &'a dyn KvPooler,
    calibration: Option<&'a Calibration>,
    run: Run<'_>,
) -> Result<Box<PoolLayer<'a>>, CliError> {
    let moments = calibration.filter(|_| name.uses_moments()).map(Calibration::moments);
    let pool = pool_layers(plan, pooler, moments);
    let Some((level, source, windows)) = refit_text(plan, calibration)? else { return Ok(pool) };
    let groups: Vec<_> = plan.layers.iter().map(|layer| &layer.groups).collect();
    let heads = |i: usize| Ok(checkpoint.layer(i)?);
    let refitted = runtime::refit(source, &groups, &heads, &pool, windows, level, run)?;
    Ok(Box::new(move |i, _| Ok(refitted.layers[i].clone())))
}

/// What is lost without a calibration, where the pooler would use one, or that one was given for nothing.
pub(super) fn note(
    plan: &Plan,
    pooler: PoolerName,
    calibration: Option<&Calibration>,
) -> Option<&'static str> {
    match calibration {
        None if pooler.uses_moments() => Some(
            "note: without --calibration FILE (a text, or moments) shared heads fit the weights alone; on novels-1m with \
             neighbour groups at half the cache that was perplexity 36.3 instead of 29.1",
        ),
        Some(_) if plan.calibration.is_none() => Some(
            "note: the calibration had no part in this plan: use --method low-rank, or --pooler low-rank",
        ),
        _ => None,
    }
}

/// The model before and after on the calibration text, as a table and as JSON; `None` without a text.
pub(super) fn before_and_after(
    checkpoint: &Checkpoint,
    plan: &Plan,
    pool: &PoolLayer<'_>,
    calibration: Option<&Calibration>,
    run: Run<'_>,
) -> Result<Option<(String, Value)>, CliError> {
    let Some((source, windows)) = calibration.and_then(Calibration::text) else { return Ok(None) };
    let model = source.under(checkpoint, plan, pool)?;
    let (before, after) = evaluate_against(source, &[&model], windows, run)?;
    let Some(after) = after.first() else { return Ok(None) };
    let (kv_before, kv_after) = kv_bytes(checkpoint, plan);
    let perplexity = |p: f64| format!("{p:.2}");
    let rows = [
        [
            "before".to_string(),
            perplexity(before.perplexity()),
            "-".into(),
            "-".into(),
            bytes(kv_before as u64),
        ],
        [
            "after".to_string(),
            perplexity(after.perplexity()),
            after.divergence.map_or("-".into(), |d| format!("{:.4}", d.kl)),
            after.divergence.map_or("-".into(), |d| percent(d.same_top)),
            bytes(kv_after as u64),
        ],
    ];
    let header = ["on the calibration text", "perplexity", "KL to source", "same top token", "KV a token"];
    let mut json = evaluation_json(after);
    json["source_perplexity"] = json!(before.perplexity());
    Ok(Some((table(header, rows), json)))
}
