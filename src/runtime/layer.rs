use candle_core::{D, DType, Device, Result as Candle, Tensor};
use candle_nn::ops::{layer_norm, rms_norm};

use super::RuntimeError;
use super::attention::Attention;
use super::cache::Past;
use super::handed::Handed;
use super::mlp::Hidden;
use super::norms::HeadNorms;
use super::ops::{add_to_rows, combined};
use super::pass::Pass;
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{Block, Norm, NormKind};

/// One layer, as [`Block`] has it.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention: Attention,
    pub(super) attention_norm: Option<Normed>,
    pub(super) attention_output_norm: Option<Normed>,
    pub(super) mlp_norm: Option<Normed>,
    pub(super) mlp_output_norm: Option<Normed>,
    pub(super) mlp: Hidden,
    pub(super) parallel: bool,
    pub(super) residual: f64,
    pub(super) sum_norms: [Option<Normed>; 2],
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

    /// A tensor, of that shape.
    pub(super) fn take(&self, name: &str, shape: &[usize]) -> Result<Tensor, RuntimeError> {
        let (numbers, _) = self.checkpoint.tensor_of(name, shape)?.into_raw_vec_and_offset();
        Ok(Tensor::from_vec(numbers, shape, self.device)?)
    }

    /// The first row of a matrix of this width, (1, d).
    pub(super) fn first_row(&self, name: &str) -> Result<Tensor, RuntimeError> {
        let rows = self.checkpoint.tensors().shape(name).and_then(|shape| shape.first().copied());
        Ok(self.take(name, &[rows.unwrap_or(1).max(1), self.width])?.narrow(0, 0, 1)?)
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
            mlp: Hidden::load(weights, &block.mlp)?,
            parallel: block.parallel,
            residual: block.residual,
            sum_norms: [norm(&block.sum_norms[0])?, norm(&block.sum_norms[1])?],
        })
    }

    /// Whether what [`Layer::load`] reads beside the heads, which every checkpoint has, is there and of its shape.
    pub(super) fn check(weights: &Weights<'_>, block: &Block, i: usize) -> Result<(), FileError> {
        let (checkpoint, d) = (weights.checkpoint, weights.width);
        Hidden::check(weights, &block.mlp)?;
        let norms = block.norms().flat_map(Norm::tensors);
        norms.into_iter().try_for_each(|name| checkpoint.check_tensor(name, &[d]))?;
        let spec = checkpoint.architecture().layers.get(i);
        spec.map_or(Ok(()), |spec| HeadNorms::check(weights, spec))
    }

    /// What the attention reads, (N, d), after the norm.
    pub(super) fn attention_input(&self, x: &Tensor) -> Candle<Tensor> {
        normed(&self.attention_norm, x)
    }

    /// The layer with number `i`, (N, d) → (N, d), and the keys and values that it read.
    pub(super) fn forward(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        past: Option<&mut Past>,
        below: Option<&Handed>,
    ) -> Candle<(Tensor, Handed)> {
        let input = self.attention_input(x)?;
        let (attended, handed) = self.attention.forward(&input, pass, pass.rope(i), past, below)?;
        Ok((self.finish(x, &attended)?, handed))
    }

    /// x and what the attention makes of it, both (N, d): the layer's output, (N, d).
    pub(super) fn finish(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        let y = self.joined(x, attended)?;
        self.added(&y, if self.parallel { x } else { &y })
    }

    /// The stream with what the attention gives, (N, d).
    pub(super) fn joined(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        self.behind(&self.attention_sum(x, attended)?)
    }

    /// The stream with what the MLP makes of `read`, (N, d).
    pub(super) fn added(&self, stream: &Tensor, read: &Tensor) -> Candle<Tensor> {
        normed(&self.sum_norms[1], &self.mlp_sum(stream, read)?)
    }

    /// What the norm behind the attention's sum makes of it.
    pub(super) fn behind(&self, sum: &Tensor) -> Candle<Tensor> {
        normed(&self.sum_norms[0], sum)
    }

    pub(super) fn attention_sum(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        combined(x, 1.0, &normed(&self.attention_output_norm, attended)?, self.residual)
    }

    pub(super) fn mlp_sum(&self, stream: &Tensor, read: &Tensor) -> Candle<Tensor> {
        let made = self.mlp.forward(&normed(&self.mlp_norm, read)?)?;
        combined(stream, 1.0, &normed(&self.mlp_output_norm, &made)?, self.residual)
    }
}

/// A weight as `x` is computed with: what is held in fewer bits is widened for as long as it is used.
pub(super) fn wide(weight: &Tensor, x: &Tensor) -> Candle<Tensor> {
    weight.to_dtype(x.dtype())
}

/// A weight in 16 bits where these hold every number of it and it is on a GPU, whose memory is small and fast: half of it is
/// saved, and widening it again takes a fraction of what it is used for.
pub(super) fn narrow(weight: Tensor) -> Candle<Tensor> {
    if weight.device().is_cpu() { Ok(weight) } else { narrowest(weight) }
}

fn narrowest(weight: Tensor) -> Candle<Tensor> {
    for dtype in [DType::BF16, DType::F16] {
        let short = weight.to_dtype(dtype)?;
        // Rows first: a maximum of all at once is one block's work.
        let apart = (short.to_dtype(weight.dtype())? - &weight)?.abs()?.max(D::Minus1)?.max_all()?;
        if apart.to_scalar::<f32>()? == 0.0 {
            return Ok(short);
        }
    }
    Ok(weight)
}

/// x (N, in), weight (out, in) → (N, out).
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: &Option<Tensor>) -> Candle<Tensor> {
    biased(x.matmul(&wide(weight, x)?.t()?)?, bias)
}

/// With a bias, where there is one; nobody else may have y.
pub(super) fn biased(y: Tensor, bias: &Option<Tensor>) -> Candle<Tensor> {
    match bias {
        Some(bias) => add_to_rows(y, bias),
        None => Ok(y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is held in 16 bits computes what it would in 32; what 16 bits do not hold stays.
    #[test]
    fn narrow_weights_lose_nothing() -> Candle<()> {
        let device = Device::Cpu;
        let x = Tensor::randn(0f32, 1.0, (3, 8), &device)?;
        let full = Tensor::randn(0f32, 1.0, (5, 8), &device)?;
        assert_eq!(narrowest(full.clone())?.dtype(), DType::F32);
        for dtype in [DType::BF16, DType::F16] {
            let stored = full.to_dtype(dtype)?.to_dtype(DType::F32)?;
            let short = narrowest(stored.clone())?;
            assert_eq!(short.dtype(), dtype);
            let of = |weight: &Tensor| linear(&x, weight, &None)?.to_vec2::<f32>();
            assert_eq!(of(&short)?, of(&stored)?);
        }
        Ok(())
    }
}
