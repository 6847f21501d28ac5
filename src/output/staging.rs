//! The place to write to: nothing there is lost, and the new model appears whole or not at all.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use serde::Deserialize;
use tempfile::TempDir;
use walkdir::WalkDir;

use super::copy::PROVENANCE;
use crate::files::{
    FileError, check_apart, check_writable, is_empty, parent_of, read_bounded, resolve, sync_directory,
};
use crate::plan::PLAN_LIMIT;

/// A place that has been found fit to be written to.
#[derive(Debug)]
pub(super) struct Destination {
    /// The output, absolute and without symbolic links.
    path: PathBuf,
    /// The nearest directory above it that exists.
    ancestor: PathBuf,
    force: bool,
}

impl Destination {
    /// Checks that `out` may be made or, with `force`, replaced, and that neither it nor `source` holds the other.
    pub(super) fn check(out: &Path, source: &Path, force: bool) -> Result<Self, FileError> {
        let failed = |source| FileError::io("write", out, source);
        let (path, ancestor) = resolve(out).map_err(failed)?;
        let destination = Self { path, ancestor, force };
        // What has no directory has no files to copy.
        source.canonicalize().map_err(|e| FileError::io("read", source, e))?;
        check_apart(out, [source])?;
        if out.symlink_metadata().is_ok() {
            if !force {
                return Err(FileError::OutputExists { path: out.to_path_buf() });
            }
            // A slip of the hand must not delete somebody's home.
            destination.check_own(out)?;
        } else if !destination.ancestor.is_dir() {
            return Err(failed(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let beside = if destination.ancestor == destination.path {
            parent_of(&destination.path)
        } else {
            &destination.ancestor
        };
        check_writable(beside).map_err(failed)?;
        Ok(destination)
    }

    /// Checks that everything in the directory, if there is anything, was written there by a conversion.
    fn check_own(&self, out: &Path) -> Result<(), FileError> {
        let foreign = |found: String| FileError::OutputForeign { path: out.to_path_buf(), found };
        if is_empty(&self.path) {
            return Ok(());
        }
        let Some(written) = written_files(&self.path) else {
            return Err(foreign(format!(
                "is no model that qcqa wrote (it has no {PROVENANCE} that says so)"
            )));
        };
        for entry in WalkDir::new(&self.path).min_depth(1) {
            let entry = entry.map_err(|e| FileError::io("read", out, e.into()))?;
            let name = entry.path().strip_prefix(&self.path).unwrap_or(entry.path());
            if !entry.file_type().is_dir() && !written.contains(name) {
                return Err(foreign(format!("holds {}, which qcqa did not write", name.display())));
            }
        }
        Ok(())
    }

    /// Checks that the disk has room for `needed` bytes.
    pub(super) fn check_space(&self, needed: u64) -> Result<(), FileError> {
        let available = fs4::available_space(&self.ancestor)
            .map_err(|e| FileError::io("ask for the free space of", &self.ancestor, e))?;
        enough(&self.path, needed, available)
    }
}

/// The files that a conversion says it wrote to a directory.
fn written_files(directory: &Path) -> Option<BTreeSet<PathBuf>> {
    #[derive(Deserialize)]
    struct Written {
        qcqa: String,
        files: BTreeSet<PathBuf>,
    }
    let text = read_bounded(&directory.join(PROVENANCE), PLAN_LIMIT).ok()?;
    let Written { qcqa, files } = serde_json::from_slice(&text).ok()?;
    (!qcqa.is_empty()).then_some(files)
}

/// The rule of [`Destination::check_space`].
fn enough(path: &Path, needed: u64, available: u64) -> Result<(), FileError> {
    if needed <= available {
        return Ok(());
    }
    Err(FileError::NoSpace { path: path.to_path_buf(), needed, available })
}

/// What holds a hidden directory for as long as its process lives, and says whose it is.
const LOCK: &str = "lock";
/// What hidden directories begin with; short, because the name of an output may be as long as names can be.
const HIDDEN: &str = ".qcqa.";

/// A hidden directory beside an output, for a model under `model`.
#[derive(Debug)]
struct Hidden {
    // Dropped in this order.
    directory: TempDir,
    _lock: File,
}

impl Hidden {
    fn beside(path: &Path, role: Role) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix(HIDDEN).tempdir_in(parent_of(path))?;
        let file = directory.path().join(LOCK);
        let mut lock = File::create_new(&file)?;
        lock.lock_exclusive()?;
        // Who reads this finds it locked.
        lock.write_all(role.label(path).as_bytes())?;
        Ok(Self { directory, _lock: lock })
    }

    fn model(&self) -> PathBuf {
        self.directory.path().join("model")
    }
}

/// What lies in a hidden directory: a model to come, or one that is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    New,
    Old,
}

impl Role {
    fn label(self, path: &Path) -> String {
        format!("{self:?} {}", path.file_name().unwrap_or_default().to_string_lossy())
    }
}

/// Removes what runs that were killed have left beside an output, and says what that was. A model that was on its way out when
/// nothing had taken its place yet is put back.
fn clear_left(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut left = Vec::new();
    for entry in fs::read_dir(parent_of(path))? {
        let directory = entry?.path();
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(file) = name.starts_with(HIDDEN).then(|| directory.join(LOCK)) else { continue };
        let Ok(label) = fs::read_to_string(&file) else { continue };
        let Some(role) = [Role::New, Role::Old].into_iter().find(|role| role.label(path) == label) else {
            continue;
        };
        // Whoever is still at work holds it.
        let lock = File::open(&file)?;
        if !lock.try_lock_exclusive()? {
            continue;
        }
        let model = directory.join("model");
        if role == Role::Old && path.symlink_metadata().is_err() && model.is_dir() {
            fs::rename(&model, path)?;
        }
        fs::remove_dir_all(&directory)?;
        left.push(directory);
    }
    Ok(left)
}

/// A model in the making, in a hidden directory beside its destination. Dropped before [`Staging::commit`], it
/// leaves nothing behind.
#[derive(Debug)]
pub(super) struct Staging<'a> {
    destination: &'a Destination,
    // Dropped in this order: the directories made on the way are removed when they are empty.
    hidden: Hidden,
    _made: MadeDirectories,
    /// What killed runs had left and is gone now.
    pub(super) removed: Vec<PathBuf>,
}

