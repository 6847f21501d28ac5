use std::path::PathBuf;

use clap::Args;
use qcqa::HeadSource;
use qcqa::Run;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::front::Front;
use qcqa::pipeline::Preset;
use qcqa::plan::{Plan, write_plan};
use serde_json::{Value, json};

use crate::Done;
use crate::args::{SearchOptions, Writing, path, target, targets_parser};
use crate::calibrated::note;
use crate::hints::CliError;
use crate::report::{Output, bytes, gap, is_wse, kv_bytes, percent, share, shown, table, total_share};
use crate::roles::{rests_on, rests_on_json};

#[derive(Debug, Args)]
pub(super) struct SearchArgs {
    #[command(flatten)]
    pub(super) asked: SearchOptions,
    /// Search only what this target can hold
    #[arg(long, value_parser = targets_parser(&[]))]
    target: Option<String>,
    /// File of the plan
    #[arg(long, value_name = "FILE", value_parser = path())]
    out: PathBuf,
    #[command(flatten)]
    writing: Writing,
}

pub(super) fn search(args: &SearchArgs, run: Run<'_>) -> Done {
    // Better now than after the search.
    args.writing.check(&args.out, &args.asked.inputs())?;
    let checkpoint = Checkpoint::open(&args.asked.model)?;
    let across = args.asked.options.is_calibrated_across(args.asked.preset(Preset::QcqaEc)?)?;
    let calibration = args.asked.calibration.open_for(across, &checkpoint, run)?;
    let calibration = calibration.as_ref();
    let target = args.target.as_deref().map(target).transpose()?;
    let compress = args.asked.compress(Preset::QcqaEc, target, calibration)?;
    let source: &dyn HeadSource = calibration.map_or(&checkpoint, |calibration| calibration);
    let searched = compress.search(source, run)?;
    let plan = searched.plan(compress.asked_budget(), run)?;
    write_plan(&args.out, &plan, args.writing.options())?;
    let dry_run = args.writing.dry_run;
    let done = if dry_run { "would be written to" } else { "written to" };
    let planned = Planned::new(&plan, searched.layers(), &checkpoint, calibration)?;
    let mut json = planned.report();
    json["out"] = json!(shown(&args.out));
    json["dry_run"] = dry_run.into();
    Ok(Output { text: format!("{}\nplan {done} {}\n", planned.describe(), args.out.display()), json }
        .noting(&checkpoint))
}

/// A plan, with what it was chosen from and what is to be said of it.
pub(super) struct Planned<'a> {
    plan: &'a Plan,
    fronts: &'a [Front],
    checkpoint: &'a Checkpoint,
    calibration: Option<&'a Calibration<'a>>,
    note: Option<&'static str>,
}

impl<'a> Planned<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        fronts: &'a [Front],
        checkpoint: &'a Checkpoint,
        calibration: Option<&'a Calibration<'a>>,
    ) -> Result<Self, CliError> {
        Ok(Self { plan, fronts, checkpoint, calibration, note: note(plan, calibration)? })
    }

    /// The plan as a table, a line for each layer, and what it comes to.
    pub(super) fn describe(&self) -> String {
        let Self { plan, fronts, .. } = self;
        let kept = plan.group_counts();
        let rows = plan.layers.iter().zip(*fronts).enumerate().map(|(i, (layer, front))| {
            let mut sizes = layer.groups.sizes();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            let sizes: Vec<_> = sizes.iter().map(usize::to_string).collect();
            [
                i.to_string(),
                // Those that it keeps for the layer above, too.
                if layer.below.is_some() { "of below".into() } else { kept[i].to_string() },
                sizes.join(","),
                format!("{:.4}", layer.error),
                // A joint error is no share of one layer.
                share(layer.error, front.energy().filter(|_| plan.joint(i).is_none()))
                    .map_or("-".into(), percent),
                layer.gap().map_or("-".into(), gap),
            ]
        });
        let error = if is_wse(plan) { "WSE" } else { "error" };
        let table = table(["layer", "groups", "sizes", error, "share", "gap at most"], rows);
        let (before, after) = kv_bytes(self.checkpoint, plan);
        let note = self.note.map_or(String::new(), |note| format!("\n{note}\n"));
        let rests =
            self.calibration.map_or(String::new(), |calibration| format!("\n{}", rests_on(calibration)));
        format!(
            "{}: asked for {} of the KV cache, reached {} ({} KV heads of {})\n\
             {} a token instead of {}; {error} {:.4}, {} of the layers' energy\n\n{table}{rests}{note}",
            plan.method.name,
            percent(plan.budget.asked),
            percent(plan.budget.reached),
            plan.budget.kv_heads,
            plan.source.kv_heads(),
            bytes(after as u64),
            bytes(before as u64),
            plan.error(),
            total_share(plan, fronts).map_or("-".into(), percent),
        )
    }

    /// The plan and what it comes to.
    pub(super) fn report(&self) -> Value {
        let Self { plan, fronts, .. } = self;
        let (before, after) = kv_bytes(self.checkpoint, plan);
        json!({
            "plan": plan, "error": plan.error(), "wse": is_wse(plan).then(|| plan.error()),
            "share": total_share(plan, fronts), "kv_bytes_per_token": { "before": before, "after": after },
            "note": self.note, "calibration": self.calibration.map(rests_on_json),
        })
    }
}
