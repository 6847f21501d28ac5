use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::calibrated::{CalibrationArgs, before_and_after, pooling};
use super::methods::{MethodName, plan_for};
use super::output::{Output, bytes, file_bytes};
use super::search::searched;
use super::{Asked, CliError, Done, Writing, about};
use crate::checkpoint::{self, Checkpoint, Target, WriteOptions, targets};
use crate::{Plan, PoolLayer, Run};

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// Directory of the model that the plan was made for
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// File of the plan
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct CompressArgs {
    #[command(flatten)]
    pub(super) asked: Asked,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is written, and where.
#[derive(Debug, Args)]
struct OutputArgs {
    /// Form of the output: stock loads in every runtime; expanded holds any plan but saves no memory
    #[arg(long, default_value = "stock")]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(targets::NAMES))]
    target: String,
    /// Directory of the output
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    writing: Writing,
}

pub(super) fn convert(args: &ConvertArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let (plan, name) = plan_for(&checkpoint, &args.plan)?;
    args.output.target()?.check(&plan).map_err(|e| about(&args.plan, e))?;
    args.output.check(&checkpoint)?;
    let calibration = args.calibration.of_plan(&plan, &args.plan, name, &checkpoint, run)?;
    let pooler = name.make();
    let pool = pooling(&checkpoint, &plan, name, pooler.as_ref(), calibration.as_ref(), run)?;
    let (text, json) = write(&checkpoint, &plan, &pool, &args.output, run)?;
    Ok(Output { text, json })
}

pub(super) fn compress(args: &CompressArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.asked.model)?;
    args.output.check(&checkpoint)?;
    let calibration = args.asked.calibration.open(&checkpoint, run)?;
    let (calibration, target) = (calibration.as_ref(), Some(args.output.target.as_str()));
    let found = searched(&args.asked, MethodName::LowRank, target, &checkpoint, calibration, run)?;
    let pooler = found.pooler.make();
    let pool = pooling(&checkpoint, &found.plan, found.pooler, pooler.as_ref(), calibration, run)?;
    let effect = before_and_after(&checkpoint, &found.plan, &pool, calibration, run)?;
    let (written, output) = write(&checkpoint, &found.plan, &pool, &args.output, run)?;
    let mut json = found.report(&checkpoint);
    let mut text = found.describe(&checkpoint) + "\n";
    if let Some((table, fields)) = effect {
        text += &format!("{table}\n");
        json["calibration_text"] = fields;
    }
    json["output"] = output;
    Ok(Output { text: text + &written, json })
}

impl OutputArgs {
    fn target(&self) -> Result<Box<dyn Target>, CliError> {
        let unknown = || CliError::Usage(format!("there is no target {}", self.target));
        targets::by_name(&self.target).ok_or_else(unknown)
    }

    /// Checks the place for the output: better now than after everything is computed.
    fn check(&self, checkpoint: &Checkpoint) -> Result<(), CliError> {
        Ok(checkpoint::check_output(checkpoint, &self.out, self.writing.force)?)
    }
}

/// Converts as the plan says, and tells what came of it.
fn write(
    checkpoint: &Checkpoint,
    plan: &Plan,
    pool: &PoolLayer<'_>,
    args: &OutputArgs,
    run: Run<'_>,
) -> Result<(String, Value), CliError> {
    let Writing { force, dry_run } = args.writing;
    let target = args.target()?;
    let options = WriteOptions { force, dry_run };
    let report = checkpoint::convert_with(checkpoint, plan, pool, target.as_ref(), &args.out, options, run)?;
    let done = if dry_run { "would be written to" } else { "written to" };
    let cache = if target.saves_memory() {
        let (after, before) = (report.kv_bytes_after as u64, report.kv_bytes_before as u64);
        format!("KV cache {} a token instead of {}", bytes(after), bytes(before))
    } else {
        "SAVES NO MEMORY: shared heads are copied back to every head, for evaluation only".to_string()
    };
    let text = format!(
        "{} model, {} in {} files, {done} {}\n{cache}\n",
        target.name(),
        file_bytes(report.bytes),
        report.files.len(),
        args.out.display(),
    );
    let json = json!({
        "out": args.out, "dry_run": dry_run, "target": target.name(), "saves_memory": target.saves_memory(),
        "bytes": report.bytes, "files": report.files,
        "kv_bytes_per_token": { "before": report.kv_bytes_before, "after": report.kv_bytes_after },
    });
    Ok((text, json))
}
