//! How large the KV cache may be, and what a target forbids.

use std::collections::BTreeMap;

use crate::{Error, Result, SearchSpace};

/// The size that the KV cache of the whole model may have: an upper bound, a plan may use less.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// A fraction of the source model's KV heads, in (0, 1].
    Fraction(f64),
    /// KV heads, summed over all layers.
    Heads(usize),
}

impl Budget {
    /// The most KV heads in all layers together: `floor(fraction · layers · heads)`, at least one a layer.
    ///
    /// # Errors
    /// [`Error::BudgetRange`] for a fraction that is NaN or outside (0, 1], or heads outside
    /// `1..=layers · heads`; [`Error::BudgetUnreachable`] when that is less than one head a layer.
    pub fn kv_heads(&self, layers: usize, heads: usize) -> Result<usize> {
        let all = layers * heads;
        let most = match *self {
            Self::Fraction(f) => {
                if !(f > 0.0 && f <= 1.0) {
                    return Err(Error::BudgetRange(f));
                }
                // 0.07 · 100 is 7.000…01 in binary, 0.29 · 100 is 28.999…: the nudge makes both mean what they say.
                (f * all as f64 + 1e-9).floor() as usize
            }
            Self::Heads(n) if (1..=all).contains(&n) => n,
            Self::Heads(n) => return Err(Error::BudgetRange(n as f64)),
        };
        if most < layers {
            let reachable = (1..=heads).map(|k| k * layers).collect();
            return Err(Error::BudgetUnreachable { asked: most, reachable });
        }
        Ok(most)
    }
}

/// What a target or the user forbids; only this reaches search and allocation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// Partitions that a layer may have.
    pub space: SearchSpace,
    /// Whether all layers must have the same number of groups (those of `fixed` too).
    pub same_k: bool,
    /// Layers whose number of groups is given: layer index → k.
    pub fixed: BTreeMap<usize, usize>,
}

/// Bytes that one token takes in a KV cache of `kv_heads` heads in all layers together:
/// `2 · kv_heads · head_dim · bytes_per_element` (keys and values).
pub fn kv_bytes_per_token(kv_heads: usize, head_dim: usize, bytes_per_element: usize) -> usize {
    2 * kv_heads * head_dim * bytes_per_element
}
