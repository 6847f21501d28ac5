use std::path::{Path, PathBuf};
use std::sync::Arc;

use ndarray::{ArrayD, IxDyn};
#[cfg(feature = "runtime")]
use rayon::prelude::*;

use super::layout::{bias_of, heads_of};
use super::lookup::{elsewhere, family_of, resembling};
use super::rows::{LayerRows, RowPart};
use super::shards::SINGLE;
use super::{CONFIG, Config, Dtype, Entry, Family, INDEX, Shards, TensorIndex};
use crate::error::{Error, Result, shown};
use crate::files::{FileError, fingerprint, is_there, read_bounded, sha256};
use crate::heads::{HeadRows, HeadSource, Heads, Projection};
use crate::model::{Architecture, AttentionSpec, ModelId, Part, Stored, StoredHeads};

const CONFIG_LIMIT: u64 = 16 << 20;
/// Bytes of a tensor that its fingerprint sees at the start, in the middle and at the end.
const SAMPLE: usize = 4096;

/// A model directory, mapped and checked; nothing is decoded before it is asked for. Clones share the mapped files.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    architecture: Architecture,
    dtype: Dtype,
    shards: Arc<Shards>,
}

impl Checkpoint {
    /// Opens a directory with config.json and model.safetensors, or shards and their index, by the first of these families
    /// that knows its `model_type`.
    ///
    /// The files must not be shortened or rewritten while the checkpoint is open.
    ///
    /// # Errors
    /// One [`FileError`] for each thing that can be wrong: the configuration, the index, a file's header or length, and the
    /// presence, shape and type of every attention tensor of every layer.
    pub fn open_as(path: impl AsRef<Path>, families: &[&dyn Family]) -> Result<Self, FileError> {
        let path = path.as_ref().to_path_buf();
        if !is_there(&path)? {
            return Err(FileError::NoDirectory { path });
        }
        if !path.is_dir() {
            return Err(FileError::NotADirectory { path });
        }
        let file = path.join(CONFIG);
        if !is_there(&file)? {
            return Err(FileError::NoConfig { hint: elsewhere(&path), path });
        }
        let text = read_bounded(&file, CONFIG_LIMIT)?;
        let config = Config::parse(file, &text)?;
        let family = family_of(&config, families);
        let shards = Shards::open(&path)?;
        let family = family.map_err(|error| resembling(error, &config, &shards, families))?;
        let ignored = shards.index.is_none() && path.join(INDEX).is_file();
        let mut opened = Self::described(path, config, family, shards)?;
        if ignored {
            opened.architecture.notes.push(format!("{SINGLE} is there and {INDEX}, too: the former is used"));
        }
        Ok(opened)
    }

    /// A model that is held in memory: the text of its config.json, and one file of safetensors.
    ///
    /// # Errors
    /// As [`Checkpoint::open_as`].
    pub fn from_bytes(config: &[u8], weights: Vec<u8>, families: &[&dyn Family]) -> Result<Self, FileError> {
        let path = PathBuf::from("memory");
        let config = Config::parse(path.join(CONFIG), config)?;
        let family = family_of(&config, families)?;
        let shards = Shards::held(&path, weights)?;
        Self::described(path, config, family, shards)
    }

    fn described(
        path: PathBuf,
        config: Config,
        family: &dyn Family,
        shards: Shards,
    ) -> Result<Self, FileError> {
        let architecture = family.describe(&config, &shards)?;
        let shards = Arc::new(shards);
        let mut checkpoint = Self { path, config, architecture, dtype: Dtype::F32, shards };
        let (stored, width) = (checkpoint.stored(0)?, checkpoint.architecture.hidden);
        checkpoint.dtype = checkpoint.checked(&stored.key.tensor, &stored.key.shape(width))?.1;
        // Ends at the first missing layer, however many config.json claims.
        (0..checkpoint.architecture.n_layers()).try_for_each(|layer| checkpoint.check_layer(layer))?;
        Ok(checkpoint)
    }

