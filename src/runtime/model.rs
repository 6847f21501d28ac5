use candle_core::{DType, Device, Tensor};
use candle_nn::ops::rms_norm;
use ndarray::{Array3, ArrayView2};
use rayon::prelude::*;

use super::attention::{Attention, KvCache, Pass};
use super::kernels::{CausalSoftmax, SwiGlu};
use super::load::{Settings, Weights};
use super::rope::Rope;
use super::stored::rounded;
use super::text::within;
use super::{RuntimeError, Windows};
use crate::checkpoint::{Checkpoint, Dtype, same_source};
use crate::{Heads, KvPooler, Partition, Plan, PoolLayer, Pooled, Rotation, Source};

/// Tokens of a window where the model has positions for more (docs/method.md, "Perplexity").
const LONGEST_WINDOW: usize = 512;
/// Tokens computed at once, and numbers of logits held at once.
const BATCH_TOKENS: usize = 4096;
const BATCH_LOGITS: usize = 1 << 25;

/// A Llama-family model that can be run: f32, on the CPU.
///
/// Cloning shares the weights.
#[derive(Debug, Clone)]
pub struct Model {
    source: Source,
    settings: Settings,
    theta: f64,
    dtype: Dtype,
    /// (vocabulary, d).
    embedding: Tensor,
    layers: Vec<Layer>,
    /// (d).
    norm: Tensor,
    /// (vocabulary, d).
    head: Tensor,
}

/// One layer: x + attention(norm(x)), then y + mlp(norm(y)).
#[derive(Debug, Clone)]
struct Layer {
    rotation: Rotation,
    attention: Attention,
    attention_norm: Tensor,
    mlp_norm: Tensor,
    /// Gate rows, then up rows, (2m, d).
    gate_up: Tensor,
    gate_up_bias: Option<Tensor>,
    /// (d, m).
    down: Tensor,
    down_bias: Option<Tensor>,
}

