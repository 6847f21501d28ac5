use std::io::{ErrorKind, Write};
use std::path::Path;

use serde::Deserialize;

use super::output::{parent_of, sync_directory};
use super::shards::read_bounded;
use super::{CheckpointError, WriteOptions};
use crate::{Error, Plan};

/// A plan of 1000 layers of 4096 heads is a third of it.
const PLAN_LIMIT: u64 = 64 << 20;

/// Reads a plan and checks it.
///
/// # Errors
/// All name the file: [`CheckpointError::Io`], [`CheckpointError::FileTooLarge`], [`CheckpointError::Json`] (an
/// unknown field and a partition that is none included), [`CheckpointError::Plan`] for another version or parts
/// that contradict one another.
pub fn read_plan(path: &Path) -> Result<Plan, CheckpointError> {
    /// The version alone: a newer plan has fields that this version would call unknown.
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }

    let text = read_bounded(path, PLAN_LIMIT)?;
    let json = |source| CheckpointError::Json { path: path.to_path_buf(), source };
    let unfit = |source| CheckpointError::Plan { path: path.to_path_buf(), source };
    let Versioned { version: found } = serde_json::from_slice(&text).map_err(json)?;
    if found != Plan::VERSION {
        return Err(unfit(Error::PlanVersion { found, supported: Plan::VERSION }));
    }
    let plan: Plan = serde_json::from_slice(&text).map_err(json)?;
    plan.check().map_err(unfit)?;
    Ok(plan)
}

/// Writes a plan, whole or not at all: to a temporary file beside it, then renamed. A dry run only checks.
///
/// # Errors
/// [`CheckpointError::OutputExists`] unless `force` is set, [`CheckpointError::Plan`] for a plan that contradicts
/// itself, [`CheckpointError::Io`].
pub fn write_plan(path: &Path, plan: &Plan, options: WriteOptions) -> Result<(), CheckpointError> {
    plan.check().map_err(|source| CheckpointError::Plan { path: path.to_path_buf(), source })?;
    if !options.force && path.symlink_metadata().is_ok() {
        return Err(CheckpointError::OutputExists { path: path.to_path_buf() });
    }
    let mut text = serde_json::to_vec_pretty(plan)
        .map_err(|source| CheckpointError::Json { path: path.to_path_buf(), source })?;
    text.push(b'\n');
    let failed = |source| CheckpointError::io("write", path, source);
    let parent = parent_of(path);
    if options.dry_run {
        let directory = parent.metadata().map_err(failed)?;
        return if directory.is_dir() { Ok(()) } else { Err(failed(ErrorKind::NotADirectory.into())) };
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".plan.");
    #[cfg(unix)]
    {
        // As any new file: the process's umask applies.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(parent).map_err(failed)?;
    file.write_all(&text).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    if options.force {
        file.persist(path).map_err(|e| failed(e.error))?;
    } else {
        file.persist_noclobber(path).map_err(|e| match e.error.kind() {
            ErrorKind::AlreadyExists => CheckpointError::OutputExists { path: path.to_path_buf() },
            _ => failed(e.error),
        })?;
    }
    sync_directory(parent)
}
