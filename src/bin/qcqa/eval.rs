use std::path::{Path, PathBuf};

use clap::Args;
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{Choices, Evaluation, HiddenDistance, evaluate, evaluate_against, hidden_distance};
use qcqa::runtime::{Model, RuntimeError};
use qcqa::text::{IdWidth, Vocabulary, Windows, read_ids, read_text};
use serde_json::json;

use crate::Done;
use crate::args::path;
use crate::caches::{CacheArgs, Reads};
use crate::calibrated::{CalibrationArgs, plan_for, shared};
use crate::hints::{CliError, about};
use crate::report::{Output, bytes, evaluation_json, merge, percent, shown, table};
use crate::roles::known;

/// A text, in words or in tokens.
#[derive(Debug, Args)]
#[command(next_help_heading = "Text")]
pub(super) struct TextArgs {
    /// Text to read, UTF-8; tokenised by the model's tokenizer.json
    #[arg(long, value_name = "FILE", value_parser = path())]
    pub(super) text: Option<PathBuf>,
    /// Token ids to read instead
    ///
    /// Little-endian, 2 bytes each for vocabularies of up to 65536, else 4.
    #[arg(long, value_name = "FILE", conflicts_with = "text", value_parser = path())]
    pub(super) ids: Option<PathBuf>,
}

impl TextArgs {
    /// Windows of `length` tokens; `None` where there is no text.
    fn windows(
        &self,
        checkpoint: &Checkpoint,
        model: &Model,
        length: usize,
    ) -> Result<Option<Windows>, CliError> {
        let windows = match (&self.text, &self.ids) {
            (Some(text), _) => {
                let tokens = Vocabulary::open(checkpoint)?.encode(&read_text(text)?)?;
                Windows::new(tokens, length).map_err(|e| about(text, e))?
            }
            (None, Some(ids)) => windows_of_ids(ids, model, length)?,
            (None, None) => return Ok(None),
        };
        Ok(Some(windows))
    }

    /// Whether there is a text.
    pub(super) fn is_given(&self) -> bool {
        self.text.is_some() || self.ids.is_some()
    }

    pub(super) fn required(
        &self,
        checkpoint: &Checkpoint,
        model: &Model,
        length: usize,
    ) -> Result<Windows, CliError> {
        let missing = || CliError::usage("a text is missing: --text FILE, or --ids FILE for token ids");
        self.windows(checkpoint, model, length)?.ok_or_else(missing)
    }
}

/// The windows of `length` tokens of a file of token ids.
pub(super) fn windows_of_ids(file: &Path, model: &Model, length: usize) -> Result<Windows, CliError> {
    let (width, vocabulary) = (IdWidth::for_vocabulary(model.vocabulary()), model.vocabulary());
    let tokens = read_ids(file, width, vocabulary).map_err(|e| about(file, e))?;
    Windows::new(tokens, length).map_err(|e| about(file, e))
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Directory of the model, source or converted
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// Evaluate the model under this plan, without writing it
    #[arg(long, value_name = "FILE", value_parser = path())]
    plan: Option<PathBuf>,
    /// The model that MODEL was converted from, to compare it with
    #[arg(long, value_name = "DIR", conflicts_with = "plan", value_parser = path())]
    source: Option<PathBuf>,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    caches: CacheArgs,
    /// Multiple choice items, a JSON object a line
    ///
    /// {"query": …, "choices": […], "gold": 0}
    #[arg(long, value_name = "FILE", value_parser = path())]
    choices: Option<PathBuf>,
}

