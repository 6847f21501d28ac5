use super::Effort;
use crate::descent::Descent;
use crate::plan::{Refit, SharedHeads};
use crate::run::Device;
use crate::runtime::{LONGEST_WINDOW, Model};

/// What a distillation does unless it is told otherwise: rules that were measured (docs/quality.md).
#[derive(Debug)]
pub(super) struct Usual {
    /// Muon's products cost as much as a window on a CPU: they pay where a step reads several.
    pub(super) descent: Descent,
    /// Windows of a step: many small steps beat few large ones.
    pub(super) batch: usize,
    /// The highest rate: the better the start, the lower.
    pub(super) rate: f64,
    /// How strongly hidden states are pulled to the source's at first, which fades to nothing: of use for as long as there are
    /// new tokens to learn from.
    pub(super) pull: f64,
}

impl Usual {
    /// For windows of so many tokens.
    pub(super) fn new(effort: Effort, model: &Model, shared: &SharedHeads<'_>, length: usize) -> Self {
        let refitted = shared.done().refit == Some(Refit::Full);
        // A CPU reads few tokens in any time that people wait.
        let on_gpu = model.device() != Device::Cpu;
        let (many, large) = match effort {
            Effort::Tokens(tokens) => (tokens >= MANY_TOKENS, on_gpu && tokens >= LARGE_TOKENS),
            Effort::Time(_) => (on_gpu, false),
        };
        let (batch, faster) = if large { (LARGE_BATCH, LARGE_RATE) } else { (BATCH, 1.0) };
        let several = (batch / length.div_ceil(LONGEST_WINDOW)).max(1);
        let (muon, adam, few) = (Descent::Muon, Descent::AdamW, FEW_TOKENS.div_ceil(length));
        match (many, refitted) {
            (true, true) => Self { descent: muon, batch: several, rate: 7e-4 * faster, pull: 3.0 },
            (true, false) => Self { descent: muon, batch: several, rate: 1e-3 * faster, pull: 3.0 },
            (false, true) => Self { descent: adam, batch: few, rate: 4e-4, pull: 0.0 },
            (false, false) => Self { descent: adam, batch: few, rate: 5e-4, pull: 0.0 },
        }
    }
}

/// Windows of a step where there are many tokens; longer windows count by their tokens.
const BATCH: usize = 4;
/// And on a GPU, to which one of a few windows is little work, where there are so many tokens that steps are enough still; at a
/// rate so much higher.
const LARGE_BATCH: usize = 16;
const LARGE_TOKENS: u64 = 4_000_000;
const LARGE_RATE: f64 = 1.4;
/// Tokens of a step where there are few in all.
const FEW_TOKENS: usize = 512;
/// Tokens from which on there are many.
const MANY_TOKENS: u64 = 1_000_000;
