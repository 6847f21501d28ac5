//! The lines of a comparison, as tables, curves and JSON.

use qcqa::HeadSource;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::Evaluation;
use qcqa::front::Front;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::{LayerPlan, Plan};
use serde_json::{Value, json};

use crate::plot::Curve;
use crate::report::{
    bytes, evaluation_json, gap, group_counts, is_wse, kv_bytes, merge, percent, table, total_share,
};

/// A line of the comparison.
pub(super) struct Line<'a> {
    /// What made the plan, and makes its shared heads.
    pub(super) compress: &'a Compress<'a>,
    method: Preset,
    /// `None` for methods that follow a rule.
    optimizer: Option<String>,
    allocation: String,
    pub(super) plan: Plan,
    share: Option<f64>,
    gap: Option<f64>,
    pub(super) evaluation: Option<Evaluation>,
}

/// The largest gap of a layer, where all are known.
fn worst_gap(plan: &Plan) -> Option<f64> {
    plan.layers.iter().map(LayerPlan::gap).try_fold(0.0, |most: f64, gap| Some(most.max(gap?)))
}

/// A curve for each method, from the smallest cache to the whole.
pub(super) fn curves(lines: &[Line<'_>], source: &Evaluation) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for line in lines {
        let Some(evaluation) = &line.evaluation else { continue };
        let name = line.name();
        let point = (line.plan.budget.reached, evaluation.perplexity());
        match curves.iter_mut().find(|c| c.name == name) {
            Some(curve) => curve.points.push(point),
            None => curves.push(Curve { name, points: vec![(1.0, source.perplexity()), point] }),
        }
    }
    curves.iter_mut().for_each(|c| c.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    curves
}

impl<'a> Line<'a> {
    pub(super) fn new(
        compress: &'a Compress<'a>,
        method: Preset,
        optimizer: Option<String>,
        allocation: String,
        plan: Plan,
        fronts: &[Front],
    ) -> Self {
        let (gap, share) = (worst_gap(&plan), total_share(&plan, fronts));
        Self { compress, method, optimizer, allocation, plan, share, gap, evaluation: None }
    }

    /// The method, and what distinguishes it from others of that name.
    pub(super) fn name(&self) -> String {
        let optimizer = self.optimizer.as_ref().filter(|o| *o != "auto").map(|o| format!(" {o}"));
        let allocation = match self.allocation.as_str() {
            "uniform" => String::new(),
            other => format!(" ({other})"),
        };
        let refit = self.plan.pooling.refit.map(|refit| format!(" + {} refit", refit.name()));
        format!("{}{}{allocation}{}", self.method, optimizer.unwrap_or_default(), refit.unwrap_or_default())
    }
}

/// An error, where it is a weight-sharing error.
fn wse(plan: &Plan, error: f64) -> String {
    if is_wse(plan) { format!("{error:.4}") } else { "-".into() }
}

pub(super) fn model_table(
    checkpoint: &Checkpoint,
    lines: &[Line<'_>],
    source: Option<&Evaluation>,
) -> String {
    let heads = checkpoint.architecture().kv_heads();
    let all: usize = heads.iter().sum();
    let before = lines.first().map_or(0, |line| kv_bytes(checkpoint, &line.plan).0);
    let perplexity = |e: &Evaluation| format!("{:.2}", e.perplexity());
    let mha = [
        "mha".to_string(),
        "-".into(),
        percent(1.0),
        group_counts(&heads),
        bytes(before as u64),
        "0".into(),
        percent(0.0),
        "0".into(),
        source.map_or("-".into(), perplexity),
        source.map_or("-".into(), |_| "0".into()),
    ];
    let rows = lines.iter().map(|line| {
        let divergence = line.evaluation.as_ref().and_then(|e| e.divergence);
        [
            line.name(),
            if line.method == Preset::Mqa { "-".into() } else { percent(line.plan.budget.asked) },
            percent(line.plan.kv_heads() as f64 / all as f64),
            group_counts(&line.plan.group_counts()),
            bytes(kv_bytes(checkpoint, &line.plan).1 as u64),
            wse(&line.plan, line.plan.error()),
            line.share.map_or("-".into(), percent),
            line.gap.map_or("-".into(), gap),
            line.evaluation.as_ref().map_or("-".into(), perplexity),
            divergence.map_or("-".into(), |d| format!("{:.3}", d.kl)),
        ]
    });
    let header = [
        "method",
        "asked",
        "reached",
        "groups",
        "KV a token",
        "WSE",
        "share",
        "gap at most",
        "perplexity",
        "KL",
    ];
    let rows = std::iter::once(mha).chain(rows);
    if source.is_some() {
        return table(header, rows);
    }
    let [header @ .., _, _] = header;
    table(header, rows.map(|[row @ .., _, _]: [String; 10]| row))
}

pub(super) fn layer_table(lines: &[Line<'_>], layer: usize) -> String {
    let rows = lines.iter().map(|line| {
        let of_layer = &line.plan.layers[layer];
        let groups = of_layer.groups.groups();
        let groups: Vec<_> = groups.iter().map(|g| format!("{g:?}").replace(' ', "")).collect();
        [
            line.name(),
            percent(line.plan.budget.asked),
            line.plan.group_counts()[layer].to_string(),
            wse(&line.plan, of_layer.error),
            groups.join(" "),
        ]
    });
    format!("layer {layer}\n\n{}", table(["method", "asked", "k", "WSE", "groups"], rows))
}

pub(super) fn line_json(checkpoint: &Checkpoint, line: &Line<'_>) -> Value {
    let layer = |l: &LayerPlan| {
        let mut json = json!({ "groups": l.groups, "error": l.error, "lower_bound": l.lower_bound });
        if let Some(below) = &l.below {
            json["below"] = json!(below);
        }
        json
    };
    let mut json = json!({
        "method": line.method.name(), "optimizer": line.optimizer,
        "allocation": line.allocation, "pooler": line.plan.pooling.pooler.name(),
        "refit": line.plan.pooling.refit, "asked": line.plan.budget.asked,
        "reached": line.plan.budget.reached, "kv_heads": line.plan.kv_heads(),
        "kv_bytes_per_token": kv_bytes(checkpoint, &line.plan).1,
        "error": line.plan.error(), "wse": is_wse(&line.plan).then(|| line.plan.error()), "share": line.share, "gap": line.gap,
        "layers": line.plan.layers.iter().map(layer).collect::<Vec<_>>(),
    });
    if let Some(evaluation) = &line.evaluation {
        merge(&mut json, evaluation_json(evaluation));
    }
    json
}
