//! Errors as the command line tells them: what the library says, the flags that help, and the exit code.

use std::path::Path;

use qcqa::Error;
use qcqa::files::FileError;
use qcqa::runtime::RuntimeError;

/// Why a command ended early.
#[derive(Debug)]
pub(super) struct CliError {
    pub(super) message: String,
    /// 1 failed, 2 wrong usage, 130 interrupted.
    pub(super) code: u8,
    /// The calibration holds what is no moment, and the message does not name its file.
    pub(super) moment: bool,
}

impl CliError {
    /// The flags contradict one another or the model.
    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 2, moment: false }
    }

    /// Something went wrong on the way.
    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1, moment: false }
    }
}

/// An error that names the file.
pub(super) fn about(path: &Path, error: impl Into<CliError>) -> CliError {
    let (name, mut error) = (path.display().to_string(), error.into());
    let known =
        error.message.starts_with(&format!("{name}:")) || error.message.contains(&format!(" {name}:"));
    if !known && error.code != 130 {
        error.message = format!("{name}: {}", error.message);
    }
    CliError { moment: false, ..error }
}

/// An error of a file of moments, or of a text.
pub(super) fn of_calibration(path: &Path, error: RuntimeError) -> CliError {
    let cut_short = matches!(&error, RuntimeError::File(FileError::Header { .. }));
    let mut error = about(path, error);
    if cut_short {
        error.message += &format!(" {AGAIN}");
    }
    error
}

const IDS: &str = "(`--ids FILE` of eval, compare and calibrate)";
const AGAIN: &str = "(`qcqa calibrate`)";

impl From<Error> for CliError {
    fn from(error: Error) -> Self {
        let (code, hint) = match &error {
            Error::Cancelled => {
                let message = "interrupted; nothing was written".to_string();
                return Self { message, code: 130, moment: false };
            }
            Error::Plugin(inner) => match (inner.downcast_ref(), inner.downcast_ref()) {
                (Some(error), _) => of_files(error),
                (_, Some(error)) => of_runtime(error),
                _ => (1, None),
            },
            error => of_library(error),
        };
        let message =
            [Some(error.to_string()), hint.map(str::to_string)].into_iter().flatten().collect::<Vec<_>>();
        Self { message: message.join(" "), code, moment: matches!(error, Error::Moment { .. }) }
    }
}

/// The target that holds plans across layers.
const ACROSS: &str = "remote-code";

/// Exit code and flags for a rule of the library.
fn of_library(error: &Error) -> (u8, Option<&'static str>) {
    match error {
        Error::BudgetUnreachable { .. } => (2, None),
        Error::UnknownPlugin { .. } | Error::UnknownSetting { .. } => (2, None),
        Error::TargetMethod { .. } => (
            2,
            Some(
                "(--target stock): use --method low-rank or qcqa-ec, or --target expanded (for evaluation: saves no memory)",
            ),
        ),
        Error::Setting { name: "the target of layers that share", .. } => {
            (2, Some("(`--target remote-code`)"))
        }
        Error::NeedsText { .. } => {
            (2, Some("(`--calibration TEXT`; without one `--allocation exact`, `--refit none`)"))
        }
        Error::KeyEnergies(_) => (
            2,
            Some(
                "(`--calibration TEXT`, or moments that `qcqa calibrate` has written since it measures them)",
            ),
        ),
        Error::RefitPooler { .. } => (2, Some("(`--pooler low-rank` or `procrustes`)")),
        Error::PlanDistilled => (2, Some("(`qcqa distill`, on what `compress` wrote)")),
        Error::PlanRefit { .. } => (2, Some("(`--calibration TEXT`)")),
        Error::PlanCalibration { expected: Some(_), found: Some(_) } => {
            (2, Some("(`--calibration-windows`)"))
        }
        Error::PlanCalibration { expected: Some(_), .. } => (2, Some("(`--calibration FILE`)")),
        Error::PlanCalibration { .. } => (2, Some("(leave `--calibration` out)")),
        Error::Moment { .. } => (1, Some(AGAIN)),
        _ => (1, None),
    }
}

/// Exit code and flags for what is wrong with a file.
fn of_files(error: &FileError) -> (u8, Option<&'static str>) {
    match error {
        FileError::OutputExists { .. } => (1, Some("(choose another name, or replace it with `--force`)")),
        FileError::TargetPlan { source: Error::Limits { expected, .. }, .. } if expected.contains(ACROSS) => {
            (1, Some("(`--target remote-code`)"))
        }
        FileError::TargetPlan { .. } => {
            (1, Some("(`--target expanded`, for evaluation, or search with `--target stock`)"))
        }
        FileError::Moment { .. } | FileError::NoMoments { .. } => (1, Some(AGAIN)),
        FileError::Core(error) => of_library(error),
        FileError::Plan { source, .. } => of_library(source),
        _ => (1, None),
    }
}

/// Exit code and flags for what can go wrong when a model runs.
fn of_runtime(error: &RuntimeError) -> (u8, Option<&'static str>) {
    match error {
        RuntimeError::NotUtf8 { .. } | RuntimeError::NoTokenizer { .. } | RuntimeError::Tokenizer { .. } => {
            (1, Some(IDS))
        }
        RuntimeError::MomentsAmong { .. } => (2, None),
        RuntimeError::NoPredictions => (2, Some("(`qcqa eval`, with `--plan FILE` or `--source DIR`)")),
        RuntimeError::InText { source, .. } => of_runtime(source),
        RuntimeError::Core(error) => of_library(error),
        RuntimeError::File(error) => of_files(error),
        _ => (1, None),
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