    fn check_layer(&self, layer: usize) -> Result<(), FileError> {
        let (stored, width) = (self.stored(layer)?, self.architecture.hidden);
        for part in Part::ALL {
            let of = stored.part(part);
            let (entry, dtype) = self.checked(&of.tensor, &of.shape(width))?;
            if matches!(part, Part::Key | Part::Value) && dtype != self.dtype {
                let expected = format!("{}, as the keys of layer 0", self.dtype.name().to_uppercase());
                return Err(self.wrong_dtype(&of.tensor, entry, expected));
            }
            if let Some(bias) = &of.bias {
                self.checked(bias, &[if part == Part::Output { width } else { of.extent }])?;
            }
        }
        Ok(())
    }

    /// Where the heads of a layer lie.
    pub(crate) fn stored(&self, layer: usize) -> Result<&StoredHeads, FileError> {
        let stored = self.attention(layer)?.stored.as_ref();
        stored.ok_or_else(|| {
            self.config.unsupported("a layer whose tensors are not named", "name them in its family")
        })
    }

    fn attention(&self, layer: usize) -> Result<&AttentionSpec, FileError> {
        let missing = Error::NoLayer { layer, layers: self.architecture.n_layers() };
        Ok(self.architecture.layers.get(layer).ok_or(missing)?)
    }

