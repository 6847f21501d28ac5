use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape};
use rayon::prelude::*;

/// Rows of m gates, then m values, (N, 2m) → silu(gate) · value, (N, m).
#[derive(Debug, Clone, Copy)]
pub(in crate::runtime) struct SwiGlu;

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
