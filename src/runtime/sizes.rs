//! How much of a text is computed at once.

use rayon::prelude::*;

use super::shelf::Shelf;
use super::{Model, RuntimeError};
use crate::run::Device;

/// Tokens computed at once.
const BATCH_TOKENS: usize = 4096;
/// On a GPU, where with few tokens the queueing of its work takes longer than the work; and numbers of logits: 1 GB.
const GPU_BATCH_TOKENS: usize = 1 << 14;
const GPU_BATCH_LOGITS: usize = 1 << 28;
/// Tokens that go through a layer together where it has to be read for them.
const STORED_TOKENS: usize = 1 << 14;
/// Windows whose inputs of all layers are held for the way back, on the CPU.
const HELD_WINDOWS: usize = 4;
/// Numbers of the source that are kept for the next time.
const KEPT: usize = 1 << 26;
/// Six gigabytes: two million tokens of calibration of a SmolLM2, 576 wide, fit. Of a text of which a part does not fit little is gained:
/// most steps have a window of that part.
const GPU_KEPT: usize = 3 << 29;
/// Numbers of a GPU for weights and traces together: twelve gigabytes. SmolLM2's sixteen windows of 512 tokens leave 2.7e9; weights of
/// 7e9 leave no room, and need what there is beside them for the memory of a descent.
const GPU_TRACED: u64 = 3 << 30;

impl Model {
    /// Windows of `len` tokens whose inputs of all layers are held at once, and those of them that go there and back as one: on the
    /// CPU each on its own, on a GPU all, for their logits are held in blocks.
    pub(crate) fn held(&self, len: usize) -> [usize; 2] {
        let many = (GPU_BATCH_TOKENS / len.max(1)).max(1);
        if self.device.is_cpu() { [HELD_WINDOWS, 1] } else { [many; 2] }
    }

    /// Numbers that may be kept rather than computed again.
    pub(crate) fn kept(&self) -> usize {
        if self.device.is_cpu() { KEPT } else { GPU_KEPT }
    }

    /// Numbers that layers may leave on the way there for the way back; on the CPU none, where it is memory that is short, not time.
    pub(crate) fn room_for_traces(&self) -> usize {
        if self.device.is_cpu() { 0 } else { beside(self.checkpoint.numbers_of_all()) }
    }

    /// Rows of `len` tokens that go from layer to layer together.
    pub(crate) fn together(&self, len: usize) -> usize {
        if self.in_files() { (STORED_TOKENS / len).max(1) } else { self.batch(len) }
    }

    /// Rows of `len` tokens that are computed at once: as many as keep the device busy and the memory small; on a GPU their logits are
    /// held, too.
    pub(crate) fn batch(&self, len: usize) -> usize {
        let tokens = match self.device() {
            Device::Cpu => BATCH_TOKENS,
            Device::Cuda(_) | Device::Metal => {
                GPU_BATCH_TOKENS.min(GPU_BATCH_LOGITS / self.vocabulary().max(1))
            }
        };
        (tokens / len).max(1)
    }

    /// Whether texts are computed at the same time, shared out over the threads. Not on a GPU: there they queue up one behind the other,
    /// and each that waits takes memory. Nor where the weights stay in files: such a model is so large that one text is work for all
    /// threads, and what each thread has ever computed in, the system's allocator keeps for that thread.
    pub(crate) fn shares_out(&self) -> bool {
        self.device.is_cpu() && !self.in_files()
    }

    /// Whether the weights stay in the checkpoint's files.
    pub(super) fn in_files(&self) -> bool {
        matches!(*self.shelf, Shelf::Stored { .. })
    }

    /// Changes all of some texts, each of as many rows as are computed as one.
    pub(crate) fn share_out<T: Send>(
        &self,
        texts: &mut [T],
        change: impl Fn(&mut T) -> Result<(), RuntimeError> + Sync + Send,
    ) -> Result<(), RuntimeError> {
        if self.shares_out() {
            return texts.par_iter_mut().try_for_each(change);
        }
        texts.iter_mut().try_for_each(change)
    }

    /// What is made of each of some texts, in their order.
    pub(crate) fn each<T: Sync, R: Send>(
        &self,
        texts: &[T],
        make: impl Fn(&T) -> Result<R, RuntimeError> + Sync + Send,
    ) -> Result<Vec<R>, RuntimeError> {
        if self.shares_out() {
            return texts.par_iter().map(make).collect();
        }
        texts.iter().map(make).collect()
    }

    /// Rows of `len` tokens that are computed as one. On the CPU each is computed on its own: its tensors stay small, and rows
    /// share out over the threads. On a GPU all that are held are.
    pub(crate) fn abreast(&self, len: usize) -> usize {
        if self.device.is_cpu() { 1 } else { self.batch(len) }
    }
}

/// Numbers of traces beside so many of weights.
fn beside(weights: u64) -> usize {
    GPU_TRACED.saturating_sub(weights) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_models_leave_no_traces() {
        assert!(beside(135_000_000) > 3_000_000_000);
        assert_eq!(beside(6_700_000_000), 0);
    }
}