impl Model {
    /// Reads a checkpoint, source or converted, as it is.
    ///
    /// # Errors
    /// [`RuntimeError::Checkpoint`]: a tensor that is missing or has another shape, and by name what this forward
    /// pass does not compute: another activation, norm, rope scaling or tensor.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self, RuntimeError> {
        let config = checkpoint.config();
        let settings = Settings::read(checkpoint)?;
        let weights = Weights::new(checkpoint);
        let d = config.hidden;
        let embedding = weights.embedding()?;
        let layers = (0..config.n_layers).map(|i| Layer::load(checkpoint, &weights, i));
        let layers = layers.collect::<Result<_, RuntimeError>>()?;
        let norm = weights.take("model.norm.weight", &[d])?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            weights.take("lm_head.weight", &[embedding.dim(0)?, d])?
        };
        weights.finish()?;
        let (source, theta, dtype) = (checkpoint.source()?, config.rope_theta, checkpoint.dtype());
        Ok(Self { source, settings, theta, dtype, embedding, layers, norm, head })
    }

    /// The model that `plan` and `pooler` make of a checkpoint, as [`convert`](crate::checkpoint::convert) would
    /// write it: what the pooler changed is rounded to the type of the stored keys and values.
    ///
    /// # Errors
    /// As [`Model::load`]; what the plan, its fit to the checkpoint and the pooler report.
    pub fn planned(
        checkpoint: &Checkpoint,
        plan: &Plan,
        pooler: &dyn KvPooler,
    ) -> Result<Self, RuntimeError> {
        let pool = |i: usize, heads: &Heads| pooler.pool(heads, &plan.layers[i].groups);
        Self::planned_with(checkpoint, plan, &pool)
    }

    /// The same for layers that are pooled with more than a pooler knows, for example the
    /// [`Moments`](super::Moments) of their inputs: `pool(i, heads)` gives the shared heads of layer i.
    ///
    /// # Errors
    /// As [`Model::planned`], and what `pool` reports.
    pub fn planned_with(
        checkpoint: &Checkpoint,
        plan: &Plan,
        pool: &PoolLayer<'_>,
    ) -> Result<Self, RuntimeError> {
        Self::load(checkpoint)?.under(checkpoint, plan, pool)
    }

    /// The same for the model of a checkpoint that is already there: all that the plan leaves is shared with it.
    ///
    /// # Errors
    /// As [`Model::planned_with`] after loading.
    pub fn under(
        &self,
        checkpoint: &Checkpoint,
        plan: &Plan,
        pool: &PoolLayer<'_>,
    ) -> Result<Self, RuntimeError> {
        plan.check()?;
        same_source(checkpoint, plan)?;
        let mut model = self.clone();
        for (i, planned) in plan.layers.iter().enumerate() {
            let heads = checkpoint.layer(i)?;
            model = model.with_pooled(i, &heads, &planned.groups, pool(i, &heads)?)?;
        }
        Ok(model)
    }

    /// This model with other keys and values in one layer; all other weights are shared. `heads` are those of
    /// the source.
    ///
    /// # Errors
    /// [`FileError::Overflow`](crate::checkpoint::FileError::Overflow) when a merged value does not fit the stored type; what the pooler reports.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn regrouped(
        &self,
        layer: usize,
        heads: &Heads,
        partition: &Partition,
        pooler: &dyn KvPooler,
    ) -> Result<Self, RuntimeError> {
        let pooled = pooler.pool(heads, partition).map_err(|e| e.of_layer(layer))?;
        self.with_pooled(layer, heads, partition, pooled)
    }

    /// The same with shared heads that are already there.
    ///
    /// # Errors
    /// [`FileError::Overflow`](crate::checkpoint::FileError::Overflow); as [`Pooled::check`].
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn with_pooled(
        &self,
        layer: usize,
        heads: &Heads,
        partition: &Partition,
        pooled: Pooled,
    ) -> Result<Self, RuntimeError> {
        pooled.check(heads, partition)?;
        let pooled = rounded(pooled, self.dtype, layer)?;
        let mut model = self.clone();
        model.layers[layer].attention = Attention::new(heads, Some((&pooled, partition)))?;
        Ok(model)
    }

    /// The checkpoint that the weights come from, before any grouping here.
    pub fn source(&self) -> &Source {
        &self.source
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
        let heads = self.kv_heads().iter().sum();
        crate::kv_bytes_per_token(heads, self.source.head_dim, DType::F32.size_in_bytes())
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.embedding.dims()[0]
    }

    /// Tokens that the model has positions for.
    pub fn positions(&self) -> usize {
        self.settings.positions
    }

    /// Tokens of a window for evaluation: all positions, at most 512.
    pub fn window(&self) -> usize {
        self.settings.positions.min(LONGEST_WINDOW)
    }

    /// Logits (B, T, vocabulary) of B rows of T tokens.
    ///
    /// # Errors
    /// [`RuntimeError::Positions`], [`RuntimeError::TokenOutOfRange`].
    pub fn logits(&self, tokens: ArrayView2<'_, u32>) -> Result<Array3<f32>, RuntimeError> {
        let (batch, len) = tokens.dim();
        let flat: Vec<u32> = tokens.iter().copied().collect();
        let logits = self.rows(&flat, batch)?.concat();
        self.shaped(logits, batch, len)
    }

    /// Logits of rows of equal length, each on its own: its tensors stay small, and rows share out over the
    /// threads. (T · vocabulary) for each row.
    pub(super) fn rows(&self, tokens: &[u32], rows: usize) -> Result<Vec<Vec<f32>>, RuntimeError> {
        let len = tokens.len().checked_div(rows).unwrap_or(0);
        let pass = self.pass(1, len, 0)?;
        let logits = |tokens: &[u32]| self.logits_from(0, &self.embed(tokens)?, &pass);
        tokens.par_chunks_exact(len).map(logits).collect()
    }

    /// Logits (N · vocabulary) of what enters layer `from`, (N, d).
    pub(super) fn logits_from(&self, from: usize, x: &Tensor, pass: &Pass) -> Result<Vec<f32>, RuntimeError> {
        let mut x = x.clone();
        for i in from..self.layers.len() {
            x = self.layer(i, &x, pass, None)?;
        }
        Ok(self.head(&x)?.flatten_all()?.to_vec1()?)
    }

    fn shaped(&self, logits: Vec<f32>, batch: usize, len: usize) -> Result<Array3<f32>, RuntimeError> {
        let shape = (batch, len, self.vocabulary());
        Ok(Array3::from_shape_vec(shape, logits).map_err(crate::Error::plugin)?)
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
        let pass = self.pass(batch, len, cache.tokens)?;
        cache.layers.resize(self.layers.len(), None);
        let mut x = self.embed(&flat)?;
        for (i, past) in cache.layers.iter_mut().enumerate() {
            x = self.layer(i, &x, &pass, Some(past))?;
        }
        cache.tokens += len;
        self.shaped(self.head(&x)?.flatten_all()?.to_vec1()?, batch, len)
    }

    /// The input of every layer's attention, after its norm, (T, d), in the order of layers.
    pub(super) fn attention_inputs(
        &self,
        tokens: &[u32],
        mut take: impl FnMut(usize, Tensor) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let pass = self.pass(1, tokens.len(), 0)?;
        let mut x = self.embed(tokens)?;
        for i in 0..self.layers.len() {
            take(i, self.attention_input(i, &x)?)?;
            // What the last layer puts out is nobody's input.
            if i + 1 < self.layers.len() {
                x = self.layer(i, &x, &pass, None)?;
            }
        }
        Ok(())
    }

    /// Windows held at once: as many as keep the cores busy and the memory small.
    pub(super) fn batch(&self, windows: &Windows) -> usize {
        let by_logits = BATCH_LOGITS / self.vocabulary().max(1) / windows.length();
        (BATCH_TOKENS / windows.length()).min(by_logits).max(1)
    }

    /// What the layers share when they read `len` tokens of `batch` rows after `start` others.
    pub(super) fn pass(&self, batch: usize, len: usize, start: usize) -> Result<Pass, RuntimeError> {
        let expected = self.settings.positions;
        match start.checked_add(len) {
            Some(end) if batch > 0 && len > 0 && end <= expected => {}
            end => return Err(RuntimeError::Positions { expected, found: end.unwrap_or(usize::MAX) }),
        }
        let rotation = self.layers.first().map_or(Rotation::None, |layer| layer.rotation);
        let rope = Rope::new(rotation, self.theta, start, len)?;
        let reach = self.settings.sliding_window.unwrap_or(usize::MAX);
        Ok(Pass { batch, len, rope, softmax: CausalSoftmax { len, start, reach } })
    }

    /// Tokens (N) → (N, d).
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Tensor, RuntimeError> {
        within(tokens, self.vocabulary(), "the tokens belong to another model")?;
        let ids = Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?;
        Ok(self.embedding.index_select(&ids, 0)?)
    }

    /// What the attention of layer `i` reads, (N, d), after the norm.
    pub(super) fn attention_input(&self, i: usize, x: &Tensor) -> Result<Tensor, RuntimeError> {
        Ok(rms_norm(x, &self.layers[i].attention_norm, self.settings.epsilon)?)
    }

    /// What the attention of layer `i` makes of what it reads, (N, d) → (N, d).
    pub(super) fn attend(&self, i: usize, input: &Tensor, pass: &Pass) -> Result<Tensor, RuntimeError> {
        Ok(self.layers[i].attention.forward(input, pass, None)?)
    }

    /// Layer `i`, (N, d) → (N, d).
    pub(super) fn layer(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        past: Option<&mut Option<(Tensor, Tensor)>>,
    ) -> Result<Tensor, RuntimeError> {
        let (layer, epsilon) = (&self.layers[i], self.settings.epsilon);
        let attended = layer.attention.forward(&rms_norm(x, &layer.attention_norm, epsilon)?, pass, past)?;
        let x = (x + attended)?;
        let gated = linear(&rms_norm(&x, &layer.mlp_norm, epsilon)?, &layer.gate_up, &layer.gate_up_bias)?;
        Ok((x + linear(&gated.apply_op1_no_bwd(&SwiGlu)?, &layer.down, &layer.down_bias)?)?)
    }

    /// (N, d) → logits (N, vocabulary).
    pub(super) fn head(&self, x: &Tensor) -> Result<Tensor, RuntimeError> {
        Ok(rms_norm(x, &self.norm, self.settings.epsilon)?.matmul(&self.head.t()?)?)
    }
}

