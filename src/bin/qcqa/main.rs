//! The binary `qcqa`: what the library does, for a directory and a terminal.
//!
//! Results go to standard output, as tables or with `--json` as JSON; progress and errors go to standard error.
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

mod args;
mod budget;
mod caches;
mod calibrate;
mod calibrated;
mod compare;
mod comparison;
mod convert;
mod distill;
mod eval;
mod hints;
mod inspect;
mod plot;
mod progress;
mod report;
mod roles;
mod search;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use qcqa::runtime::best_device;
use qcqa::{Device, Precision, Run};

use hints::CliError;
use progress::Watch;
use report::Output;

/// Shares key and value heads of trained transformers at the least loss.
#[derive(Debug, Parser)]
#[command(name = "qcqa", version, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.\n\
    `qcqa COMMAND --help` tells all about a command, `qcqa COMMAND -h` the most important.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    /// Seed of every random choice
    ///
    /// One seed, one result, on any number of threads.
    #[arg(long, global = true, default_value_t = 0, value_name = "N", allow_negative_numbers = true)]
    seed: u64,
    /// Where models run: cpu, cuda, cuda:N, metal, or auto: a GPU where one answers
    #[arg(long, global = true, default_value = "cpu", value_parser = device, value_name = "DEVICE")]
    #[arg(hide = !GPU)]
    device: Device,
    /// On a GPU, what weights stored in BF16 are multiplied in: f32, or bf16, rougher and faster
    #[arg(long, global = true, default_value = "f32", value_parser = precision, value_name = "TYPE")]
    #[arg(hide = !GPU)]
    dtype: Precision,
}

/// Whether this build knows any other device than the CPU.
const GPU: bool = cfg!(any(feature = "cuda", feature = "metal"));

/// A device that this build knows.
fn device(name: &str) -> Result<Device, String> {
    let built = |device: Device, feature: &str, has: bool| match has {
        true => Ok(device),
        false => Err(format!("this build does not run models there; build it with the feature `{feature}`")),
    };
    let number = name.strip_prefix("cuda:").map(str::parse);
    match (name, number) {
        ("cpu", _) => Ok(Device::Cpu),
        ("auto", _) => Ok(best_device()),
        ("cuda", _) => built(Device::Cuda(0), "cuda", cfg!(feature = "cuda")),
        ("metal", _) => built(Device::Metal, "metal", cfg!(feature = "metal")),
        (_, Some(Ok(number))) => built(Device::Cuda(number), "cuda", cfg!(feature = "cuda")),
        _ => Err("a device is cpu, cuda, cuda:N, metal or auto".to_string()),
    }
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        _ => Err("a type is f32 or bf16".to_string()),
    }
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
    /// Let the shared heads of a converted model learn from its source
    Distill(distill::DistillArgs),
    /// Perplexity of a model, or of a model under a plan, and how far it is from its source
    Eval(eval::EvalArgs),
    /// Search the best way to spend a budget of bytes: on heads, layers, tokens or bits
    Budget(budget::BudgetArgs),
    /// Measure the second moments of every layer's inputs on a text
    Calibrate(calibrate::CalibrateArgs),
}

type Done = Result<Output, CliError>;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return report::misused(&error),
    };
    let watch = match Watch::new() {
        Ok(watch) => watch,
        Err(error) => return report::failed(cli.json, &error.to_string(), 1),
    };
    let run = Run::new(cli.seed).on(cli.device).computing(cli.dtype).with_observer(&watch);
    let done = match &cli.command {
        Command::Inspect(args) => inspect::inspect(args),
        Command::Compare(args) => args.calibration.named(compare::compare(args, run)),
        Command::Search(args) => args.asked.calibration.named(search::search(args, run)),
        Command::Convert(args) => args.calibration.named(convert::convert(args, run)),
        Command::Compress(args) => args.asked.calibration.named(convert::compress(args, run)),
        Command::Distill(args) => args.calibration.named(distill::distill(args, run)),
        Command::Eval(args) => args.calibration.named(eval::eval(args, run)),
        Command::Budget(args) => args.calibration.named(budget::budget(args, run)),
        Command::Calibrate(args) => calibrate::calibrate(args, run),
    };
    watch.finish();
    match done {
        Ok(output) => output.print(cli.json),
        Err(error) => report::failed(cli.json, &error.message, error.code),
    }
}
