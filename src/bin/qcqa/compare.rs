use std::path::PathBuf;

use clap::Args;
use qcqa::allocator::ALLOCATORS;
use qcqa::budget::Budget;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{Evaluation, evaluate_against};
use qcqa::files::write_whole;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::Plan;
use qcqa::runtime::Model;
use qcqa::text::Windows;
use qcqa::{HeadSource, Run};
use serde_json::json;

use crate::Done;
use crate::args::{MethodArgs, RefitArgs, Writing, fraction, methods, path, preset};
use crate::calibrated::CalibrationArgs;
use crate::comparison::{Line, curves, layer_table, line_json, model_table};
use crate::eval::TextArgs;
use crate::hints::CliError;
use crate::plot;
use crate::report::{Output, shown};
use crate::roles::{known, rests_on, rests_on_json};

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// Shares of the KV cache that may be kept
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', value_parser = fraction, required = true)]
    #[arg(allow_negative_numbers = true)]
    kv: Vec<f64>,
    /// Methods to compare
    ///
    /// Unless said, all that share within layers but low-rank, and that, too, with a calibration.
    #[arg(long, value_parser = methods(), value_name = "METHODS", value_delimiter = ',')]
    method: Vec<String>,
    /// Show the groups of this layer under every method
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    layer: Option<usize>,
    #[command(flatten)]
    options: MethodArgs,
    #[command(flatten)]
    refit: RefitArgs,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
    #[command(flatten)]
    text: TextArgs,
    /// Draw perplexity over KV cache into this file (SVG)
    #[arg(long, value_name = "FILE", value_parser = path())]
    plot: Option<PathBuf>,
    /// Replace a picture that is already there
    #[arg(long)]
    force: bool,
}

/// A method to compare, and how it searches where it does.
struct Candidate {
    method: Preset,
    optimizer: Option<String>,
}

/// What is compared unless said.
const METHODS: [Preset; 5] = [Preset::Gqa, Preset::Mqa, Preset::KeyNorm, Preset::QcqaEc, Preset::QcqaAc];

/// Pictures that are not drawn, by the endings of their names.
const OTHER_PICTURES: [&str; 9] = ["png", "jpg", "jpeg", "gif", "webp", "pdf", "eps", "tif", "tiff"];

/// A text, and the source to read it.
type Reader = (Windows, Model);

pub(super) fn compare(args: &CompareArgs, run: Run<'_>) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let layers = checkpoint.architecture().n_layers();
    if let Some(layer) = args.layer.filter(|&l| l >= layers) {
        return Err(CliError::usage(format!("there is no layer {layer}: the model has {layers}, from 0")));
    }
    let picture =
        args.plot.as_ref().and_then(|plot| Some(plot.extension()?.to_string_lossy().to_lowercase()));
    if let Some(other) = picture.filter(|form| OTHER_PICTURES.contains(&form.as_str())) {
        return Err(CliError::usage(format!("--plot draws SVG, not {other}: let the name end in .svg")));
    }
    if args.plot.is_some() && !args.text.is_given() {
        return Err(CliError::usage("--plot draws perplexity: it needs --text FILE"));
    }
    let writing = Writing { force: args.force, dry_run: false };
    if let Some(plot) = &args.plot {
        let read = [&args.model].into_iter().chain(&args.text.text).chain(&args.text.ids).cloned();
        writing.check(plot, &read.chain(args.calibration.files()).collect::<Vec<_>>())?;
    }
    let candidates = candidates(args)?;
    check_refit(args, &candidates)?;
    // What is given is read before what takes long.
    let text = args.text.is_given().then(|| {
        let source = Model::open_for(&checkpoint, run)?;
        Ok::<Reader, CliError>((args.text.required(&checkpoint, &source)?, source))
    });
    let text = text.transpose()?;
    let across = candidates.iter().map(|candidate| args.options.is_calibrated_across(candidate.method));
    let across = across.collect::<Result<Vec<_>, _>>()?.contains(&true);
    let calibration = args.calibration.open_for(across, &checkpoint, run)?;
    let calibration = calibration.as_ref();
    let source: &dyn HeadSource = calibration.map_or(&checkpoint, |calibration| calibration);
    let compressions = candidates.iter().map(|c| compression(args, c, calibration, text.is_some()));
    let compressions = compressions.collect::<Result<Vec<_>, _>>()?;
    let mut lines = Vec::new();
    for (candidate, compress) in candidates.iter().zip(&compressions) {
        lines.extend(plans(args, candidate, compress, source, run)?);
    }
    let before = match &text {
        Some(reader) => Some(evaluate(reader, source, &mut lines, run)?),
        None => None,
    };
    let mut not_drawn = "";
    if let (Some(path), Some(before)) = (&args.plot, &before) {
        let title = format!("{}, before fine-tuning", args.model.display());
        match plot::draw(&title, &curves(&lines, before))? {
            Some(svg) => write_whole(path, svg.as_bytes(), writing.options())?,
            None => not_drawn = "note: there is no finite perplexity, so no picture was drawn\n",
        }
    }
    let told = match args.layer {
        Some(layer) => layer_table(&lines, layer),
        None => model_table(&checkpoint, &lines, before.as_ref()),
    };
    let mut rests = calibration.map_or(String::new(), |calibration| format!("\n{}", rests_on(calibration)));
    let note = text.as_ref().and_then(|(windows, _)| known(calibration, windows));
    rests += not_drawn;
    rests += &note.iter().map(|note| format!("note: {note}\n")).collect::<String>();
    let json = json!({
        "model": shown(&args.model), "calibration": calibration.map(rests_on_json), "note": note, "source": checkpoint.id()?,
        "source_perplexity": before.as_ref().map(Evaluation::perplexity),
        "lines": lines.iter().map(|line| line_json(&checkpoint, line)).collect::<Vec<_>>(),
    });
    Ok(Output { text: told + &rests, json }.noting(&checkpoint))
}