pub(super) fn eval(args: &EvalArgs, run: Run<'_>) -> Done {
    if args.calibration.is_given() && args.plan.is_none() && !args.caches.is_given() {
        return Err(CliError::usage("--calibration belongs to a plan or a cache: give --plan FILE, too"));
    }
    args.caches.policies()?;
    let checkpoint = Checkpoint::open(&args.model)?;
    // What is given is read before what takes long.
    let plan = args.plan.as_ref().map(|path| Ok::<_, CliError>((path, plan_for(&checkpoint, path)?)));
    let plan = plan.transpose()?;
    let choices = args.choices.as_deref().map(Choices::read).transpose()?;
    let loaded = Model::open_for(&checkpoint, run)?;
    let text = args.choices.is_none() || args.text.is_given();
    let length = args.caches.length(&loaded)?;
    let windows = text.then(|| args.text.required(&checkpoint, &loaded, length)).transpose()?;
    let windows = windows.map(|windows| args.caches.some_of(windows));
    let mut measured = None;
    // The model in question, and the one it came from where there is one.
    let mut note = None;
    let (model, source) = match (plan, &args.source) {
        (Some((path, plan)), _) => {
            let calibration = args.calibration.of_plan(&plan, path, &checkpoint, run)?;
            let shared = shared(&plan, path, &checkpoint, calibration.as_ref(), run)?;
            note = windows.as_ref().and_then(|windows| known(calibration.as_ref(), windows));
            let models = (loaded.with_shared(&shared)?, Some(loaded));
            drop(shared);
            measured = calibration;
            models
        }
        (None, Some(path)) => {
            let source = Model::open_for(&Checkpoint::open(path)?, run)?;
            let sizes = [source.vocabulary(), loaded.vocabulary()];
            if sizes[0] != sizes[1] {
                return Err(CliError::failed(format!(
                    "{} has a vocabulary of {} tokens, {} (--source) one of {}: only models of one vocabulary can be compared; give the \
                     model that it was converted from",
                    args.model.display(),
                    sizes[1],
                    path.display(),
                    sizes[0],
                )));
            }
            (loaded, Some(source))
        }
        (None, None) => (loaded, None),
    };
    let mut json =
        json!({ "model": shown(&args.model), "plan": args.plan.as_deref().map(shown), "note": note });
    let mut text = String::new();
    if let Some(windows) = windows.as_ref().filter(|_| !model.predicts()) {
        let source = source.as_ref().ok_or_else(|| CliError::from(RuntimeError::NoPredictions))?;
        let HiddenDistance { error, cosine, tokens, windows, .. } =
            hidden_distance(source, &model, windows, run)?;
        let row = ["model".to_string(), percent(error), format!("{cosine:.4}"), tokens.to_string()];
        text += &table(["", "error of hidden states", "cosine", "tokens"], [row]);
        let fields =
            json!({ "hidden_error": error, "hidden_cosine": cosine, "tokens": tokens, "windows": windows });
        merge(&mut json, fields);
    } else if let Some(windows) = &windows {
        let (before, after) = match &source {
            Some(source) => {
                let (before, after) = evaluate_against(source, &[&model], windows, run)?;
                (Some(before), after.into_iter().next())
            }
            None => (None, Some(evaluate(&model, windows, run)?)),
        };
        let rows = before.iter().map(|e| row("source", e)).chain(after.iter().map(|e| row("model", e)));
        text += &table(HEADER, rows);
        if let Some(after) = &after {
            merge(&mut json, evaluation_json(after));
        }
        json["source_perplexity"] = json!(before.as_ref().or(after.as_ref()).map(Evaluation::perplexity));
        if args.caches.is_given() {
            if measured.is_none() {
                measured = args.calibration.open(&checkpoint, run)?;
            }
            let reads = Reads { name: "model".to_string(), family: "model".to_string(), model: &model };
            let source = source.as_ref().unwrap_or(&model);
            let told = args.caches.through(&checkpoint, source, windows, &[reads], measured.as_ref(), run)?;
            text += &format!("\n{}", told.text);
            json["caches"] = told.json;
        }
    }
    text += &note.iter().map(|note| format!("\nnote: {note}\n")).collect::<String>();
    if let Some(choices) = choices {
        let score = choices.score(&model, &Vocabulary::open(&checkpoint)?, run)?;
        let (accuracy, error) = (percent(score.accuracy), percent(score.standard_error));
        text += &format!("accuracy {accuracy} ± {error} on {} items\n", score.items);
        json["choices"] = json!({
            "accuracy": score.accuracy, "standard_error": score.standard_error, "items": score.items,
        });
    }
    Ok(Output { text, json }.noting(&checkpoint))
}

const HEADER: [&str; 7] =
    ["", "perplexity", "KL to source", "same top token", "tokens", "tokens/s", "KV bytes a token (f32)"];

fn row(name: &str, evaluation: &Evaluation) -> [String; 7] {
    [
        name.to_string(),
        format!("{:.2}", evaluation.perplexity()),
        evaluation.divergence.map_or("-".into(), |d| format!("{:.4}", d.kl)),
        evaluation.divergence.map_or("-".into(), |d| percent(d.same_top)),
        evaluation.tokens.to_string(),
        format!("{:.0}", evaluation.tokens_per_second),
        bytes(evaluation.kv_bytes_per_token as u64),
    ]
}
