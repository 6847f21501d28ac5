use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::calibrated::{note, refit_of};
use super::methods::{MethodName, PoolerName};
use super::output::{Output, bytes, gap, is_wse, kv_bytes, percent, share, table, total_share};
use super::resolved::Resolved;
use super::{Asked, CliError, Done, Writing};
use crate::checkpoint::{Checkpoint, WriteOptions, targets, write_plan, write_whole};
use crate::runtime::Calibration;
use crate::front::Front;
use crate::plan::Plan;
use crate::run::Run;

#[derive(Debug, Args)]
pub(super) struct SearchArgs {
    #[command(flatten)]
    pub(super) asked: Asked,
    /// Search only what this target can hold
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(targets::NAMES))]
    target: Option<String>,
    /// File of the plan
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    writing: Writing,
}

pub(super) fn search(args: &SearchArgs, run: Run<'_>) -> Done {
    let Writing { force, dry_run } = args.writing;
    // Better now than after the search.
    write_whole(&args.out, &[], WriteOptions { force, dry_run: true })?;
    let checkpoint = Checkpoint::open(&args.asked.model)?;
    let calibration = args.asked.calibration.open(&checkpoint, run)?;
    let target = args.target.as_deref();
    let found = searched(&args.asked, MethodName::QcqaEc, target, &checkpoint, calibration.as_ref(), run)?;
    write_plan(&args.out, &found.plan, WriteOptions { force, dry_run })?;
    let done = if dry_run { "would be written to" } else { "written to" };
    let description = found.describe(&checkpoint);
    let mut json = found.report(&checkpoint);
    json["out"] = json!(args.out);
    json["dry_run"] = dry_run.into();
    Ok(Output { text: format!("{description}\nplan {done} {}\n", args.out.display()), json })
}

/// A plan, with what it was chosen from and what is to be said of it.
pub(super) struct Searched {
    pub(super) plan: Plan,
    pub(super) fronts: Vec<Front>,
    pub(super) pooler: PoolerName,
    note: Option<&'static str>,
}

/// Searches every layer, and plans; `default` is the method unless another is asked for.
pub(super) fn searched(
    asked: &Asked,
    default: MethodName,
    target: Option<&str>,
    checkpoint: &Checkpoint,
    calibration: Option<&Calibration>,
    run: Run<'_>,
) -> Result<Searched, CliError> {
    let method = asked.method.unwrap_or(default);
    let method = Resolved::new(method, &asked.options, target, checkpoint, calibration)?;
    let found = method.found(run)?;
    let mut plan = method.plan(&found, asked.kv, run)?;
    let pooler = method.pooler();
    plan.method.refit = refit_of(asked.refit, pooler, calibration)?.map(|refit| refit.name().to_string());
    let note = note(&plan, pooler, calibration);
    Ok(Searched { plan, fronts: found.fronts, pooler, note })
}

impl Searched {
    /// The plan as a table, a line for each layer, and what it comes to.
    pub(super) fn describe(&self, checkpoint: &Checkpoint) -> String {
        let Self { plan, fronts, .. } = self;
        let rows = plan.layers.iter().zip(fronts).enumerate().map(|(i, (layer, front))| {
            let mut sizes = layer.groups.sizes();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            let sizes: Vec<_> = sizes.iter().map(usize::to_string).collect();
            [
                i.to_string(),
                layer.groups.n_groups().to_string(),
                sizes.join(","),
                format!("{:.4}", layer.error),
                share(layer.error, front.energy()).map_or("-".into(), percent),
                layer.gap().map_or("-".into(), gap),
            ]
        });
        let error = if is_wse(plan) { "WSE" } else { "error" };
        let table = table(["layer", "groups", "sizes", error, "share", "gap at most"], rows);
        let (before, after) = kv_bytes(checkpoint, plan);
        let note = self.note.map_or(String::new(), |note| format!("\n{note}\n"));
        format!(
            "{}: asked for {} of the KV cache, reached {} ({} KV heads of {})\n\
             {} a token instead of {}; {error} {:.4}, {} of the layers' energy\n\n{table}{note}",
            plan.method.name,
            percent(plan.budget.asked),
            percent(plan.budget.reached),
            plan.budget.kv_heads,
            plan.source.layers * plan.source.kv_heads,
            bytes(after as u64),
            bytes(before as u64),
            plan.error(),
            total_share(plan, fronts).map_or("-".into(), percent),
        )
    }

    /// The plan and what it comes to.
    pub(super) fn report(&self, checkpoint: &Checkpoint) -> Value {
        let Self { plan, fronts, .. } = self;
        let (before, after) = kv_bytes(checkpoint, plan);
        json!({
            "plan": plan, "error": plan.error(), "wse": is_wse(plan).then(|| plan.error()),
            "share": total_share(plan, fronts), "kv_bytes_per_token": { "before": before, "after": after },
            "note": self.note,
        })
    }
}
