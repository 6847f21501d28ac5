//! The place to write to: nothing there is lost, and the new model appears whole or not at all.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use tempfile::TempDir;

use crate::checkpoint::CONFIG;
use crate::files::{FileError, parent_of, sync_directory};

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
        let source = source.canonicalize().map_err(|e| FileError::io("read", source, e))?;
        if destination.path.starts_with(&source) {
            return Err(FileError::OutputOverlap { path: out.to_path_buf(), inner: source });
        }
        destination.spare(&source)?;
        if out.symlink_metadata().is_ok() {
            if !force {
                return Err(FileError::OutputExists { path: out.to_path_buf() });
            }
            // A slip of the hand must not delete somebody's home.
            let empty = || fs::read_dir(&destination.path).is_ok_and(|mut entries| entries.next().is_none());
            if !destination.path.join(CONFIG).is_file() && !empty() {
                return Err(FileError::OutputForeign { path: out.to_path_buf() });
            }
        } else if !destination.ancestor.is_dir() {
            return Err(failed(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        Ok(destination)
    }

    /// Checks that a file of the source does not lie, by way of symbolic links, in what will be replaced.
    pub(super) fn spare(&self, file: &Path) -> Result<(), FileError> {
        let inner = file.canonicalize().map_err(|e| FileError::io("read", file, e))?;
        if inner.starts_with(&self.path) {
            return Err(FileError::OutputOverlap { path: self.path.clone(), inner });
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

/// The rule of [`Destination::check_space`].
fn enough(path: &Path, needed: u64, available: u64) -> Result<(), FileError> {
    if needed <= available {
        return Ok(());
    }
    Err(FileError::NoSpace { path: path.to_path_buf(), needed, available })
}

/// `out` without symbolic links, and the nearest existing path above (or at) it.
fn resolve(out: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let absolute = std::path::absolute(out)?;
    for ancestor in absolute.ancestors() {
        let Ok(real) = ancestor.canonicalize() else { continue };
        let rest = absolute.strip_prefix(ancestor).unwrap_or(Path::new(""));
        if !rest.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "`..` below a directory that does not exist",
            ));
        }
        // Joining nothing would append a slash.
        let path = if rest.as_os_str().is_empty() { real.clone() } else { real.join(rest) };
        return Ok((path, real));
    }
    Err(io::Error::from(io::ErrorKind::NotFound))
}

/// A model in the making, in a hidden directory beside its destination. Dropped before [`Staging::commit`], it
/// leaves nothing behind.
#[derive(Debug)]
pub(super) struct Staging<'a> {
    destination: &'a Destination,
    // Dropped in this order: the directories made on the way are removed when they are empty.
    hidden: TempDir,
    _made: MadeDirectories,
}

impl<'a> Staging<'a> {
    pub(super) fn new(destination: &'a Destination) -> Result<Self, FileError> {
        let failed = |source| FileError::io("write", &destination.path, source);
        let parent = parent_of(&destination.path);
        let missing = parent.ancestors().take_while(|a| !a.exists()).map(Path::to_path_buf).collect();
        let made = MadeDirectories(missing);
        fs::create_dir_all(parent).map_err(failed)?;
        let hidden = hidden_beside(&destination.path, "new").map_err(failed)?;
        let staging = Self { destination, hidden, _made: made };
        fs::create_dir(staging.path()).map_err(failed)?;
        Ok(staging)
    }

    /// The directory to fill.
    pub(super) fn path(&self) -> PathBuf {
        self.hidden.path().join("model")
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
    let aside = hidden_beside(path, "old").map_err(failed)?;
    let old = aside.path().join("model");
    fs::rename(path, &old).map_err(failed)?;
    if let Err(error) = fs::rename(new, path) {
        return Err(match fs::rename(&old, path) {
            Ok(()) => failed(error),
            Err(source) => {
                let kept = aside.keep().join("model");
                FileError::OldKept { path: path.to_path_buf(), kept, source }
            }
        });
    }
    sync_directory(parent_of(path))?;
    let kept = aside.path().to_path_buf();
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

fn hidden_beside(path: &Path, what: &str) -> io::Result<TempDir> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    tempfile::Builder::new().prefix(&format!(".{name}.{what}-")).tempdir_in(parent_of(path))
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
        fs::write(out.join(CONFIG), "old")?;
        let error = replace(&root.path().join("nothing"), &out).map_err(|e| e.to_string());
        assert!(error.is_err_and(|e| e.starts_with("cannot write") && e.contains("out")));
        assert_eq!(fs::read_to_string(out.join(CONFIG))?, "old");
        assert_eq!(fs::read_dir(root.path())?.count(), 1);
        Ok(())
    }
}
