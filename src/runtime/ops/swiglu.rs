use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use candle_nn::ops::swiglu;
use rayon::prelude::*;

/// Rows of m gates, then m values, (N, 2m) → silu(gate) · value, (N, m).
#[derive(Debug, Clone, Copy)]
pub(in crate::runtime) struct SwiGlu;

impl SwiGlu {
    /// On the CPU in one pass, elsewhere of candle's operations.
    pub(in crate::runtime) fn of(self, x: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() { x.apply_op1_no_bwd(&self) } else { swiglu(x) }
    }
}

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = layout.shape().dims2()?;
        let (CpuStorage::F32(x), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("gates must be contiguous and f32");
        };
        let m = width / 2;
        let mut gated = vec![0.0; n * m];
        gated.par_chunks_exact_mut(m).zip(x[from..to].par_chunks_exact(width)).for_each(|(out, x)| {
            let (gates, values) = x.split_at(m);
            for ((out, &gate), &value) in out.iter_mut().zip(gates).zip(values) {
                *out = gate / (1.0 + (-gate).exp()) * value;
            }
        });
        Ok((CpuStorage::F32(gated), (n, m).into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What other devices compute is what the CPU computes.
        #[test]
        fn both_ways_agree(n in 1usize..6, m in 1usize..40, seed in 0u32..1000) {
            let numbers: Vec<f32> =
                (0..2 * n * m).map(|i| ((i as u32 * 7919 + seed * 31) % 201) as f32 / 10.0 - 10.0).collect();
            let x = Tensor::from_vec(numbers, (n, 2 * m), &Device::Cpu).unwrap();
            let (fast, general) = (SwiGlu.of(&x).unwrap(), swiglu(&x).unwrap());
            prop_assert_eq!(fast.dims(), [n, m]);
            let apart = (fast - general).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(apart < 1e-4, "{apart}");
        }
    }
}
