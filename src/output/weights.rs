//! The files of weights of an output, and how each kind is written.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::{SafeTensorError, View};
use serde_json::{Map, Value, json};

use super::copy::same_permissions;
use super::gguf::Gguf;
use super::views::{Job, Tensor};
use super::{Container, OutputModel};
use crate::checkpoint::Checkpoint;
use crate::files::{FileError, sync_file};

/// The tensors of one file, by name.
type Outputs<'a> = Vec<(&'a str, Tensor<'a>)>;

/// Tensors by the file that they are written to.
pub(super) enum Weights<'a> {
    /// The files of the source, with its names.
    Shards(Vec<Outputs<'a>>),
    Gguf(Gguf<'a>),
}

impl<'a> Weights<'a> {
    /// Of tensors with the number of the source's file that each belongs to.
    pub(super) fn new(
        source: &Checkpoint,
        output: &'a OutputModel,
        tensors: Vec<(usize, Tensor<'a>)>,
    ) -> Result<Self, FileError> {
        match &output.container {
            Container::Directory => {
                let mut shards: Vec<Outputs<'a>> = source.files().files.iter().map(|_| Vec::new()).collect();
                tensors.into_iter().for_each(|(shard, tensor)| shards[shard].push((tensor.name, tensor)));
                Ok(Self::Shards(shards))
            }
            Container::Gguf { file, matrices, metadata } => {
                let tensors = tensors.into_iter().map(|(_, tensor)| tensor).collect();
                Ok(Self::Gguf(Gguf::new(file, *matrices, metadata, tensors)?))
            }
        }
    }

    /// The files, by their place in the output.
    pub(super) fn files(&self, source: &Checkpoint) -> impl Iterator<Item = PathBuf> + use<> {
        let files: Vec<_> = match self {
            Self::Shards(_) => source.files().files.iter().map(|shard| shard.file.clone().into()).collect(),
            Self::Gguf(gguf) => vec![gguf.file.into()],
        };
        files.into_iter()
    }

    /// Their bytes; of headers that are not made yet those of the source's.
    pub(super) fn bytes(&self, source: &Checkpoint) -> u64 {
        match self {
            Self::Shards(shards) => {
                let data = shards.iter().flatten().map(|(_, tensor)| tensor.data_len() as u64);
                data.chain(source.files().files.iter().map(|shard| shard.header as u64)).sum()
            }
            Self::Gguf(gguf) => gguf.bytes(),
        }
    }

    /// Writes them all.
    pub(super) fn write(self, source: &Checkpoint, job: &Job<'_>, directory: &Path) -> Result<(), FileError> {
        let files = self.files(source);
        match self {
            Self::Shards(shards) => {
                for (shard, tensors) in source.files().files.iter().zip(shards) {
                    let path = directory.join(&shard.file);
                    let written = safetensors::serialize_to_file(tensors, shard.metadata.clone(), &path);
                    job.outcome()?;
                    written.map_err(|e| match e {
                        SafeTensorError::IoError(e) => FileError::io("write", &path, e),
                        other => FileError::io("write", &path, io::Error::other(other)),
                    })?;
                }
            }
            Self::Gguf(gguf) => {
                let path = directory.join(gguf.file);
                let written = gguf.write(&path);
                job.outcome()?;
                written.map_err(|e| FileError::io("write", &path, e))?;
            }
        }
        for (file, like) in files.zip(&source.files().files) {
            let path = directory.join(file);
            sync_file(&path).map_err(|e| FileError::io("write", &path, e))?;
            same_permissions(&like.path, &path)?;
        }
        Ok(())
    }

    /// The index of the source with the sizes and the tensors of the output, which stay in their files.
    pub(super) fn index(&self, source: &Checkpoint) -> Option<Map<String, Value>> {
        let Self::Shards(shards) = self else { return None };
        let mut index = source.files().index.clone()?;
        let tensors = || shards.iter().flatten().map(|(_, tensor)| tensor);
        let metadata = index.entry("metadata").or_insert_with(|| json!({}));
        if let Value::Object(metadata) = metadata {
            let bytes: u64 = tensors().map(|t| t.data_len() as u64).sum();
            metadata.insert("total_size".to_string(), bytes.into());
            if let Some(before) = metadata.get("total_parameters").and_then(Value::as_u64) {
                let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
                let old: u64 = source.files().tensors.values().map(|entry| count(&entry.shape)).sum();
                let new: u64 = tensors().map(|tensor| count(&tensor.shape)).sum();
                let total = (before + new).saturating_sub(old);
                metadata.insert("total_parameters".to_string(), total.into());
            }
        }
        if let Some(Value::Object(map)) = index.get_mut("weight_map") {
            let files = shards.iter().zip(&source.files().files);
            let new: BTreeMap<&str, &str> = files
                .flat_map(|(tensors, shard)| tensors.iter().map(|(name, _)| (*name, &*shard.file)))
                .collect();
            map.retain(|name, _| new.contains_key(name.as_str()));
            map.extend(new.into_iter().map(|(name, file)| (name.to_string(), file.into())));
        }
        Some(index)
    }
}
