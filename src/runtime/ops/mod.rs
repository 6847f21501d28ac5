//! Steps of a layer in one pass over their numbers, shared out by rayon. Candle's own elementwise products wait for one
//! another on a pool of their own, which costs more than it gives where windows already run side by side.

mod activation;
mod causal_softmax;
mod combined;
mod exponential;
mod gradients;
mod rows;

use candle_core::{CpuStorage, Layout, Result, Storage};

pub(super) use activation::{
    activated, activated_backward, gated, gated_apart, gated_apart_backward, gated_backward,
};
pub(crate) use causal_softmax::{CausalSoftmax, KeptMask, visible};
pub(crate) use combined::{added, combined};
pub(crate) use exponential::{exp, largest, sum_of_exp, sum_of_exp_apart};
pub(super) use gradients::{capped, capped_backward, layer_norm_backward, scores_backward};
pub(super) use rows::{add_to_rows, rms_norm_backward};
pub(crate) use rows::{squared_lengths, times, weighed};

/// The numbers of a contiguous f32 tensor on the CPU.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(numbers), Some((from, to))) => Ok(&numbers[from..to]),
        _ => candle_core::bail!("numbers must be contiguous and f32"),
    }
}

/// [`numbers`] of a tensor, which must lie on the CPU.
pub(crate) fn numbers_on_cpu<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => numbers(storage, layout),
        _ => candle_core::bail!("numbers must be on the CPU"),
    }
}
