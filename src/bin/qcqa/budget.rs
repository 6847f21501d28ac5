use std::path::{Path, PathBuf};

use clap::Args;
use qcqa::budget::Budget;
use qcqa::calibration::{Calibration, Origin};
use qcqa::checkpoint::Checkpoint;
use qcqa::files::write_whole;
use qcqa::pipeline::{Mixer, Mixture, Mixtures};
use qcqa::plan::{Plan, write_plan};
use qcqa::runtime::{Model, Steps};
use qcqa::text::{Texts, Vocabulary, Windows, read_text};
use qcqa::{Error, HeadSource, Run};
use serde_json::{Value, json};

use crate::Done;
use crate::args::{MethodArgs, Writing, from_one, methods, path, preset};
use crate::caches::context;
use crate::calibrated::CalibrationArgs;
use crate::hints::CliError;
use crate::report::{Output, bytes, evaluation_json, merge, percent, shown, table};

/// Shares of the heads that are tried unless said.
const SHARES: [f64; 5] = [0.25, 0.34, 0.5, 0.67, 0.75];

#[derive(Debug, Args)]
pub(super) struct BudgetArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// Bytes of the KV cache for each token, in the 16 bits of servers
    #[arg(long, value_name = "BYTES", value_parser = from_one(), allow_negative_numbers = true)]
    bytes_per_token: Option<usize>,
    /// Bytes of the whole KV cache instead
    #[arg(long, value_name = "BYTES", value_parser = from_one(), conflicts_with = "bytes_per_token")]
    #[arg(allow_negative_numbers = true)]
    bytes: Option<usize>,
    /// Tokens of the context; the model's window unless said
    #[arg(long, value_name = "N", value_parser = from_one(), allow_negative_numbers = true)]
    context: Option<usize>,
    /// Windows of the context that decide, spaced over the calibration texts
    #[arg(long, value_name = "N", default_value = "4", value_parser = from_one(), hide_short_help = true)]
    #[arg(allow_negative_numbers = true)]
    windows: usize,
    /// Shares of the heads to try
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', value_parser = crate::args::fraction)]
    #[arg(allow_negative_numbers = true, hide_short_help = true)]
    kv: Vec<f64>,
    /// How heads are shared
    #[arg(long, value_parser = methods(), default_value = "low-rank", hide_short_help = true)]
    method: String,
    #[command(flatten)]
    options: MethodArgs,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
    /// Write the best mixture: NAME.cache.json, and NAME.plan.json where heads are shared
    #[arg(long, value_name = "NAME", value_parser = path(), help_heading = "Output")]
    out: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Output")]
    writing: Writing,
}

/// A share of the heads: what it is called, its plan, and the model under it.
struct Shared {
    name: String,
    plan: Plan,
    model: Model,
}

