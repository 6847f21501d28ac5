use std::path::Path;

use serde::Deserialize;

use super::Plan;
use super::migrate::PlanV1;
use crate::error::Error;
use crate::files::{FileError, WriteOptions, read_bounded, without_mark, write_whole};

/// A plan of 1000 layers of 4096 heads is a third of it.
pub(crate) const PLAN_LIMIT: u64 = 64 << 20;

/// Reads a plan and checks it; one of version 1 comes in the present form.
///
/// # Errors
/// All name the file: [`FileError::Io`], [`FileError::FileTooLarge`], [`FileError::Json`] (an unknown field and a
/// partition that is none included), [`FileError::Plan`] for another version or parts that contradict one another.
pub fn read_plan(path: &Path) -> Result<Plan, FileError> {
    parse_plan(path, &read_bounded(path, PLAN_LIMIT)?)
}

/// The plan in the text of a file.
pub(crate) fn parse_plan(path: &Path, text: &[u8]) -> Result<Plan, FileError> {
    /// The version alone: a newer plan has fields that this version would call unknown.
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }

    let (text, json) = (without_mark(text), |source| FileError::Json { path: path.to_path_buf(), source });
    let unfit = |source| FileError::Plan { path: path.to_path_buf(), source };
    let Versioned { version: found } = serde_json::from_slice(text).map_err(json)?;
    let plan = match found {
        Plan::VERSION => serde_json::from_slice(text).map_err(json)?,
        1 => serde_json::from_slice::<PlanV1>(text).map_err(json)?.migrated().map_err(unfit)?,
        _ => return Err(unfit(Error::PlanVersion { found, supported: Plan::VERSION })),
    };
    plan.check().map_err(unfit)?;
    Ok(plan)
}

/// Writes a plan, whole or not at all. A dry run only checks.
///
/// # Errors
/// [`FileError::OutputExists`] unless `force` is set, [`FileError::Plan`] for a plan that contradicts itself,
/// [`FileError::Io`].
pub fn write_plan(path: &Path, plan: &Plan, options: WriteOptions) -> Result<(), FileError> {
    plan.check().map_err(|source| FileError::Plan { path: path.to_path_buf(), source })?;
    let mut text = serde_json::to_vec_pretty(plan)
        .map_err(|source| FileError::Json { path: path.to_path_buf(), source })?;
    text.push(b'\n');
    write_whole(path, &text, options)
}
