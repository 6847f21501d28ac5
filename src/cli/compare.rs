use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::methods::{AllocationName, MethodArgs, MethodName, Resolved, name_of};
use super::output::{Output, bytes, group_counts, percent, table};
use super::search::{gap, kv_bytes, total_share};
use super::{CliError, Done, fraction};
use crate::checkpoint::Checkpoint;
use crate::{Error, FitnessFn, Front, Plan, Run, WeightSharingError};

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Shares of the KV cache that may be kept
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', value_parser = fraction, required = true)]
    kv: Vec<f64>,
    /// Show the groups of this layer under every method
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    #[command(flatten)]
    options: MethodArgs,
}

/// A line of the comparison.
struct Line {
    method: MethodName,
    allocation: AllocationName,
    plan: Plan,
    share: Option<f64>,
    gap: Option<f64>,
}

const METHODS: [MethodName; 5] =
    [MethodName::Gqa, MethodName::Mqa, MethodName::KeyNorm, MethodName::QcqaEc, MethodName::QcqaAc];

pub(super) fn compare(args: &CompareArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let layers = checkpoint.config().n_layers;
    if let Some(layer) = args.layer.filter(|&l| l >= layers) {
        return Err(CliError::Usage(format!("there is no layer {layer}: the model has {layers}, from 0")));
    }
    let resolve = |method| Resolved::new(method, &args.options, None, &checkpoint);
    let methods = METHODS.into_iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    let fronts = fronts(&checkpoint, &methods, run)?;

    let mut lines = Vec::new();
    for (method, fronts) in METHODS.into_iter().zip(&fronts) {
        // The cache of MQA is what it is.
        let budgets = if method == MethodName::Mqa { &args.kv[..1] } else { &args.kv };
        let allocations = match (args.options.allocation, method) {
            (Some(one), _) => vec![one],
            (None, MethodName::QcqaAc) => AllocationName::value_variants().to_vec(),
            (None, _) => vec![AllocationName::Uniform],
        };
        for (&allocation, &kv) in allocations.iter().flat_map(|a| budgets.iter().map(move |kv| (a, kv))) {
            let options = MethodArgs { allocation: Some(allocation), ..args.options };
            let plan = Resolved::new(method, &options, None, &checkpoint)?.plan(
                &checkpoint,
                fronts,
                Some(kv),
                run,
            )?;
            lines.push(Line {
                method,
                allocation,
                gap: worst_gap(&plan),
                share: total_share(&plan, fronts),
                plan,
            });
        }
    }
    let text = match args.layer {
        Some(layer) => layer_table(&lines, layer),
        None => model_table(&checkpoint, &lines),
    };
    let json = json!({
        "model": args.model, "source": checkpoint.source()?,
        "lines": lines.iter().map(|line| line_json(&checkpoint, line)).collect::<Vec<_>>(),
    });
    Ok(Output { text, json })
}

/// The fronts of every method: each layer is decoded once for all of them.
fn fronts(checkpoint: &Checkpoint, methods: &[Resolved], run: Run<'_>) -> Result<Vec<Vec<Front>>, CliError> {
    let layers = checkpoint.config().n_layers;
    let mut fronts: Vec<Vec<Front>> = methods.iter().map(|_| Vec::new()).collect();
    let mut fitness = Vec::new();
    for i in 0..layers {
        run.step("layers", i as u64, layers as u64)?;
        let heads = checkpoint.key_value(i).map_err(Error::from)?;
        let wse = WeightSharingError::new(&heads)?;
        for (method, fronts) in methods.iter().zip(&mut fronts) {
            fronts.extend(method.grouped(&heads, &wse, run.fork(i as u64))?);
        }
        fitness.push(wse);
    }
    let fitness: Vec<&dyn FitnessFn> = fitness.iter().map(|f| f as &dyn FitnessFn).collect();
    for (method, fronts) in methods.iter().zip(&mut fronts) {
        fronts.extend(method.fronts_of(&fitness, run)?);
    }
    Ok(fronts)
}

/// The largest gap of a layer, where all are known.
fn worst_gap(plan: &Plan) -> Option<f64> {
    let gaps = plan.layers.iter().map(|layer| {
        let point = crate::FrontPoint {
            partition: layer.groups.clone(),
            error: layer.error,
            lower_bound: layer.lower_bound,
        };
        point.gap()
    });
    gaps.collect::<Option<Vec<_>>>().map(|gaps| gaps.into_iter().fold(0.0, f64::max))
}

fn model_table(checkpoint: &Checkpoint, lines: &[Line]) -> String {
    let source = checkpoint.config();
    let all = source.n_layers * source.kv_heads;
    let before = lines.first().map_or(0, |line| kv_bytes(checkpoint, &line.plan).0);
    let mha = [
        "mha".to_string(),
        "-".into(),
        "-".into(),
        "100.0%".into(),
        group_counts(&vec![source.kv_heads; source.n_layers]),
        bytes(before as u64),
        "0".into(),
        percent(0.0),
        "0".into(),
    ];
    let rows = lines.iter().map(|line| {
        [
            name_of(line.method),
            name_of(line.allocation),
            if line.method == MethodName::Mqa { "-".into() } else { percent(line.plan.budget.asked) },
            percent(line.plan.kv_heads() as f64 / all as f64),
            group_counts(&line.plan.group_counts()),
            bytes(kv_bytes(checkpoint, &line.plan).1 as u64),
            format!("{:.4}", line.plan.error()),
            line.share.map_or("-".into(), percent),
            line.gap.map_or("-".into(), gap),
        ]
    });
    table(
        [
            "method",
            "allocation",
            "asked",
            "reached",
            "groups",
            "KV bytes a token",
            "WSE",
            "share",
            "gap at most",
        ],
        std::iter::once(mha).chain(rows),
    )
}

fn layer_table(lines: &[Line], layer: usize) -> String {
    let rows = lines.iter().map(|line| {
        let of_layer = &line.plan.layers[layer];
        let groups: Vec<_> =
            of_layer.groups.groups().iter().map(|g| format!("{g:?}").replace(' ', "")).collect();
        [
            name_of(line.method),
            name_of(line.allocation),
            percent(line.plan.budget.asked),
            of_layer.groups.n_groups().to_string(),
            format!("{:.4}", of_layer.error),
            groups.join(" "),
        ]
    });
    format!("layer {layer}\n\n{}", table(["method", "allocation", "asked", "k", "WSE", "groups"], rows))
}

fn line_json(checkpoint: &Checkpoint, line: &Line) -> Value {
    let layers =
        line.plan.layers.iter().map(|l| json!({ "groups": l.groups, "error": l.error })).collect::<Vec<_>>();
    json!({
        "method": name_of(line.method), "allocation": name_of(line.allocation),
        "asked": line.plan.budget.asked, "reached": line.plan.budget.reached, "kv_heads": line.plan.kv_heads(),
        "kv_bytes_per_token": kv_bytes(checkpoint, &line.plan).1,
        "wse": line.plan.error(), "share": line.share, "gap": line.gap, "layers": layers,
    })
}
