use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::eval::{TextArgs, evaluation_json, merge};
use super::methods::{AllocationName, MethodArgs, MethodName, OptimizerName, Resolved, name_of};
use super::output::{Output, bytes, group_counts, percent, table};
use super::plot::{self, Curve};
use super::search::{gap, kv_bytes, total_share};
use super::{CliError, Done, fraction};
use crate::checkpoint::Checkpoint;
use crate::runtime::{Evaluation, Model, evaluate_against};
use crate::{FitnessFn, Front, LayerPlan, Plan, Run, WeightSharingError};

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
    #[command(flatten)]
    text: TextArgs,
    /// Draw perplexity over KV cache into this file (SVG)
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// A method to compare, and how it searches where it does.
struct Candidate {
    method: MethodName,
    optimizer: Option<OptimizerName>,
    options: MethodArgs,
    fronts: Vec<Front>,
}

/// A line of the comparison.
struct Line {
    method: MethodName,
    optimizer: Option<OptimizerName>,
    allocation: AllocationName,
    plan: Plan,
    share: Option<f64>,
    gap: Option<f64>,
    evaluation: Option<Evaluation>,
}

const RULES: [MethodName; 3] = [MethodName::Gqa, MethodName::Mqa, MethodName::KeyNorm];
const SEARCHES: [MethodName; 2] = [MethodName::QcqaEc, MethodName::QcqaAc];

pub(super) fn compare(args: &CompareArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let layers = checkpoint.config().n_layers;
    if let Some(layer) = args.layer.filter(|&l| l >= layers) {
        return Err(CliError::Usage(format!("there is no layer {layer}: the model has {layers}, from 0")));
    }
    let has_text = args.text.text.is_some() || args.text.ids.is_some();
    if args.plot.is_some() && !has_text {
        return Err(CliError::Usage("--plot draws perplexity: it needs --text FILE".to_string()));
    }
    let mut candidates = candidates(&args.options);
    search(&checkpoint, &mut candidates, run)?;
    let mut lines = lines(&checkpoint, &candidates, args, run)?;
    let source = if has_text { Some(evaluate(&checkpoint, args, &mut lines, run)?) } else { None };
    if let (Some(path), Some(source)) = (&args.plot, &source) {
        let title = format!("{}, before fine-tuning", args.model.display());
        plot::write(path, &plot::draw(&title, &curves(&lines, source))?)?;
    }
    let text = match args.layer {
        Some(layer) => layer_table(&lines, layer),
        None => model_table(&checkpoint, &lines, source.as_ref()),
    };
    let json = json!({
        "model": args.model, "source": checkpoint.source()?,
        "source_perplexity": source.as_ref().map(Evaluation::perplexity),
        "lines": lines.iter().map(|line| line_json(&checkpoint, line)).collect::<Vec<_>>(),
    });
    Ok(Output { text, json })
}

/// Every rule once, every search with each optimizer asked for.
fn candidates(options: &MethodArgs) -> Vec<Candidate> {
    let candidate = |method, optimizer: Option<OptimizerName>| {
        let optimizers = optimizer.map_or_else(|| vec![OptimizerName::Auto], |o| vec![o]);
        let options = MethodArgs { optimizer: optimizers, ..options.clone() };
        Candidate { method, optimizer, options, fronts: Vec::new() }
    };
    let searches = options.optimizer.iter().flat_map(|&o| SEARCHES.map(|method| candidate(method, Some(o))));
    RULES.into_iter().map(|method| candidate(method, None)).chain(searches).collect()
}

/// Fills in the fronts: each layer is decoded once for all.
fn search(checkpoint: &Checkpoint, candidates: &mut [Candidate], run: Run<'_>) -> Result<(), CliError> {
    let layers = checkpoint.config().n_layers;
    let resolve = |c: &Candidate| Resolved::new(c.method, &c.options, None, checkpoint);
    let methods = candidates.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    let mut fitness = Vec::new();
    for i in 0..layers {
        run.step("layers", i as u64, layers as u64)?;
        let heads = checkpoint.key_value(i)?;
        let wse = WeightSharingError::new(&heads)?;
        for (method, candidate) in methods.iter().zip(&mut *candidates) {
            candidate.fronts.extend(method.grouped(&heads, &wse, run.fork(i as u64))?);
        }
        fitness.push(wse);
    }
    let fitness: Vec<&dyn FitnessFn> = fitness.iter().map(|f| f as &dyn FitnessFn).collect();
    for (method, candidate) in methods.iter().zip(candidates) {
        candidate.fronts.extend(method.fronts_of(&fitness, run)?);
    }
    Ok(())
}

