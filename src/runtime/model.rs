use candle_core::{DType, Device as Place, Tensor};
use ndarray::{Array3, ArrayView2};
use rayon::prelude::*;

use super::attention::Pass;
use super::cache::{KvCache, LayerCache};
use super::device;
use super::layer::{Layer, Normed, Weights};
use super::rope::Rope;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Error;
use crate::heads::HeadSource;
use crate::model::ModelId;
use crate::run::Device;
use crate::text::{RuntimeError, forward_of, within};

/// Tokens of a window where the model has positions for more (docs/method.md, "Perplexity").
const LONGEST_WINDOW: usize = 512;
/// Tokens computed at once, and numbers of logits held at once.
const BATCH_TOKENS: usize = 4096;
const BATCH_LOGITS: usize = 1 << 25;
/// On a GPU, where with few tokens the queueing of its work takes longer than the work; the logits are 2 GB.
const GPU_BATCH_TOKENS: usize = 1 << 14;
const GPU_BATCH_LOGITS: usize = 1 << 29;
/// Windows whose inputs of all layers are held for the way back: on the CPU, and on a GPU.
const HELD_WINDOWS: usize = 4;
const GPU_HELD_WINDOWS: usize = 24;

/// A model that can be run: f32, on the CPU or a GPU.
///
/// Cloning shares the weights.
///
/// ```
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::ndarray::array;
/// use qcqa::runtime::Model;
///
/// let model = Model::load(&Checkpoint::open("tests/data/novels-1m")?)?;
/// let logits = model.logits(array![[5, 7, 11], [2, 3, 5]].view())?;
/// assert_eq!(logits.dim(), (2, 3, model.vocabulary()));
/// # Ok::<(), qcqa::runtime::RuntimeError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Model {
    id: ModelId,
    pub(super) device: Place,
    positions: usize,
    pub(super) dtype: Dtype,
    /// (vocabulary, d).
    embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Normed,
    /// (vocabulary, d).
    pub(super) head: Tensor,
}

