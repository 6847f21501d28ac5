//! What the steps of a layer pass back: for each the gradient of what it reads, given that of what it gives.

use candle_core::{CpuStorage, D, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

use super::rows::{FEW, in_parts};
use super::{numbers, rms_norm_backward};

/// From what queries read to their scores, through the softmax over keys: `p ⊙ (g − Σ p g)`, g = `of_read` valuesᵀ, of
/// probabilities p (…, t, s), the gradient of what was read (…, t, h), and the values (…, s, h). `Σ p g` is also `worth`, what was
/// read times its gradient (…, t, 1): elsewhere than on the CPU it has to be given.
pub(in crate::runtime) fn scores_backward(
    probabilities: &Tensor,
    of_read: &Tensor,
    values: &Tensor,
    worth: Option<&Tensor>,
) -> Result<Tensor> {
    match worth {
        Some(worth) if probabilities.elem_count() > FEW => {
            by_one_product(probabilities, of_read, values, worth)
        }
        Some(worth) => probabilities * of_read.matmul(&values.t()?)?.broadcast_sub(worth)?,
        None => {
            let gradient = of_read.matmul(&values.t()?)?;
            gradient.inplace_op2(probabilities, &SoftmaxBackward)?;
            Ok(gradient)
        }
    }
}

/// `g − Σ p g` as one product, of `of_read` with `worth` beside it and the values with ones: on a GPU to take a number off each
/// row takes longer than the product.
fn by_one_product(
    probabilities: &Tensor,
    of_read: &Tensor,
    values: &Tensor,
    worth: &Tensor,
) -> Result<Tensor> {
    let of_read = Tensor::cat(&[of_read, &in_parts(&worth.neg()?)?], D::Minus1)?;
    let (b, g, s, _) = values.dims4()?;
    let values =
        Tensor::cat(&[values, &Tensor::ones((b, g, s, 4), values.dtype(), values.device())?], D::Minus1)?;
    probabilities * of_read.matmul(&values.t()?)?
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

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::ops::softmax_last_dim;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What other devices compute is what the CPU computes, and both are the definition.
        #[test]
        fn all_ways_agree(t in 1usize..9, s in 1usize..9, h in 1usize..7, seed in 0usize..1000) {
            let numbers = |shape: (usize, usize, usize, usize), seed: usize| {
                let n = shape.0 * shape.1 * shape.2 * shape.3;
                let number = |i: usize| ((i * 7919 + seed * 31) % 401) as f32 / 100.0 - 2.0;
                Tensor::from_vec((0..n).map(number).collect::<Vec<_>>(), shape, &Device::Cpu).unwrap()
            };
            let probabilities = softmax_last_dim(&numbers((2, 3, t, s), seed)).unwrap();
            let (of_read, values) = (numbers((2, 3, t, h), seed + 1), numbers((2, 3, s, h), seed + 2));
            let read = probabilities.matmul(&values).unwrap();
            let worth = (&read * &of_read).unwrap().sum_keepdim(D::Minus1).unwrap();
            let all = [
                scores_backward(&probabilities, &of_read, &values, None),
                scores_backward(&probabilities, &of_read, &values, Some(&worth)),
                by_one_product(&probabilities, &of_read, &values, &worth),
            ];
            let gradient = of_read.matmul(&values.t().unwrap()).unwrap();
            let mean = (&probabilities * &gradient).unwrap().sum_keepdim(D::Minus1).unwrap();
            let expected = (&probabilities * gradient.broadcast_sub(&mean).unwrap()).unwrap();
            for found in all {
                let apart = (found.unwrap() - &expected).unwrap().abs().unwrap().max_all().unwrap();
                prop_assert!(apart.to_scalar::<f32>().unwrap() < 1e-4);
            }
        }
    }
}