/// x (N, in), weight (out, in) → (N, out).
fn linear(x: &Tensor, weight: &Tensor, bias: &Option<Tensor>) -> candle_core::Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

impl Layer {
    fn load(checkpoint: &Checkpoint, weights: &Weights<'_>, i: usize) -> Result<Self, RuntimeError> {
        let d = checkpoint.config().hidden;
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let optional = |part: &str, size: usize| {
            let name = name(part);
            weights.has(&name).then(|| weights.take(&name, &[size])).transpose()
        };
        let heads = checkpoint.layer(i)?;
        for part in ["q", "k", "v", "o"] {
            weights.seen(&name(&format!("self_attn.{part}_proj.weight")));
            weights.seen(&name(&format!("self_attn.{part}_proj.bias")));
        }
        let m = weights.rows(&name("mlp.gate_proj.weight"))?;
        let [gate, up] =
            ["gate", "up"].map(|part| weights.take(&name(&format!("mlp.{part}_proj.weight")), &[m, d]));
        let [gate_bias, up_bias] = ["gate", "up"].map(|part| optional(&format!("mlp.{part}_proj.bias"), m));
        let gate_up_bias = match (gate_bias?, up_bias?) {
            (None, None) => None,
            (gate, up) => {
                let zeros = Tensor::zeros(m, DType::F32, &Device::Cpu)?;
                Some(Tensor::cat(&[&gate.unwrap_or(zeros.clone()), &up.unwrap_or(zeros)], 0)?)
            }
        };
        Ok(Self {
            rotation: heads.rotation(),
            attention: Attention::new(&heads, None)?,
            attention_norm: weights.take(&name("input_layernorm.weight"), &[d])?,
            mlp_norm: weights.take(&name("post_attention_layernorm.weight"), &[d])?,
            gate_up: Tensor::cat(&[&gate?, &up?], 0)?,
            gate_up_bias,
            down: weights.take(&name("mlp.down_proj.weight"), &[d, m])?,
            down_bias: optional("mlp.down_proj.bias", d)?,
        })
    }
}
