use candle_core::{DType, Device, Result as Candle, Tensor};
use candle_nn::ops::{layer_norm, rms_norm};

use super::RuntimeError;
use super::attention::{Attention, Pass};
use super::cache::LayerCache;
use super::norms::HeadNorms;
use super::ops::{activated, gated};
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{Activation, Block, Linear, Mlp, Norm, NormKind};

/// One layer, as [`Block`] has it.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention: Attention,
    pub(super) attention_norm: Option<Normed>,
    pub(super) attention_output_norm: Option<Normed>,
    pub(super) mlp_norm: Option<Normed>,
    pub(super) mlp_output_norm: Option<Normed>,
    pub(super) mlp: FeedForward,
    pub(super) parallel: bool,
    pub(super) residual: f64,
}

/// An MLP and its weights.
#[derive(Debug, Clone)]
pub(super) struct FeedForward {
    /// Gate rows where there are any, then up rows, (m or 2m, d).
    pub(super) up: Tensor,
    pub(super) up_bias: Option<Tensor>,
    /// (d, m).
    pub(super) down: Tensor,
    pub(super) down_bias: Option<Tensor>,
    pub(super) activation: Activation,
    pub(super) has_gate: bool,
}

/// A norm and its weights, (d) each.
#[derive(Debug, Clone)]
pub(super) struct Normed {
    pub(super) kind: NormKind,
    pub(super) weight: Tensor,
    /// Of a [`NormKind::Layer`].
    pub(super) bias: Tensor,
    pub(super) epsilon: f32,
}

impl Normed {
    /// A norm of vectors of this size.
    pub(super) fn load(weights: &Weights<'_>, norm: &Norm, size: usize) -> Result<Self, RuntimeError> {
        let of = |name: &Option<String>, or: f64| match name {
            Some(name) => weights.take(name, &[size]),
            None => Ok(Tensor::full(or as f32, size, weights.device)?),
        };
        let weight = of(&norm.weight, 1.0)?.affine(1.0, norm.offset)?;
        let (kind, epsilon) = (norm.kind, norm.epsilon as f32);
        Ok(Self { kind, weight, bias: of(&norm.bias, 0.0)?, epsilon })
    }

    /// x (N, size) → (N, size).
    pub(super) fn of(&self, x: &Tensor) -> Candle<Tensor> {
        match self.kind {
            NormKind::Rms => rms_norm(x, &self.weight, self.epsilon),
            NormKind::Layer => layer_norm(x, &self.weight, &self.bias, self.epsilon),
        }
    }
}

/// What a norm that may not be there makes of x.
pub(super) fn normed(norm: &Option<Normed>, x: &Tensor) -> Candle<Tensor> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.of(x))
}

/// What passes back through a norm that may not be there.
pub(super) fn normed_backward(norm: &Option<Normed>, x: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
    norm.as_ref().map_or_else(|| Ok(gradient.clone()), |norm| norm.backward(x, gradient))
}

/// The tensors of a checkpoint of width d, on their way to a device.
#[derive(Debug)]
pub(super) struct Weights<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) width: usize,
    pub(super) device: &'a Device,
}

impl<'a> Weights<'a> {
    pub(super) fn of(checkpoint: &'a Checkpoint, device: &'a Device) -> Self {
        Self { checkpoint, width: checkpoint.architecture().hidden, device }
    }

    /// The width of an MLP, m, which no configuration need say.
    fn intermediate(&self, mlp: &Mlp) -> Result<usize, FileError> {
        let shape = self.checkpoint.tensors().shape(&mlp.up.weight);
        let all = shape.and_then(|shape| shape.get(usize::from(mlp.up.transposed)).copied());
        all.map(|all| all / mlp.up.part.1).ok_or_else(|| FileError::TensorMissing {
            path: self.checkpoint.path().to_path_buf(),
            tensor: mlp.up.weight.clone(),
            expected: Vec::new(),
        })
    }

    /// A tensor, of that shape.
    pub(super) fn take(&self, name: &str, shape: &[usize]) -> Result<Tensor, RuntimeError> {
        let (numbers, _) = self.checkpoint.tensor_of(name, shape)?.into_raw_vec_and_offset();
        Ok(Tensor::from_vec(numbers, shape, self.device)?)
    }

    /// The weight of a projection, (out, inputs).
    fn weight(&self, linear: &Linear, out: usize, inputs: usize) -> Result<Tensor, RuntimeError> {
        let stored = self.take(&linear.weight, &shape(linear, out, inputs))?;
        let whole = if linear.transposed { stored.t()? } else { stored };
        Ok(whole.narrow(0, linear.part.0 * out, out)?.contiguous()?)
    }

    /// The bias of a projection, (out).
    fn bias(&self, linear: &Linear, out: usize) -> Result<Option<Tensor>, RuntimeError> {
        let Some(name) = &linear.bias else { return Ok(None) };
        let (number, of) = linear.part;
        Ok(Some(self.take(name, &[of * out])?.narrow(0, number * out, out)?))
    }

    fn check(&self, linear: &Linear, out: usize, inputs: usize) -> Result<(), FileError> {
        self.checkpoint.check_tensor(&linear.weight, &shape(linear, out, inputs))?;
        let bias = linear.bias.as_ref();
        bias.map_or(Ok(()), |bias| self.checkpoint.check_tensor(bias, &[linear.part.1 * out]))
    }
}

/// The shape of the tensor that holds a projection.
fn shape(linear: &Linear, out: usize, inputs: usize) -> [usize; 2] {
    let out = linear.part.1 * out;
    if linear.transposed { [inputs, out] } else { [out, inputs] }
}

