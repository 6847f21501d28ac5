//! The command line: what the library does, for a directory and a terminal.
//!
//! Results go to standard output, as tables or with `--json` as JSON; progress and errors go to standard error.
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

mod calibrated;
mod compare;
mod comparison;
mod convert;
mod eval;
mod inspect;
mod methods;
mod output;
mod plot;
mod progress;
mod resolved;
mod search;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::checkpoint::FileError;
use crate::runtime::RuntimeError;
use crate::error::Error;
use crate::run::Run;

use calibrated::CalibrationArgs;
use methods::{MethodArgs, MethodName};
use output::Output;
use progress::Watch;

/// Shares key and value heads of trained transformers at the least loss.
#[derive(Debug, Parser)]
#[command(name = "qcqa", version, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n\
    `qcqa help COMMAND` tells more about each command.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Seed of every random choice; the same seed gives the same result on any number of threads
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    seed: u64,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What a model is, what its KV cache takes, and what budgets would save
    Inspect(inspect::InspectArgs),
    /// Weight-sharing error and KV cache of every method, side by side
    Compare(compare::CompareArgs),
    /// Search groups for a KV-cache budget and write them as a plan
    Search(search::SearchArgs),
    /// Write the model that a plan describes
    Convert(convert::ConvertArgs),
    /// Search and convert in one
    Compress(convert::CompressArgs),
    /// Perplexity of a model, or of a model under a plan, and how far it is from its source
    Eval(eval::EvalArgs),
    /// Measure the second moments of every layer's inputs on a text
    Calibrate(eval::CalibrateArgs),
}

/// What searching takes, wherever it is done.
#[derive(Debug, Args)]
struct Asked {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Share of the KV cache that may be kept, above 0 and at most 1 (not needed for mqa)
    #[arg(long, value_name = "FRACTION", value_parser = fraction)]
    kv: Option<f64>,
    /// How heads are grouped; search: qcqa-ec unless said, compress: low-rank
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    #[command(flatten)]
    options: MethodArgs,
    /// What is fitted again on the calibration text after heads were merged; full for low-rank where there is a text
    #[arg(long, value_enum, help_heading = "Calibration")]
    refit: Option<calibrated::RefitName>,
    #[command(flatten)]
    calibration: CalibrationArgs,
}

/// What writing takes, wherever it is done.
#[derive(Debug, Clone, Copy, Args)]
struct Writing {
    /// Replace what is already there
    #[arg(long)]
    force: bool,
    /// Check everything, write nothing
    #[arg(long)]
    dry_run: bool,
}

/// A budget as the command line takes it.
fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => {
            Err("a budget is a fraction of the KV cache, above 0 and at most 1 (0.5 keeps half)".to_string())
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let watch = match Watch::new() {
        Ok(watch) => watch,
        Err(error) => return output::failed(cli.json, &error.to_string(), 1),
    };
    let run = Run::new(cli.seed).with_observer(&watch);
    let done = match &cli.command {
        Command::Inspect(args) => inspect::inspect(args),
        Command::Compare(args) => args.calibration.named(compare::compare(args, run)),
        Command::Search(args) => args.asked.calibration.named(search::search(args, run)),
        Command::Convert(args) => args.calibration.named(convert::convert(args, run)),
        Command::Compress(args) => args.asked.calibration.named(convert::compress(args, run)),
        Command::Eval(args) => args.calibration.named(eval::eval(args, run)),
        Command::Calibrate(args) => eval::calibrate(args, run),
    };
    watch.finish();
    match done {
        Ok(output) => output.print(cli.json),
        Err(CliError::Usage(message)) => output::failed(cli.json, &message, 2),
        Err(CliError::Interrupted) => output::failed(cli.json, "interrupted; nothing was written", 130),
        Err(CliError::Moment(message) | CliError::Failed(message)) => output::failed(cli.json, &message, 1),
    }
}

/// Why a command ended early.
#[derive(Debug)]
enum CliError {
    /// The flags contradict one another or the model.
    Usage(String),
    /// Ctrl-C, or a request to end.
    Interrupted,
    /// The calibration holds what is no moment; the message does not name its file.
    Moment(String),
    /// Something went wrong on the way.
    Failed(String),
}

type Done = Result<Output, CliError>;

/// An error that names the file.
fn about(path: &Path, error: impl Into<CliError>) -> CliError {
    let name = path.display().to_string();
    let named = |message: String| {
        let known = message.starts_with(&format!("{name}:")) || message.contains(&format!(" {name}:"));
        if known { message } else { format!("{name}: {message}") }
    };
    match error.into() {
        CliError::Usage(message) => CliError::Usage(named(message)),
        CliError::Failed(message) | CliError::Moment(message) => CliError::Failed(named(message)),
        CliError::Interrupted => CliError::Interrupted,
    }
}

impl From<Error> for CliError {
    fn from(error: Error) -> Self {
        match error {
            Error::Cancelled => Self::Interrupted,
            Error::Moment { .. } => Self::Moment(error.to_string()),
            Error::BudgetUnreachable { .. } => Self::Usage(error.to_string()),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<FileError> for CliError {
    fn from(error: FileError) -> Self {
        Error::from(error).into()
    }
}

impl From<RuntimeError> for CliError {
    fn from(error: RuntimeError) -> Self {
        Error::from(error).into()
    }
}
