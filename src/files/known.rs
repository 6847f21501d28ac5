//! What files are that are not what their names say: stand-ins, downloads that failed, what other programs make of text; and
//! the errors that say so.

use std::io::ErrorKind;
use std::path::Path;

use super::FileError;

/// Bytes at the beginning that tell UTF-16 without a mark.
const LOOKED_AT: usize = 4096;

/// What a failed download leaves.
const WEB_PAGE: &str = "is a web page, as a failed download leaves: download the file again";

/// Beginnings of files, and what such a file is and what to do.
const BEGINNINGS: &[(&[u8], &str)] = &[
    (
        b"version https://git-lfs.github.com/spec/",
        "is a pointer of git-lfs and not the file itself: fetch it (git lfs pull)",
    ),
    (b"<!DOCTYPE", WEB_PAGE),
    (b"<!doctype", WEB_PAGE),
    (b"<html", WEB_PAGE),
    (b"\xff\xfe", "is UTF-16: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16: save it as UTF-8"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it"),
    (
        b"PK\x03\x04",
        "is a zip archive, as PyTorch writes weights: unpack it, or save the model as safetensors",
    ),
    (b"GGUF", "is a GGUF file: take the model that it was made of, as safetensors"),
    (b"\x93NUMPY", "is a NumPy array with its header: write the numbers alone (tofile)"),
    (b"%PDF-", "is a PDF: extract its text"),
];

/// What a file is, where it is known not to be what it is read as, and what to do about it; of a file of no bytes, too.
pub(crate) fn mistaken(bytes: &[u8]) -> Option<&'static str> {
    if bytes.is_empty() {
        return Some("is empty: write or download it again");
    }
    let known = BEGINNINGS.iter().find(|(beginning, _)| bytes.starts_with(beginning)).map(|(_, what)| *what);
    known.or_else(|| is_wide(bytes).then_some("is UTF-16 without a byte-order mark: save it as UTF-8"))
}

/// The longest header of a safetensors file.
const LONGEST_HEADER: u64 = 100_000_000;

/// Whether a file begins as safetensors do: eight bytes with the length of a header, then its brace. As text those eight bytes
/// would hold at least four zeros.
pub(crate) fn is_safetensors(bytes: &[u8]) -> bool {
    let header = bytes.split_first_chunk::<8>().filter(|(_, rest)| rest.first() == Some(&b'{'));
    header.is_some_and(|(length, _)| u64::from_le_bytes(*length) <= LONGEST_HEADER)
}

/// What a file is that should be text, where it is known not to be; see [`mistaken`]. Web pages are texts.
pub(crate) fn no_text(bytes: &[u8]) -> Option<&'static str> {
    const WEIGHTS: &str = "is a safetensors file and no text: give the file that was meant";
    let known = mistaken(bytes).filter(|what| *what != WEB_PAGE);
    known.or_else(|| is_safetensors(bytes).then_some(WEIGHTS))
}

/// Whether every second byte is 0 and the others are not, as in UTF-16 of plain English.
fn is_wide(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(LOOKED_AT) / 2 * 2];
    let zeros = |first: usize| head.iter().skip(first).step_by(2).filter(|&&byte| byte == 0).count();
    let (even, odd, half) = (zeros(0), zeros(1), head.len() / 2);
    half > 8 && even.max(odd) > half * 9 / 10 && even.min(odd) == 0
}

/// What other programs write into JSON, and what to do about it.
const NO_JSON: &[(&str, &str)] = &[
    ("NaN", ": NaN is no JSON; write null or a number"),
    ("Infinity", ": Infinity is no JSON; write null or a number"),
    ("-Infinity", ": Infinity is no JSON; write null or a number"),
    ("//", ": comments are no JSON; remove them"),
    ("/*", ": comments are no JSON; remove them"),
    ("#", ": comments are no JSON; remove them"),
    ("'", ": strings of JSON stand in double quotes"),
    ("True", ": JSON writes true and false in small letters"),
    ("False", ": JSON writes true and false in small letters"),
    ("None", ": JSON writes null for None"),
];

/// What stands where a text stops being JSON, as far as that is known.
fn no_json(text: &[u8], error: &serde_json::Error) -> &'static str {
    if error.is_eof() {
        return ": it ends too early; write or download it again";
    }
    if !error.is_syntax() {
        return "";
    }
    let line = text.split(|&byte| byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    // The column is that of the last byte read.
    let at = |back: usize| line.get(error.column().saturating_sub(back)..).unwrap_or_default();
    let stands = |(what, _): &&(&str, &str)| [1, 2].iter().any(|&back| at(back).starts_with(what.as_bytes()));
    NO_JSON.iter().find(stands).map_or("", |(_, hint)| hint)
}

impl FileError {
    /// What the operating system says; of a link to nothing what it should have led to.
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        let path = path.to_path_buf();
        match path.read_link() {
            Ok(goal) if source.kind() == ErrorKind::NotFound && action != "write" => {
                Self::Dangling { path, goal }
            }
            _ => Self::Io { action, path, source },
        }
    }

    /// What keeps a text from being read as JSON.
    pub(crate) fn json(path: &Path, text: &[u8], source: serde_json::Error) -> Self {
        let path = path.to_path_buf();
        match mistaken(text).or_else(|| no_text(text)) {
            Some(what) => Self::Mistaken { path, what },
            None => Self::Json { path, hint: no_json(text, &source), source },
        }
    }

    /// What keeps a value from being written as JSON.
    pub(crate) fn unwritten(path: &Path, source: serde_json::Error) -> Self {
        Self::Json { path: path.to_path_buf(), source, hint: "" }
    }
}