pub(super) fn budget(args: &BudgetArgs, run: Run<'_>) -> Done {
    let files = args.out.as_ref().map(|out| [with_end(out, "cache.json"), with_end(out, "plan.json")]);
    let inputs: Vec<PathBuf> = [args.model.clone()].into_iter().chain(args.calibration.files()).collect();
    for file in files.iter().flatten() {
        args.writing.check(file, &inputs)?;
    }
    if args.bytes.is_none() && args.bytes_per_token.is_none() {
        return Err(CliError::usage("--bytes-per-token BYTES or --bytes BYTES is missing: the budget"));
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let calibration = args.calibration.open(&checkpoint, run)?;
    let calibration = calibration.as_ref();
    let Some((source, texts)) = calibration.and_then(Calibration::text) else {
        return Err(CliError::usage("--calibration FILE is missing: a text, which chooses between mixtures"));
    };
    let context = context(args.context, source)?;
    let windows = deciding(args, &checkpoint, texts, context, source.window())?;
    let shares = shared(args, &checkpoint, calibration, source, run)?;
    let models = shares.iter().map(|shared| &shared.model);
    let mixer = Mixer::new(source, models, &windows, texts.fit(), Steps::default());
    let allowed = match (args.bytes, args.bytes_per_token) {
        (Some(bytes), _) => bytes as f64,
        (None, of_token) => (of_token.unwrap_or_default() * context) as f64,
    };
    let mixtures = mixer.within(allowed, run)?;
    let best = &mixtures.read[0];
    if let Some([cache, plan]) = &files {
        let policy =
            serde_json::to_vec_pretty(&best.cache.spec()).map_err(|e| CliError::failed(e.to_string()))?;
        write_whole(cache, &policy, args.writing.options())?;
        if let Some(shared) = shares.get(best.model) {
            write_plan(plan, &shared.plan, args.writing.options())?;
        }
    }
    let name = |mixture: &Mixture| shares.get(mixture.model).map_or("all", |shared| &shared.name).to_string();
    let text = told(args, &mixtures, &mixer, &windows, allowed, name);
    let json = json!({
        "model": shown(&args.model), "context": context, "bytes": allowed, "whole_bytes": mixer.whole(),
        "considered": mixtures.considered,
        "mixtures": mixtures.read.iter().map(|m| mixture_json(m, &name(m))).collect::<Vec<_>>(),
        "plan": shares.get(best.model).map(|shared| &shared.plan), "cache": best.cache.spec(),
    });
    Ok(Output { text, json }.noting(&checkpoint))
}

/// `NAME.end`, whatever dots the name has.
fn with_end(name: &Path, end: &str) -> PathBuf {
    let mut name = name.as_os_str().to_owned();
    name.push(format!(".{end}"));
    name.into()
}

/// The windows that decide: those that validate where they have the length, else passages of the texts that fitted nothing.
fn deciding(
    args: &BudgetArgs,
    checkpoint: &Checkpoint,
    texts: &Texts,
    context: usize,
    window: usize,
) -> Result<Windows, CliError> {
    let none = || {
        CliError::failed(format!(
            "the calibration text has no {context} tokens in a row that fit nothing: give a longer text, or lower \
             --calibration-windows"
        ))
    };
    if context == window {
        return Ok(texts.validation().ok_or_else(none)?.spaced(args.windows));
    }
    let words = Vocabulary::open(checkpoint)?;
    let mut tokens = Vec::new();
    let sources = args.calibration.sources();
    let share = args.windows.div_ceil(sources.len().max(1));
    for source in sources {
        if let Origin::File(path) = source.origin {
            let windows = Windows::new(words.encode(&read_text(&path)?)?, context)?;
            if let Some(apart) = texts.apart(&windows) {
                tokens.extend_from_slice(apart.spaced(share).tokens());
            }
        }
    }
    Windows::new(tokens, context).map_err(|_| none())
}

/// A model for every share of the heads that the method reaches, from the smallest cache on.
fn shared(
    args: &BudgetArgs,
    checkpoint: &Checkpoint,
    calibration: Option<&Calibration<'_>>,
    model: &Model,
    run: Run<'_>,
) -> Result<Vec<Shared>, CliError> {
    let [optimizer] = &args.options.optimizer[..] else {
        return Err(CliError::usage("one --optimizer at a time"));
    };
    let compress = args.options.compress(preset(&args.method)?, optimizer, None, calibration)?;
    let source: &dyn HeadSource = calibration.map_or(checkpoint, |calibration| calibration);
    let searched = compress.search(source, run)?;
    let mut shares: Vec<Shared> = Vec::new();
    let mut asked = if args.kv.is_empty() { SHARES.to_vec() } else { args.kv.clone() };
    asked.sort_by(f64::total_cmp);
    for kv in asked {
        let plan = match searched.plan(Budget::Fraction(kv), run) {
            Err(Error::BudgetUnreachable { .. }) => continue,
            plan => plan?,
        };
        let known = shares.last().is_some_and(|shared| shared.plan.kv_heads() == plan.kv_heads());
        if known || plan.budget.reached >= 1.0 {
            continue;
        }
        let heads = compress.shared(&plan, source, run)?;
        shares.push(Shared {
            name: format!("{} {}", args.method, percent(plan.budget.reached)),
            plan: heads.record(),
            model: model.with_shared(&heads)?,
        });
    }
    Ok(shares)
}

/// A policy as the command line takes it, without what was measured.
fn policy(mixture: &Mixture) -> String {
    let spec = mixture.cache.spec();
    let settings = spec.settings().filter(|(key, _)| *key != "importance");
    spec.name().to_string() + &settings.map(|(key, value)| format!(":{key}={value}")).collect::<String>()
}

fn told(
    args: &BudgetArgs,
    mixtures: &Mixtures,
    mixer: &Mixer<'_>,
    windows: &Windows,
    allowed: f64,
    name: impl Fn(&Mixture) -> String,
) -> String {
    let whole = mixer.whole();
    let rows = mixtures.read.iter().map(|mixture| {
        let evaluation = &mixture.cached.evaluation;
        [
            name(mixture),
            policy(mixture),
            if mixture.single { "yes" } else { "" }.to_string(),
            bytes(mixture.cached.bytes as u64),
            percent(mixture.cached.bytes / whole),
            format!("{:.2}", evaluation.perplexity()),
            evaluation.divergence.map_or("-".into(), |d| format!("{:.4}", d.kl)),
        ]
    });
    let table = table(["heads", "cache", "one thing", "KV a window", "share", "perplexity", "KL"], rows);
    let [all, within, read] = mixtures.considered;
    let written = match &args.out {
        Some(out) if args.writing.dry_run => format!("\nwould be written to {}.*.json\n", out.display()),
        Some(out) => {
            let plan = if name(&mixtures.read[0]) == "all" {
                String::new()
            } else {
                format!(" --plan {}.plan.json --calibration …", out.display())
            };
            let (model, out) = (args.model.display(), out.display());
            format!("\nwritten to {out}.*.json: qcqa eval {model}{plan} --cache {out}.cache.json --text …\n")
        }
        None => String::new(),
    };
    format!(
        "{} for a context of {} tokens, {} of all heads in 16 bits\n{all} mixtures, {within} within the budget, {read} without \
         room left\nvalidation: {} windows that fitted nothing\n\n{table}{written}",
        bytes(allowed as u64),
        windows.length(),
        percent(allowed / whole),
        windows.count(),
    )
}

fn mixture_json(mixture: &Mixture, heads: &str) -> Value {
    let mut json = json!({
        "heads": heads, "cache": mixture.cache.spec(), "single": mixture.single, "bytes": mixture.cached.bytes,
        "most_bytes": mixture.cached.most_bytes,
    });
    merge(&mut json, evaluation_json(&mixture.cached.evaluation));
    json
}
