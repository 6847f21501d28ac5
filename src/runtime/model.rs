use std::sync::Arc;

use candle_core::{DType, Device as Place, Tensor};
use ndarray::{Array3, ArrayView2};
use rayon::prelude::*;

use super::aside::Own;
use super::attention::Attention;
use super::device;
use super::ends::Ends;
use super::handed::Handed;
use super::layer::{Layer, Weights};
use super::pass::Pass;
use super::rest::Rest;
use super::shelf::Shelf;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Error;
use crate::heads::HeadSource;
use crate::model::{AttentionSpec, Block, FeedForward, ModelId};
use crate::run::{Device, Precision};
use crate::text::{RuntimeError, forward_of, within};

/// Tokens of a window where the model has positions for more (docs/method.md, "Perplexity").
pub(crate) const LONGEST_WINDOW: usize = 512;
/// Bytes of weights in f32 from which on a model is not held.
const HELD_WEIGHTS: u64 = 1 << 30;
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
    pub(super) precision: Precision,
    positions: usize,
    pub(super) dtype: Dtype,
    vocabulary: usize,
    /// Whether there is an output embedding.
    predicts: bool,
    pub(super) specs: Arc<[AttentionSpec]>,
    /// Shared with all models made of this one.
    pub(super) shelf: Arc<Shelf>,
    /// In place of what is on the shelf.
    pub(super) attention: Vec<Option<Own>>,
    pub(super) rest: Vec<Option<Arc<Rest>>>,
    /// What the shelf was filled from.
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) ends: Arc<Ends>,
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
        Self::on(checkpoint, device, Shelf::held)
    }

    /// Opens a checkpoint, source or converted, to run on a device in little memory: as [`Model::load_on`] where its weights take
    /// less than 1 GiB in f32 or it runs on a GPU; else they stay in its files, and one layer at a time is read for as many
    /// tokens as there are. Reading many tokens it is about as fast; writing one after the other it is not.
    ///
    /// # Errors
    /// As [`Model::load_on`]; weights that are not finite are found only when they are read.
    pub fn open(checkpoint: &Checkpoint, device: Device) -> Result<Self, RuntimeError> {
        let bytes = checkpoint.numbers_of_all() * DType::F32.size_in_bytes() as u64;
        let held = device != Device::Cpu || bytes < HELD_WEIGHTS;
        if held { Self::load_on(checkpoint, device) } else { Self::on(checkpoint, device, Shelf::stored) }
    }

    /// Opens a checkpoint as [`Model::open`] does one that is too large to be held, whatever its size.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_by_layers(checkpoint: &Checkpoint) -> Result<Self, RuntimeError> {
        Self::on(checkpoint, Device::Cpu, Shelf::stored)
    }

    fn on(
        checkpoint: &Checkpoint,
        device: Device,
        shelf: impl FnOnce(&Checkpoint, &Place) -> Result<Shelf, RuntimeError>,
    ) -> Result<Self, RuntimeError> {
        let (forward, device) = (forward_of(checkpoint)?, device::open(device)?);
        let architecture = checkpoint.architecture();
        let (expected, found) = (architecture.n_layers(), forward.blocks.len());
        if found != expected {
            return Err(Error::LayerCount { what: "blocks", expected, found }.into());
        }
        Ok(Self {
            shelf: Arc::new(shelf(checkpoint, &device)?),
            attention: vec![None; expected],
            rest: vec![None; expected],
            checkpoint: Arc::new(checkpoint.clone()),
            specs: architecture.layers.clone().into(),
            ends: Arc::new(Ends::load(&Weights::of(checkpoint, &device), forward)?),
            vocabulary: forward.vocabulary,
            predicts: forward.head.is_some(),
            id: checkpoint.id()?,
            precision: Precision::F32,
            positions: forward.positions,
            dtype: checkpoint.dtype(),
            device,
        })
    }

    /// The checkpoint that the weights come from, before any sharing here.
    pub fn id(&self) -> &ModelId {
        &self.id
    }

    /// Number of layers, L.
    pub fn n_layers(&self) -> usize {
        self.specs.len()
    }

    /// KV heads that every layer computes and keeps.
    pub fn kv_heads(&self) -> Vec<usize> {
        let found = self.specs.iter().zip(&self.attention);
        found
            .map(|(spec, own)| own.as_ref().map_or(spec.cached_heads(), |own| own.known().kv_heads()))
            .collect()
    }

    /// Bytes of keys and values that this model keeps for each token, at the four bytes of an f32.
    pub fn kv_bytes_per_token(&self) -> usize {
        let kept = self.kv_heads().into_iter().zip(self.specs.iter());
        let numbers = kept.map(|(heads, spec)| 2 * heads * spec.head_dim);
        numbers.sum::<usize>() * DType::F32.size_in_bytes()
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Whether it predicts next tokens, as encoders do not: these have no logits, no perplexity and no cache.
    pub fn predicts(&self) -> bool {
        self.predicts
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
    /// [`RuntimeError::Positions`], [`RuntimeError::TokenOutOfRange`]; [`RuntimeError::NoPredictions`] of an encoder.
    pub fn logits(&self, tokens: ArrayView2<'_, u32>) -> Result<Array3<f32>, RuntimeError> {
        let (batch, len) = tokens.dim();
        let flat: Vec<u32> = tokens.iter().copied().collect();
        let parts = self.each(&self.rows(&flat, batch)?, |x| numbers(&self.head(x)?))?;
        self.shaped(parts.concat(), batch, len)
    }

    /// What the last layer gives for rows of equal length, in parts of as many as are computed [abreast](Model::abreast):
    /// (rows of the part · T, d) each.
    pub(crate) fn rows(&self, tokens: &[u32], rows: usize) -> Result<Vec<Tensor>, RuntimeError> {
        let len = tokens.len().checked_div(rows).unwrap_or(0);
        let pass = self.pass(len, 0)?;
        self.through(0, self.embed_rows(tokens, &pass)?, &pass)
    }

    /// Rows of tokens before the first layer, in the parts of [`Model::rows`].
    pub(crate) fn embed_rows(&self, tokens: &[u32], pass: &Pass) -> Result<Vec<Tensor>, RuntimeError> {
        let len = pass.positions.len();
        tokens.par_chunks(self.abreast(len) * len).map(|tokens| self.embed(tokens, pass)).collect()
    }

    /// Some texts, (N, d) each, from before layer `from` through all that follow: layer by layer, so that each is read once.
    pub(crate) fn through(
        &self,
        from: usize,
        texts: Vec<Tensor>,
        pass: &Pass,
    ) -> Result<Vec<Tensor>, RuntimeError> {
        let mut texts: Vec<(Tensor, Option<Handed>)> = texts.into_iter().map(|x| (x, None)).collect();
        for i in from..self.n_layers() {
            self.share_out(&mut texts, |(x, below)| {
                *x = self.step(i, x, pass, None, below)?;
                Ok(())
            })?;
        }
        Ok(texts.into_iter().map(|(x, _)| x).collect())
    }

    pub(super) fn shaped(
        &self,
        logits: Vec<f32>,
        batch: usize,
        len: usize,
    ) -> Result<Array3<f32>, RuntimeError> {
        let shape = (batch, len, self.vocabulary());
        Ok(Array3::from_shape_vec(shape, logits).map_err(Error::plugin)?)
    }

    /// The device that it is on, as candle has it.
    pub(crate) fn place(&self) -> &Place {
        &self.device
    }

    /// Width of the residual stream, d.
    pub(crate) fn width(&self) -> usize {
        self.id.hidden
    }

    /// Tokens (B·T) → what enters the first layer, (B·T, d).
    pub(crate) fn embed(&self, tokens: &[u32], pass: &Pass) -> Result<Tensor, RuntimeError> {
        within(tokens, self.vocabulary(), "the tokens belong to another model")?;
        self.ends.enter(self.shelf.embed(tokens)?, &pass.positions)
    }

    /// The attention of layer `i`.
    pub(super) fn attention(&self, i: usize) -> Result<Attention, RuntimeError> {
        match &self.attention[i] {
            Some(own) => self.shelf.attention(own),
            None => Ok(self.shelf.layer(i)?.attention),
        }
    }

    /// Layer `i`.
    pub(super) fn whole(&self, i: usize) -> Result<Layer, RuntimeError> {
        let mut layer = self.shelf.layer(i)?;
        if let Some(own) = &self.attention[i] {
            layer.attention = self.shelf.attention(own)?;
        }
        if let Some(rest) = &self.rest[i] {
            layer.rest = Rest::clone(rest);
        }
        Ok(layer)
    }

    /// Layer `i` without its attention.
    pub(super) fn rest(&self, i: usize) -> Result<Rest, RuntimeError> {
        match &self.rest[i] {
            Some(rest) => Ok(Rest::clone(rest)),
            None => Ok(self.shelf.layer(i)?.rest),
        }
    }

    /// Whether any layer has a mixture of experts.
    pub(crate) fn has_experts(&self) -> Result<bool, RuntimeError> {
        let blocks = &forward_of(&self.checkpoint)?.blocks;
        Ok(blocks.iter().any(|block| matches!(block.mlp, FeedForward::Experts(_))))
    }

    /// What layer `i` is besides attention, by its tensors' names.
    pub(super) fn block(&self, i: usize) -> Result<&Block, RuntimeError> {
        let block = forward_of(&self.checkpoint)?.blocks.get(i);
        Ok(block.ok_or(Error::NoLayer { layer: i, layers: self.n_layers() })?)
    }

    /// What the attention of layer `i` reads, (N, d), after the norm.
    pub(crate) fn attention_input(&self, i: usize, x: &Tensor) -> Result<Tensor, RuntimeError> {
        Ok(self.rest(i)?.attention_input(x)?)
    }

    /// How what the attention of layer `i` gives comes into the stream.
    pub(crate) fn joint(&self, i: usize) -> Result<Joint, RuntimeError> {
        let rest = self.rest(i)?;
        Ok(match (rest.parallel, &rest.attention_output_norm) {
            (_, Some(_)) => Joint::Normed,
            (true, None) => Joint::Parallel(rest.residual),
            (false, None) => Joint::Added(rest.residual),
        })
    }

    /// What layer `i` gives, from its input and what its attention made of it, or of a stream to which this was added already,
    /// (N, d) each.
    pub(crate) fn finish(
        &self,
        i: usize,
        stream: &Tensor,
        attended: Option<&Tensor>,
    ) -> Result<Tensor, RuntimeError> {
        let rest = self.rest(i)?;
        Ok(match attended {
            Some(attended) => rest.finish(stream, attended)?,
            None => {
                let stream = rest.behind(stream)?;
                rest.added(&stream, &stream)?
            }
        })
    }

    /// Layer `i`, which has keys and values of its own, (N, d) → (N, d).
    pub(crate) fn layer(&self, i: usize, x: &Tensor, pass: &Pass) -> Result<Tensor, RuntimeError> {
        self.step(i, x, pass, None, &mut None)
    }

    /// Some texts, (N, d) each, through layer `i`, which has keys and values of its own.
    pub(crate) fn pass_layer(&self, i: usize, texts: &mut [Tensor], pass: &Pass) -> Result<(), RuntimeError> {
        self.share_out(texts, |x| {
            *x = self.layer(i, x, pass)?;
            Ok(())
        })
    }

    /// The output embedding, (vocabulary, d).
    pub(crate) fn output_embedding(&self) -> Result<Tensor, RuntimeError> {
        self.shelf.head(0..self.vocabulary)
    }
}

/// How what an attention gives comes into the stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Joint {
    /// Times this, and the MLP reads the sum.
    Added(f64),
    /// Times this, and the MLP does not read it.
    Parallel(f64),
    /// Through a norm.
    Normed,
}

/// The numbers of a tensor, in order.
pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f32>, RuntimeError> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
