use ndarray::ArrayView3;

use super::rows::{Alike, BITS, bits_of};
use super::{CachePolicy, Kept, LayerCache};
use crate::error::{Error, Result};
use crate::spec::Spec;

/// Keeps the first tokens of a text and the last ones, `window`: the plain baseline of all that drop tokens.
///
/// The first ones, attention sinks, are what attention looks at when it looks at nothing (Xiao et al. 2023, "Efficient Streaming
/// Language Models with Attention Sinks", arXiv 2309.17453). Other than there, keys keep the positions of their tokens: a text goes
/// on as far as the model has positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingWindow {
    sinks: usize,
    recent: usize,
    bits: u8,
}

impl Default for SlidingWindow {
    fn default() -> Self {
        Self::new(4, 252)
    }
}

impl SlidingWindow {
    /// The first `sinks` tokens and the last `recent` ones, 1 at least, in 16 bits.
    pub fn new(sinks: usize, recent: usize) -> Self {
        Self { sinks, recent: recent.max(1), bits: BITS }
    }

    /// The policy that a spec describes: `sinks` (4 unless said), `recent` (252), `bits` (16; as in [`FullCache`](super::FullCache)).
    ///
    /// # Errors
    /// [`Error::Setting`], [`Error::UnknownSetting`].
    pub fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["sinks", "recent", "bits"])?;
        let unless = Self::default();
        let recent = spec.count("recent")?.unwrap_or(unless.recent);
        if recent == 0 {
            return Err(Error::setting("recent", recent, "at least 1 token"));
        }
        let sinks = spec.count("sinks")?.unwrap_or(unless.sinks);
        Ok(Self { sinks, recent, bits: bits_of(spec, BITS)? })
    }
}

impl CachePolicy for SlidingWindow {
    fn spec(&self) -> Spec {
        let spec = Spec::new("window").with("sinks", self.sinks).with("recent", self.recent);
        spec.with("bits", usize::from(self.bits))
    }

    fn layer(&self, _layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        Ok(Box::new(Ends { policy: *self, rows: Alike::new(kv_heads, head_dim), first: 0, next: 0 }))
    }
}

/// The first tokens and the last ones of those at positions `first..next`.
#[derive(Debug)]
struct Ends {
    policy: SlidingWindow,
    rows: Alike,
    first: usize,
    next: usize,
}

impl LayerCache for Ends {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        if let ([first, .., last] | [first @ last], true) = (positions, self.next == self.first) {
            (self.first, self.next) = (*first, *last + 1);
        } else {
            self.next += positions.len();
        }
        self.rows.append(keys, values);
    }

    fn read(&self, head: usize) -> Kept {
        let len = self.rows.heads[head].len();
        let sinks = self.policy.sinks.min(len);
        let positions = (self.first..self.first + sinks).chain(self.next - (len - sinks)..self.next);
        self.rows.read(head, positions.collect())
    }

    fn settle(&mut self) {
        let SlidingWindow { sinks, recent, bits } = self.policy;
        for head in &mut self.rows.heads {
            head.settle(bits);
            let recent_from = head.len().saturating_sub(recent);
            if recent_from > sinks {
                head.retain(|i| i < sinks || i >= recent_from);
            }
        }
    }

    fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}
