//! Files: read within bounds, mapped, written whole or not at all; and what can be wrong with them.

mod digest;
mod error;
mod known;
mod mapped;
mod place;
mod temporary;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

pub(crate) use digest::{fingerprint, sha256};
pub use error::FileError;
pub(crate) use known::mistaken;
#[cfg(feature = "runtime")]
pub(crate) use known::{is_safetensors, no_text};
pub(crate) use mapped::Mapped;
pub use place::{SVG_MARK, check_apart};
pub(crate) use place::{is_empty, resolve};
use temporary::temporary;
pub(crate) use temporary::{HIDDEN, check_writable, clear};
#[cfg(feature = "runtime")]
pub(crate) use temporary::{HeldDirectory, unnamed};

/// How to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct WriteOptions {
    /// Replace what is already there and was written by this crate, once the new is whole.
    pub force: bool,
    /// Check everything and write nothing.
    pub dry_run: bool,
}

impl WriteOptions {
    /// Replaces what this crate wrote there before, or refuses to.
    pub fn force(self, force: bool) -> Self {
        Self { force, ..self }
    }

    /// Checks everything and writes nothing, or writes.
    pub fn dry_run(self, dry_run: bool) -> Self {
        Self { dry_run, ..self }
    }
}

/// Whether there is something at `path`.
///
/// # Errors
/// [`FileError::Dangling`] for a link to nothing.
pub(crate) fn is_there(path: &Path) -> Result<bool, FileError> {
    match path.metadata() {
        Err(error) if path.is_symlink() => Err(FileError::io("read", path, error)),
        found => Ok(found.is_ok()),
    }
}

/// The bytes of a regular file of at most `limit` bytes.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::io("read", path, source);
    check_regular(path)?;
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(FileError::FileTooLarge { path: path.to_path_buf(), limit });
    }
    Ok(bytes)
}

/// Checks that it is a regular file: opening a named pipe would wait for a writer for ever.
pub(crate) fn check_regular(path: &Path) -> Result<(), FileError> {
    let failed = |source| FileError::io("read", path, source);
    match path.metadata().map_err(failed)? {
        found if found.is_file() => Ok(()),
        found if found.is_dir() => Err(failed(io::Error::other("a directory, not a file"))),
        _ => Err(failed(io::Error::other("not a regular file"))),
    }
}

/// A text without the byte-order mark that some editors put before it.
pub(crate) fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

/// The JSON in a file of at most `limit` bytes, where there is one.
pub(crate) fn json_where_there(path: &Path, limit: u64) -> Result<Option<serde_json::Value>, FileError> {
    if !is_there(path)? {
        return Ok(None);
    }
    let text = read_bounded(path, limit)?;
    let text = without_mark(&text);
    serde_json::from_slice(text).map(Some).map_err(|source| FileError::json(path, text, source))
}

/// The directory that a path lies in.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes a file lasting that a library has written and closed.
pub(crate) fn sync_file(path: &Path) -> io::Result<()> {
    File::options().write(true).open(path)?.sync_all()
}

/// Makes a directory's entries lasting.
pub(crate) fn sync_directory(path: &Path) -> Result<(), FileError> {
    // Elsewhere directories cannot be opened, and renames are lasting by themselves.
    if cfg!(unix) {
        File::open(path).and_then(|d| d.sync_all()).map_err(|e| FileError::io("sync", path, e))?;
    }
    Ok(())
}

/// Writes a file, whole or not at all: to a temporary file beside it, then renamed. A dry run only checks.
///
/// # Errors
/// [`FileError::OutputExists`] unless `force` is set, [`FileError::OutputForeign`] for a file that this crate did not write,
/// [`FileError::Io`].
pub fn write_whole(path: &Path, bytes: &[u8], options: WriteOptions) -> Result<(), FileError> {
    if path.symlink_metadata().is_ok() {
        if !options.force {
            return Err(FileError::OutputExists { path: path.to_path_buf() });
        }
        place::check_own(path)?;
    }
    replace_whole(path, bytes, options)
}

/// [`write_whole`] of what the caller knows to be its own.
pub(crate) fn replace_whole(path: &Path, bytes: &[u8], options: WriteOptions) -> Result<(), FileError> {
    let failed = |source| FileError::io("write", path, source);
    let parent = parent_of(path);
    if options.dry_run {
        let directory = parent.metadata().map_err(failed)?;
        if path.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        if !directory.is_dir() {
            return Err(failed(io::ErrorKind::NotADirectory.into()));
        }
        return check_writable(parent).map_err(failed);
    }
    let mut file = temporary(parent).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    if options.force {
        file.persist(path).map_err(|e| failed(e.error))?;
    } else {
        file.persist_noclobber(path).map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => FileError::OutputExists { path: path.to_path_buf() },
            _ => failed(e.error),
        })?;
    }
    sync_directory(parent)
}
