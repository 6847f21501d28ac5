use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::calibrated::{CalibrationArgs, RefitName, pooling, refit_of};
use super::comparison::{Line, curves, layer_table, line_json, model_table, worst_gap};
use super::eval::TextArgs;
use super::methods::{AllocationName, MethodArgs, MethodName, OptimizerName, PoolerName};
use super::output::{Output, total_share};
use super::plot;
use super::resolved::{Found, Resolved};
use super::{CliError, Done, fraction};
use crate::checkpoint::Checkpoint;
use crate::runtime::{Calibration, Evaluation, Model, Refit, Windows, evaluate_against};
use crate::fitness::{FitnessFn, WeightSharingError};
use crate::plan::{LayerPlan, Plan};
use crate::run::Run;

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Shares of the KV cache that may be kept
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', value_parser = fraction, required = true)]
    kv: Vec<f64>,
    /// Methods to compare; all but low-rank unless said, and that, too, with a calibration
    #[arg(long, value_enum, value_name = "METHODS", value_delimiter = ',')]
    method: Vec<MethodName>,
    /// Show the groups of this layer under every method
    #[arg(long, value_name = "N")]
    layer: Option<usize>,
    #[command(flatten)]
    options: MethodArgs,
    /// What is fitted again after heads were merged, where the pooler is calibrated; full where there is a text
    #[arg(long, value_enum, help_heading = "Calibration")]
    refit: Option<RefitName>,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
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
    refit: Option<Refit>,
    found: Found,
}

impl Candidate {
    fn pooler(&self) -> PoolerName {
        PoolerName::of(self.method, self.options.pooler)
    }
}

/// What is compared unless said.
const METHODS: [MethodName; 5] =
    [MethodName::Gqa, MethodName::Mqa, MethodName::KeyNorm, MethodName::QcqaEc, MethodName::QcqaAc];

