use std::path::PathBuf;

use clap::Args;
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::output::{Report, Target, check_place, check_plan, convert as write};
use qcqa::pipeline::Preset;
use serde_json::{Value, json};

use crate::Done;
use crate::args::{SearchOptions, Writing, target, targets_parser};
use crate::calibrated::{CalibrationArgs, plan_for, shared};
use crate::hints::{CliError, about};
use crate::report::{Output, bytes, file_bytes};
use crate::roles::{outcome, outcome_json, rests_on, rests_on_json};
use crate::search::Planned;

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
    pub(super) asked: SearchOptions,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is written, and where.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// Form of the output
    ///
    /// stock loads in every runtime; expanded holds any plan but saves no memory: it is for evaluation.
    #[arg(long, default_value = "stock", value_parser = targets_parser())]
    target: String,
    /// Directory of the output
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    writing: Writing,
}

pub(super) fn convert(args: &ConvertArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let plan = plan_for(&checkpoint, &args.plan)?;
    let target = target(&args.output.target)?;
    check_plan(&checkpoint, &plan, target).map_err(|e| about(&args.plan, e))?;
    args.output.check(&checkpoint)?;
    let calibration = args.calibration.of_plan(&plan, &args.plan, &checkpoint, run)?;
    let shared = shared(&plan, &args.plan, &checkpoint, calibration.as_ref(), run)?;
    let report = write(&checkpoint, &shared, target, &args.output.out, args.output.writing.options(), run)?;
    let (text, mut json) = args.output.tell(target, &report);
    json["calibration"] = json!(calibration.as_ref().map(rests_on_json));
    Ok(Output { text: calibration.as_ref().map_or(String::new(), rests_on) + &text, json })
}

pub(super) fn compress(args: &CompressArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.asked.model)?;
    args.output.check(&checkpoint)?;
    let calibration = args.asked.calibration.open(&checkpoint, run)?;
    let calibration = calibration.as_ref();
    let target = target(&args.output.target)?;
    let compress = args.asked.compress(Preset::LowRank, Some(target), calibration)?;
    let compressed = compress.run(&checkpoint, run)?;
    let report = compressed.write(&args.output.out, args.output.writing.options(), run)?;

    let planned = Planned::new(compressed.plan(), &compressed.fronts, &checkpoint, calibration)?;
    let (mut text, mut json) = (planned.describe() + "\n", planned.report());
    if calibration.is_some_and(|calibration| calibration.text().is_some()) {
        text += &format!("{}\n", outcome(&compressed));
        (json["validation"], json["stages"]) = outcome_json(&compressed);
    }
    let (written, output) = args.output.tell(target, &report);
    json["output"] = output;
    Ok(Output { text: text + &written, json })
}

impl OutputArgs {
    /// Checks the place for the output: better now than after everything is computed.
    fn check(&self, checkpoint: &Checkpoint) -> Result<(), CliError> {
        Ok(check_place(checkpoint, &self.out, self.writing.options().force)?)
    }

    /// What came of writing.
    fn tell(&self, target: &dyn Target, report: &Report) -> (String, Value) {
        let dry_run = self.writing.dry_run;
        let done = if dry_run { "would be written to" } else { "written to" };
        let saves = report.saves_memory;
        let cache = if saves {
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
            self.out.display(),
        );
        let json = json!({
            "out": self.out, "dry_run": dry_run, "target": target.name(), "saves_memory": saves,
            "bytes": report.bytes, "files": report.files,
            "kv_bytes_per_token": { "before": report.kv_bytes_before, "after": report.kv_bytes_after },
        });
        (text, json)
    }
}
