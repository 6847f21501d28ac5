//! Cache policies as the command line names them, and models that read a text through them.

use std::path::Path;
use std::sync::Arc;

use clap::Args;
use qcqa::HeadSource;
use qcqa::Run;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{Cached, Items, Preparation, Recall, Reference, recall};
use qcqa::runtime::{CachePolicy, Model, POLICIES, Steps};
use qcqa::spec::Spec;
use qcqa::text::{Vocabulary, Windows};
use serde_json::{Value, json};

use crate::args::from_one;
use crate::hints::{CliError, about};
use crate::plot::Curve;
use crate::report::{bytes, evaluation_json, merge, percent, table};

/// Needles that are asked for.
const NEEDLES: usize = 16;

#[derive(Debug, Args)]
#[command(next_help_heading = "Text")]
pub(super) struct CacheArgs {
    /// Read it through caches: full, window, corm, headkv, headkv-r2, qaq
    ///
    /// POLICY or POLICY:SETTING=VALUE:…, several apart by commas, as in window:sinks=4:recent=252,corm:bits=4, or a file that `qcqa budget` wrote. The settings
    /// of each are in docs/caches.md. headkv measures heads on the calibration text.
    #[arg(long, value_name = "POLICIES", value_delimiter = ',')]
    cache: Vec<String>,
    /// Tokens of a window
    #[arg(long, value_name = "N", value_parser = from_one(), allow_negative_numbers = true)]
    context: Option<usize>,
    /// Windows to read at the most
    #[arg(long, value_name = "N", value_parser = from_one(), allow_negative_numbers = true, hide_short_help = true)]
    windows: Option<usize>,
    /// Tokens of a step while a prompt is read
    #[arg(long, value_name = "N", value_parser = from_one(), default_value = "64", hide_short_help = true)]
    chunk: usize,
    /// Tokens at the end of a window that are read one by one
    #[arg(long, value_name = "N", default_value = "16", hide_short_help = true)]
    decoded: usize,
    /// Also ask for needles and names that stand far back in the text
    #[arg(long, requires = "cache", hide_short_help = true)]
    recall: bool,
}

/// A policy, and what it was called.
pub(super) type Named = (String, Arc<dyn CachePolicy>);

/// A model that reads through caches.
pub(super) struct Reads<'a> {
    /// How its heads are shared, and how many are left.
    pub(super) name: String,
    /// How its heads are shared.
    pub(super) family: String,
    pub(super) model: &'a Model,
}

/// What came of it.
#[derive(Debug, Default)]
pub(super) struct Through {
    pub(super) text: String,
    pub(super) json: Value,
    pub(super) curves: Vec<(String, (f64, f64))>,
}

impl CacheArgs {
    pub(super) fn is_given(&self) -> bool {
        !self.cache.is_empty()
    }

    /// The policies.
    pub(super) fn policies(&self) -> Result<Vec<Named>, CliError> {
        self.cache.iter().map(|given| Ok((given.clone(), policy(given)?))).collect()
    }

    /// Tokens of a window.
    pub(super) fn length(&self, model: &Model) -> Result<usize, CliError> {
        context(self.context, model)
    }

    /// As many windows as were asked for, spaced over the text.
    pub(super) fn some_of(&self, windows: Windows) -> Windows {
        self.windows.map_or(windows.clone(), |n| windows.spaced(n))
    }

    pub(super) fn steps(&self) -> Result<Steps, CliError> {
        Ok(Steps::new(self.chunk, self.decoded)?)
    }

