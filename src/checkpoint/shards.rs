//! The weight files of a directory: which there are, what their headers say.

use std::collections::{BTreeMap, HashMap};
use std::ops::{Deref, Range};
use std::path::{Component, Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Map, Value};

use super::TensorIndex;
use crate::files::{FileError, Mapped, is_there, mistaken, read_bounded, without_mark};

pub(super) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The most that is read of an index; one of a million tensors is a tenth of it.
const INDEX_LIMIT: u64 = 1 << 30;
/// Bytes before the header: its length.
const LENGTH_BYTES: usize = 8;
/// Bytes of a tensor that are given back once they were read.
const LARGE: usize = 1 << 20;

/// One file of weights.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Its name in the directory.
    pub(crate) file: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: Bytes,
    /// `__metadata__` of its header.
    pub(crate) metadata: Option<HashMap<String, String>>,
    /// Bytes before its data.
    pub(crate) header: usize,
}

/// The bytes of a file.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mapped),
    Held(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(bytes) => bytes,
            Self::Held(bytes) => bytes,
        }
    }
}

/// Where a tensor lies, and what it is.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) shard: usize,
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<usize>,
}

/// All weight files of a directory.
#[derive(Debug)]
pub(crate) struct Shards {
    pub(crate) files: Vec<Shard>,
    pub(crate) tensors: BTreeMap<String, Entry>,
    /// The index, for a directory of several files.
    pub(crate) index: Option<Map<String, Value>>,
}

impl Shards {
    /// Maps the files and checks their headers and lengths. Like transformers, one whole file comes before an
    /// index.
    pub(super) fn open(directory: &Path) -> Result<Self, FileError> {
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new(), index: None };
        if is_there(&directory.join(SINGLE))? {
            shards.add(directory, SINGLE)?;
            return Ok(shards);
        }
        let index_path = directory.join(INDEX);
        if !is_there(&index_path)? {
            return Err(no_weights(directory));
        }
        let text = read_bounded(&index_path, INDEX_LIMIT)?;
        let text = without_mark(&text);
        let index = serde_json::from_slice(text);
        let index: Map<String, Value> = index.map_err(|source| FileError::json(&index_path, text, source))?;
        let weight_map = weight_map(&index_path, &index)?;
        // A tensor of each file, so that a missing file can be explained.
        let files: BTreeMap<&str, &str> = weight_map.iter().map(|&(tensor, file)| (file, tensor)).collect();
        for (&file, &tensor) in &files {
            let of = || (index_path.clone(), file.to_string(), tensor.to_string());
            let mut components = Path::new(file).components();
            let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
            if !plain || !file.ends_with(".safetensors") {
                let (index, shard, tensor) = of();
                return Err(FileError::ShardName { index, tensor, shard });
            }
            if !is_there(&directory.join(file))? {
                let (index, shard, tensor) = of();
                return Err(FileError::ShardMissing { index, shard, tensor });
            }
            shards.add(directory, file)?;
        }
        for (tensor, file) in weight_map {
            if shards.tensors.get(tensor).is_none_or(|e| shards.files[e.shard].file != file) {
                let (shard, tensor) = (file.to_string(), tensor.to_string());
                return Err(FileError::IndexTensor { index: index_path, shard, tensor });
            }
        }
        shards.index = Some(index);
        Ok(shards)
    }

    /// One file that is held in memory.
    pub(super) fn held(directory: &Path, bytes: Vec<u8>) -> Result<Self, FileError> {
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new(), index: None };
        shards.take(directory.join(SINGLE), SINGLE, Bytes::Held(bytes))?;
        Ok(shards)
    }

    fn add(&mut self, directory: &Path, file: &str) -> Result<(), FileError> {
        let path = directory.join(file);
        let bytes = Bytes::Mapped(Mapped::open(&path)?);
        self.take(path, file, bytes)
    }

    fn take(&mut self, path: PathBuf, file: &str, bytes: Bytes) -> Result<(), FileError> {
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|source| {
            let (path, len) = (path.clone(), bytes.len());
            match mistaken(&bytes) {
                Some(what) => FileError::Mistaken { path, what },
                None => FileError::Header { path, len, source },
            }
        })?;
        let data = LENGTH_BYTES + header;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let (shape, range) = (info.shape.clone(), data + start..data + end);
            let entry = Entry { shard: self.files.len(), dtype: info.dtype, shape, range };
            if let Some(twice) = self.tensors.insert(name.clone(), entry) {
                let first = self.files.get(twice.shard).map_or_else(|| path.clone(), |s| s.path.clone());
                return Err(FileError::TensorTwice { tensor: name, first, second: path });
            }
        }
        let metadata = metadata.metadata().clone();
        self.files.push(Shard { file: file.to_string(), path, bytes, metadata, header: data });
        Ok(())
    }

    /// The stored bytes of a tensor.
    pub(crate) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.shard].bytes[entry.range.clone()]
    }

    /// Gives back the memory of a tensor's bytes, should it be mapped, where that is worth it.
    pub(crate) fn forget(&self, entry: &Entry) {
        if let (Bytes::Mapped(bytes), LARGE..) = (&self.files[entry.shard].bytes, entry.range.len()) {
            bytes.forget(entry.range.clone());
        }
    }

    /// Gives back the memory of all that was read.
    pub(crate) fn forget_all(&self) {
        self.tensors.values().for_each(|entry| self.forget(entry));
    }
}

