use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, ArrayD, IxDyn};

use super::families::{Family, Part};
use super::rows::{LayerRows, RowPart};
use super::shards::{Entry, Shards, read_bounded};
use super::{Config, Dtype, FileError, fingerprint};
use crate::{Heads, Projection, Rotation, Source};

pub(super) const CONFIG: &str = "config.json";
const CONFIG_LIMIT: u64 = 16 << 20;

/// A model directory, mapped and checked; nothing is decoded before it is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    family: &'static Family,
    dtype: Dtype,
    /// Whether query, key, value and output have biases, in every layer alike.
    biases: [bool; 4],
    shards: Shards,
}

impl Checkpoint {
    /// Opens a directory with config.json and model.safetensors, or shards and their index.
    ///
    /// The files must not be shortened or rewritten while the checkpoint is open.
    ///
    /// # Errors
    /// One [`FileError`] for each thing that can be wrong: the configuration, the index, a file's header
    /// or length, and the presence, shape and type of every attention tensor of every layer.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FileError> {
        let path = path.as_ref().to_path_buf();
        if !path.is_dir() {
            return Err(FileError::NotADirectory { path });
        }
        let config_path = path.join(CONFIG);
        let (config, family) = Config::parse(&config_path, &read_bounded(&config_path, CONFIG_LIMIT)?)?;
        let shards = Shards::open(&path)?;
        let normalised = |name: &&String| name.contains(".q_norm.") || name.contains(".k_norm.");
        if let Some(name) = shards.tensors.keys().find(normalised) {
            let what = format!("normalised queries or keys (tensor {name})");
            let hint = "merging keys is not exact under their norm".to_string();
            return Err(FileError::Unsupported { path, what, hint });
        }
        let mut checkpoint = Self { path, config, family, dtype: Dtype::F32, biases: [false; 4], shards };
        checkpoint.biases =
            Part::ALL.map(|part| checkpoint.shards.tensors.contains_key(&family.bias(0, part)));
        checkpoint.dtype =
            checkpoint.attention(&family.weight(0, Part::Key), &checkpoint.shape(Part::Key))?.1;
        // Ends at the first missing layer, however many config.json claims.
        (0..checkpoint.config.n_layers).try_for_each(|layer| checkpoint.check_layer(layer))?;
        Ok(checkpoint)
    }

    fn check_layer(&self, layer: usize) -> Result<(), FileError> {
        for part in Part::ALL {
            let shape = self.shape(part);
            let weight = self.family.weight(layer, part);
            let (entry, dtype) = self.attention(&weight, &shape)?;
            if matches!(part, Part::Key | Part::Value) && dtype != self.dtype {
                let expected = format!("{}, as the keys of layer 0", self.dtype.name().to_uppercase());
                return Err(self.wrong_dtype(&weight, entry, expected));
            }
            let bias = self.family.bias(layer, part);
            if self.shards.tensors.contains_key(&bias) != self.has(part) {
                return Err(FileError::UnevenBias { path: self.path.clone(), tensor: bias });
            }
            if self.has(part) {
                self.attention(&bias, &shape[..1])?;
            }
        }
        Ok(())
    }

    /// An attention tensor, of the shape that it must have and a type that can be read.
    fn attention(&self, name: &str, shape: &[usize]) -> Result<(&Entry, Dtype), FileError> {
        let Some(entry) = self.shards.tensors.get(name) else {
            let (path, tensor) = (self.path.clone(), name.to_string());
            return Err(FileError::TensorMissing { path, tensor, expected: shape.to_vec() });
        };
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

    pub(super) fn float(&self, name: &str, entry: &Entry) -> Result<Dtype, FileError> {
        Dtype::from_stored(entry.dtype)
            .ok_or_else(|| self.wrong_dtype(name, entry, "BF16, F16 or F32 (not quantised)".to_string()))
    }

    fn wrong_dtype(&self, name: &str, entry: &Entry, expected: String) -> FileError {
        let (path, tensor) = (self.file_of(entry).to_path_buf(), name.to_string());
        FileError::TensorDtype { path, tensor, expected, found: entry.dtype.to_string() }
    }

    /// Shape of a projection's weight; of its bias, the first dimension.
    fn shape(&self, part: Part) -> [usize; 2] {
        let Config { query_heads, kv_heads, head_dim, hidden, .. } = self.config;
        match part {
            Part::Query => [query_heads * head_dim, hidden],
            Part::Key | Part::Value => [kv_heads * head_dim, hidden],
            Part::Output => [hidden, query_heads * head_dim],
        }
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

    /// Whether queries, keys or values have biases.
    pub fn has_bias(&self) -> bool {
        [Part::Query, Part::Key, Part::Value].iter().any(|&part| self.has(part))
    }

    /// The model as plans name it. Reads 12 KiB of each key and value weight for the fingerprint.
    ///
    /// The fingerprint is the SHA-256 of name, shape, type and the first, middle and last 4 KiB of every key and
    /// value weight, in the order of layers. It misses changes elsewhere in these tensors, and in all others.
    ///
    /// # Errors
    /// None at present.
    pub fn source(&self) -> Result<Source, FileError> {
        let Config { model_type, n_layers, hidden, query_heads, kv_heads, head_dim, .. } = &self.config;
        let names = (0..*n_layers).flat_map(|i| [Part::Key, Part::Value].map(|p| self.family.weight(i, p)));
        let tensors = names.filter_map(|name| {
            let entry = self.shards.tensors.get(&name)?;
            Some((name, &entry.shape[..], entry.dtype, self.shards.bytes(entry)))
        });
        Ok(Source {
            model_type: model_type.clone(),
            layers: *n_layers,
            query_heads: *query_heads,
            kv_heads: *kv_heads,
            head_dim: *head_dim,
            hidden: *hidden,
            dtype: self.dtype.name().to_string(),
            fingerprint: Some(fingerprint::of(tensors)),
        })
    }

    /// The heads of layer `i`, queries and output included, with their rotation.
    ///
    /// # Errors
    /// [`FileError::LayerOutOfRange`], [`FileError::NotFinite`] naming file and tensor.
    pub fn layer(&self, i: usize) -> Result<Heads, FileError> {
        let heads = self.key_value(i)?;
        let query = self.projection(i, Part::Query)?;
        let Config { hidden, query_heads, head_dim, .. } = self.config;
        let output = self.numbers(&self.family.weight(i, Part::Output))?;
        // Stored (d, H·r·h): the columns of one query head after the other.
        let output = Array3::from_shape_vec((hidden, query_heads, head_dim), output)
            .map_err(crate::Error::plugin)?
            .permuted_axes([1, 0, 2]);
        let heads = heads.with_queries(query, output.as_standard_layout().into_owned())?;
        if !self.has(Part::Output) {
            return Ok(heads);
        }
        Ok(heads.with_output_bias(self.numbers(&self.family.bias(i, Part::Output))?.into())?)
    }

    /// The keys and values of layer `i` alone, with their rotation.
    ///
    /// # Errors
    /// As [`Checkpoint::layer`].
    pub fn key_value(&self, i: usize) -> Result<Heads, FileError> {
        self.check_index(i)?;
        let heads = Heads::new(self.projection(i, Part::Key)?, self.projection(i, Part::Value)?)?;
        Ok(heads.with_rotation(Rotation::HalfSplit { dims: self.config.head_dim })?)
    }

    /// The keys and values of layer `i` as rows, decoded from the files piece by piece.
    ///
    /// # Errors
    /// [`FileError::LayerOutOfRange`].
    pub fn rows(&self, i: usize) -> Result<LayerRows<'_>, FileError> {
        self.check_index(i)?;
        let weights = [Part::Key, Part::Value].map(|part| self.family.weight(i, part));
        let biases = [Part::Key, Part::Value].map(|part| self.has(part).then(|| self.family.bias(i, part)));
        let mut parts = Vec::with_capacity(4);
        for name in weights.into_iter().chain(biases.into_iter().flatten()) {
            let (entry, dtype) = self.entry(&name)?;
            let (bytes, file) = (self.shards.bytes(entry), self.file_of(entry));
            parts.push(RowPart { tensor: name, file, bytes, dtype });
        }
        Ok(LayerRows::new(self.config.kv_heads, parts))
    }

    /// Any BF16, F16 or F32 tensor, decoded.
    ///
    /// # Errors
    /// [`FileError::TensorMissing`], [`FileError::TensorDtype`], [`FileError::NotFinite`].
    pub fn tensor(&self, name: &str) -> Result<ArrayD<f32>, FileError> {
        let shape = IxDyn(&self.entry(name)?.0.shape);
        Ok(ArrayD::from_shape_vec(shape, self.numbers(name)?).map_err(crate::Error::plugin)?)
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.shards.tensors.keys().map(String::as_str)
    }

    fn projection(&self, layer: usize, part: Part) -> Result<Projection, FileError> {
        let (h, d) = (self.config.head_dim, self.config.hidden);
        let weight = self.numbers(&self.family.weight(layer, part))?;
        let n = weight.len() / (h * d);
        let weight = Array3::from_shape_vec((n, h, d), weight).map_err(crate::Error::plugin)?;
        let bias = self.has(part).then(|| self.numbers(&self.family.bias(layer, part))).transpose()?;
        let bias =
            bias.map(|b| Array2::from_shape_vec((n, h), b)).transpose().map_err(crate::Error::plugin)?;
        Ok(Projection::new(weight, bias)?)
    }

    /// All numbers of a tensor, which must be finite.
    fn numbers(&self, name: &str) -> Result<Vec<f32>, FileError> {
        let (entry, dtype) = self.entry(name)?;
        let mut numbers = vec![0.0; entry.range.len() / dtype.bytes()];
        dtype.decode(self.shards.bytes(entry), &mut numbers);
        if !numbers.iter().all(|v| v.is_finite()) {
            let (path, tensor) = (self.file_of(entry).to_path_buf(), name.to_string());
            return Err(FileError::NotFinite { path, tensor });
        }
        Ok(numbers)
    }

    fn entry(&self, name: &str) -> Result<(&Entry, Dtype), FileError> {
        match self.shards.tensors.get(name) {
            Some(entry) => Ok((entry, self.float(name, entry)?)),
            None => {
                let (path, tensor) = (self.path.clone(), name.to_string());
                Err(FileError::TensorMissing { path, tensor, expected: Vec::new() })
            }
        }
    }

    fn check_index(&self, layer: usize) -> Result<(), FileError> {
        let layers = self.config.n_layers;
        if layer < layers {
            return Ok(());
        }
        Err(FileError::LayerOutOfRange { path: self.path.clone(), layer, layers })
    }

    fn has(&self, part: Part) -> bool {
        self.biases[part as usize]
    }

    fn file_of(&self, entry: &Entry) -> &Path {
        &self.shards.files[entry.shard].path
    }

    pub(super) fn files(&self) -> &Shards {
        &self.shards
    }

    /// The attention tensors of a layer: name, projection, whether a bias.
    pub(super) fn head_tensors(&self, layer: usize) -> impl Iterator<Item = (String, Part, bool)> {
        Part::ALL.into_iter().flat_map(move |part| {
            let bias = self.has(part).then(|| (self.family.bias(layer, part), part, true));
            [Some((self.family.weight(layer, part), part, false)), bias].into_iter().flatten()
        })
    }
}
