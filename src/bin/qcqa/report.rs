//! What a command has to say: a table for people, JSON for machines.

use std::io::{ErrorKind, Write, stderr, stdout};
use std::path::Path;
use std::process::ExitCode;

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{BinaryBytes, HumanBytes};
use qcqa::HeadSource;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::Evaluation;
use qcqa::front::Front;
use qcqa::plan::Plan;
use serde_json::{Value, json};

/// The result of a command in both forms.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) text: String,
    pub(super) json: Value,
}

impl Output {
    /// Says where the files of a model contradict themselves, and what was taken.
    pub(super) fn noting(mut self, model: &Checkpoint) -> Self {
        let notes = &model.architecture().notes;
        self.text += &notes.iter().map(|note| format!("note: {note}\n")).collect::<String>();
        self.json["notes"] = json!(notes);
        self
    }

    /// Prints one of the forms. A reader that has gone away is no failure.
    pub(super) fn print(&self, json: bool) -> ExitCode {
        let text = if json { format!("{:#}\n", self.json) } else { self.text.clone() };
        match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => failed(false, &error.to_string(), 1),
            _ => ExitCode::SUCCESS,
        }
    }
}

/// Says why a command failed, and leaves with this code. What files say may be part of the message: a terminal gets no
/// control characters from there.
pub(super) fn failed(json: bool, message: &str, code: u8) -> ExitCode {
    let escaped = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        _ if c.is_control() => c.escape_default().to_string(),
        _ => c.to_string(),
    };
    // Nowhere is left to report to when this fails.
    let _ = writeln!(stderr(), "error: {}", message.chars().map(escaped).collect::<String>());
    if json {
        let _ = writeln!(stdout(), "{:#}", json!({ "error": message }));
    }
    ExitCode::from(code)
}

/// Says what is wrong with the arguments, or what was asked of them: help and version are no failures.
pub(super) fn misused(error: &clap::Error) -> ExitCode {
    // Nowhere is left to report to when this fails.
    let _ = error.print();
    if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
        let _ = writeln!(stdout(), "{:#}", json!({ "error": error.to_string().trim_end() }));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// A table with its first column to the left and numbers to the right, that pastes into Markdown.
pub(super) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

/// Bytes for people: 1.5 KiB.
pub(super) fn bytes(n: u64) -> String {
    BinaryBytes(n).to_string()
}

/// Bytes of large files for people.
pub(super) fn file_bytes(n: u64) -> String {
    HumanBytes(n).to_string()
}

/// A share for people: 12.3%.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// One number where all layers agree, else as [`group_counts`].
pub(super) fn counts(all: &[usize]) -> String {
    match all.first() {
        Some(first) if all.iter().all(|n| n == first) => first.to_string(),
        _ => group_counts(all),
    }
}

/// The numbers of groups of the layers, runs of equal ones taken together: `4×4`, `8 4×3`.
pub(super) fn group_counts(ks: &[usize]) -> String {
    let runs = ks.chunk_by(|a, b| a == b).map(|run| match run.len() {
        1 => run[0].to_string(),
        n => format!("{}×{n}", run[0]),
    });
    runs.collect::<Vec<_>>().join(" ")
}

/// The fields of an evaluation.
pub(super) fn evaluation_json(evaluation: &Evaluation) -> Value {
    json!({
        "perplexity": evaluation.perplexity(), "loss": evaluation.loss, "tokens": evaluation.tokens,
        "windows": evaluation.windows, "tokens_per_second": evaluation.tokens_per_second,
        "runtime_kv_bytes_per_token": evaluation.kv_bytes_per_token,
        "kl": evaluation.divergence.map(|d| d.kl), "same_top": evaluation.divergence.map(|d| d.same_top),
    })
}

/// A path as JSON can hold it: names that are no text are told as well as can be.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Puts the fields of one object into another.
pub(super) fn merge(into: &mut Value, fields: Value) {
    if let (Value::Object(into), Value::Object(fields)) = (into, fields) {
        into.extend(fields);
    }
}

/// Whether the errors of a plan are weight-sharing errors.
pub(super) fn is_wse(plan: &Plan) -> bool {
    plan.method.fitness.name() == "wse"
}

/// KV cache of the source and of the plan, bytes a token.
pub(super) fn kv_bytes(checkpoint: &Checkpoint, plan: &Plan) -> (usize, usize) {
    let (model, size) = (checkpoint.architecture(), checkpoint.dtype().bytes());
    (model.kv_bytes_per_token(size), model.kv_bytes_with(&plan.group_counts(), size))
}

/// The summed error as a share of the summed energy.
pub(super) fn total_share(plan: &Plan, fronts: &[Front]) -> Option<f64> {
    share(plan.error(), fronts.iter().map(Front::energy).sum())
}

pub(super) fn share(error: f64, energy: Option<f64>) -> Option<f64> {
    energy.filter(|e| *e > 0.0).map(|energy| error / energy)
}

/// How far an error may be above the optimum: 0 where it is known to be optimal.
pub(super) fn gap(gap: f64) -> String {
    if gap < 1e-9 { "0".to_string() } else { format!("{:.2}%", 100.0 * gap) }
}