impl TensorIndex for Shards {
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| &entry.shape[..])
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.tensors.keys().map(String::as_str))
    }

    fn equal(&self, a: &str, b: &str) -> bool {
        let [a, b] = [a, b].map(|name| {
            let entry = self.tensors.get(name)?;
            Some((entry.dtype, &entry.shape, self.bytes(entry)))
        });
        a == b
    }
}

/// Pairs of tensor and file.
fn weight_map<'a>(path: &Path, index: &'a Map<String, Value>) -> Result<Vec<(&'a str, &'a str)>, FileError> {
    let wrong = |found: String| FileError::ConfigValue {
        path: path.to_path_buf(),
        key: "weight_map",
        expected: "an object of tensor names and file names".to_string(),
        found,
    };
    let map = match index.get("weight_map") {
        Some(Value::Object(map)) if !map.is_empty() => map,
        Some(_) => return Err(wrong("something else, or nothing in it".to_string())),
        None => return Err(wrong("nothing".to_string())),
    };
    let pair = |(tensor, file): (&'a String, &'a Value)| match file {
        Value::String(file) => Ok((tensor.as_str(), file.as_str())),
        other => Err(wrong(format!("{other} for {tensor}"))),
    };
    map.iter().map(pair).collect()
}

/// Endings of files that hold weights, or will: with what to do, the first that is found.
const WEIGHTS: &[(&[&str], &str)] = &[
    (
        &[".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download"],
        ": the download is incomplete, go on with it",
    ),
    (
        &[".safetensors"],
        ": one file of weights must be called model.safetensors, and several need their index; download it, or save the model again",
    ),
    (
        &[".bin", ".pth", ".pt", ".ckpt"],
        ": save the model as safetensors (save_pretrained of transformers does)",
    ),
    (&[".gguf"], ": take the model that it was made of, as safetensors"),
];

/// The error for a directory that has no weights under the right names: which there are under others, and what to do.
fn no_weights(directory: &Path) -> FileError {
    const SHOWN: usize = 8;
    let entries = directory.read_dir().into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    let ends = |name: &String, ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    names.retain(|name| WEIGHTS.iter().any(|(of, _)| ends(name, of)));
    names.sort();
    let kind = WEIGHTS.iter().find(|(of, _)| names.iter().any(|name| ends(name, of)));
    names.truncate(SHOWN);
    let found = if names.is_empty() { "no weights".to_string() } else { names.join(", ") };
    let hint = kind.map_or("; download the model again, whole", |(_, hint)| hint);
    FileError::NoWeights { path: directory.to_path_buf(), found, hint }
}
