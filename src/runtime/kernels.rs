//! Two steps of a layer in one pass over their numbers, shared out by rayon. Candle's own elementwise products wait
//! for one another on a pool of their own, which costs more than it gives where windows already run side by side.

use candle_core::{CpuStorage, CustomOp1, InplaceOp1, Layout, Result, Shape};
use rayon::prelude::*;

/// Softmax of scores (…, T, S) over what each of the T new tokens may look at, in place; 0 elsewhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct CausalSoftmax {
    /// New tokens, T.
    pub(super) len: usize,
    /// Tokens before them, S − T.
    pub(super) start: usize,
    /// Tokens that a token may look back at, itself included.
    pub(super) reach: usize,
}

impl CausalSoftmax {
    /// Softmax of one row of scores, of the token at position `t`.
    pub(super) fn row(row: &mut [f32], t: usize, reach: usize) {
        let end = t + 1;
        let begin = end.saturating_sub(reach);
        let most = row[begin..end].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for score in &mut row[begin..end] {
            *score = (*score - most).exp();
            sum += *score;
        }
        let share = sum.recip();
        row[begin..end].iter_mut().for_each(|weight| *weight *= share);
        row[..begin].fill(0.0);
        row[end..].fill(0.0);
    }
}

impl InplaceOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let seen = self.start + self.len;
        let (CpuStorage::F32(scores), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("scores must be contiguous and f32");
        };
        scores[from..to].par_chunks_exact_mut(seen * self.len).for_each(|head| {
            for (t, row) in head.chunks_exact_mut(seen).enumerate() {
                Self::row(row, self.start + t, self.reach);
            }
        });
        Ok(())
    }
}

/// Rows of m gates, then m values, (N, 2m) → silu(gate) · value, (N, m).
#[derive(Debug, Clone, Copy)]
pub(super) struct SwiGlu;

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
