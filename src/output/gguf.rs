//! One [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) file, the form of llama.cpp: tensors and what describes them.

use std::fs::File;
use std::io;
use std::path::Path;

use gguf_rs_lib::error::GGUFError;
use gguf_rs_lib::format::metadata::{Metadata as Entries, MetadataArray, MetadataValue as Entry};
use gguf_rs_lib::format::{GGUFHeader, GGUFTensorType, GGUFValueType};
use gguf_rs_lib::tensor::{TensorData, TensorInfo, TensorShape};
use gguf_rs_lib::writer::GGUFFileWriter;
use safetensors::{Dtype, View};

use super::views::Tensor;
use crate::files::FileError;

/// What an entry of a GGUF file's description says.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Metadata {
    /// A number that counts.
    Count(u32),
    /// A number.
    Number(f32),
    /// Yes or no.
    Flag(bool),
    /// A text.
    Text(String),
    /// Numbers that count, or stand for kinds.
    Counts(Vec<i32>),
    /// Numbers.
    Numbers(Vec<f32>),
    /// Texts.
    Texts(Vec<String>),
}

impl Metadata {
    fn entry(&self) -> Result<Entry, GGUFError> {
        let array = |kind, values| Ok(Entry::Array(Box::new(MetadataArray::new(kind, values)?)));
        match self {
            Self::Count(count) => Ok(Entry::U32(*count)),
            Self::Number(number) => Ok(Entry::F32(*number)),
            Self::Flag(flag) => Ok(Entry::Bool(*flag)),
            Self::Text(text) => Ok(Entry::String(text.clone())),
            Self::Counts(counts) => {
                array(GGUFValueType::I32, counts.iter().map(|&n| Entry::I32(n)).collect())
            }
            Self::Numbers(all) => array(GGUFValueType::F32, all.iter().map(|&x| Entry::F32(x)).collect()),
            Self::Texts(texts) => {
                array(GGUFValueType::String, texts.iter().map(|t| Entry::String(t.clone())).collect())
            }
        }
    }
}

/// A file to be written.
pub(super) struct Gguf<'a> {
    /// Its name.
    pub(super) file: &'a str,
    entries: Entries,
    infos: Vec<TensorInfo>,
    tensors: Vec<Tensor<'a>>,
}

/// Where tensors begin: at multiples of so many bytes.
const ALIGNMENT: u64 = 32;

impl<'a> Gguf<'a> {
    pub(super) fn new(
        file: &'a str,
        matrices: Option<crate::checkpoint::Dtype>,
        metadata: &[(String, Metadata)],
        mut tensors: Vec<Tensor<'a>>,
    ) -> Result<Self, FileError> {
        let failed = |error: GGUFError| FileError::io("write", Path::new(file), io::Error::other(error));
        let mut entries = Entries::new();
        for (key, value) in metadata {
            entries.insert(key.clone(), value.entry().map_err(failed)?);
        }
        let (mut infos, mut offset) = (Vec::with_capacity(tensors.len()), 0);
        for tensor in &mut tensors {
            // Runtimes add and multiply by vectors of f32 only.
            if tensor.shape.len() == 1 {
                tensor.store_as(crate::checkpoint::Dtype::F32);
            } else if let Some(dtype) = matrices {
                tensor.store_as(dtype);
            }
            let kind = match tensor.dtype {
                Dtype::F16 => GGUFTensorType::F16,
                Dtype::BF16 => GGUFTensorType::BF16,
                Dtype::F32 => GGUFTensorType::F32,
                other => {
                    let found = format!("{} is stored as {other}, expected F16, BF16 or F32", tensor.name);
                    return Err(FileError::io("write", Path::new(file), io::Error::other(found)));
                }
            };
            // The dimension of neighbours comes first.
            let shape = tensor.shape.iter().rev().map(|&n| n as u64).collect();
            let shape = TensorShape::new(shape).map_err(failed)?;
            infos.push(TensorInfo::new(tensor.name.to_string(), shape, kind, offset));
            offset += (tensor.data_len() as u64).next_multiple_of(ALIGNMENT);
        }
        Ok(Self { file, entries, infos, tensors })
    }

    /// Bytes of the file, up to those between its parts.
    pub(super) fn bytes(&self) -> u64 {
        let names = self.infos.iter().map(|info| info.name().len() + 64).sum::<usize>();
        let data = self.tensors.iter().map(|tensor| (tensor.data_len() as u64).next_multiple_of(ALIGNMENT));
        data.sum::<u64>() + (self.entries.serialized_size() + names) as u64
    }

    /// Writes it; one tensor at a time is in memory.
    pub(super) fn write(self, path: &Path) -> io::Result<()> {
        let failed = |error| match error {
            GGUFError::Io(error) => error,
            other => io::Error::other(other),
        };
        let mut writer = GGUFFileWriter::new(File::create_new(path)?);
        let header = GGUFHeader::new(self.infos.len() as u64, self.entries.len() as u64);
        writer.write_header(&header).map_err(failed)?;
        writer.write_metadata(&self.entries).map_err(failed)?;
        writer.write_tensor_infos(&self.infos).map_err(failed)?;
        writer.align_for_tensor_data().map_err(failed)?;
        for (info, tensor) in self.infos.iter().zip(&self.tensors) {
            let data = TensorData::Owned(tensor.data().into_owned());
            writer.write_tensor_data(info, &data).map_err(failed)?;
        }
        writer.finalize().map_err(failed).map(drop)
    }
}
