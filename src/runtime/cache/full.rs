use ndarray::ArrayView3;

use super::rows::{Alike, Rows, bits_of};
use super::{CachePolicy, Kept, LayerCache};
use crate::error::Result;
use crate::spec::Spec;

/// Keeps all tokens, `full`: what the model computes, or that in fewer bits.
///
/// A number takes 32 bits, and is what the model computed; 16, as servers hold it (f16); or 1 to 8: the plain baseline of quantised
/// caches, each key and each value of a token between its own least and largest number (two more f16 numbers).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FullCache {
    bits: u8,
}

impl Default for FullCache {
    fn default() -> Self {
        Self { bits: 32 }
    }
}

impl FullCache {
    /// The policy that a spec describes: `bits`, 32 unless said.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::error::Error::Setting), [`Error::UnknownSetting`](crate::error::Error::UnknownSetting).
    pub fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["bits"])?;
        Ok(Self { bits: bits_of(spec, 32)? })
    }
}

impl CachePolicy for FullCache {
    fn spec(&self) -> Spec {
        Spec::new("full").with("bits", usize::from(self.bits))
    }

    fn layer(&self, _layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        Ok(Box::new(Everything { bits: self.bits, rows: Alike::new(kv_heads, head_dim), first: 0 }))
    }
}

/// All tokens of a text, from the position `first` on.
#[derive(Debug)]
struct Everything {
    bits: u8,
    rows: Alike,
    first: usize,
}

impl LayerCache for Everything {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        if self.rows.heads.iter().all(|head| head.len() == 0) {
            self.first = positions.first().copied().unwrap_or(0);
        }
        self.rows.append(keys, values);
    }

    fn read(&self, head: usize) -> Kept {
        let positions = self.first..self.first + self.rows.heads[head].len();
        self.rows.read(head, positions.collect())
    }

    fn settle(&mut self) {
        self.rows.heads.iter_mut().for_each(|head: &mut Rows| head.settle(self.bits));
    }

    fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}
