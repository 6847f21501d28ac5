//! The files of a model besides its weights: tokenizer, generation config, chat template, licence, ….

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use walkdir::WalkDir;

use crate::checkpoint::{CONFIG, Checkpoint, INDEX};
use crate::files::FileError;

/// Where the provenance of a converted model is kept.
pub(super) const PROVENANCE: &str = "qcqa.json";

/// Weights in other forms: they would still be those of the source.
const WEIGHTS: &[&str] = &[
    "bin",
    "aria2",
    "ckpt",
    "crdownload",
    "distcp",
    "engine",
    "gguf",
    "h5",
    "incomplete",
    "mlmodel",
    "mlpackage",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "onnx_data",
    "ot",
    "part",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "safetensors",
    "tflite",
];
/// What describes weights in other forms, or an adapter whose weights are not copied.
const DESCRIPTIONS: &[&str] = &[
    "params.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
];
/// Directories of other weights, or of the tool that fetched the model.
const SKIPPED: &[&str] = &["original", ".git", ".cache"];
/// A model directory has some dozens; a link to the root of a disk has millions.
const MOST_FILES: usize = 10_000;

/// A file to copy.
#[derive(Debug)]
pub(super) struct Extra {
    pub(super) from: PathBuf,
    /// Its name in the output directory.
    pub(super) to: PathBuf,
    pub(super) bytes: u64,
}

/// The files to copy from a model directory and those below it, and what is left behind, both sorted; links are followed, those
/// to a directory above end. The files that are written anew are neither.
pub(super) fn list(source: &Checkpoint) -> Result<(Vec<Extra>, Vec<PathBuf>), FileError> {
    let (root, index) = (source.path(), source.files().index.is_some().then_some(INDEX));
    let weights = source.files().files.iter().map(|shard| shard.file.as_str());
    // At the root, or of the tool that fetched the model anywhere.
    let written: BTreeSet<&Path> = weights.chain([CONFIG, PROVENANCE]).chain(index).map(Path::new).collect();
    let is_written = |path: &Path| {
        written.contains(path) || path.file_name().is_some_and(|name| name == ".git" || name == ".cache")
    };
    let (mut extras, mut left) = (Vec::new(), Vec::new());
    let taken = |depth, path: &Path| depth == 0 || !(is_skipped(path, depth == 1) || is_another(path));
    let mut take = |entry: &walkdir::DirEntry| {
        let taken = taken(entry.depth(), entry.path());
        let name = entry.path().strip_prefix(root).unwrap_or(entry.path());
        if !taken && !is_written(name) {
            left.push(name.to_path_buf());
        }
        taken
    };
    let entries = WalkDir::new(root).follow_links(true).into_iter();
    for entry in entries.filter_entry(&mut take) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                let path = error.path().unwrap_or(root).to_path_buf();
                if error.loop_ancestor().is_some() || !taken(error.depth(), &path) {
                    continue;
                }
                return Err(FileError::io("read", &path, error.into()));
            }
        };
        if !entry.file_type().is_file() {
            continue;
        }
        if extras.len() == MOST_FILES {
            return Err(FileError::TooManyFiles { path: root.to_path_buf(), limit: MOST_FILES });
        }
        let from = entry.path().to_path_buf();
        if entry.path().strip_prefix(root).is_ok_and(|name| name.to_str().is_none()) {
            return Err(FileError::Name { path: from });
        }
        // Better now than when it is its turn.
        File::open(&from).map_err(|e| FileError::io("read", &from, e))?;
        let bytes = from.metadata().map_err(|e| FileError::io("read", &from, e))?.len();
        let to = from.strip_prefix(root).unwrap_or(&from).to_path_buf();
        extras.push(Extra { from, to, bytes });
    }
    extras.sort_by(|a, b| a.to.cmp(&b.to));
    left.sort();
    Ok((extras, left))
}

/// Whether a directory below is a model of its own, with configuration and weights: a step of its training, say.
fn is_another(path: &Path) -> bool {
    let is_weights = |path: &Path| {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        WEIGHTS.contains(&&*extension)
    };
    let mut below = path.read_dir().into_iter().flatten().flatten();
    path.join(CONFIG).is_file() && below.any(|entry| is_weights(&entry.path()))
}

/// Whether a file says under what terms a model is used.
pub(super) fn is_licence(extra: &Extra) -> bool {
    let name = extra.to.to_string_lossy().to_lowercase();
    ["license", "licence", "notice", "use_policy"].iter().any(|start| name.starts_with(start))
}

/// Takes out the code that the configuration of the source names and that of the output does not, and gives its names.
pub(super) fn take_unnamed(
    extras: &mut Vec<Extra>,
    source: &Map<String, Value>,
    output: &Map<String, Value>,
) -> Vec<PathBuf> {
    let (named, kept) = (code(source), code(output));
    let unnamed = |extra: &Extra| named.contains(&extra.to) && !kept.contains(&extra.to);
    let (left, others): (Vec<_>, _) = std::mem::take(extras).into_iter().partition(unnamed);
    *extras = others;
    left.into_iter().map(|extra| extra.to).collect()
}

/// The files of code beside a configuration that its `auto_map` names: of `module.Class` module.py.
fn code(config: &Map<String, Value>) -> BTreeSet<PathBuf> {
    let all = config.get("auto_map").and_then(Value::as_object).into_iter().flat_map(Map::values);
    // A tokenizer may have two classes.
    let names = all.flat_map(|named| named.as_array().map_or(std::slice::from_ref(named), Vec::as_slice));
    let modules = names.filter_map(|name| Some(name.as_str()?.rsplit_once('.')?.0));
    modules.map(|module| PathBuf::from(module.replace('.', "/") + ".py")).collect()
}

fn is_skipped(path: &Path, at_root: bool) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    WEIGHTS.contains(&&*extension)
        || SKIPPED.contains(&&*name)
        || DESCRIPTIONS.contains(&&*name)
        || name.starts_with("consolidated")
        || name.ends_with(".bin.index.json")
        || (at_root && [CONFIG, INDEX, PROVENANCE].contains(&&*name))
}

impl Extra {
    /// Copies the file into the output directory, permissions included.
    pub(super) fn copy(&self, output: &Path) -> Result<(), FileError> {
        let to = output.join(&self.to);
        let failed = |e| FileError::io("copy", &self.from, e);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        let mut file = File::create_new(&to).map_err(failed)?;
        io::copy(&mut File::open(&self.from).map_err(failed)?, &mut file).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        same_permissions(&self.from, &to)
    }
}

/// Gives `to` the permissions of `from`.
pub(super) fn same_permissions(from: &Path, to: &Path) -> Result<(), FileError> {
    let permissions = from.metadata().map(|m| m.permissions());
    permissions.and_then(|p| fs::set_permissions(to, p)).map_err(|e| FileError::io("write", to, e))
}