    /// Reads a text with every model through every policy.
    pub(super) fn through(
        &self,
        checkpoint: &Checkpoint,
        source: &Model,
        windows: &Windows,
        models: &[Reads<'_>],
        calibration: Option<&Calibration<'_>>,
        run: Run<'_>,
    ) -> Result<Through, CliError> {
        let (policies, steps) = (self.policies()?, self.steps()?);
        let reference = Reference::new(source, windows, run)?;
        let items = self.recall.then(|| items(checkpoint, windows, run)).transpose()?;
        // What servers hold: 16 bits a number.
        let whole = (checkpoint.architecture().kv_bytes_per_token(2) * windows.length()) as f64;
        let mut told = Through::default();
        let (mut rows, mut json) = (Vec::new(), Vec::new());
        for read in models {
            let mut preparation = preparation(read.model, calibration);
            for (name, policy) in &policies {
                let policy = ready(policy, preparation.as_mut(), run)?;
                let cached = reference.compare_through(read.model, &policy, steps, run)?;
                let recalled =
                    items.iter().flatten().map(|items| recall(read.model, Some(&policy), items, steps, run));
                let recalled = recalled.collect::<Result<Vec<Recall>, _>>()?;
                // Either the heads or the settings of a policy go along a curve.
                let spec = policy.spec();
                let alone =
                    policies.iter().filter(|(_, other)| other.spec().name() == spec.name()).count() == 1;
                let heads = if alone { &read.family } else { &read.name };
                told.curves.push((
                    format!("{heads} × {}", spec.name()),
                    (cached.bytes / whole, cached.evaluation.perplexity()),
                ));
                rows.push(row(read, name, &cached, whole, &recalled));
                let mut line = json!({
                    "heads": read.name, "cache": spec, "bytes": cached.bytes, "share": cached.bytes / whole,
                    "most_bytes": cached.most_bytes,
                    "stretches": cached.stretches.iter().map(|s| json!({
                        "from": s.places.start, "to": s.places.end, "loss": s.loss, "kl": s.kl,
                    })).collect::<Vec<_>>(),
                    "recall": recalled.iter().map(|r| json!({ "share": r.share, "asked": r.asked })).collect::<Vec<_>>(),
                });
                merge(&mut line, evaluation_json(&cached.evaluation));
                json.push(line);
            }
        }
        let header = [
            "heads",
            "cache",
            "KV a window",
            "share",
            "perplexity",
            "KL",
            "KL at the end",
            "needles",
            "names",
        ];
        told.text = format!(
            "{} windows of {} tokens; shares of {}, all heads in 16 bits\n\n{}",
            windows.count(),
            windows.length(),
            bytes(whole as u64),
            if items.is_some() {
                table(header, rows)
            } else {
                table(first(header), rows.into_iter().map(first))
            }
        );
        told.json = json!(json);
        Ok(told)
    }
}

/// Tokens of a window: those asked for, where the model has positions for them.
pub(super) fn context(asked: Option<usize>, model: &Model) -> Result<usize, CliError> {
    match asked {
        Some(context) if context > model.positions() => Err(CliError::usage(format!(
            "--context {context}: the model has positions for {} tokens",
            model.positions()
        ))),
        Some(context) => Ok(context),
        None => Ok(model.window()),
    }
}

/// A row without what was not asked for.
fn first<T>([a, b, c, d, e, f, g, ..]: [T; 9]) -> [T; 7] {
    [a, b, c, d, e, f, g]
}

/// A policy as the command line names it: settings, or a file that holds them.
fn policy(given: &str) -> Result<Arc<dyn CachePolicy>, CliError> {
    let file = Path::new(given);
    let spec = match file.extension().is_some_and(|end| end == "json") {
        true => {
            let text =
                std::fs::read_to_string(file).map_err(|e| about(file, CliError::failed(e.to_string())))?;
            let read = serde_json::from_str::<Value>(&text).and_then(|value| match value.get("cache") {
                Some(cache) => serde_json::from_value(cache.clone()),
                None => serde_json::from_value(value),
            });
            read.map_err(|e| about(file, CliError::failed(format!("no cache policy: {e}"))))?
        }
        false => given.parse::<Spec>().map_err(|e| CliError::usage(format!("--cache {given}: {e}")))?,
    };
    let made = POLICIES.make(&spec);
    Ok(made.map_err(|e| CliError::usage(format!("--cache {given}: {e}")))?.into())
}

/// Where policies learn of a model's heads: the calibration text, where there is one.
fn preparation<'a>(model: &'a Model, calibration: Option<&'a Calibration<'_>>) -> Option<Preparation<'a>> {
    let (_, texts) = calibration?.text()?;
    Some(Preparation::new(model, texts.fit()))
}

/// The policy, with what it has to know measured where that can be.
fn ready(
    policy: &Arc<dyn CachePolicy>,
    preparation: Option<&mut Preparation<'_>>,
    run: Run<'_>,
) -> Result<Arc<dyn CachePolicy>, CliError> {
    match preparation {
        Some(preparation) => Ok(preparation.ready(policy, run)?),
        None if policy.probe().is_none() => Ok(policy.clone()),
        None => {
            let name = policy.spec().name().to_string();
            Err(CliError::usage(format!("{name} measures heads on a text: --calibration FILE is missing")))
        }
    }
}

/// What is asked for in a text: needles, and names where there are words.
fn items(checkpoint: &Checkpoint, windows: &Windows, run: Run<'_>) -> Result<Vec<Items>, CliError> {
    let needles = Items::needles(windows, NEEDLES, false, run)?;
    Ok(vec![needles, Items::names(windows, &Vocabulary::open(checkpoint)?)?])
}

fn row(read: &Reads<'_>, policy: &str, cached: &Cached, whole: f64, recalled: &[Recall]) -> [String; 9] {
    let evaluation = &cached.evaluation;
    let share = |i: usize| recalled.get(i).filter(|r| r.asked > 0).map_or("-".into(), |r| percent(r.share));
    [
        read.name.clone(),
        policy.to_string(),
        bytes(cached.bytes as u64),
        percent(cached.bytes / whole),
        format!("{:.2}", evaluation.perplexity()),
        evaluation.divergence.map_or("-".into(), |d| format!("{:.4}", d.kl)),
        cached.stretches.last().map_or("-".into(), |s| format!("{:.4} ({}-)", s.kl, s.places.start)),
        share(0),
        share(1),
    ]
}

/// Points of one name as a curve each.
pub(super) fn as_curves(points: &[(String, (f64, f64))]) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for (name, point) in points {
        match curves.iter_mut().find(|curve| curve.name == *name) {
            Some(curve) => curve.points.push(*point),
            None => curves.push(Curve { name: name.clone(), points: vec![*point] }),
        }
    }
    curves.iter_mut().for_each(|curve| curve.points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    curves
}
