use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

use ndarray::{Array2, ArrayView2};
use safetensors::tensor::{TensorView, View};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result, shown};
use crate::files::{FileError, WriteOptions, fingerprint, sha256, write_whole};
use crate::heads::{Heads, KeyEnergies, Moment};
use crate::model::ModelId;

/// Tensor that holds the number of tokens.
const TOKENS: &str = "tokens";
/// Metadata key of the source's fingerprint.
const FINGERPRINT: &str = "fingerprint";
/// Tensor that holds the moments' own fingerprint.
const CALIBRATION: &str = "calibration";
/// How the names of tensors that hold the energies of keys begin.
const KEYS: &str = "keys.";

/// The [moment](Moment) of every layer's attention input (after the input norm) and, where they were measured, too, the
/// [energies of its keys](KeyEnergies) window by window.
///
/// As a file: safetensors with an F64 tensor `layers.N` for each layer N and an I64 tensor `tokens` with the number of
/// tokens; F64 tensors `keys.N`, for all layers or none, hold the energies; a U8 tensor `calibration` may name what was read and the metadata key `fingerprint` the model
/// (docs/calibration.md). Equal moments are equal bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub(super) layers: Vec<Moment>,
    pub(super) keys: Option<Vec<KeyEnergies>>,
    pub(super) tokens: u64,
    pub(super) model: Option<String>,
    pub(super) digest: [u8; 32],
}

impl Moments {
    /// Reads a file, made here or elsewhere, for a model.
    ///
    /// # Errors
    /// [`FileError::Io`]; [`FileError::Header`]; [`FileError::NoMoments`] for a model's weights; [`FileError::TensorDtype`] for a tensor that is missing or of another type
    /// or shape; [`FileError::Moment`] for a layer that is no [`Moment`] or [`KeyEnergies`]; [`FileError::MomentsModel`] for another number of
    /// layers, width or fingerprint than the model's.
    pub fn read(path: &Path, model: &ModelId) -> Result<Self, FileError> {
        let bytes = fs::read(path).map_err(|e| FileError::io("read", path, e))?;
        Self::from_bytes(path, &bytes, model)
    }