impl<'a> Staging<'a> {
    pub(super) fn new(destination: &'a Destination) -> Result<Self, FileError> {
        let failed = |source| FileError::io("write", &destination.path, source);
        let parent = parent_of(&destination.path);
        let missing = parent.ancestors().take_while(|a| !a.exists()).map(Path::to_path_buf).collect();
        let made = MadeDirectories(missing);
        fs::create_dir_all(parent).map_err(failed)?;
        let removed = clear_left(&destination.path).map_err(failed)?;
        let hidden = Hidden::beside(&destination.path, Role::New).map_err(failed)?;
        let staging = Self { destination, hidden, _made: made, removed };
        fs::create_dir(staging.path()).map_err(failed)?;
        Ok(staging)
    }

    /// The directory to fill.
    pub(super) fn path(&self) -> PathBuf {
        self.hidden.model()
    }

    /// Moves the new model to its place, and deletes what was there.
    pub(super) fn commit(self) -> Result<(), FileError> {
        let path = &self.destination.path;
        let failed = |source| FileError::io("write", path, source);
        sync_directory(&self.path())?;
        if path.symlink_metadata().is_err() {
            fs::rename(self.path(), path).map_err(failed)?;
            return sync_directory(parent_of(path));
        }
        if !self.destination.force {
            return Err(FileError::OutputExists { path: path.clone() });
        }
        replace(&self.path(), path)
    }
}

/// Moves `new` to `path`, where something is; that is deleted afterwards, or moved back if `new` cannot be moved.
fn replace(new: &Path, path: &Path) -> Result<(), FileError> {
    let failed = |source| FileError::io("write", path, source);
    let aside = Hidden::beside(path, Role::Old).map_err(failed)?;
    let old = aside.model();
    fs::rename(path, &old).map_err(failed)?;
    if let Err(error) = fs::rename(new, path) {
        return Err(match fs::rename(&old, path) {
            Ok(()) => failed(error),
            Err(source) => {
                let kept = aside.directory.keep().join("model");
                FileError::OldKept { path: path.to_path_buf(), kept, source }
            }
        });
    }
    sync_directory(parent_of(path))?;
    let kept = aside.directory.path().to_path_buf();
    aside.directory.close().map_err(|e| FileError::io("delete the old model in", &kept, e))
}

/// Directories that did not exist before, innermost first; removed on drop where they are still empty.
#[derive(Debug)]
struct MadeDirectories(Vec<PathBuf>);

impl Drop for MadeDirectories {
    fn drop(&mut self) {
        for directory in &self.0 {
            // Fails, as it should, once the model lies in it.
            let _ = fs::remove_dir(directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named() {
        assert!(enough(Path::new("out"), 10, 10).is_ok());
        let message = enough(Path::new("out"), 11, 10).map_err(|e| e.to_string());
        assert_eq!(
            message,
            Err("out: 11 bytes are needed, 10 are free; make room or choose another disk".into())
        );
    }

    #[test]
    fn the_old_model_is_moved_back() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let out = root.path().join("out");
        fs::create_dir(&out)?;
        fs::write(out.join("config.json"), "old")?;
        let error = replace(&root.path().join("nothing"), &out).map_err(|e| e.to_string());
        assert!(error.is_err_and(|e| e.starts_with("cannot write") && e.contains("out")));
        assert_eq!(fs::read_to_string(out.join("config.json"))?, "old");
        assert_eq!(fs::read_dir(root.path())?.count(), 1);
        Ok(())
    }
}