pub(super) fn compare(args: &CompareArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let layers = checkpoint.config().n_layers;
    if let Some(layer) = args.layer.filter(|&l| l >= layers) {
        return Err(CliError::Usage(format!("there is no layer {layer}: the model has {layers}, from 0")));
    }
    if args.plot.is_some() && !args.text.is_given() {
        return Err(CliError::Usage("--plot draws perplexity: it needs --text FILE".to_string()));
    }
    let mut candidates = candidates(args);
    let refits = matches!(args.refit, Some(RefitName::Output | RefitName::Full));
    if refits && !(args.text.is_given() && candidates.iter().any(|c| c.pooler().uses_moments())) {
        return Err(CliError::Usage(
            "--refit shows in the perplexity of calibrated methods: it needs --text FILE, and --method low-rank or --pooler \
             low-rank"
                .to_string(),
        ));
    }
    // What is given is read before what takes long.
    let text = args.text.is_given().then(|| {
        let source = Model::load(&checkpoint)?;
        Ok::<_, CliError>((args.text.required(&checkpoint, &source)?, source))
    });
    let text = text.transpose()?;
    let calibration = args.calibration.open(&checkpoint, run)?;
    let calibration = calibration.as_ref();
    for candidate in &mut candidates {
        let asked = args.refit.filter(|_| candidate.pooler().uses_moments());
        let refit = refit_of(asked, candidate.pooler(), calibration)?;
        // Only what is evaluated is fitted again.
        candidate.refit = refit.filter(|_| text.is_some());
    }
    search(&checkpoint, calibration, &mut candidates, run)?;
    let mut lines = lines(&checkpoint, calibration, &candidates, args, run)?;
    let source =
        text.map(|(windows, source)| evaluate(&checkpoint, calibration, &source, &windows, &mut lines, run));
    let source = source.transpose()?;
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
fn candidates(args: &CompareArgs) -> Vec<Candidate> {
    let candidate = |method, optimizer: Option<OptimizerName>| {
        let optimizers = optimizer.map_or_else(|| vec![OptimizerName::Auto], |o| vec![o]);
        let options = MethodArgs { optimizer: optimizers, ..args.options.clone() };
        Candidate { method, optimizer, options, refit: None, found: Found::default() }
    };
    let low_rank = args.calibration.calibration.is_some().then_some(MethodName::LowRank);
    let methods: Vec<MethodName> = match args.method[..] {
        [] => METHODS.into_iter().chain(low_rank).collect(),
        _ => args.method.clone(),
    };
    let (searches, rules): (Vec<_>, Vec<_>) = methods.into_iter().partition(|m| m.searches());
    let searches = args.options.optimizer.iter().flat_map(|&o| searches.iter().map(move |&m| (m, Some(o))));
    rules.into_iter().map(|m| (m, None)).chain(searches).map(|(m, o)| candidate(m, o)).collect()
}

/// Fills in what is found: each layer is decoded once for all that judge by the weight-sharing error.
fn search(
    checkpoint: &Checkpoint,
    calibration: Option<&Calibration>,
    candidates: &mut [Candidate],
    run: Run<'_>,
) -> Result<(), CliError> {
    let resolve = |c: &Candidate| Resolved::new(c.method, &c.options, None, checkpoint, calibration);
    let methods = candidates.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    let mut fitness = Vec::new();
    let mut fronts = vec![Vec::new(); methods.len()];
    // Low-rank sharing decodes layers itself.
    let wse_counts = candidates.iter().any(|c| c.method != MethodName::LowRank);
    let layers = if wse_counts { checkpoint.config().n_layers } else { 0 };
    for i in 0..layers {
        run.step("layers", i as u64, layers as u64)?;
        let heads = checkpoint.key_value(i)?;
        let wse = WeightSharingError::new(&heads)?;
        for ((method, candidate), fronts) in methods.iter().zip(&*candidates).zip(&mut fronts) {
            if !candidate.method.searches() {
                fronts.push(method.front(&heads, &wse, run.fork(i as u64))?);
            }
        }
        fitness.push(wse);
    }
    let fitness: Vec<&dyn FitnessFn> = fitness.iter().map(|f| f as &dyn FitnessFn).collect();
    for ((method, candidate), fronts) in methods.iter().zip(candidates).zip(fronts) {
        candidate.found = match candidate.method {
            MethodName::LowRank => method.found(run)?,
            name if name.searches() => method.of_fitness(&fitness, run)?,
            _ => method.measured(fronts, run)?,
        };
    }
    Ok(())
}

/// A plan for every candidate, allocation and budget. MQA has one cache, whatever the budget.
fn lines(
    checkpoint: &Checkpoint,
    calibration: Option<&Calibration>,
    candidates: &[Candidate],
    args: &CompareArgs,
    run: Run<'_>,
) -> Result<Vec<Line>, CliError> {
    let mut lines = Vec::new();
    for Candidate { method, optimizer, options, refit, found } in candidates {
        let budgets = if *method == MethodName::Mqa { &args.kv[..1] } else { &args.kv };
        let allocations = match (options.allocation, method) {
            (None, MethodName::QcqaAc) => AllocationName::OF_ERRORS.map(Some).to_vec(),
            (one, _) => vec![one],
        };
        for (&allocation, &kv) in allocations.iter().flat_map(|a| budgets.iter().map(move |kv| (a, kv))) {
            let options = MethodArgs { allocation, ..options.clone() };
            let resolved = Resolved::new(*method, &options, None, checkpoint, calibration)?;
            let mut plan = resolved.plan(found, Some(kv), run)?;
            plan.method.refit = refit.map(|refit| refit.name().to_string());
            let (gap, share) = (worst_gap(&plan), total_share(&plan, &found.fronts));
            lines.push(Line {
                method: *method,
                optimizer: *optimizer,
                allocation: resolved.allocation(),
                pooler: resolved.pooler(),
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
    calibration: Option<&Calibration>,
    source: &Model,
    windows: &Windows,
    lines: &mut [Line],
    run: Run<'_>,
) -> Result<Evaluation, CliError> {
    let same = |a: &[LayerPlan], b: &[LayerPlan]| a.iter().map(|l| &l.groups).eq(b.iter().map(|l| &l.groups));
    let mut distinct: Vec<(PoolerName, Plan)> = Vec::new();
    let mut of_line = Vec::new();
    for line in lines.iter() {
        let known =
            distinct.iter().position(|(p, d)| *p == line.pooler && same(&d.layers, &line.plan.layers));
        of_line.push(known.unwrap_or(distinct.len()));
        if known.is_none() {
            distinct.push((line.pooler, line.plan.clone()));
        }
    }
    let poolers: Vec<_> = distinct.iter().map(|(name, _)| name.make()).collect();
    let pools = distinct
        .iter()
        .zip(&poolers)
        .map(|((name, plan), pooler)| pooling(checkpoint, plan, *name, pooler.as_ref(), calibration, run));
    let pools = pools.collect::<Result<Vec<_>, _>>()?;
    let mut models = vec![source.clone(); distinct.len()];
    for i in 0..checkpoint.config().n_layers {
        let heads = checkpoint.layer(i)?;
        for ((model, (_, plan)), pool) in models.iter_mut().zip(&distinct).zip(&pools) {
            *model = model.with_pooled(i, &heads, &plan.layers[i].groups, pool(i, &heads)?)?;
        }
    }
    let (before, after) = evaluate_against(source, &models.iter().collect::<Vec<_>>(), windows, run)?;
    for (line, model) in lines.iter_mut().zip(of_line) {
        line.evaluation = after.get(model).cloned();
    }
    Ok(before)
}
