use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::{Model, RuntimeError, Windows};
use crate::checkpoint::{WriteOptions, write_whole};
use crate::heads::Heads;
use crate::model::Source;

/// Tensor that holds the number of tokens.
const TOKENS: &str = "tokens";
/// Metadata key of the source's fingerprint.
const FINGERPRINT: &str = "fingerprint";
/// Tensor that holds the moments' own fingerprint.
const CALIBRATION: &str = "calibration";
/// Why a moment without inputs is none.
const UNSEEN: &str = "is 0 for every input, so nothing was measured";
/// How far a stored moment may be from symmetric, as a share of √(C_ii C_jj).
const ASYMMETRY: f64 = 1e-6;

/// The second moment `E[x xᵀ]` of every layer's attention input x (after the input norm) with a constant 1
/// appended, (d+1, d+1) each.
///
/// As a file: safetensors with an F64 tensor `layers.N` for each layer N and an I64 tensor `tokens` with the number of
/// tokens; a U8 tensor `calibration` may name what was read and the metadata key `fingerprint` the model
/// (docs/calibration.md). The same moments are the same bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    layers: Vec<Arc<Array2<f64>>>,
    tokens: u64,
    model: Option<String>,
    digest: [u8; 32],
}

impl Moments {
    /// Measures them on a text, window by window; products and sums in f64. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// As [`evaluate`](super::evaluate()).
    pub fn measure(model: &Model, windows: &Windows, run: crate::Run<'_>) -> Result<Self, RuntimeError> {
        let total = windows.count() as u64;
        let mut sums: Vec<Option<Tensor>> = vec![None; model.n_layers()];
        for (done, tokens) in windows.batches(1).enumerate() {
            run.step("calibrate", done as u64, total)?;
            model.attention_inputs(tokens, |i, x| {
                let x = x.to_dtype(DType::F64)?;
                let ones = Tensor::ones((x.dim(0)?, 1), DType::F64, x.device())?;
                let x = Tensor::cat(&[&x, &ones], 1)?;
                let product = x.t()?.matmul(&x)?;
                let sum = match sums[i].take() {
                    Some(sum) => (sum + product)?,
                    None => product,
                };
                sums[i] = Some(sum);
                Ok(())
            })?;
        }
        run.step("calibrate", total, total)?;
        let (tokens, size) = (windows.tokens().len(), model.source().hidden + 1);
        let layers = sums.into_iter().flatten().enumerate().map(|(i, sum)| {
            let sum: Vec<f64> = sum.flatten_all()?.to_vec1()?;
            let sum = Array2::from_shape_vec((size, size), sum).map_err(crate::Error::plugin)?;
            if !sum.iter().all(|v| v.is_finite()) {
                return Err(RuntimeError::NotFinite { what: format!("the attention input of layer {i}") });
            }
            Ok(Arc::new(symmetric(&sum) / tokens as f64))
        });
        let layers = layers.collect::<Result<_, RuntimeError>>()?;
        let (model, digest) = (model.source().fingerprint.clone(), digest_of(model.source(), windows));
        Ok(Self { layers, tokens: tokens as u64, model, digest })
    }

    /// Reads a file, made here or elsewhere, for the model `source`.
    ///
    /// # Errors
    /// [`RuntimeError::Io`]; [`RuntimeError::MomentsHeader`]; [`RuntimeError::MomentsTensor`] for a tensor that is
    /// missing or of another type or shape; [`RuntimeError::MomentsValue`] for NaN, infinities, asymmetry, a negative
    /// diagonal, a last entry other than 1 or nothing but 0 for the inputs; [`RuntimeError::MomentsModel`] for another
    /// number of layers, width or fingerprint.
    pub fn read(path: &Path, source: &Source) -> Result<Self, RuntimeError> {
        let bytes = fs::read(path).map_err(|e| RuntimeError::io("read", path, e))?;
        Self::from_bytes(path, &bytes, source)
    }

