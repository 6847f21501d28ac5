use std::path::PathBuf;

use clap::Args;
use qcqa::checkpoint::Checkpoint;
use qcqa::distil::{Distill, Effort};
use qcqa::files::check_apart;
use qcqa::output::{Report, Target, check_form, check_place, check_plan, convert as write};
use qcqa::pipeline::Preset;
use qcqa::targets::{Runtime, serving_notes};
use qcqa::{HeadSource, Run};
use serde_json::{Value, json};

use crate::Done;
use crate::args::{AUTO, SearchOptions, Writing, path, runtimes, target, targets_parser};
use crate::calibrated::{CalibrationArgs, plan_for, shared};
use crate::distill::{TrainArgs, beside, effort, state, told};
use crate::hints::{CliError, about};
use crate::report::{Output, bytes, file_bytes, percent, shown};
use crate::roles::{limit_cost, limit_cost_json, outcome, outcome_json, rests_on, rests_on_json};
use crate::search::Planned;

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// Directory of the model that the plan was made for
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// File of the plan
    #[arg(long, value_name = "FILE", value_parser = path())]
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
    /// Distil afterwards, for 500k or 2M tokens, 30min or 2h
    ///
    /// Shared heads learn what their source says on the calibration text. The state lies beside the output until all is done: after Ctrl-C, which
    /// writes what is best so far, or a crash the same command goes on from there.
    #[arg(long, value_name = "EFFORT", value_parser = effort, help_heading = "Calibration")]
    distill: Option<Effort>,
    #[command(flatten)]
    train: TrainArgs,
    /// Say what the limits of --target cost, of a large model, too
    ///
    /// The plan of the same budget without them is searched as well, and both are measured before refits. Done unasked for models of at most 8 KV heads a
    /// layer and less than a GiB of weights in f32, where it takes little.
    #[arg(long, hide_short_help = true, help_heading = "Output")]
    limit_cost: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// What is written, and where.
#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
struct OutputArgs {
    /// Form of the output: stock, padded, gguf, …
    ///
    /// Unless said stock, which loads in every runtime; padded, too, with groups of any size, filled up with query heads of zeros; remote-code holds any plan,
    /// for transformers with a model file of its own; gguf (gguf-f16, gguf-f32) any plan of models like Llama, as one file for
    /// llama.cpp; deci groups of any size, k by layer, for vLLM, as far as one number of query heads for all layers holds them; expanded holds any plan but saves no memory: it is for evaluation. With auto, the plainest that holds the best plan in the runtime that --runtime names.
    #[arg(long, default_value = "stock", hide_default_value = true, hide_possible_values = true)]
    #[arg(value_parser = targets_parser(&[AUTO]))]
    target: String,
    /// Where the output of --target auto is to be served
    #[arg(long, default_value = "transformers", hide_short_help = true, value_parser = runtimes())]
    runtime: String,
    #[command(flatten)]
    written: Written,
}

/// Where, and how carefully.
#[derive(Debug, Args)]
pub(super) struct Written {
    /// Directory of the output
    #[arg(long, value_name = "DIR", value_parser = path())]
    pub(super) out: PathBuf,
    #[command(flatten)]
    pub(super) writing: Writing,
}

pub(super) fn convert(args: &ConvertArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let plan = plan_for(&checkpoint, &args.plan)?;
    let target = match args.output.runtime()? {
        Some(runtime) => runtime.plainest(&checkpoint, &plan),
        None => target(&args.output.target).map(Ok)?,
    };
    let target = target.map_err(|e| about(&args.plan, e))?;
    check_plan(&checkpoint, &plan, target).map_err(|e| about(&args.plan, e))?;
    let read: Vec<_> = [args.plan.clone()].into_iter().chain(args.calibration.files()).collect();
    args.output.written.check(&[&checkpoint], &read)?;
    let calibration = args.calibration.of_plan(&plan, &args.plan, &checkpoint, run)?;
    let shared = shared(&plan, &args.plan, &checkpoint, calibration.as_ref(), run)?;
    let written = &args.output.written;
    let report = write(&checkpoint, &shared, target, &written.out, written.writing.options(), run)?;
    let (text, mut json) = tell(written, target, &report);
    json["calibration"] = json!(calibration.as_ref().map(rests_on_json));
    Ok(Output { text: calibration.as_ref().map_or(String::new(), rests_on) + &text, json }
        .noting(&checkpoint))
}

