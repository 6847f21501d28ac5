//! The lines of a comparison, as tables, curves and JSON.

use serde_json::{Value, json};

use super::methods::{AllocationName, MethodName, OptimizerName, PoolerName, name_of};
use super::output::{bytes, evaluation_json, gap, group_counts, is_wse, kv_bytes, merge, percent, table};
use super::plot::Curve;
use crate::checkpoint::Checkpoint;
use crate::runtime::Evaluation;
use crate::plan::{LayerPlan, Plan};

/// A line of the comparison.
pub(super) struct Line {
    pub(super) method: MethodName,
    pub(super) optimizer: Option<OptimizerName>,
    pub(super) allocation: AllocationName,
    pub(super) pooler: PoolerName,
    pub(super) plan: Plan,
    pub(super) share: Option<f64>,
    pub(super) gap: Option<f64>,
    pub(super) evaluation: Option<Evaluation>,
}

/// The largest gap of a layer, where all are known.
pub(super) fn worst_gap(plan: &Plan) -> Option<f64> {
    plan.layers.iter().map(LayerPlan::gap).try_fold(0.0, |most: f64, gap| Some(most.max(gap?)))
}

/// A curve for each method, from the smallest cache to the whole.
pub(super) fn curves(lines: &[Line], source: &Evaluation) -> Vec<Curve> {
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

impl Line {
    /// The method, and what distinguishes it from others of that name.
    fn name(&self) -> String {
        let optimizer =
            self.optimizer.filter(|o| *o != OptimizerName::Auto).map(|o| format!(" {}", name_of(o)));
        let allocation = match self.allocation {
            AllocationName::Uniform => String::new(),
            other => format!(" ({})", name_of(other)),
        };
        let refit = self.plan.method.refit.as_ref().map(|refit| format!(" + {refit} refit"));
        format!(
            "{}{}{allocation}{}",
            name_of(self.method),
            optimizer.unwrap_or_default(),
            refit.unwrap_or_default()
        )
    }
}

/// An error, where it is a weight-sharing error.
fn wse(plan: &Plan, error: f64) -> String {
    if is_wse(plan) { format!("{error:.4}") } else { "-".into() }
}

pub(super) fn model_table(checkpoint: &Checkpoint, lines: &[Line], source: Option<&Evaluation>) -> String {
    let config = checkpoint.config();
    let all = config.n_layers * config.kv_heads;
    let before = lines.first().map_or(0, |line| kv_bytes(checkpoint, &line.plan).0);
    let perplexity = |e: &Evaluation| format!("{:.2}", e.perplexity());
    let mha = [
        "mha".to_string(),
        "-".into(),
        percent(1.0),
        group_counts(&vec![config.kv_heads; config.n_layers]),
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
            if line.method == MethodName::Mqa { "-".into() } else { percent(line.plan.budget.asked) },
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

pub(super) fn layer_table(lines: &[Line], layer: usize) -> String {
    let rows = lines.iter().map(|line| {
        let of_layer = &line.plan.layers[layer];
        let groups = of_layer.groups.groups();
        let groups: Vec<_> = groups.iter().map(|g| format!("{g:?}").replace(' ', "")).collect();
        [
            line.name(),
            percent(line.plan.budget.asked),
            of_layer.groups.n_groups().to_string(),
            wse(&line.plan, of_layer.error),
            groups.join(" "),
        ]
    });
    format!("layer {layer}\n\n{}", table(["method", "asked", "k", "WSE", "groups"], rows))
}

pub(super) fn line_json(checkpoint: &Checkpoint, line: &Line) -> Value {
    let layer = |l: &LayerPlan| json!({ "groups": l.groups, "error": l.error, "lower_bound": l.lower_bound });
    let mut json = json!({
        "method": name_of(line.method), "optimizer": line.optimizer.map(name_of),
        "allocation": name_of(line.allocation), "pooler": line.plan.method.pooler,
        "refit": line.plan.method.refit, "asked": line.plan.budget.asked,
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
