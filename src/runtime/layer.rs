use candle_core::{D, DType, Device, Result as Candle, Tensor};
use candle_nn::ops::{layer_norm, rms_norm};

use super::RuntimeError;
use super::attention::Attention;
use super::cache::Past;
use super::handed::Handed;
use super::norms::HeadNorms;
use super::ops::add_to_rows;
use super::pass::Pass;
use super::rest::Rest;
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{Block, Norm, NormKind};
use crate::plan::Others;

/// One layer, as [`Block`] has it.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention: Attention,
    pub(super) rest: Rest,
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
    /// In the place of the checkpoint's.
    pub(super) others: Option<&'a Others>,
}

impl<'a> Weights<'a> {
    pub(super) fn of(checkpoint: &'a Checkpoint, device: &'a Device) -> Self {
        Self { checkpoint, width: checkpoint.architecture().hidden, device, others: None }
    }

    /// A tensor, of that shape.
    pub(super) fn take(&self, name: &str, shape: &[usize]) -> Result<Tensor, RuntimeError> {
        let numbers = match self.others.and_then(|others| others.get(name)) {
            Some(numbers) if numbers.len() == shape.iter().product::<usize>() => numbers.clone(),
            Some(numbers) => return Err(Error::shape(name, shape, &[numbers.len()]).into()),
            None => self.checkpoint.tensor_of(name, shape)?.into_raw_vec_and_offset().0,
        };
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
        let attention = Attention::new(&checkpoint.heads(i)?, None, spec, norms, weights.device)?;
        Ok(Self { attention, rest: Rest::load(weights, block)? })
    }

    /// Whether what [`Layer::load`] reads beside the heads, which every checkpoint has, is there and of its shape.
    pub(super) fn check(weights: &Weights<'_>, block: &Block, i: usize) -> Result<(), FileError> {
        Rest::check(weights, block)?;
        let spec = weights.checkpoint.architecture().layers.get(i);
        spec.map_or(Ok(()), |spec| HeadNorms::check(weights, spec))
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
        let input = self.rest.attention_input(x)?;
        let (attended, handed) = self.attention.forward(&input, pass, pass.rope(i), past, below)?;
        Ok((self.rest.finish(x, &attended)?, handed))
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