    /// A tensor of the shape that it must have and a type that can be read.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<(&Entry, Dtype), FileError> {
        let entry = self.shards.tensors.get(name).ok_or_else(|| self.missing(name, shape))?;
        if entry.shape != shape {
            return Err(FileError::TensorShape {
                path: self.file_of(entry).to_path_buf(),
                tensor: name.to_string(),
                expected: shape.to_vec(),
                found: entry.shape.clone(),
            });
        }
        Ok((entry, self.float(name, entry)?))
    }

    pub(crate) fn float(&self, name: &str, entry: &Entry) -> Result<Dtype, FileError> {
        Dtype::from_stored(entry.dtype).ok_or_else(|| {
            self.wrong_dtype(
                name,
                entry,
                "BF16, F16 or F32 (not quantised; convert the model to one of these)".to_string(),
            )
        })
    }

    fn wrong_dtype(&self, name: &str, entry: &Entry, expected: String) -> FileError {
        let (path, tensor) = (self.file_of(entry).to_path_buf(), name.to_string());
        FileError::TensorDtype { path, tensor, expected, found: entry.dtype.to_string() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Type of the key and value weights.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.shards.tensors.values().map(|e| e.range.len() as u64).sum()
    }

    /// Number of weight files.
    pub fn shards(&self) -> usize {
        self.shards.files.len()
    }

    /// Bytes of keys and values that one token takes in the cache, at the type of the weights.
    pub fn kv_bytes_per_token(&self) -> usize {
        self.architecture.kv_bytes_per_token(self.dtype.bytes())
    }

    /// Any BF16, F16 or F32 tensor, decoded.
    ///
    /// # Errors
    /// [`FileError::TensorMissing`], [`FileError::TensorDtype`], [`FileError::NotFinite`].
    pub fn tensor(&self, name: &str) -> Result<ArrayD<f32>, FileError> {
        let shape = IxDyn(&self.entry(name)?.0.shape);
        Ok(ArrayD::from_shape_vec(shape, self.numbers(name)?).map_err(Error::plugin)?)
    }

    /// Any BF16, F16 or F32 tensor of this shape, decoded.
    ///
    /// # Errors
    /// [`FileError::TensorShape`]; as [`Checkpoint::tensor`].
    pub fn tensor_of(&self, name: &str, shape: &[usize]) -> Result<ArrayD<f32>, FileError> {
        self.checked(name, shape)?;
        self.tensor(name)
    }

    /// How many numbers all tensors hold.
    #[cfg(feature = "runtime")]
    pub(crate) fn numbers_of_all(&self) -> u64 {
        self.shards.tensors.values().map(|entry| entry.shape.iter().map(|&n| n as u64).product::<u64>()).sum()
    }

    /// Whether there is a BF16, F16 or F32 tensor of this shape, without reading it.
    #[cfg(feature = "runtime")]
    pub(crate) fn check_tensor(&self, name: &str, shape: &[usize]) -> Result<(), FileError> {
        self.checked(name, shape).map(drop)
    }

    /// How a tensor is stored.
    #[cfg(feature = "runtime")]
    pub(crate) fn dtype_of(&self, name: &str) -> Result<Dtype, FileError> {
        Ok(self.entry(name)?.1)
    }

    /// Rows of a matrix, one after the other, decoded. Each must be there.
    #[cfg(feature = "runtime")]
    pub(crate) fn rows_of(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>, FileError> {
        let (entry, dtype) = self.entry(name)?;
        let width = entry.shape.last().copied().unwrap_or(1);
        let (bytes, size) = (self.shards.bytes(entry), width * dtype.bytes());
        let mut numbers = vec![0.0; rows.len() * width];
        rows.par_iter().zip(numbers.par_chunks_exact_mut(width)).for_each(|(&row, out)| {
            dtype.decode(&bytes[row as usize * size..][..size], out);
        });
        if numbers.par_iter().all(|v| v.is_finite()) {
            Ok(numbers)
        } else {
            Err(self.not_finite(name, entry))
        }
    }

    /// The stored bytes of the keys and values of a layer: key weights, value weights, key bias, value bias.
    ///
    /// # Errors
    /// [`Error::NoLayer`].
    pub fn stored_bytes(&self, layer: usize) -> Result<Vec<&[u8]>, FileError> {
        let (key, value) = (&self.stored(layer)?.key, &self.stored(layer)?.value);
        let names = [Some(&key.tensor), Some(&value.tensor), key.bias.as_ref(), value.bias.as_ref()];
        names.into_iter().flatten().map(|name| Ok(self.shards.bytes(self.entry(name)?.0))).collect()
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &dyn TensorIndex {
        self.shards.as_ref()
    }

    fn projection(
        &self,
        attention: &AttentionSpec,
        stored: &Stored,
        part: Part,
    ) -> Result<Projection, FileError> {
        let h = attention.head_dim;
        // All that the layer below has, of which some are read.
        let below = attention.below.as_deref().filter(|_| matches!(part, Part::Key | Part::Value));
        let n = below.map_or(attention.heads(part), |_| stored.extent / h);
        let weight = heads_of(self.numbers(&stored.tensor)?, stored, n, h)?;
        let bias =
            stored.bias.as_ref().map(|bias| Ok::<_, FileError>(bias_of(&self.numbers(bias)?, stored, n, h)));
        let projection = Projection::new(weight, bias.transpose()?)?;
        Ok(below.map_or(Ok(projection.clone()), |heads| projection.selected(heads))?)
    }

    fn read_heads(&self, layer: usize) -> Result<Heads, FileError> {
        let (attention, stored) = (self.attention(layer)?, self.stored(layer)?);
        let read = |part| self.projection(attention, stored.part(part), part);
        let heads = Heads::new(read(Part::Key)?, read(Part::Value)?)?;
        let mut heads = heads.with_rotation(attention.rotation())?.with_layer(layer);
        if let Some(norm) = &attention.norms[1] {
            heads = heads.with_key_norm(norm.over);
        }
        let (n, h, of) = (attention.query_heads, attention.head_dim, &stored.output);
        // (n_q, h, d) → (n_q, d, h).
        let output = heads_of(self.numbers(&of.tensor)?, of, n, h)?.permuted_axes([0, 2, 1]);
        let heads = heads.with_queries(read(Part::Query)?, output.as_standard_layout().into_owned())?;
        match &of.bias {
            Some(bias) => Ok(heads.with_output_bias(self.numbers(bias)?.into())?),
            None => Ok(heads),
        }
    }

    fn read_rows(&self, layer: usize) -> Result<LayerRows<'_>, FileError> {
        let (attention, stored) = (self.attention(layer)?, self.stored(layer)?);
        let both = [&stored.key, &stored.value];
        let weights = both.map(|stored| (stored, Some(&stored.tensor), self.architecture.hidden));
        let biases = both.map(|stored| (stored, stored.bias.as_ref(), 1));
        let mut parts = Vec::with_capacity(4);
        for (stored, tensor, width) in weights.into_iter().chain(biases) {
            let Some(tensor) = tensor else { continue };
            let (entry, dtype) = self.entry(tensor)?;
            let (bytes, file) = (self.shards.bytes(entry), self.file_of(entry));
            parts.push(RowPart { stored, tensor, file, bytes, dtype, width });
        }
        Ok(LayerRows { n_heads: attention.kv_heads, head_dim: attention.head_dim, parts })
    }

    /// All numbers of a tensor, which must be finite.
    fn numbers(&self, name: &str) -> Result<Vec<f32>, FileError> {
        let (entry, dtype) = self.entry(name)?;
        let mut numbers = vec![0.0; entry.range.len() / dtype.bytes()];
        dtype.decode(self.shards.bytes(entry), &mut numbers);
        self.shards.forget(entry);
        if numbers.iter().all(|v| v.is_finite()) { Ok(numbers) } else { Err(self.not_finite(name, entry)) }
    }

    fn not_finite(&self, name: &str, entry: &Entry) -> FileError {
        FileError::NotFinite { path: self.file_of(entry).to_path_buf(), tensor: name.to_string() }
    }

    fn entry(&self, name: &str) -> Result<(&Entry, Dtype), FileError> {
        match self.shards.tensors.get(name) {
            Some(entry) => Ok((entry, self.float(name, entry)?)),
            None => Err(self.missing(name, &[])),
        }
    }

    /// The error for a tensor that is in none of the files: which, how it should be, and what is there in its place.
    pub(crate) fn missing(&self, name: &str, shape: &[usize]) -> FileError {
        let path = match &self.shards.files[..] {
            [one] => one.path.clone(),
            _ => self.path.clone(),
        };
        let (tensor, expected) = (name.to_string(), shape.to_vec());
        let within =
            |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'));
        let near = self.shards.names().find(|found| within(found, name) || within(name, found));
        let forward = self.architecture.forward.as_ref().ok();
        let hint = match near {
            Some(near) => format!(
                "; {} is there instead: rename the tensors (tools put `module.` and the like before names, or leave `model.` out)",
                shown(near)
            ),
            None if forward.is_some_and(|forward| forward.head.as_deref() == Some(name) && forward.embedding != name) => {
                "; download the model again, or set `tie_word_embeddings` to true in config.json if its output embedding is that of the inputs"
                    .to_string()
            }
            None => "; download the model again, or correct config.json if it describes another".to_string(),
        };
        FileError::TensorMissing { path, tensor, expected, hint }
    }

    fn file_of(&self, entry: &Entry) -> &Path {
        &self.shards.files[entry.shard].path
    }

    pub(crate) fn files(&self) -> &Shards {
        &self.shards
    }
}

impl HeadSource for Checkpoint {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Reads 12 KiB of each key and value weight for the fingerprint: the SHA-256 of name, shape, type and the first, middle
    /// and last 4 KiB of every key and value weight, in the order of layers. It misses changes elsewhere in these tensors,
    /// and in all others.
    fn id(&self) -> Result<ModelId> {
        let mut fields: Vec<Vec<u8>> = Vec::new();
        for layer in 0..self.architecture.n_layers() {
            let stored = self.stored(layer)?;
            for name in [&stored.key.tensor, &stored.value.tensor] {
                let (entry, _) = self.entry(name)?;
                let bytes = self.shards.bytes(entry);
                let sample = SAMPLE.min(bytes.len());
                let samples = [0, (bytes.len() - sample) / 2, bytes.len() - sample];
                fields.push(name.clone().into_bytes());
                fields.push(format!("{} {:?}", entry.dtype, entry.shape).into_bytes());
                fields.extend(samples.map(|start| bytes[start..start + sample].to_vec()));
            }
        }
        Ok(ModelId::new(&self.architecture, self.dtype.name(), Some(fingerprint(sha256(fields)))))
    }

    fn heads(&self, layer: usize) -> Result<Heads> {
        Ok(self.read_heads(layer)?)
    }

    fn rows(&self, layer: usize) -> Result<Box<dyn HeadRows + '_>> {
        // Those of the layer below lie in no row of its own.
        match self.attention(layer)?.below {
            Some(_) => Ok(Box::new(self.read_heads(layer)?)),
            None => Ok(Box::new(self.read_rows(layer)?)),
        }
    }
}