impl FeedForward {
    fn load(weights: &Weights<'_>, mlp: &Mlp) -> Result<Self, RuntimeError> {
        let (d, m) = (weights.width, weights.intermediate(mlp)?);
        let above: Vec<&Linear> = mlp.gate.iter().chain([&mlp.up]).collect();
        let rows = above.iter().map(|linear| weights.weight(linear, m, d));
        let rows: Vec<Tensor> = rows.collect::<Result<_, _>>()?;
        let biases = above.iter().map(|linear| weights.bias(linear, m));
        let biases: Vec<Option<Tensor>> = biases.collect::<Result<_, _>>()?;
        let up_bias = if biases.iter().all(Option::is_none) {
            None
        } else {
            let zeros = Tensor::zeros(m, DType::F32, weights.device)?;
            let biases: Vec<Tensor> = biases.into_iter().map(|b| b.unwrap_or(zeros.clone())).collect();
            Some(Tensor::cat(&biases, 0)?)
        };
        Ok(Self {
            up: Tensor::cat(&rows, 0)?,
            up_bias,
            down: weights.weight(&mlp.down, d, m)?,
            down_bias: weights.bias(&mlp.down, d)?,
            activation: mlp.activation,
            has_gate: mlp.gate.is_some(),
        })
    }

    fn check(weights: &Weights<'_>, mlp: &Mlp) -> Result<(), FileError> {
        let (d, m) = (weights.width, weights.intermediate(mlp)?);
        mlp.gate.iter().chain([&mlp.up]).try_for_each(|linear| weights.check(linear, m, d))?;
        weights.check(&mlp.down, d, m)
    }

    /// What the activation reads, (N, d) → (N, m or 2m).
    pub(super) fn widened(&self, x: &Tensor) -> Candle<Tensor> {
        linear(x, &self.up, &self.up_bias)
    }

    /// (N, d) → (N, d).
    pub(super) fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        let wide = self.widened(x)?;
        let hidden = match self.has_gate {
            true => gated(self.activation, &wide)?,
            false => activated(self.activation, &wide)?,
        };
        linear(&hidden, &self.down, &self.down_bias)
    }
}

impl Layer {
    pub(super) fn load(weights: &Weights<'_>, block: &Block, i: usize) -> Result<Self, RuntimeError> {
        let checkpoint = weights.checkpoint;
        let layers = &checkpoint.architecture().layers;
        let spec = layers.get(i).ok_or(Error::NoLayer { layer: i, layers: layers.len() })?;
        let norms = HeadNorms::load(weights, spec)?;
        let norm = |norm: &Option<Norm>| {
            norm.as_ref().map(|norm| Normed::load(weights, norm, weights.width)).transpose()
        };
        Ok(Self {
            attention: Attention::new(&checkpoint.heads(i)?, None, spec, norms, weights.device)?,
            attention_norm: norm(&block.attention_norm)?,
            attention_output_norm: norm(&block.attention_output_norm)?,
            mlp_norm: norm(&block.mlp_norm)?,
            mlp_output_norm: norm(&block.mlp_output_norm)?,
            mlp: FeedForward::load(weights, &block.mlp)?,
            parallel: block.parallel,
            residual: block.residual,
        })
    }

    /// Whether what [`Layer::load`] reads beside the heads, which every checkpoint has, is there and of its shape.
    pub(super) fn check(weights: &Weights<'_>, block: &Block, i: usize) -> Result<(), FileError> {
        let (checkpoint, d) = (weights.checkpoint, weights.width);
        FeedForward::check(weights, &block.mlp)?;
        let norms = block.norms().flat_map(Norm::tensors);
        norms.into_iter().try_for_each(|name| checkpoint.check_tensor(name, &[d]))?;
        let spec = checkpoint.architecture().layers.get(i);
        spec.map_or(Ok(()), |spec| HeadNorms::check(weights, spec))
    }

    /// What the attention reads, (N, d), after the norm.
    pub(super) fn attention_input(&self, x: &Tensor) -> Candle<Tensor> {
        normed(&self.attention_norm, x)
    }

    /// The layer with number `i`, (N, d) → (N, d).
    pub(super) fn forward(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        past: Option<&mut LayerCache>,
    ) -> Candle<Tensor> {
        let attended = self.attention.forward(&self.attention_input(x)?, pass, pass.rope(i), past)?;
        self.finish(x, &attended)
    }

    /// x and what the attention makes of it, both (N, d): the layer's output, (N, d).
    pub(super) fn finish(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        let y = self.joined(x, attended)?;
        self.added(&y, if self.parallel { x } else { &y })
    }

    /// The stream with what the attention gives, (N, d).
    pub(super) fn joined(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        x + times(normed(&self.attention_output_norm, attended)?, self.residual)?
    }

    /// The stream with what the MLP makes of `read`, (N, d).
    pub(super) fn added(&self, stream: &Tensor, read: &Tensor) -> Candle<Tensor> {
        let made = self.mlp.forward(&normed(&self.mlp_norm, read)?)?;
        stream + times(normed(&self.mlp_output_norm, &made)?, self.residual)?
    }
}

/// A tensor, multiplied.
pub(super) fn times(x: Tensor, factor: f64) -> Candle<Tensor> {
    if factor == 1.0 { Ok(x) } else { x.affine(factor, 0.0) }
}

/// x (N, in), weight (out, in) → (N, out).
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: &Option<Tensor>) -> Candle<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}
