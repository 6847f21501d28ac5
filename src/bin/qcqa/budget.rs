use std::path::{Path, PathBuf};

use clap::Args;
use qcqa::budget::Budget;
use qcqa::calibration::{Calibration, Origin};
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{Cached, Reference};
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
use crate::hints::{CliError, about};
use crate::report::{Output, bytes, evaluation_json, merge, percent, shown, table};

/// Shares of the heads that are tried unless said.
const SHARES: [f64; 5] = [0.25, 0.34, 0.5, 0.67, 0.75];

#[derive(Debug, Args)]
pub(super) struct BudgetArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// Bytes of the KV cache for each token; several apart by commas
    #[arg(long, value_name = "BYTES", value_parser = from_one(), value_delimiter = ',')]
    #[arg(allow_negative_numbers = true)]
    bytes_per_token: Vec<usize>,
    /// Bytes of the whole KV cache instead
    #[arg(long, value_name = "BYTES", value_parser = from_one(), value_delimiter = ',')]
    #[arg(allow_negative_numbers = true, hide_short_help = true, conflicts_with = "bytes_per_token")]
    bytes: Vec<usize>,
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
    /// A text that decides nothing, to report on
    #[arg(long, value_name = "FILE", value_parser = path(), help_heading = "Text")]
    text: Option<PathBuf>,
    /// Write the best one: NAME.cache.json, and NAME.plan.json
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
    let read = [args.model.clone()].into_iter().chain(args.text.clone());
    let inputs: Vec<PathBuf> = read.chain(args.calibration.files()).collect();
    for file in files.iter().flatten() {
        args.writing.check(file, &inputs)?;
    }
    match args.bytes.len() + args.bytes_per_token.len() {
        0 => {
            return Err(CliError::usage("--bytes-per-token BYTES or --bytes BYTES is missing: the budget"));
        }
        2.. if args.out.is_some() => {
            return Err(CliError::usage("--out writes the best mixture of one budget: name one"));
        }
        _ => {}
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    let calibration = args.calibration.open(&checkpoint, run)?;
    let calibration = calibration.as_ref();
    let Some((source, texts)) = calibration.and_then(Calibration::text) else {
        return Err(CliError::usage("--calibration FILE is missing: a text, which chooses between mixtures"));
    };
    let context = context(args.context, source)?;
    let windows = deciding(args, &checkpoint, texts, context, source.window())?;
    let held_out = args.text.as_ref().map(|text| held_out(args, text, &checkpoint, context)).transpose()?;
    let shares = shared(args, &checkpoint, calibration, source, run)?;
    let models = shares.iter().map(|shared| &shared.model);
    let mixer = Mixer::new(source, models, &windows, texts.fit(), Steps::default());
    let of_tokens = args.bytes_per_token.iter().map(|&of_token| of_token as f64 * context as f64);
    let budgets: Vec<f64> = args.bytes.iter().map(|&bytes| bytes as f64).chain(of_tokens).collect();
    let mixtures = mixer.within(&budgets, run)?;
    let reference = held_out.as_ref().map(|text| Reference::new(source, text, run)).transpose()?;
    let mut results = Vec::new();
    for mixtures in mixtures {
        let mut held_out = Vec::new();
        if let Some(reference) = &reference {
            for i in mixtures.told() {
                let mixture = &mixtures.read[i];
                let model = shares.get(mixture.model).map_or(source, |shared| &shared.model);
                held_out.push((i, reference.compare_through(model, &mixture.cache, Steps::default(), run)?));
            }
        }
        results.push(Found { mixtures, held_out });
    }
    let best = &results[0].mixtures.read[0];
    if let Some([cache, plan]) = &files {
        let policy =
            serde_json::to_vec_pretty(&best.cache.spec()).map_err(|e| CliError::failed(e.to_string()))?;
        write_whole(cache, &policy, args.writing.options())?;
        if let Some(shared) = shares.get(best.model) {
            write_plan(plan, &shared.plan, args.writing.options())?;
        }
    }
    let name = |mixture: &Mixture| shares.get(mixture.model).map_or("all", |shared| &shared.name).to_string();
    let (whole, length) = (mixer.whole(), windows.length());
    let tables = results.iter().map(|found| found.told(whole, length, windows.count(), name));
    let text = tables.collect::<Vec<_>>().join("\n") + &written(args, name(best) != "all");
    let json = json!({
        "model": shown(&args.model), "context": context, "whole_bytes": whole,
        "budgets": results.iter().map(|found| json!({
            "bytes": found.mixtures.bytes,
            "considered": found.mixtures.considered,
            "mixtures": found.json(name),
            "plan": shares.get(found.mixtures.read[0].model).map(|shared| &shared.plan),
            "cache": found.mixtures.read[0].cache.spec(),
        })).collect::<Vec<_>>(),
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

/// Windows of the context that are read of a text which decides nothing.
fn held_out(
    args: &BudgetArgs,
    text: &Path,
    checkpoint: &Checkpoint,
    context: usize,
) -> Result<Windows, CliError> {
    let tokens = Vocabulary::open(checkpoint)?.encode(&read_text(text)?)?;
    Ok(Windows::new(tokens, context).map_err(|e| about(text, e))?.spaced(args.windows))
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

/// What was found within one budget, and what some of it did on a text that decided nothing.
struct Found {
    mixtures: Mixtures,
    held_out: Vec<(usize, Cached)>,
}

impl Found {
    fn held_out(&self, i: usize) -> Option<&Cached> {
        self.held_out.iter().find(|(of, _)| *of == i).map(|(_, cached)| cached)
    }

    fn told(&self, whole: f64, context: usize, windows: usize, name: impl Fn(&Mixture) -> String) -> String {
        let kl =
            |cached: &Cached| cached.evaluation.divergence.map_or("-".into(), |d| format!("{:.4}", d.kl));
        let rows = self.mixtures.read.iter().enumerate().map(|(i, mixture)| {
            let cached = &mixture.cached;
            let held_out = self.held_out(i);
            [
                name(mixture),
                policy(mixture),
                if mixture.single { "yes" } else { "" }.to_string(),
                bytes(cached.bytes as u64),
                percent(cached.bytes / whole),
                format!("{:.2}", cached.evaluation.perplexity()),
                kl(cached),
                held_out.map_or(String::new(), |cached| percent(cached.bytes / whole)),
                held_out.map_or(String::new(), |cached| format!("{:.2}", cached.evaluation.perplexity())),
                held_out.map_or(String::new(), kl),
            ]
        });
        let header = ["heads", "cache", "one thing", "KV a window", "share", "perplexity", "KL"];
        let table = if self.held_out.is_empty() {
            table(header, rows.map(|[a, b, c, d, e, f, g, ..]| [a, b, c, d, e, f, g]))
        } else {
            let [a, b, c, d, e, f, g] = header;
            table([a, b, c, d, e, f, g, "share, held out", "perplexity, held out", "KL, held out"], rows)
        };
        let ([all, within, read], allowed) = (self.mixtures.considered, self.mixtures.bytes);
        format!(
            "{} for a context of {context} tokens, {} of all heads in 16 bits\n{all} mixtures, {within} within the budget, {read} without \
             room left\nvalidation: {windows} windows that fitted nothing\n\n{table}",
            bytes(allowed as u64),
            percent(allowed / whole),
        )
    }

    fn json(&self, name: impl Fn(&Mixture) -> String) -> Vec<Value> {
        let all = self.mixtures.read.iter().enumerate().map(|(i, mixture)| {
            let mut json = cached_json(&mixture.cached);
            json["heads"] = json!(name(mixture));
            json["cache"] = json!(mixture.cache.spec());
            json["single"] = json!(mixture.single);
            json["held_out"] = self.held_out(i).map_or(Value::Null, cached_json);
            json
        });
        all.collect()
    }
}

/// What was written, and how it is read again.
fn written(args: &BudgetArgs, shares_heads: bool) -> String {
    match &args.out {
        Some(out) if args.writing.dry_run => format!("\nwould be written to {}.*.json\n", out.display()),
        Some(out) => {
            let (model, out) = (args.model.display(), out.display());
            let plan = match shares_heads {
                true => format!(" --plan {out}.plan.json --calibration …"),
                false => String::new(),
            };
            format!("\nwritten to {out}.*.json: qcqa eval {model}{plan} --cache {out}.cache.json --text …\n")
        }
        None => String::new(),
    }
}

fn cached_json(cached: &Cached) -> Value {
    let mut json = json!({ "bytes": cached.bytes, "most_bytes": cached.most_bytes });
    merge(&mut json, evaluation_json(&cached.evaluation));
    json
}
