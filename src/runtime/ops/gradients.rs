//! What the steps of a layer pass back: for each the gradient of what it reads, given that of what it gives.

use candle_core::{CpuStorage, D, Device, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

use super::{numbers, rms_norm_backward};

/// Of a softmax over the last dimension: `p ⊙ (g − Σ p g)`, where p are the probabilities and g their gradient, which is
/// overwritten on the CPU.
pub(in crate::runtime) fn softmax_backward(probabilities: &Tensor, gradient: Tensor) -> Result<Tensor> {
    if let Device::Cpu = gradient.device() {
        gradient.inplace_op2(probabilities, &SoftmaxBackward)?;
        return Ok(gradient);
    }
    let mean = (probabilities * &gradient)?.sum_keepdim(D::Minus1)?;
    probabilities * gradient.broadcast_sub(&mean)?
}

struct SoftmaxBackward;

impl InplaceOp2 for SoftmaxBackward {
    fn name(&self) -> &'static str {
        "softmax-backward"
    }

    fn cpu_fwd(&self, gradient: &mut CpuStorage, at: &Layout, p: &CpuStorage, of: &Layout) -> Result<()> {
        let (p, keys) = (numbers(p, of)?, at.dims().last().copied().unwrap_or(1).max(1));
        let (CpuStorage::F32(gradient), Some((from, to))) = (gradient, at.contiguous_offsets()) else {
            candle_core::bail!("gradients must be contiguous and f32");
        };
        gradient[from..to].par_chunks_exact_mut(keys).zip(p.par_chunks_exact(keys)).for_each(|(g, p)| {
            let mean: f32 = g.iter().zip(p).map(|(g, p)| g * p).sum();
            g.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - mean));
        });
        Ok(())
    }
}

/// Of `w ⊙ (x − mean x) / √(var x + ε) + b`: x and the gradient (N, d) → (N, d).
pub(in crate::runtime) fn layer_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    gradient: &Tensor,
) -> Result<Tensor> {
    let centred = |x: &Tensor| x.broadcast_sub(&x.mean_keepdim(D::Minus1)?);
    let unit = Tensor::ones_like(weight)?;
    centred(&rms_norm_backward(&centred(x)?, &unit, epsilon, &gradient.broadcast_mul(weight)?)?)
}

/// Scores bounded to `c tanh(x / c)`.
pub(in crate::runtime) fn capped(scores: &Tensor, cap: f64) -> Result<Tensor> {
    (scores / cap)?.tanh()? * cap
}

/// What passes back through [`capped`], given what it made.
pub(in crate::runtime) fn capped_backward(made: &Tensor, cap: f64, gradient: &Tensor) -> Result<Tensor> {
    gradient * (1.0 - (made / cap)?.sqr()?)?
}