    /// The moments in a file that was read already.
    pub(super) fn from_bytes(path: &Path, bytes: &[u8], id: &ModelId) -> Result<Self, FileError> {
        let file = File { path };
        let header = |source| FileError::Header { path: path.to_path_buf(), len: bytes.len(), source };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(header)?;
        let model = metadata.metadata().as_ref().and_then(|m| m.get(FINGERPRINT).cloned());
        if let (Some(found), Some(expected)) = (&model, &id.fingerprint) {
            file.same("fingerprint", expected, found)?;
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(header)?;
        let names = tensors.names();
        let own = |name: &&&str| name.starts_with("layers.") || [TOKENS, CALIBRATION].contains(*name);
        if let (None, Some(first)) = (names.iter().find(own), names.iter().min()) {
            return Err(FileError::NoMoments { path: path.to_path_buf(), tensor: shown(first) });
        }
        let n_layers = tensors.names().iter().filter(|name| name.starts_with("layers.")).count();
        file.same("number of layers", &id.layers.len(), &n_layers)?;
        let (tokens, own) = (file.tokens(&tensors)?, file.digest(&tensors)?);
        let layers =
            (0..n_layers).map(|i| file.layer(&tensors, i, id.hidden)).collect::<Result<Vec<_>, _>>()?;
        let has_keys = tensors.names().iter().any(|name| name.starts_with(KEYS));
        let heads = id.layers.iter().map(|layer| layer.kv_heads).enumerate().filter(|_| has_keys);
        let keys = heads.map(|(i, heads)| file.keys(&tensors, i, heads)).collect::<Result<Vec<_>, _>>()?;
        let contents = || {
            let parts = layers.iter().map(Stored::from).chain(keys.iter().map(Stored::from));
            sha256([tokens.to_le_bytes().to_vec()].into_iter().chain(parts.map(|part| part.bytes())))
        };
        let digest = own.unwrap_or_else(contents);
        Ok(Self { layers, keys: has_keys.then_some(keys), tokens, model, digest })
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`FileError::OutputExists`] unless `force`, [`FileError::Io`].
    pub fn write(&self, path: &Path, options: WriteOptions) -> Result<(), FileError> {
        let header = |source| FileError::Header { path: path.to_path_buf(), len: 0, source };
        let tokens = self.tokens.to_le_bytes();
        let tokens = TensorView::new(Dtype::I64, vec![], &tokens).map_err(header)?;
        let own = TensorView::new(Dtype::U8, vec![32], &self.digest).map_err(header)?;
        let layers = self.layers.iter().map(Stored::from).enumerate().map(|(i, part)| (name(i), part));
        let keys = self.keys.iter().flatten().map(Stored::from).enumerate();
        let layers = layers.chain(keys.map(|(i, part)| (keys_name(i), part)));
        let layers = layers.map(|(name, part)| (name, Tensor::Layer(part)));
        let tensors =
            [(TOKENS.to_string(), Tensor::Small(tokens)), (CALIBRATION.to_string(), Tensor::Small(own))];
        // One key at most: several would be written in any order.
        let metadata = self.model.clone().map(|f| HashMap::from([(FINGERPRINT.to_string(), f)]));
        let bytes = safetensors::serialize(tensors.into_iter().chain(layers), metadata).map_err(header)?;
        write_whole(path, &bytes, options)
    }

    /// Number of layers, L.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Tokens that the means were taken over.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// What plans call these moments, `sha256:` and 64 hex digits. Moments measured here are named by what they were
    /// measured on (`Windows::fingerprint`, `Texts::fingerprint`), so that a text and the moments written from it agree on every machine; others
    /// by their contents. It tells calibrations apart; it does not prove what a file holds.
    pub fn fingerprint(&self) -> String {
        fingerprint(self.digest)
    }

    /// The moments, one for each layer.
    pub fn layers(&self) -> &[Moment] {
        &self.layers
    }

    /// The energies of the keys of every layer, where they were measured: moments made by others, or by releases before there
    /// were any, have none.
    pub fn key_energies(&self) -> Option<&[KeyEnergies]> {
        self.keys.as_deref()
    }

    /// Gives the heads of a layer their moment and, where there are any, the energies of their keys.
    ///
    /// # Errors
    /// [`Error::NoLayer`] when there is none of it; [`Error::Shape`].
    pub fn attach(&self, heads: Heads) -> Result<Heads> {
        let missing = Error::NoLayer { layer: heads.layer(), layers: self.layers.len() };
        let moment = self.layers.get(heads.layer()).ok_or(missing)?.clone();
        let keys = self.keys.as_ref().and_then(|keys| keys.get(heads.layer())).cloned();
        let heads = heads.with_moment(moment)?;
        keys.map_or(Ok(heads.clone()), |keys| heads.with_key_energies(keys))
    }
}

/// A matrix as bytes, made when they are asked for.
struct Stored<'a> {
    shape: [usize; 2],
    numbers: Numbers<'a>,
}

enum Numbers<'a> {
    Moment(&'a Moment),
    Energies(&'a KeyEnergies),
}

impl Stored<'_> {
    fn bytes(&self) -> Vec<u8> {
        let bytes = |matrix: ArrayView2<'_, f64>| matrix.iter().flat_map(|v| v.to_le_bytes()).collect();
        match self.numbers {
            Numbers::Moment(moment) => bytes(moment.matrix().view()),
            Numbers::Energies(energies) => bytes(energies.energies()),
        }
    }
}

impl<'a> From<&'a Moment> for Stored<'a> {
    fn from(moment: &'a Moment) -> Self {
        Self { shape: [moment.size(); 2], numbers: Numbers::Moment(moment) }
    }
}

impl<'a> From<&'a KeyEnergies> for Stored<'a> {
    fn from(energies: &'a KeyEnergies) -> Self {
        let (windows, heads) = energies.energies().dim();
        Self { shape: [windows, heads], numbers: Numbers::Energies(energies) }
    }
}

/// A tensor to be written. Of the layers one is in memory as bytes at a time, beside the whole file.
enum Tensor<'a> {
    Small(TensorView<'a>),
    Layer(Stored<'a>),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Small(view) => view.dtype(),
            Self::Layer(_) => Dtype::F64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Small(view) => view.shape(),
            Self::Layer(stored) => &stored.shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Small(view) => view.data().into(),
            Self::Layer(stored) => stored.bytes().into(),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Small(view) => view.data().len(),
            Self::Layer(stored) => size_of::<f64>() * stored.shape.iter().product::<usize>(),
        }
    }
}

fn name(layer: usize) -> String {
    format!("layers.{layer}")
}

