//! Places of outputs: nothing that is read is written over, and nothing that others wrote is replaced.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use super::FileError;

/// Bytes of a file that tell whose it is: the header of moments of a thousand layers.
const HEAD: u64 = 1 << 20;
/// What the files of this crate hold near their beginning: plans, moments, pictures.
const MARKS: [&str; 3] = ["\"qcqa\": \"", "\"calibration\":{\"dtype\":\"U8\",\"shape\":[32]", SVG_MARK];
/// What a picture (SVG) holds that may be replaced.
pub const SVG_MARK: &str = "<desc>drawn by qcqa</desc>";

/// Checks that an output is none of the inputs of the same work, does not lie within one, and holds none, whatever links say.
/// What is no file or directory, a pipe for one, cannot be lost.
///
/// ```
/// use qcqa::files::check_apart;
///
/// let model = "tests/data/novels-1m".as_ref();
/// assert!(check_apart("tests/data/novels-1m/model.safetensors".as_ref(), [model]).is_err());
/// assert!(check_apart("tests/data/plan.json".as_ref(), [model]).is_ok());
/// ```
///
/// # Errors
/// [`FileError::OutputOverlap`], [`FileError::Io`].
pub fn check_apart<'a>(out: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<(), FileError> {
    let (place, _) = resolve(out).map_err(|e| FileError::io("write", out, e))?;
    for input in inputs {
        let Ok(input) = input.canonicalize() else { continue };
        let kept = input.is_dir() || input.is_file();
        if kept && (place.starts_with(&input) || input.starts_with(&place)) {
            return Err(FileError::OutputOverlap { path: out.to_path_buf(), inner: input });
        }
    }
    Ok(())
}

/// Checks that the file at `path` may be replaced: that this crate wrote it, or nothing is in it.
pub(super) fn check_own(path: &Path) -> Result<(), FileError> {
    let failed = |source| FileError::io("read", path, source);
    let metadata = path.metadata().map_err(failed)?;
    let mut head = Vec::new();
    if metadata.is_file() {
        File::open(path).map_err(failed)?.take(HEAD).read_to_end(&mut head).map_err(failed)?;
    }
    let marked = |mark: &&str| head.windows(mark.len()).any(|part| part == mark.as_bytes());
    if metadata.is_file() && (head.is_empty() || MARKS.iter().any(marked)) {
        return Ok(());
    }
    Err(FileError::OutputForeign {
        path: path.to_path_buf(),
        found: "is no plan, moments or picture that qcqa wrote".to_string(),
    })
}

/// `out` without symbolic links, and the nearest existing path above (or at) it.
pub(crate) fn resolve(out: &Path) -> io::Result<(PathBuf, PathBuf)> {
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

/// Whether there is nothing in a directory.
pub(crate) fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}
