//! What a computation is given besides its data: a seed, somebody to report to, and where models run.

use std::fmt;
use std::ops::ControlFlow;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::error::{Error, Result};

/// How far a stage of a computation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// Name of the stage, for people: `"layers"`, `"nsga2"`, ….
    pub stage: &'a str,
    /// Steps done.
    pub done: u64,
    /// Steps in all.
    pub total: u64,
    /// How it goes, for people; mostly empty.
    pub detail: &'a str,
}

/// Watches a computation and may stop it. Closures `Fn(&Progress) -> ControlFlow<()>` are observers.
pub trait Observer: Sync {
    /// Called between steps, from whichever thread took them, one call at a time or several at once.
    /// `ControlFlow::Break` ends the computation with [`Error::Cancelled`].
    fn observe(&self, progress: &Progress<'_>) -> ControlFlow<()>;
}

impl<F: Fn(&Progress<'_>) -> ControlFlow<()> + Sync> Observer for F {
    fn observe(&self, progress: &Progress<'_>) -> ControlFlow<()> {
        self(progress)
    }
}

/// Where models run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// The NVIDIA GPU of this number, in builds with the feature `cuda`.
    Cuda(usize),
    /// The GPU of an Apple machine, in builds with the feature `metal`.
    Metal,
}

/// In what numbers models compute that have a GPU for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// In f32; products round their factors to TF32 (10 bits of mantissa) and sum in f32.
    #[default]
    F32,
    /// As [`Precision::F32`], but where weights that do not change are stored in BF16, what they are multiplied with is rounded to that (7
    /// bits), too, and so is the product; and so are the products that make a distillation's steps of Muon orthogonal. About twice as fast, on a
    /// large model.
    Bf16,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "the CPU",
            Self::Cuda(number) => return write!(f, "CUDA device {number}"),
            Self::Metal => "a Metal device",
        })
    }
}

/// A seed and, if wanted, an observer and a device. `Copy`, handed down by value.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    seed: u64,
    observer: Option<&'a dyn Observer>,
    stoppable: bool,
    device: Device,
    precision: Precision,
}

impl<'a> Run<'a> {
    /// A silent run on the CPU. The same seed gives the same result on any number of threads.
    pub fn new(seed: u64) -> Self {
        let (device, precision) = (Device::Cpu, Precision::F32);
        Self { seed, observer: None, stoppable: true, device, precision }
    }

    /// This run, watched.
    pub fn with_observer(self, observer: &'a dyn Observer) -> Self {
        Self { observer: Some(observer), ..self }
    }

    /// This run, unwatched.
    pub fn unwatched(self) -> Self {
        Self { observer: None, ..self }
    }

    /// This run, watched as before, but no longer to be stopped: what was computed at length should not be lost on its last
    /// steps.
    pub fn to_the_end(self) -> Self {
        Self { stoppable: false, ..self }
    }

    /// This run, with the models that it loads on a device. Models that are there already run where they are.
    pub fn on(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// This run, with the models that it loads computing in these numbers.
    pub fn computing(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// In what numbers the models compute that this run loads.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where this run loads models to.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// This run with another seed.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The run of part `stream` of the work: its seed depends on this seed and on `stream` alone,
    /// so layer 7 gets the same one whatever ran before it.
    pub fn fork(self, stream: u64) -> Self {
        // SplitMix64's finaliser (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195).
        let mut z = self.seed ^ stream.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self { seed: z ^ (z >> 31), ..self }
    }

    /// Reports that `done` of `total` steps of `stage` are over.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when the observer breaks.
    pub fn step(&self, stage: &str, done: u64, total: u64) -> Result<()> {
        self.step_with(stage, done, total, "")
    }

    /// Reports as [`Run::step`] does, and how it goes.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when the observer breaks.
    pub fn step_with(&self, stage: &str, done: u64, total: u64, detail: &str) -> Result<()> {
        let Some(observer) = self.observer else { return Ok(()) };
        match observer.observe(&Progress { stage, done, total, detail }) {
            ControlFlow::Break(()) if self.stoppable => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }

    /// The generator of this run; ChaCha8, whose output is fixed across platforms and releases.
    pub(crate) fn rng(&self) -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(self.seed)
    }
}

impl fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Run");
        shown.field("seed", &self.seed).field("observed", &self.observer.is_some());
        shown.field("device", &self.device).field("precision", &self.precision).finish()
    }
}

/// `f(0), …, f(n − 1)` in order, on all threads where the feature `rayon` allows.
pub(crate) fn map_ordered<T: Send>(n: usize, f: impl Fn(usize) -> T + Send + Sync) -> Vec<T> {
    #[cfg(feature = "rayon")]
    {
        use rayon::prelude::*;
        (0..n).into_par_iter().map(f).collect()
    }
    #[cfg(not(feature = "rayon"))]
    (0..n).map(f).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_to_the_end_tells_and_does_not_stop() {
        let told = std::sync::atomic::AtomicU64::new(0);
        let watch = |progress: &Progress<'_>| {
            told.store(progress.done, std::sync::atomic::Ordering::Relaxed);
            ControlFlow::Break(())
        };
        let run = Run::new(0).with_observer(&watch);
        assert!(matches!(run.step("stage", 1, 2), Err(Error::Cancelled)));
        assert!(run.to_the_end().fork(3).step("stage", 2, 2).is_ok());
        assert_eq!(told.into_inner(), 2);
    }
}
