use candle_core::{DType, Device, Tensor};
use candle_nn::ops::rms_norm;

use super::RuntimeError;
use super::attention::{Attention, Pass};
use super::cache::LayerCache;
use super::ops::SwiGlu;
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{Block, Linear, Mlp, Norm};

/// One layer: x + attention(norm(x)), then y + mlp(norm(y)).
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention: Attention,
    pub(super) attention_norm: Normed,
    pub(super) mlp_norm: Normed,
    /// Gate rows, then up rows, (2m, d).
    pub(super) gate_up: Tensor,
    pub(super) gate_up_bias: Option<Tensor>,
    /// (d, m).
    pub(super) down: Tensor,
    pub(super) down_bias: Option<Tensor>,
}

/// A root mean square norm and its weight, (d).
#[derive(Debug, Clone)]
pub(super) struct Normed {
    pub(super) weight: Tensor,
    pub(super) epsilon: f32,
}

impl Normed {
    pub(super) fn load(weights: &Weights<'_>, norm: &Norm) -> Result<Self, RuntimeError> {
        Ok(Self { weight: weights.take(&norm.weight, &[weights.width])?, epsilon: norm.epsilon as f32 })
    }

    /// x (N, d) → (N, d).
    pub(super) fn of(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm(x, &self.weight, self.epsilon)
    }
}

/// The tensors of a checkpoint of width d, on their way to a device.
#[derive(Debug)]
pub(super) struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    pub(super) width: usize,
    device: &'a Device,
}

impl<'a> Weights<'a> {
    pub(super) fn of(checkpoint: &'a Checkpoint, device: &'a Device) -> Self {
        Self { checkpoint, width: checkpoint.architecture().hidden, device }
    }

    /// The width of an MLP, m, which no configuration need say.
    fn intermediate(&self, mlp: &Mlp) -> Result<usize, FileError> {
        let shape = self.checkpoint.tensors().shape(&mlp.gate.weight);
        let rows = shape.and_then(|shape| shape.first().copied());
        rows.ok_or_else(|| self.checkpoint.missing(&mlp.gate.weight, &[]))
    }

    /// A tensor, of that shape.
    pub(super) fn take(&self, name: &str, shape: &[usize]) -> Result<Tensor, RuntimeError> {
        let (numbers, _) = self.checkpoint.tensor_of(name, shape)?.into_raw_vec_and_offset();
        Ok(Tensor::from_vec(numbers, shape, self.device)?)
    }

    fn bias(&self, linear: &Linear, size: usize) -> Result<Option<Tensor>, RuntimeError> {
        linear.bias.as_ref().map(|name| self.take(name, &[size])).transpose()
    }
}

impl Layer {
    pub(super) fn load(weights: &Weights<'_>, block: &Block, i: usize) -> Result<Self, RuntimeError> {
        let (checkpoint, d, mlp) = (weights.checkpoint, weights.width, &block.mlp);
        let layers = &checkpoint.architecture().layers;
        let spec = layers.get(i).ok_or(Error::NoLayer { layer: i, layers: layers.len() })?;
        let m = weights.intermediate(mlp)?;
        let gate_up_bias = match (weights.bias(&mlp.gate, m)?, weights.bias(&mlp.up, m)?) {
            (None, None) => None,
            (gate, up) => {
                let zeros = Tensor::zeros(m, DType::F32, weights.device)?;
                Some(Tensor::cat(&[&gate.unwrap_or(zeros.clone()), &up.unwrap_or(zeros)], 0)?)
            }
        };
        let [gate, up] = [&mlp.gate, &mlp.up].map(|linear| weights.take(&linear.weight, &[m, d]));
        Ok(Self {
            attention: Attention::new(&checkpoint.heads(i)?, None, spec, weights.device)?,
            attention_norm: Normed::load(weights, &block.attention_norm)?,
            mlp_norm: Normed::load(weights, &block.mlp_norm)?,
            gate_up: Tensor::cat(&[&gate?, &up?], 0)?,
            gate_up_bias,
            down: weights.take(&mlp.down.weight, &[d, m])?,
            down_bias: weights.bias(&mlp.down, d)?,
        })
    }

    /// Whether what [`Layer::load`] reads beside the heads, which every checkpoint has, is there and of its shape.
    pub(super) fn check(weights: &Weights<'_>, block: &Block) -> Result<(), FileError> {
        let (checkpoint, d, mlp) = (weights.checkpoint, weights.width, &block.mlp);
        let m = weights.intermediate(mlp)?;
        for (linear, [rows, columns]) in [(&mlp.gate, [m, d]), (&mlp.up, [m, d]), (&mlp.down, [d, m])] {
            checkpoint.check_tensor(&linear.weight, &[rows, columns])?;
            linear.bias.as_ref().map_or(Ok(()), |bias| checkpoint.check_tensor(bias, &[rows]))?;
        }
        let norms = [&block.attention_norm, &block.mlp_norm];
        norms.into_iter().try_for_each(|norm| checkpoint.check_tensor(&norm.weight, &[d]))
    }

    /// What the attention reads, (N, d), after the norm.
    pub(super) fn attention_input(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.attention_norm.of(x)
    }

    /// The layer with number `i`, (N, d) → (N, d).
    pub(super) fn forward(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        past: Option<&mut LayerCache>,
    ) -> candle_core::Result<Tensor> {
        self.feed_forward(
            &(x + self.attention.forward(&self.attention_input(x)?, pass, pass.rope(i), past)?)?,
        )
    }

    /// What comes after attention was added, (N, d) → (N, d).
    pub(super) fn feed_forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let gated = linear(&self.mlp_norm.of(x)?, &self.gate_up, &self.gate_up_bias)?;
        x + linear(&SwiGlu.of(&gated)?, &self.down, &self.down_bias)?
    }
}

/// x (N, in), weight (out, in) → (N, out).
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: &Option<Tensor>) -> candle_core::Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}
