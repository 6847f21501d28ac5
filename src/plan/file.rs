use std::path::Path;

use serde_json::{Map, Value};

use super::Plan;
use super::migrate::PlanV1;
use crate::error::{Error, shown};
use crate::files::{FileError, WriteOptions, read_bounded, without_mark, write_whole};

/// A plan of 1000 layers of 4096 heads is a third of it.
pub(crate) const PLAN_LIMIT: u64 = 64 << 20;

/// Reads a plan and checks it; one of version 1 comes in the present form, and of the qcqa.json of a converted model the plan
/// in it.
///
/// # Errors
/// All name the file: [`FileError::Io`], [`FileError::FileTooLarge`], [`FileError::Json`] (an unknown field and a
/// partition that is none included), [`FileError::NoPlan`], [`FileError::Plan`] for another version or parts that contradict one another.
pub fn read_plan(path: &Path) -> Result<Plan, FileError> {
    parse_plan(path, &read_bounded(path, PLAN_LIMIT)?)
}

/// The plan in the text of a file.
pub(crate) fn parse_plan(path: &Path, text: &[u8]) -> Result<Plan, FileError> {
    let text = without_mark(text);
    let json = |source| FileError::json(path, text, source);
    let unfit = |source| FileError::Plan { path: path.to_path_buf(), source };
    // The version first: a newer plan has fields that this version would call unknown.
    let found = match serde_json::from_slice(text).map_err(json)? {
        Value::Object(fields) => fields,
        _ => return Err(no_plan(path, "no object".to_string())),
    };
    let version = match (found.get("version"), found.get("plan")) {
        (Some(version), _) => version,
        // What a conversion says of itself has its plan in it.
        (None, Some(plan @ Value::Object(_))) => {
            let plan = serde_json::to_vec(plan).map_err(|source| FileError::unwritten(path, source))?;
            return parse_plan(path, &plan);
        }
        (None, _) => return Err(no_plan(path, keys(&found))),
    };
    let version = version.as_u64().and_then(|version| u32::try_from(version).ok());
    let found = version.ok_or_else(|| {
        no_plan(path, "something else of version ".to_string() + &shown(&found["version"].to_string()))
    })?;
    let plan = match found {
        Plan::VERSION => serde_json::from_slice(text).map_err(json)?,
        1 => serde_json::from_slice::<PlanV1>(text).map_err(json)?.migrated().map_err(unfit)?,
        _ => return Err(unfit(Error::PlanVersion { found, supported: Plan::VERSION })),
    };
    plan.check().map_err(unfit)?;
    Ok(plan)
}

fn no_plan(path: &Path, found: String) -> FileError {
    FileError::NoPlan { path: path.to_path_buf(), found }
}

/// What an object has in it, for the message that it is no plan.
fn keys(found: &Map<String, Value>) -> String {
    const SHOWN: usize = 4;
    let keys: Vec<String> = found.keys().take(SHOWN).map(|key| shown(key)).collect();
    let more = if found.len() > SHOWN { ", …" } else { "" };
    if keys.is_empty() { "nothing".to_string() } else { format!("the keys {}{more}", keys.join(", ")) }
}

/// Writes a plan, whole or not at all. A dry run only checks.
///
/// # Errors
/// [`FileError::OutputExists`] unless `force` is set, [`FileError::Plan`] for a plan that contradicts itself,
/// [`FileError::Io`].
pub fn write_plan(path: &Path, plan: &Plan, options: WriteOptions) -> Result<(), FileError> {
    plan.check().map_err(|source| FileError::Plan { path: path.to_path_buf(), source })?;
    let mut text = serde_json::to_vec_pretty(plan).map_err(|source| FileError::unwritten(path, source))?;
    text.push(b'\n');
    write_whole(path, &text, options)
}
