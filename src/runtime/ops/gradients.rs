//! What the steps of a layer pass back: for each the gradient of what it reads, given that of what it gives.

use candle_core::{CpuStorage, CustomOp2, D, Device, InplaceOp2, Layout, Result, Shape, Tensor};
use candle_nn::ops::sigmoid;
use rayon::prelude::*;

/// The numbers of a contiguous f32 tensor on the CPU.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(numbers), Some((from, to))) => Ok(&numbers[from..to]),
        _ => candle_core::bail!("gradients must be contiguous and f32"),
    }
}

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

/// Of `silu(gate) ⊙ value`: x (N, 2m) and the gradient (N, m) → (N, 2m).
pub(in crate::runtime) fn swiglu_backward(x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    if let Device::Cpu = x.device() {
        return x.apply_op2_no_bwd(gradient, &SwiGluBackward);
    }
    let m = gradient.dim(1)?;
    let (gate, value) = (x.narrow(1, 0, m)?, x.narrow(1, m, m)?);
    let share = sigmoid(&gate)?;
    let silu = (&gate * &share)?;
    let slope = (&share + (&silu * (1.0 - &share)?)?)?;
    Tensor::cat(&[((gradient * value)? * slope)?, (gradient * silu)?], 1)
}

struct SwiGluBackward;

impl CustomOp2 for SwiGluBackward {
    fn name(&self) -> &'static str {
        "swiglu-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of: &Layout,
        gradient: &CpuStorage,
        at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gradient, (n, width)) = (numbers(x, of)?, numbers(gradient, at)?, of.shape().dims2()?);
        let m = width / 2;
        let mut back = vec![0.0; n * width];
        let rows = x.par_chunks_exact(width).zip(gradient.par_chunks_exact(m));
        back.par_chunks_exact_mut(width).zip(rows).for_each(|(back, (x, gradient))| {
            let ((gates, values), (of_gate, of_value)) = (x.split_at(m), back.split_at_mut(m));
            for i in 0..m {
                let share = 1.0 / (1.0 + (-gates[i]).exp());
                let silu = gates[i] * share;
                of_gate[i] = gradient[i] * values[i] * (share + silu * (1.0 - share));
                of_value[i] = gradient[i] * silu;
            }
        });
        Ok((CpuStorage::F32(back), (n, width).into()))
    }
}

/// Of `w ⊙ x / √(mean x² + ε)`: x and the gradient (N, d) → (N, d).
pub(in crate::runtime) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    gradient: &Tensor,
) -> Result<Tensor> {
    let scaled = gradient.broadcast_mul(weight)?;
    let share = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?.powf(-0.5)?;
    let along = ((&scaled * x)?.mean_keepdim(D::Minus1)? * share.powf(3.0)?)?;
    scaled.broadcast_mul(&share)? - x.broadcast_mul(&along)?
}