fn keys_name(layer: usize) -> String {
    format!("{KEYS}{layer}")
}

/// A file that moments are read from.
struct File<'a> {
    path: &'a Path,
}

impl File<'_> {
    fn same<T: PartialEq + ToString>(
        &self,
        what: &'static str,
        expected: &T,
        found: &T,
    ) -> Result<(), FileError> {
        if expected == found {
            return Ok(());
        }
        let (path, expected, found) = (self.path.to_path_buf(), expected.to_string(), found.to_string());
        Err(FileError::MomentsModel { path, what, expected, found })
    }

    fn broken(&self, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> FileError {
        let (path, tensor) = (self.path.to_path_buf(), tensor.to_string());
        FileError::TensorDtype { path, tensor, expected: expected.into(), found: found.into() }
    }

    /// The digest that the file names its moments by, where it does.
    fn digest(&self, tensors: &SafeTensors<'_>) -> Result<Option<[u8; 32]>, FileError> {
        let Ok(tensor) = tensors.tensor(CALIBRATION) else { return Ok(None) };
        let fits = tensor.dtype() == Dtype::U8 && tensor.shape() == [32];
        let bytes = tensor.data().try_into().ok().filter(|_| fits);
        bytes.map(Some).ok_or_else(|| self.broken(CALIBRATION, "U8 [32], or left out", found(&tensor)))
    }

    fn tokens(&self, tensors: &SafeTensors<'_>) -> Result<u64, FileError> {
        let broken = |found: String| self.broken(TOKENS, "one I64 above 0", found);
        let tensor = tensors.tensor(TOKENS).map_err(|_| broken("nothing".to_string()))?;
        let bytes: Option<[u8; 8]> = tensor.data().try_into().ok().filter(|_| tensor.dtype() == Dtype::I64);
        let Some(bytes) = bytes else { return Err(broken(found(&tensor))) };
        let tokens = i64::from_le_bytes(bytes);
        u64::try_from(tokens).ok().filter(|&n| n > 0).ok_or_else(|| broken(tokens.to_string()))
    }

    fn layer(&self, tensors: &SafeTensors<'_>, layer: usize, hidden: usize) -> Result<Moment, FileError> {
        let (tensor, size) = (name(layer), hidden + 1);
        let broken = |found| self.broken(&tensor, format!("F64 [{size}, {size}]"), found);
        let stored = tensors.tensor(&tensor).map_err(|_| broken("nothing".to_string()))?;
        if let (&[n, m], Dtype::F64) = (stored.shape(), stored.dtype()) {
            if n == m {
                self.same("width (with the constant)", &size, &n)?;
            }
        }
        if stored.dtype() != Dtype::F64 || stored.shape() != [size, size] {
            return Err(broken(found(&stored)));
        }
        Moment::new(numbers(&stored, (size, size))?).map_err(|error| match error {
            Error::Moment { rule, .. } => FileError::Moment { path: self.path.to_path_buf(), tensor, rule },
            error => error.into(),
        })
    }

    fn keys(&self, tensors: &SafeTensors<'_>, layer: usize, heads: usize) -> Result<KeyEnergies, FileError> {
        let tensor = keys_name(layer);
        let broken = |found| self.broken(&tensor, format!("F64 [windows, {heads}], or none at all"), found);
        let stored = tensors.tensor(&tensor).map_err(|_| broken("nothing".to_string()))?;
        let windows = match *stored.shape() {
            [windows, n] if windows > 0 && n == heads && stored.dtype() == Dtype::F64 => windows,
            _ => return Err(broken(found(&stored))),
        };
        KeyEnergies::new(numbers(&stored, (windows, heads))?).map_err(|error| match error {
            Error::KeyEnergies(rule) => FileError::Moment { path: self.path.to_path_buf(), tensor, rule },
            error => error.into(),
        })
    }
}

/// The numbers of an F64 tensor of that shape.
fn numbers(tensor: &TensorView<'_>, shape: (usize, usize)) -> Result<Array2<f64>, FileError> {
    let number = |b: &[u8]| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
    let numbers = tensor.data().chunks_exact(8).map(number).collect();
    Ok(Array2::from_shape_vec(shape, numbers).map_err(Error::plugin)?)
}

/// Type and shape of a tensor.
fn found(tensor: &TensorView<'_>) -> String {
    format!("{} {:?}", tensor.dtype(), tensor.shape())
}
