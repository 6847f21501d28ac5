use ndarray::ArrayView3;

use super::attended::{Noted, append_each};
use super::rows::{BITS, bits_of};
use super::{CachePolicy, Kept, LayerCache};
use crate::error::{Error, Result};
use crate::spec::Spec;

/// Drops what recent queries would not attend to, head by head and without a fixed budget, `corm`: Cache Optimization with Recent
/// Message (Dai et al. 2024, arXiv 2404.15949).
///
/// A key is minor to query t where its attention weight is below `threshold`/t, with the paper's threshold of 1: less than an even
/// share of the t tokens so far. A token is dropped once none of the last `window` queries found its key anything but minor, and it
/// is not among the last `recent` tokens. Queries near one another are alike, so what none of them wants the next will not want.
///
/// Where the paper holds a bit for each of the last queries, this holds the position of the last query to which the key was not
/// minor, which says as much. A query of any query head of the group counts. The rule and the two constants are as the paper's abstract and
/// later papers describe them; its algorithm in print could not be checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Corm {
    window: usize,
    recent: usize,
    threshold: f64,
    bits: u8,
}

impl Default for Corm {
    fn default() -> Self {
        Self { window: 256, recent: 32, threshold: 1.0, bits: BITS }
    }
}

impl Corm {
    /// With the last `window` queries asked, and the last `recent` tokens kept whatever they say.
    pub fn new(window: usize, recent: usize) -> Self {
        Self { window, recent, ..Self::default() }
    }

    /// The policy that a spec describes: `window` (256 unless said), `recent` (32), `threshold` (1), `bits` (16; as in
    /// [`FullCache`](super::FullCache)).
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::UnknownSetting`].
    pub fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["window", "recent", "threshold", "bits"])?;
        let unless = Self::default();
        let threshold = spec.number("threshold")?.unwrap_or(unless.threshold);
        if threshold < 0.0 {
            return Err(Error::setting("threshold", threshold, "0 or more"));
        }
        let window = spec.count("window")?.unwrap_or(unless.window);
        let recent = spec.count("recent")?.unwrap_or(unless.recent);
        Ok(Self { window, recent, threshold, bits: bits_of(spec, BITS)? })
    }
}

impl CachePolicy for Corm {
    fn spec(&self) -> Spec {
        let spec = Spec::new("corm").with("window", self.window).with("recent", self.recent);
        spec.with("threshold", self.threshold).with("bits", usize::from(self.bits))
    }

    fn layer(&self, _layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        Ok(Box::new(Wanted { policy: *self, heads: vec![Noted::new(head_dim); kv_heads], step: 0 }))
    }
}

/// Tokens with the position of the last query that wanted them.
#[derive(Debug)]
struct Wanted {
    policy: Corm,
    heads: Vec<Noted<u32>>,
    /// Tokens of this step.
    step: usize,
}

impl LayerCache for Wanted {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        append_each(&mut self.heads, keys, values, positions, |position| position);
        self.step = positions.len();
    }

    fn read(&self, head: usize) -> Kept {
        self.heads[head].read()
    }

    fn wants_weights(&self) -> bool {
        true
    }

    fn attended(&mut self, head: usize, weights: ArrayView3<'_, f32>) {
        let head = &mut self.heads[head];
        let first = head.next() - self.step as u32;
        for of_query_head in weights.outer_iter() {
            for (t, weights) in (first..).zip(of_query_head.outer_iter()) {
                let even = (self.policy.threshold / f64::from(t + 1)) as f32;
                // What comes after the query has no weight, and was wanted later.
                for (wanted, &weight) in head.notes.iter_mut().zip(weights) {
                    if weight >= even {
                        *wanted = t.max(*wanted);
                    }
                }
            }
        }
    }

    fn settle(&mut self) {
        let Corm { window, recent, bits, .. } = self.policy;
        for head in &mut self.heads {
            head.rows.settle(bits);
            let (next, notes, positions) = (head.next() as usize, head.notes.clone(), head.positions.clone());
            let reaches = |position: u32, by: usize| (position as usize).saturating_add(by) >= next;
            head.retain(|i| reaches(positions[i], recent) || reaches(notes[i], window));
        }
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(Noted::bytes).sum()
    }
}