pub(super) fn compress(args: &CompressArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.asked.model)?;
    let written = &args.output.written;
    written.check(&[&checkpoint], &args.asked.inputs())?;
    if args.train.train.is_some() && args.distill.is_none() {
        return Err(CliError::usage(
            "--train says what a distillation trains: it needs --distill EFFORT, such as 2M",
        ));
    }
    let distil = args.distill.map(|effort| beside(effort, &args.train, &written.out));
    if let Some(distil) = &distil {
        written.check_state(distil, &[&checkpoint], &args.asked.inputs())?;
    }
    let runtime = args.output.runtime()?;
    let target = runtime.map_or_else(|| target(&args.output.target), |runtime| Ok(runtime.widest()))?;
    check_form(&checkpoint, target)?;
    let across = args.asked.options.is_calibrated_across(args.asked.preset(Preset::LowRank)?)?;
    let calibration = args.asked.calibration.open_for(across, &checkpoint, run)?;
    let calibration = calibration.as_ref();
    let validates = calibration.and_then(|c| c.text()).is_some_and(|(_, texts)| texts.validation().is_some());
    if args.limit_cost && !validates {
        return Err(CliError::usage(
            "--limit-cost is measured on windows that fitted nothing: it needs --calibration TEXT, of two windows or more",
        ));
    }
    let mut compress = args.asked.compress(Preset::LowRank, Some(target), calibration)?;
    if let Some(distil) = &distil {
        compress = compress.distil(distil.clone());
    }
    if args.limit_cost || is_small(&checkpoint) {
        compress = compress.weighing_limits();
    }
    let compressed = compress.run(&checkpoint, run)?;
    let target = runtime.map_or(Ok(target), |runtime| runtime.plainest(&checkpoint, compressed.plan()))?;
    let compressed = compressed.for_target(target);
    let run = if args.distill.is_some() { run.to_the_end() } else { run };
    let report = compressed.write(&written.out, written.writing.options(), run)?;
    if let (false, Some(distil)) = (compressed.interrupted, &distil) {
        distil.forget()?;
    }

    let planned = Planned::new(compressed.plan(), &compressed.fronts, &checkpoint, calibration)?;
    let (mut text, mut json) = (planned.describe() + "\n", planned.report());
    if calibration.is_some_and(|calibration| calibration.text().is_some()) {
        text += &format!("{}\n", outcome(&compressed));
        text += &limit_cost(&compressed);
        text += &told(&compressed.course, compressed.interrupted, &written.out);
        (json["validation"], json["stages"]) = outcome_json(&compressed);
        json["limit_cost"] = limit_cost_json(&compressed);
        json["distillation"] = json!({ "course": compressed.course, "interrupted": compressed.interrupted });
    }
    let (told, output) = tell(written, target, &report);
    json["output"] = output;
    Ok(Output { text: text + &told, json }.noting(&checkpoint))
}

/// Whether a second search is over soon: exact, of layers that are held.
fn is_small(checkpoint: &Checkpoint) -> bool {
    let heads = checkpoint.architecture().kv_heads().into_iter().max().unwrap_or(0);
    let f32_bytes = checkpoint.weight_bytes() / checkpoint.dtype().bytes() as u64 * 4;
    heads <= 8 && f32_bytes < 1 << 30
}

impl OutputArgs {
    /// The runtime, where the target is to be found by it.
    fn runtime(&self) -> Result<Option<&'static Runtime>, CliError> {
        if self.target != AUTO {
            return Ok(None);
        }
        let unknown = || CliError::usage(format!("there is no runtime {}", self.runtime));
        Runtime::by_name(&self.runtime).map(Some).ok_or_else(unknown)
    }
}

impl Written {
    /// Checks the place of a distillation's state, as that of the output.
    pub(super) fn check_state(
        &self,
        distill: &Distill,
        models: &[&Checkpoint],
        files: &[PathBuf],
    ) -> Result<(), CliError> {
        let directories = models.iter().map(|model| model.path());
        check_apart(&state(&self.out), files.iter().map(PathBuf::as_path).chain(directories))?;
        Ok(distill.check()?)
    }

    /// Checks the place for the output, better now than after everything is computed: beside the models and the files that are
    /// read.
    pub(super) fn check(&self, models: &[&Checkpoint], files: &[PathBuf]) -> Result<(), CliError> {
        let directories = models.iter().map(|model| model.path());
        check_apart(&self.out, files.iter().map(PathBuf::as_path).chain(directories))?;
        Ok(models.iter().try_for_each(|model| check_place(model, &self.out, self.writing.force))?)
    }
}

/// What came of writing.
pub(super) fn tell(written: &Written, target: &dyn Target, report: &Report) -> (String, Value) {
    let dry_run = written.writing.dry_run;
    let done = if dry_run { "would be written to" } else { "written to" };
    let saves = report.saves_memory;
    let cache = if saves {
        let (after, before) = (report.kv_bytes_after as u64, report.kv_bytes_before as u64);
        format!("KV cache {} a token instead of {}", bytes(after), bytes(before))
    } else {
        "SAVES NO MEMORY: shared heads are copied back to every head, for evaluation only".to_string()
    };
    let dead = match report.dead_query_heads {
        0 => String::new(),
        dead => format!(
            "{dead} query heads of zeros beside {} fill groups up: {} more for scores, {} more weights\n",
            report.query_heads,
            percent(dead as f64 / report.query_heads as f64),
            file_bytes(report.dead_bytes),
        ),
    };
    let served = serving_notes(target, &report.heads);
    let notes: String = served.iter().map(|note| format!("to be known: {note}\n")).collect();
    let removed = report
        .removed
        .iter()
        .map(|left| format!("removed {}, which a killed run had left\n", left.display()));
    let text = format!(
        "{}{} model, {} in {} files, {done} {}\n{cache}\n{dead}{notes}",
        removed.collect::<String>(),
        target.name(),
        file_bytes(report.bytes),
        report.files.len(),
        written.out.display(),
    ) + &left_out(&report.left_out);
    let all = |paths: &[PathBuf]| paths.iter().map(|path| shown(path)).collect::<Vec<_>>();
    let json = json!({
        "out": shown(&written.out), "dry_run": dry_run, "target": target.name(), "saves_memory": saves,
        "bytes": report.bytes, "files": all(&report.files), "left_out": all(&report.left_out), "removed": all(&report.removed),
        "serving_notes": served, "query_heads": report.query_heads, "dead_query_heads": report.dead_query_heads, "dead_bytes": report.dead_bytes,
        "kv_bytes_per_token": { "before": report.kv_bytes_before, "after": report.kv_bytes_after },
    });
    (text, json)
}

/// What of the source was not copied, in a line.
fn left_out(files: &[PathBuf]) -> String {
    match files {
        [] => String::new(),
        files => {
            let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            format!("not copied, as it is of the source alone: {}\n", names.join(", "))
        }
    }
}