/// Every rule once, every search with each optimizer asked for.
fn candidates(args: &CompareArgs) -> Result<Vec<Candidate>, CliError> {
    let low_rank = args.calibration.is_given().then_some(Preset::LowRank);
    let methods: Vec<Preset> = match args.method[..] {
        [] => METHODS.into_iter().chain(low_rank).collect(),
        _ => args.method.iter().map(|name| preset(name)).collect::<Result<_, _>>()?,
    };
    let (searches, rules): (Vec<_>, Vec<_>) = methods.into_iter().partition(|m| m.searches());
    let optimizers = &args.options.optimizer;
    let searches = optimizers.iter().flat_map(|o| searches.iter().map(move |&m| (m, Some(o.clone()))));
    let all = rules.into_iter().map(|m| (m, None)).chain(searches);
    Ok(all.map(|(method, optimizer)| Candidate { method, optimizer }).collect())
}

/// A refit shows in the perplexity of calibrated methods, and nowhere else.
fn check_refit(args: &CompareArgs, candidates: &[Candidate]) -> Result<(), CliError> {
    let calibrated = candidates.iter().map(|c| args.options.is_calibrated(c.method));
    let any = calibrated.collect::<Result<Vec<_>, _>>()?.into_iter().any(|calibrated| calibrated);
    match args.refit.asked() {
        Some(Some(_)) if !(args.text.is_given() && any) => Err(CliError::usage(
            "--refit shows in the perplexity of calibrated methods: it needs --text FILE, and --method low-rank or --pooler \
             low-rank",
        )),
        _ => Ok(()),
    }
}

/// The compression of a candidate; refitted only where that will be evaluated.
fn compression<'a>(
    args: &CompareArgs,
    candidate: &Candidate,
    calibration: Option<&'a Calibration<'a>>,
    evaluated: bool,
) -> Result<Compress<'a>, CliError> {
    let optimizer = candidate.optimizer.as_deref().unwrap_or("auto");
    let compress = args.options.compress(candidate.method, optimizer, None, calibration)?;
    let calibrated = args.options.is_calibrated(candidate.method)?;
    Ok(match args.refit.asked() {
        _ if !(calibrated && evaluated) => compress.refit(None),
        Some(refit) => compress.refit(refit),
        None => compress,
    })
}

/// A plan for every allocation and budget. MQA has one cache, whatever the budget.
fn plans<'a>(
    args: &CompareArgs,
    Candidate { method, optimizer }: &Candidate,
    compress: &'a Compress<'a>,
    source: &'a dyn HeadSource,
    run: Run<'_>,
) -> Result<Vec<Line<'a>>, CliError> {
    let searched = compress.search(source, run)?;
    let budgets = if *method == Preset::Mqa { &args.kv[..1] } else { &args.kv };
    // The paper's stage 2 and ours beside one k for all, unless one is asked for.
    let allocations: Vec<Option<&str>> = match (&args.options.allocation, method) {
        (None, Preset::QcqaAc) => ALLOCATORS.names().map(Some).collect(),
        _ => vec![None],
    };
    let mut lines = Vec::new();
    for (allocation, &kv) in allocations.iter().flat_map(|a| budgets.iter().map(move |kv| (a, kv))) {
        let budget = Budget::Fraction(kv);
        let plan = match allocation {
            Some(name) => searched.plan_by(args.options.allocator(name)?.as_ref(), budget, run)?,
            None => searched.plan(budget, run)?,
        };
        let allocation = allocation.map_or_else(|| searched.allocation(), str::to_string);
        lines.push(Line::new(compress, *method, optimizer.clone(), allocation, plan, searched.layers()));
    }
    Ok(lines)
}

/// Runs the source and every plan on the text; plans that come to the same heads run once. Returns the source's evaluation.
fn evaluate<'a>(
    (windows, model): &Reader,
    source: &'a dyn HeadSource,
    lines: &mut [Line<'a>],
    run: Run<'_>,
) -> Result<Evaluation, CliError> {
    let same = |a: &Plan, b: &Plan| {
        let groups = |plan: &'_ Plan| {
            plan.layers.iter().map(|layer| (layer.groups.clone(), layer.below.clone())).collect::<Vec<_>>()
        };
        a.pooling == b.pooling && groups(a) == groups(b)
    };
    let mut models: Vec<(Plan, Plan, Model)> = Vec::new();
    let mut of_line = Vec::new();
    for line in lines.iter() {
        let known = models.iter().position(|(plan, ..)| same(plan, &line.plan));
        of_line.push(known.unwrap_or(models.len()));
        if known.is_none() {
            let shared = line.compress.shared(&line.plan, source, run)?;
            models.push((line.plan.clone(), shared.record(), model.with_shared(&shared)?));
        }
    }
    let all: Vec<&Model> = models.iter().map(|(.., model)| model).collect();
    let (before, after) = evaluate_against(model, &all, windows, run)?;
    for (line, model) in lines.iter_mut().zip(of_line) {
        line.evaluation = after.get(model).cloned();
        // What was kept, where it is not all that was planned.
        if let Some((_, made, _)) = models.get(model) {
            line.plan.pooling = made.pooling.clone();
        }
    }
    Ok(before)
}