/// A plan for every candidate, allocation and budget. MQA has one cache, whatever the budget.
fn lines(
    checkpoint: &Checkpoint,
    candidates: &[Candidate],
    args: &CompareArgs,
    run: Run<'_>,
) -> Result<Vec<Line>, CliError> {
    let mut lines = Vec::new();
    for Candidate { method, optimizer, options, fronts } in candidates {
        let budgets = if *method == MethodName::Mqa { &args.kv[..1] } else { &args.kv };
        let allocations = match (options.allocation, method) {
            (Some(one), _) => vec![one],
            (None, MethodName::QcqaAc) => AllocationName::value_variants().to_vec(),
            (None, _) => vec![AllocationName::Uniform],
        };
        for (&allocation, &kv) in allocations.iter().flat_map(|a| budgets.iter().map(move |kv| (a, kv))) {
            let options = MethodArgs { allocation: Some(allocation), ..options.clone() };
            let plan = Resolved::new(*method, &options, None, checkpoint)?.plan(
                checkpoint,
                fronts,
                Some(kv),
                run,
            )?;
            let (gap, share) = (worst_gap(&plan), total_share(&plan, fronts));
            lines.push(Line {
                method: *method,
                optimizer: *optimizer,
                allocation,
                plan,
                share,
                gap,
                evaluation: None,
            });
        }
    }
    Ok(lines)
}

/// Runs the source and every plan on the text; equal plans run once. Returns the source's evaluation.
fn evaluate(
    checkpoint: &Checkpoint,
    args: &CompareArgs,
    lines: &mut [Line],
    run: Run<'_>,
) -> Result<Evaluation, CliError> {
    let source = Model::load(checkpoint)?;
    let windows = args.text.required(checkpoint, &source)?;
    let pooler = args.options.pooler.make();
    let same = |a: &[LayerPlan], b: &[LayerPlan]| a.iter().map(|l| &l.groups).eq(b.iter().map(|l| &l.groups));
    let mut distinct: Vec<Vec<LayerPlan>> = Vec::new();
    let mut of_line = Vec::new();
    for line in lines.iter() {
        let known = distinct.iter().position(|d| same(d, &line.plan.layers));
        of_line.push(known.unwrap_or(distinct.len()));
        if known.is_none() {
            distinct.push(line.plan.layers.clone());
        }
    }
    let mut models = vec![source.clone(); distinct.len()];
    for i in 0..checkpoint.config().n_layers {
        let heads = checkpoint.layer(i)?;
        for (model, layers) in models.iter_mut().zip(&distinct) {
            *model = model.regrouped(i, &heads, &layers[i].groups, pooler.as_ref())?;
        }
    }
    let (before, after) = evaluate_against(&source, &models.iter().collect::<Vec<_>>(), &windows, run)?;
    for (line, model) in lines.iter_mut().zip(of_line) {
        line.evaluation = after.get(model).cloned();
    }
    Ok(before)
}

/// The largest gap of a layer, where all are known.
fn worst_gap(plan: &Plan) -> Option<f64> {
    plan.layers.iter().map(LayerPlan::gap).try_fold(0.0, |most: f64, gap| Some(most.max(gap?)))
}

/// A curve for each method, from the smallest cache to the whole.
fn curves(lines: &[Line], source: &Evaluation) -> Vec<Curve> {
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
        format!("{}{}{allocation}", name_of(self.method), optimizer.unwrap_or_default())
    }
}

fn model_table(checkpoint: &Checkpoint, lines: &[Line], source: Option<&Evaluation>) -> String {
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
            format!("{:.4}", line.plan.error()),
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

fn layer_table(lines: &[Line], layer: usize) -> String {
    let rows = lines.iter().map(|line| {
        let of_layer = &line.plan.layers[layer];
        let groups = of_layer.groups.groups();
        let groups: Vec<_> = groups.iter().map(|g| format!("{g:?}").replace(' ', "")).collect();
        [
            line.name(),
            percent(line.plan.budget.asked),
            of_layer.groups.n_groups().to_string(),
            format!("{:.4}", of_layer.error),
            groups.join(" "),
        ]
    });
    format!("layer {layer}\n\n{}", table(["method", "asked", "k", "WSE", "groups"], rows))
}

fn line_json(checkpoint: &Checkpoint, line: &Line) -> Value {
    let layer = |l: &LayerPlan| json!({ "groups": l.groups, "error": l.error, "lower_bound": l.lower_bound });
    let mut json = json!({
        "method": name_of(line.method), "optimizer": line.optimizer.map(name_of),
        "allocation": name_of(line.allocation), "asked": line.plan.budget.asked,
        "reached": line.plan.budget.reached, "kv_heads": line.plan.kv_heads(),
        "kv_bytes_per_token": kv_bytes(checkpoint, &line.plan).1,
        "wse": line.plan.error(), "share": line.share, "gap": line.gap,
        "layers": line.plan.layers.iter().map(layer).collect::<Vec<_>>(),
    });
    if let Some(evaluation) = &line.evaluation {
        merge(&mut json, evaluation_json(evaluation));
    }
    json
}