impl Model {
    /// Reads a checkpoint, source or converted, as it is, to run on the CPU.
    ///
    /// # Errors
    /// [`FileError`](crate::files::FileError): a tensor that is missing or has another shape, and by name what this forward
    /// pass does not compute: another activation, norm, rope scaling or tensor.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, RuntimeError> {
        Self::load_on(checkpoint, Device::Cpu)
    }

    /// Reads a checkpoint, source or converted, as it is, to run on a device.
    ///
    /// On a GPU products of f32 round their factors to TF32 (10 bits of mantissa) and sum in f32.
    ///
    /// # Errors
    /// [`RuntimeError::Device`] where there is no such device; as [`Model::load`].
    pub fn load_on(checkpoint: &Checkpoint, device: Device) -> Result<Self, RuntimeError> {
        let (forward, device) = (forward_of(checkpoint)?, device::open(device)?);
        let architecture = checkpoint.architecture();
        let weights = Weights { checkpoint, width: architecture.hidden, device: &device };
        let (expected, found) = (architecture.n_layers(), forward.blocks.len());
        if found != expected {
            return Err(Error::LayerCount { what: "blocks", expected, found }.into());
        }
        let shape = [forward.vocabulary, architecture.hidden];
        let embedding = weights.take(&forward.embedding, &shape)?;
        let layers = forward.blocks.iter().enumerate().map(|(i, block)| Layer::load(&weights, block, i));
        Ok(Self {
            layers: layers.collect::<Result<_, _>>()?,
            norm: Normed::load(&weights, &forward.norm)?,
            head: match forward.head == forward.embedding {
                true => embedding.clone(),
                false => weights.take(&forward.head, &shape)?,
            },
            embedding,
            id: checkpoint.id()?,
            positions: forward.positions,
            dtype: checkpoint.dtype(),
            device,
        })
    }

    /// The checkpoint that the weights come from, before any sharing here.
    pub fn id(&self) -> &ModelId {
        &self.id
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        device::of(&self.device)
    }

    /// Number of layers, L.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// KV heads of every layer.
    pub fn kv_heads(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.attention.kv_heads()).collect()
    }

    /// Bytes of keys and values that this model keeps for each token, at the four bytes of an f32.
    pub fn kv_bytes_per_token(&self) -> usize {
        let numbers: usize = self.layers.iter().map(|layer| layer.attention.kept_numbers()).sum();
        numbers * DType::F32.size_in_bytes()
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.embedding.dims()[0]
    }

    /// Tokens that the model has positions for.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Tokens of a window for evaluation: all positions, at most 512.
    pub fn window(&self) -> usize {
        self.positions.min(LONGEST_WINDOW)
    }

    /// Logits (B, T, vocabulary) of B rows of T tokens.
    ///
    /// # Errors
    /// [`RuntimeError::Positions`], [`RuntimeError::TokenOutOfRange`].
    pub fn logits(&self, tokens: ArrayView2<'_, u32>) -> Result<Array3<f32>, RuntimeError> {
        let (batch, len) = tokens.dim();
        let flat: Vec<u32> = tokens.iter().copied().collect();
        let parts = self.rows(&flat, batch)?;
        let parts: Vec<Vec<f32>> = parts.iter().map(numbers).collect::<Result<_, _>>()?;
        self.shaped(parts.concat(), batch, len)
    }

    /// Logits of rows of equal length, in parts of as many as are computed [abreast](Model::abreast): (rows of the
    /// part · T, vocabulary) each.
    pub(crate) fn rows(&self, tokens: &[u32], rows: usize) -> Result<Vec<Tensor>, RuntimeError> {
        let len = tokens.len().checked_div(rows).unwrap_or(0);
        let pass = self.pass(len, 0)?;
        let logits = |tokens: &[u32]| self.logits_from(0, &self.embed(tokens)?, &pass);
        tokens.par_chunks(self.abreast(len) * len).map(logits).collect()
    }

    /// Logits (T, vocabulary) of each of some rows of equal length, by way of a cache that takes `chunk` tokens at a time.
    pub(crate) fn rows_by_cache(
        &self,
        tokens: &[u32],
        rows: usize,
        chunk: usize,
    ) -> Result<Vec<Tensor>, RuntimeError> {
        let logits = |tokens: &[u32]| {
            let mut cache = KvCache::default();
            let parts = tokens.chunks(chunk).map(|part| self.read(&mut cache, part, 1));
            Ok(Tensor::cat(&parts.collect::<Result<Vec<_>, RuntimeError>>()?, 0)?)
        };
        tokens.par_chunks_exact(tokens.len() / rows).map(logits).collect()
    }

    /// Logits (N, vocabulary) of what enters layer `from`, (N, d).
    pub(crate) fn logits_from(&self, from: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, RuntimeError> {
        let mut x = x.clone();
        for i in from..self.layers.len() {
            x = self.layer(i, &x, pass)?;
        }
        self.head(&x)
    }

    fn shaped(&self, logits: Vec<f32>, batch: usize, len: usize) -> Result<Array3<f32>, RuntimeError> {
        let shape = (batch, len, self.vocabulary());
        Ok(Array3::from_shape_vec(shape, logits).map_err(Error::plugin)?)
    }

    /// Logits (B, T, vocabulary) of T more tokens of each of B rows, after those that `cache` holds; theirs are
    /// added to it. Start from `KvCache::default()`.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn extend(
        &self,
        cache: &mut KvCache,
        tokens: ArrayView2<'_, u32>,
    ) -> Result<Array3<f32>, RuntimeError> {
        let (batch, len) = tokens.dim();
        let flat: Vec<u32> = tokens.iter().copied().collect();
        let logits = self.read(cache, &flat, batch)?;
        self.shaped(numbers(&logits)?, batch, len)
    }

    /// Logits (B·T, vocabulary) of further tokens (B·T).
    fn read(&self, cache: &mut KvCache, tokens: &[u32], batch: usize) -> Result<Tensor, RuntimeError> {
        let len = tokens.len().checked_div(batch).unwrap_or(0);
        let pass = self.pass(len, cache.tokens)?;
        cache.layers.resize(self.layers.len(), LayerCache::default());
        let mut x = self.embed(tokens)?;
        for (i, (layer, past)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            x = layer.forward(i, &x, &pass, Some(past))?;
        }
        cache.tokens += len;
        self.head(&x)
    }

    /// The input of every layer's attention, after its norm, (T, d), in the order of layers.
    pub(crate) fn attention_inputs(
        &self,
        tokens: &[u32],
        mut take: impl FnMut(usize, Tensor) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let pass = self.pass(tokens.len(), 0)?;
        let mut x = self.embed(tokens)?;
        for i in 0..self.layers.len() {
            take(i, self.attention_input(i, &x)?)?;
            // What the last layer puts out is nobody's input.
            if i + 1 < self.layers.len() {
                x = self.layer(i, &x, &pass)?;
            }
        }
        Ok(())
    }

    /// What enters every layer, and what the last one gives, (N, d) each.
    pub(crate) fn layer_inputs(&self, tokens: &[u32], pass: &Pass) -> Result<Vec<Tensor>, RuntimeError> {
        let mut inputs = vec![self.embed(tokens)?];
        for i in 0..self.layers.len() {
            let next = self.layer(i, &inputs[i], pass)?;
            inputs.push(next);
        }
        Ok(inputs)
    }

    /// What the last layer gives, (N, d).
    pub(crate) fn hidden(&self, tokens: &[u32], pass: &Pass) -> Result<Tensor, RuntimeError> {
        (0..self.layers.len()).try_fold(self.embed(tokens)?, |x, i| self.layer(i, &x, pass))
    }

    /// The device that it is on, as candle has it.
    pub(crate) fn place(&self) -> &Place {
        &self.device
    }

    /// Width of the residual stream, d.
    pub(crate) fn width(&self) -> usize {
        self.id.hidden
    }

    /// Windows whose inputs of all layers are held at once.
    pub(crate) fn held_windows(&self) -> usize {
        if self.device.is_cpu() { HELD_WINDOWS } else { GPU_HELD_WINDOWS }
    }

    /// Rows of `len` tokens held at once: as many as keep the device busy and the memory small.
    pub(crate) fn batch(&self, len: usize) -> usize {
        let (tokens, logits) = match self.device() {
            Device::Cpu => (BATCH_TOKENS, BATCH_LOGITS),
            Device::Cuda => (GPU_BATCH_TOKENS, GPU_BATCH_LOGITS),
        };
        (tokens.min(logits / self.vocabulary().max(1)) / len).max(1)
    }

    /// Rows of `len` tokens that are computed as one. On the CPU each is computed on its own: its tensors stay small, and rows
    /// share out over the threads. On a GPU all that are held are.
    pub(crate) fn abreast(&self, len: usize) -> usize {
        if self.device.is_cpu() { 1 } else { self.batch(len) }
    }

    /// What the layers share when they read `len` tokens of each row after `start` others.
    pub(crate) fn pass(&self, len: usize, start: usize) -> Result<Pass, RuntimeError> {
        let expected = self.positions;
        match start.checked_add(len) {
            Some(end) if len > 0 && end <= expected => {}
            end => return Err(RuntimeError::Positions { expected, found: end.unwrap_or(usize::MAX) }),
        }
        let positions: Vec<usize> = (start..start + len).collect();
        let mut ropes: Vec<Rope> = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let alike = self.layers[..i].iter().position(|other| other.spec.rotary == layer.spec.rotary);
            ropes.push(match alike {
                Some(j) => ropes[j].clone(),
                None => Rope::new(layer.spec.rotary.as_ref(), &positions, &self.device)?,
            });
        }
        Ok(Pass { positions, ropes })
    }

    /// Tokens (N) → (N, d).
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Tensor, RuntimeError> {
        within(tokens, self.vocabulary(), "the tokens belong to another model")?;
        let ids = Tensor::from_slice(tokens, tokens.len(), &self.device)?;
        Ok(self.embedding.index_select(&ids, 0)?)
    }

    /// What the attention of layer `i` reads, (N, d), after the norm.
    pub(crate) fn attention_input(&self, i: usize, x: &Tensor) -> Result<Tensor, RuntimeError> {
        Ok(self.layers[i].attention_input(x)?)
    }

    /// What the attention of layer `i` makes of what it reads, (N, d) → (N, d).
    pub(crate) fn attend(&self, i: usize, input: &Tensor, pass: &Pass) -> Result<Tensor, RuntimeError> {
        Ok(self.layers[i].attention.forward(input, pass, pass.rope(i), None)?)
    }

    /// Layer `i` after its attention was added, (N, d) → (N, d).
    pub(crate) fn feed_forward(&self, i: usize, x: &Tensor) -> Result<Tensor, RuntimeError> {
        Ok(self.layers[i].feed_forward(x)?)
    }

    /// Layer `i`, (N, d) → (N, d).
    pub(crate) fn layer(&self, i: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, RuntimeError> {
        Ok(self.layers[i].forward(i, x, pass, None)?)
    }

    /// (N, d) → logits (N, vocabulary).
    fn head(&self, x: &Tensor) -> Result<Tensor, RuntimeError> {
        Ok(self.norm.of(x)?.matmul(&self.head.t()?)?)
    }
}

/// The numbers of a tensor, in order.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>, RuntimeError> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
