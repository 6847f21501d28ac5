use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::methods::Resolved;
use super::output::{Output, bytes, percent, table};
use super::{Asked, CliError, Done, Writing};
use crate::checkpoint::{Checkpoint, WriteOptions, targets, write_plan};
use crate::{Front, Plan, Run, kv_bytes_per_token};

#[derive(Debug, Args)]
pub(super) struct SearchArgs {
    #[command(flatten)]
    asked: Asked,
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
    let (checkpoint, plan, fronts) = searched(&args.asked, args.target.as_deref(), run)?;
    write_plan(&args.out, &plan, WriteOptions { force, dry_run })?;
    let note = if dry_run { "would be written to" } else { "written to" };
    let text = format!("{}\nplan {note} {}\n", describe(&checkpoint, &plan, &fronts), args.out.display());
    let mut json = report(&checkpoint, &plan, &fronts);
    json["out"] = json!(args.out);
    json["dry_run"] = dry_run.into();
    Ok(Output { text, json })
}

/// Opens the model, searches every layer, and plans.
pub(super) fn searched(
    asked: &Asked,
    target: Option<&str>,
    run: Run<'_>,
) -> Result<(Checkpoint, Plan, Vec<Front>), CliError> {
    let checkpoint = Checkpoint::open(&asked.model)?;
    let method = Resolved::new(asked.method, &asked.options, target, &checkpoint)?;
    let fronts = method.fronts(&checkpoint, run)?;
    let plan = method.plan(&checkpoint, &fronts, asked.kv, run)?;
    Ok((checkpoint, plan, fronts))
}

/// The plan as a table, a line for each layer, and what it comes to.
pub(super) fn describe(checkpoint: &Checkpoint, plan: &Plan, fronts: &[Front]) -> String {
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
    let table = table(["layer", "groups", "sizes", "WSE", "share", "gap at most"], rows);
    let (before, after) = kv_bytes(checkpoint, plan);
    format!(
        "{}: asked for {} of the KV cache, reached {} ({} KV heads of {})\n\
         {} a token instead of {}; WSE {:.4}, {} of the layers' energy\n\n{table}",
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
pub(super) fn report(checkpoint: &Checkpoint, plan: &Plan, fronts: &[Front]) -> Value {
    let (before, after) = kv_bytes(checkpoint, plan);
    json!({
        "plan": plan, "wse": plan.error(), "share": total_share(plan, fronts),
        "kv_bytes_per_token": { "before": before, "after": after },
    })
}

/// KV cache of the source and of the plan, bytes a token.
pub(super) fn kv_bytes(checkpoint: &Checkpoint, plan: &Plan) -> (usize, usize) {
    let config = checkpoint.config();
    let bytes = |heads| kv_bytes_per_token(heads, config.head_dim, checkpoint.dtype().bytes());
    (bytes(config.n_layers * config.kv_heads), bytes(plan.kv_heads()))
}

/// The summed error as a share of the summed energy.
pub(super) fn total_share(plan: &Plan, fronts: &[Front]) -> Option<f64> {
    share(plan.error(), fronts.iter().map(Front::energy).sum())
}

fn share(error: f64, energy: Option<f64>) -> Option<f64> {
    energy.filter(|e| *e > 0.0).map(|energy| error / energy)
}

/// How far an error may be above the optimum: 0 where it is known to be optimal.
pub(super) fn gap(gap: f64) -> String {
    if gap < 1e-9 { "0".to_string() } else { format!("{:.2}%", 100.0 * gap) }
}
