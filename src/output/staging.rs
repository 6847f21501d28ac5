//! The place to write to: nothing there is lost, and the new model appears whole or not at all.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use serde::Deserialize;
use walkdir::WalkDir;

use super::copy::PROVENANCE;
use crate::files::{
    FileError, HIDDEN, check_apart, check_writable, clear, is_empty, parent_of, read_bounded, resolve,
    sync_directory,
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
/// Where in it the model is.
const MODEL: &str = "model";
/// Letters that tell one hidden directory from others.
const LETTERS: usize = 6;

/// A hidden directory beside an output, for a model under `model`. It goes when it is dropped, unless it is kept.
#[derive(Debug)]
struct Hidden {
    directory: PathBuf,
    _lock: File,
    kept: bool,
}

impl Hidden {
    fn beside(path: &Path, role: Role) -> io::Result<Self> {
        loop {
            let mut builder = tempfile::Builder::new();
            let directory = builder.prefix(HIDDEN).rand_bytes(LETTERS).tempdir_in(parent_of(path))?;
            let file = directory.path().join(LOCK);
            let mut lock = match File::create_new(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                lock => lock?,
            };
            lock.lock_exclusive()?;
            // Between the two another run may have taken it for left.
            if !file.exists() {
                continue;
            }
            // Who reads this finds it locked.
            lock.write_all(role.label(path).as_bytes())?;
            return Ok(Self { directory: directory.keep(), _lock: lock, kept: false });
        }
    }

    fn model(&self) -> PathBuf {
        self.directory.join(MODEL)
    }

    /// Leaves it where it is.
    fn keep(mut self) -> PathBuf {
        self.kept = true;
        self.model()
    }

    fn close(mut self) -> io::Result<()> {
        self.kept = true;
        remove(&self.directory)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if !self.kept {
            // What stays is found by the next run.
            let _ = remove(&self.directory);
        }
    }
}

/// Removes a hidden directory. What is half removed is no model, and what says what it was goes last: a run may be killed here, too.
fn remove(directory: &Path) -> io::Result<()> {
    let (model, gone) = (directory.join(MODEL), directory.join("gone"));
    if gone.exists() {
        fs::remove_dir_all(&gone)?;
    }
    match fs::rename(model, &gone) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
        Ok(()) => fs::remove_dir_all(&gone)?,
    }
    fs::remove_dir_all(directory)
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
    let mut left = clear(parent_of(path));
    for entry in fs::read_dir(parent_of(path))? {
        let directory = entry?.path();
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(letters) = name.strip_prefix(HIDDEN) else { continue };
        let file = directory.join(LOCK);
        let label = || fs::read_to_string(&file).unwrap_or_default();
        let role_of = |label: &str| [Role::New, Role::Old].into_iter().find(|role| role.label(path) == label);
        // A run that was killed before it said what this is for has put nothing into it.
        let unsaid = label().is_empty() && letters.len() == LETTERS;
        if !unsaid && role_of(&label()).is_none() {
            continue;
        }
        let Ok(lock) = File::open(&file) else {
            // Only where there is nothing in it.
            left.extend(fs::remove_dir(&directory).is_ok().then_some(directory));
            continue;
        };
        // Whoever is still at work holds it.
        if !lock.try_lock_exclusive()? {
            continue;
        }
        match role_of(&label()) {
            Some(role) => {
                let model = directory.join(MODEL);
                if role == Role::Old && path.symlink_metadata().is_err() && model.is_dir() {
                    fs::rename(&model, path)?;
                }
                remove(&directory)?;
            }
            None if label().is_empty() && fs::remove_file(&file).is_ok() => {
                let _ = fs::remove_dir(&directory);
            }
            None => continue,
        }
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
        let there = || path.symlink_metadata().is_ok();
        if !there() {
            match fs::rename(self.path(), path) {
                // Another run was first.
                Err(_) if there() => {}
                moved => {
                    moved.map_err(failed)?;
                    return sync_directory(parent_of(path));
                }
            }
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
            Err(source) => FileError::OldKept { path: path.to_path_buf(), kept: aside.keep(), source },
        });
    }
    sync_directory(parent_of(path))?;
    let kept = aside.directory.clone();
    aside.close().map_err(|e| FileError::io("delete the old model in", &kept, e))
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

    /// Whatever a killed run was at, the next one removes what is left, and nothing that others hold or have written.
    #[test]
    fn what_killed_runs_leave_goes() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let out = root.path().join("out");
        let made = |name: &str, label: Option<&str>| {
            let directory = root.path().join(name);
            fs::create_dir_all(directory.join("model"))?;
            fs::write(directory.join("model/config.json"), name)?;
            match label {
                Some("") => {
                    fs::remove_dir_all(directory.join("model"))?;
                    fs::write(directory.join(LOCK), "")
                }
                Some(label) => fs::write(directory.join(LOCK), label),
                None => fs::remove_dir_all(directory.join("model")),
            }
        };
        made(".qcqa.newnew", Some("New out"))?;
        made(".qcqa.oldold", Some("Old out"))?;
        // Killed before it said what it is for, and before there was a lock.
        made(".qcqa.emptyy", Some(""))?;
        made(".qcqa.nolock", None)?;
        made(".qcqa.others", Some("New other"))?;
        made(".qcqa.longer-name", None)?;
        // Killed while it deleted the old model.
        made(".qcqa.halfhf", Some("Old out"))?;
        fs::rename(root.path().join(".qcqa.halfhf/model"), root.path().join(".qcqa.halfhf/gone"))?;
        let held = Hidden::beside(&out, Role::New)?;
        assert_eq!(clear_left(&out)?.len(), 5);
        assert_eq!(fs::read_to_string(out.join("config.json"))?, ".qcqa.oldold");
        assert!(held.directory.join(LOCK).exists());
        drop(held);
        let mut names: Vec<_> =
            fs::read_dir(root.path())?.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>()?;
        names.sort();
        assert_eq!(names, [".qcqa.longer-name", ".qcqa.others", "out"]);
        Ok(())
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
