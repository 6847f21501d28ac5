use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::methods::{PoolerName, name_of};
use super::output::{Output, bytes, file_bytes};
use super::search::{describe, report, searched};
use super::{Asked, CliError, Done, Writing};
use crate::checkpoint::{self, Checkpoint, WriteOptions, read_plan, targets};
use crate::{KvPooler, Plan, Run};

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// Directory of the model that the plan was made for
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// File of the plan
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
pub(super) struct CompressArgs {
    #[command(flatten)]
    asked: Asked,
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
    let plan = read_plan(&args.plan)?;
    let (text, json) = write(&checkpoint, &plan, &args.output, &args.plan, run)?;
    Ok(Output { text, json })
}

pub(super) fn compress(args: &CompressArgs, run: Run<'_>) -> Done {
    let (checkpoint, plan, fronts) = searched(&args.asked, Some(&args.output.target), run)?;
    let (written, output) = write(&checkpoint, &plan, &args.output, Path::new("the plan"), run)?;
    let text = format!("{}\n{written}", describe(&checkpoint, &plan, &fronts));
    let mut json = report(&checkpoint, &plan, &fronts);
    json["output"] = output;
    Ok(Output { text, json })
}

/// The pooler that a plan names.
pub(super) fn pooler_of(plan: &Plan, plan_file: &Path) -> Result<Box<dyn KvPooler>, CliError> {
    let name = &plan.method.pooler;
    PoolerName::from_str(name, false).map(PoolerName::make).map_err(|_| {
        let known: Vec<_> = PoolerName::value_variants().iter().map(|&p| name_of(p)).collect();
        let (file, known) = (plan_file.display(), known.join(", "));
        CliError::Usage(format!("{file}: there is no pooler {name:?}; known are {known}"))
    })
}

/// Converts as the plan says, and tells what came of it.
fn write(
    checkpoint: &Checkpoint,
    plan: &Plan,
    args: &OutputArgs,
    plan_file: &Path,
    run: Run<'_>,
) -> Result<(String, Value), CliError> {
    let Writing { force, dry_run } = args.writing;
    let pooler = pooler_of(plan, plan_file)?;
    let target = targets::by_name(&args.target)
        .ok_or_else(|| CliError::Usage(format!("there is no target {}", args.target)))?;
    let options = WriteOptions { force, dry_run };
    let report =
        checkpoint::convert(checkpoint, plan, pooler.as_ref(), target.as_ref(), &args.out, options, run)?;
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
