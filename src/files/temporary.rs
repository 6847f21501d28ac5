//! Files that are not whole yet: under a lock, by which the next run knows those that a killed one has left.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use tempfile::{Builder, NamedTempFile};

/// What hidden names begin with; short, because the name of an output may be as long as names can be.
pub(crate) const HIDDEN: &str = ".qcqa.";
/// Letters that tell one name from others.
const LETTERS: usize = 12;
/// What names of files end with.
const END: &str = ".part";
/// And those of the directories that such a file holds.
const DIRECTORY: &str = "parts";

/// A file in a directory that is to be renamed. Those that killed runs have left there go.
pub(crate) fn temporary(directory: &Path) -> io::Result<NamedTempFile> {
    clear(directory);
    loop {
        let file = named(directory)?;
        // Where there are no locks nothing is cleared either.
        let _ = file.as_file().lock_exclusive();
        // Between the two another run may have taken it for left.
        if file.path().exists() {
            return Ok(file);
        }
    }
}

/// A hidden directory for files that a library writes under names of its own, and renames: no lock of ours is on these. It goes when it
/// is dropped; what a killed run leaves goes with the file that holds it.
#[cfg(feature = "runtime")]
#[derive(Debug)]
pub(crate) struct HeldDirectory {
    directory: PathBuf,
    held: Option<NamedTempFile>,
}

#[cfg(feature = "runtime")]
impl HeldDirectory {
    /// In this directory.
    pub(crate) fn new(parent: &Path) -> io::Result<Self> {
        let held = temporary(parent)?;
        let directory = held.path().with_extension(DIRECTORY);
        fs::create_dir(&directory)?;
        Ok(Self { directory, held: Some(held) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }
}

#[cfg(feature = "runtime")]
impl Drop for HeldDirectory {
    fn drop(&mut self) {
        if fs::remove_dir_all(&self.directory).is_err() {
            // The next run finds it by the file.
            let _ = self.held.take().map(NamedTempFile::keep);
        }
    }
}

/// A file without a name where the system has its temporary ones, gone with this process.
#[cfg(feature = "runtime")]
pub(crate) fn unnamed() -> io::Result<File> {
    tempfile::tempfile()
}

/// Whether files can be made in a directory: one is, and is gone at once.
pub(crate) fn check_writable(directory: &Path) -> io::Result<()> {
    named(directory).map(drop)
}

fn named(directory: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(HIDDEN).suffix(END).rand_bytes(LETTERS);
    #[cfg(unix)]
    {
        // As any new file: the process's umask applies.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(directory)
}

/// Removes the files of runs that are no more, with the directories that they held, and says which. What cannot be removed stays.
pub(crate) fn clear(directory: &Path) -> Vec<PathBuf> {
    let mut left = Vec::new();
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        let name = entry.file_name();
        let letters = name.to_str().and_then(|name| name.strip_prefix(HIDDEN)?.strip_suffix(END));
        let own =
            letters.is_some_and(|own| own.len() == LETTERS && own.bytes().all(|b| b.is_ascii_alphanumeric()));
        if !own || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let held = File::open(entry.path()).and_then(|file| Ok(file.try_lock_exclusive()?.then_some(file)));
        // The lock is held until the file is gone.
        if let Ok(Some(_lock)) = held {
            match fs::remove_dir_all(entry.path().with_extension(DIRECTORY)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => continue,
                _ => {}
            }
            left.extend(fs::remove_file(entry.path()).is_ok().then(|| entry.path()));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_holds_goes_and_nothing_else() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let held = temporary(root.path())?;
        let left = named(root.path())?.into_temp_path().keep().map_err(io::Error::other)?;
        let others = [
            ".qcqa.toml",
            ".qcqa.part",
            ".qcqa.abcdefghijkl",
            "abcdefghijkl.part",
            ".qcqa.abcdefghij-l.part",
        ];
        for name in others {
            fs::write(root.path().join(name), "mine")?;
        }
        fs::create_dir(root.path().join(".qcqa.abcdefghijkl.part"))?;
        let next = temporary(root.path())?;
        assert!(held.path().exists() && next.path().exists() && !left.exists());
        assert_eq!(fs::read_dir(root.path())?.count(), 2 + others.len() + 1);
        Ok(())
    }

    #[cfg(feature = "runtime")]
    #[test]
    fn a_directory_goes_with_the_file_that_holds_it() -> io::Result<()> {
        let root = tempfile::tempdir()?;
        let held = HeldDirectory::new(root.path())?;
        fs::write(held.path().join("state"), "mine")?;
        let left = named(root.path())?.into_temp_path().keep().map_err(io::Error::other)?;
        let directory = left.with_extension(DIRECTORY);
        fs::create_dir(&directory)?;
        fs::write(directory.join("state"), "of one who was killed")?;
        let alone = root.path().join(".qcqa.abcdefghijkl.parts");
        fs::create_dir(&alone)?;
        assert_eq!(clear(root.path()), [left]);
        assert!(held.path().join("state").exists() && !directory.exists() && alone.exists());
        drop(held);
        assert_eq!(fs::read_dir(root.path())?.count(), 1);
        Ok(())
    }
}
