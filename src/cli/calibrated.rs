//! What the model's inputs are known to be, as the command line is given it.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::RangedU64ValueParser;
use serde_json::{Value, json};

use super::methods::PoolerName;
use super::output::{bytes, percent, table};
use super::search::kv_bytes;
use super::{CliError, eval};
use crate::checkpoint::Checkpoint;
use crate::runtime::{Calibration, RuntimeError, evaluate_against, made_with, pool_layers};
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

    /// The calibration that a plan was made with, where its pooler uses moments.
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
        opened.map_err(|error| match (&error, &self.calibration) {
            (RuntimeError::PlanCalibration { .. }, _) => {
                CliError::Usage(format!("{}: {error}", plan_file.display()))
            }
            (_, Some(path)) => about(path, error),
            (_, None) => error.into(),
        })
    }
}

/// An error that names the file.
fn about(path: &Path, error: RuntimeError) -> CliError {
    let name = path.display().to_string();
    match CliError::from(error) {
        CliError::Failed(message) if !message.contains(&name) => {
            CliError::Failed(format!("{name}: {message}"))
        }
        error => error,
    }
}

/// What makes the shared heads of every layer of a plan: all that is evaluated and written comes from here.
pub(super) fn pooling<'a>(
    plan: &'a Plan,
    name: PoolerName,
    pooler: &'a dyn KvPooler,
    calibration: Option<&'a Calibration>,
) -> Box<PoolLayer<'a>> {
    let moments = calibration.filter(|_| name.uses_moments()).map(Calibration::moments);
    pool_layers(plan, pooler, moments)
}

/// What is lost without a calibration, where the pooler would use one.
pub(super) fn note(pooler: PoolerName, calibration: Option<&Calibration>) -> Option<&'static str> {
    (pooler.uses_moments() && calibration.is_none()).then_some(
        "note: without --calibration FILE (a text, or moments) shared heads fit the weights alone; on novels-1m with \
         neighbour groups at half the cache that was perplexity 36.3 instead of 29.1",
    )
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
    let mut json = eval::evaluation_json(after);
    json["source_perplexity"] = json!(before.perplexity());
    Ok(Some((table(header, rows), json)))
}