    /// The same for a file that was read already.
    pub(super) fn from_bytes(path: &Path, bytes: &[u8], source: &Source) -> Result<Self, RuntimeError> {
        let header = |source| RuntimeError::MomentsHeader { path: path.to_path_buf(), source };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(header)?;
        let model = metadata.metadata().as_ref().and_then(|m| m.get(FINGERPRINT).cloned());
        if let (Some(found), Some(expected)) = (&model, &source.fingerprint) {
            same("fingerprint", expected, found)?;
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(header)?;
        let n_layers = tensors.names().iter().filter(|name| name.starts_with("layers.")).count();
        same("number of layers", &source.layers, &n_layers)?;
        let (tokens, own) = (tokens_of(path, &tensors)?, own_digest(path, &tensors)?);
        let layers = (0..n_layers).map(|i| read_layer(path, &tensors, i, source.hidden).map(Arc::new));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let contents =
            || sha256([tokens.to_le_bytes().to_vec()].into_iter().chain(layers.iter().map(encoded)));
        let digest = own.unwrap_or_else(contents);
        Ok(Self { layers, tokens, model, digest })
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`FileError::OutputExists`](crate::checkpoint::FileError::OutputExists) unless `force`,
    /// [`FileError::Io`](crate::checkpoint::FileError::Io).
    pub fn write(&self, path: &Path, options: WriteOptions) -> Result<(), RuntimeError> {
        let data: Vec<_> = self.layers.iter().map(encoded).collect();
        let tokens = self.tokens.to_le_bytes();
        let view = |dtype, shape, bytes| TensorView::new(dtype, shape, bytes);
        let header = |source| RuntimeError::MomentsHeader { path: path.to_path_buf(), source };
        let mut tensors = vec![
            (TOKENS.to_string(), view(Dtype::I64, vec![], &tokens).map_err(header)?),
            (CALIBRATION.to_string(), view(Dtype::U8, vec![32], &self.digest).map_err(header)?),
        ];
        for (i, (bytes, moment)) in data.iter().zip(&self.layers).enumerate() {
            let tensor = view(Dtype::F64, moment.shape().to_vec(), bytes).map_err(header)?;
            tensors.push((name(i), tensor));
        }
        // One key at most: several would be written in any order.
        let metadata = self.model.clone().map(|f| HashMap::from([(FINGERPRINT.to_string(), f)]));
        let bytes = safetensors::serialize(tensors, metadata).map_err(header)?;
        Ok(write_whole(path, &bytes, options)?)
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
    /// measured on ([`Moments::fingerprint_of`]), so that a text and the moments written from it agree on every
    /// machine; others by their contents. It tells calibrations apart; it does not prove what a file holds.
    pub fn fingerprint(&self) -> String {
        named(&self.digest)
    }

    /// The fingerprint that moments measured on these windows have: over the fingerprint of the model, the length of a
    /// window and the token ids.
    pub fn fingerprint_of(source: &Source, windows: &Windows) -> String {
        named(&digest_of(source, windows))
    }

    /// The moment of a layer, (d+1, d+1), symmetric.
    pub fn layer(&self, i: usize) -> Option<&Arc<Array2<f64>>> {
        self.layers.get(i)
    }

    /// Gives the heads of layer `i` their moment.
    ///
    /// # Errors
    /// [`Error::LayerCount`](crate::Error::LayerCount) when there is no such layer,
    /// [`Error::Moment`](crate::Error::Moment) where every input of it was 0: any shared head would seem to lose
    /// nothing; [`Error::Shape`](crate::Error::Shape).
    pub fn attach(&self, i: usize, heads: Heads) -> crate::Result<Heads> {
        let missing = crate::Error::LayerCount { what: "moments", expected: i + 1, found: self.layers.len() };
        let moment = self.layers.get(i).ok_or(missing)?;
        if is_unseen(moment) {
            return Err(crate::Error::Moment { layer: Some(i), rule: UNSEEN });
        }
        heads.with_moment(Arc::clone(moment))
    }
}

fn encoded(moment: &Arc<Array2<f64>>) -> Vec<u8> {
    moment.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The fingerprint over the fields.
pub(super) fn digest(fields: impl IntoIterator<Item = Vec<u8>>) -> String {
    named(&sha256(fields))
}

/// SHA-256 over the fields, each with its length before it.
fn sha256(fields: impl IntoIterator<Item = Vec<u8>>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for field in fields {
        hash.update((field.len() as u64).to_le_bytes());
        hash.update(field);
    }
    hash.finalize().into()
}

fn digest_of(source: &Source, windows: &Windows) -> [u8; 32] {
    sha256([
        source.fingerprint.clone().unwrap_or_default().into_bytes(),
        (windows.length() as u64).to_le_bytes().to_vec(),
        windows.tokens().iter().flat_map(|t| t.to_le_bytes()).collect(),
    ])
}

/// A digest as a fingerprint.
fn named(digest: &[u8; 32]) -> String {
    let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{digits}")
}

fn name(layer: usize) -> String {
    format!("layers.{layer}")
}

fn same<T: PartialEq + ToString>(what: &'static str, expected: &T, found: &T) -> Result<(), RuntimeError> {
    if expected == found {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(RuntimeError::MomentsModel { what, expected, found })
}

/// The digest that a file names its moments by, where it does.
fn own_digest(path: &Path, tensors: &SafeTensors<'_>) -> Result<Option<[u8; 32]>, RuntimeError> {
    let Ok(tensor) = tensors.tensor(CALIBRATION) else { return Ok(None) };
    let fits = tensor.dtype() == Dtype::U8 && tensor.shape() == [32];
    let bytes = tensor.data().try_into().ok().filter(|_| fits);
    bytes.map(Some).ok_or_else(|| broken(path, CALIBRATION, "U8 [32], or left out", found(&tensor)))
}

fn broken(path: &Path, tensor: &str, expected: impl ToString, found: String) -> RuntimeError {
    let (path, tensor, expected) = (path.to_path_buf(), tensor.to_string(), expected.to_string());
    RuntimeError::MomentsTensor { path, tensor, expected, found }
}

/// Type and shape of a tensor.
fn found(tensor: &TensorView<'_>) -> String {
    format!("{} {:?}", tensor.dtype(), tensor.shape())
}

fn tokens_of(path: &Path, tensors: &SafeTensors<'_>) -> Result<u64, RuntimeError> {
    let broken = |found| broken(path, TOKENS, "one I64 above 0", found);
    let tensor = tensors.tensor(TOKENS).map_err(|_| broken("nothing".to_string()))?;
    let bytes: Option<[u8; 8]> = tensor.data().try_into().ok().filter(|_| tensor.dtype() == Dtype::I64);
    let Some(bytes) = bytes else { return Err(broken(found(&tensor))) };
    let tokens = i64::from_le_bytes(bytes);
    u64::try_from(tokens).ok().filter(|&n| n > 0).ok_or_else(|| broken(tokens.to_string()))
}

fn read_layer(
    path: &Path,
    tensors: &SafeTensors<'_>,
    layer: usize,
    hidden: usize,
) -> Result<Array2<f64>, RuntimeError> {
    let (tensor, size) = (name(layer), hidden + 1);
    let broken = |found| broken(path, &tensor, format!("F64 [{size}, {size}]"), found);
    let stored = tensors.tensor(&tensor).map_err(|_| broken("nothing".to_string()))?;
    if let (&[n, m], Dtype::F64) = (stored.shape(), stored.dtype()) {
        if n == m {
            same("width (with the constant)", &size, &n)?;
        }
    }
    if stored.dtype() != Dtype::F64 || stored.shape() != [size, size] {
        return Err(broken(found(&stored)));
    }
    let number = |b: &[u8]| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
    let moment = stored.data().chunks_exact(8).map(number).collect();
    let moment = Array2::from_shape_vec((size, size), moment).map_err(crate::Error::plugin)?;
    let rules: [(&'static str, bool); 5] = [
        ("holds NaN or infinities", !moment.iter().all(|v| v.is_finite())),
        ("has a negative diagonal, so it is no second moment", moment.diag().iter().any(|&v| v < 0.0)),
        ("is not symmetric, so it is no second moment", !is_symmetric(&moment)),
        (
            "must end with 1, the moment of the constant that is appended to the input",
            (moment[[hidden, hidden]] - 1.0).abs() > ASYMMETRY,
        ),
        (UNSEEN, is_unseen(&moment)),
    ];
    if let Some((rule, _)) = rules.into_iter().find(|(_, broken)| *broken) {
        return Err(RuntimeError::MomentsValue { path: path.to_path_buf(), tensor, rule });
    }
    Ok(symmetric(&moment))
}

/// Whether every input was 0 throughout.
fn is_unseen(moment: &Array2<f64>) -> bool {
    moment.diag().iter().take(moment.nrows() - 1).all(|&v| v == 0.0)
}

fn is_symmetric(moment: &Array2<f64>) -> bool {
    moment.indexed_iter().all(|((i, j), &v)| {
        (v - moment[[j, i]]).abs() <= ASYMMETRY * (moment[[i, i]] * moment[[j, j]]).sqrt()
    })
}

/// (A + Aᵀ) / 2.
fn symmetric(moment: &Array2<f64>) -> Array2<f64> {
    (moment + &moment.t()) * 0.5
}
