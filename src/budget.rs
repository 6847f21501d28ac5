//! How large the KV cache may be, and what a target forbids.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::partition::{Cardinality, Partition, SearchSpace};

/// The size that the KV cache of the whole model may have: an upper bound, a plan may use less.
///
/// ```
/// use qcqa::budget::Budget;
///
/// // Half of two layers of 8 heads and one of 4.
/// assert_eq!(Budget::Fraction(0.5).kv_heads(&[8, 8, 4])?, 10);
/// assert!(Budget::Fraction(0.1).kv_heads(&[8, 8, 4]).is_err(), "less than one head a layer");
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    /// A fraction of the source model's KV heads, in (0, 1].
    Fraction(f64),
    /// KV heads, summed over all layers.
    Heads(usize),
}

impl Budget {
    /// The most KV heads in all layers together: `floor(fraction · Σ H)`, at least one a layer. `heads` holds the H of
    /// every layer.
    ///
    /// # Errors
    /// [`Error::BudgetRange`] for a fraction that is NaN or outside (0, 1], or heads outside `1..=Σ H`;
    /// [`Error::BudgetUnreachable`] when that is less than one head a layer.
    pub fn kv_heads(&self, heads: &[usize]) -> Result<usize> {
        let (layers, all) = (heads.len(), heads.iter().sum::<usize>());
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
            let largest = heads.iter().copied().max().unwrap_or(0);
            let uniform = |k| heads.iter().map(|&h| h.min(k)).sum();
            return Err(Error::BudgetUnreachable {
                asked: most,
                reachable: (1..=largest).map(uniform).collect(),
            });
        }
        Ok(most)
    }

    /// The fraction of these heads that is asked for.
    pub fn fraction(&self, heads: &[usize]) -> f64 {
        match *self {
            Self::Fraction(fraction) => fraction,
            Self::Heads(n) => n as f64 / heads.iter().sum::<usize>() as f64,
        }
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
    /// A number that every layer's number of groups must divide: the query heads of a layer, where all have as many.
    pub dividing: Option<usize>,
}

impl Limits {
    /// Checks that partitions, one for each layer, keep to the limits.
    ///
    /// # Errors
    /// [`Error::Limits`] naming the first layer at fault.
    pub fn check<'a>(&self, layers: impl IntoIterator<Item = &'a Partition>) -> Result<()> {
        let mut first = None;
        for (layer, groups) in layers.into_iter().enumerate() {
            let (k, sizes) = (groups.n_groups(), groups.sizes());
            let unfit = |found: String, expected: String| Err(Error::Limits { layer, found, expected });
            if !self.space.admits(groups) {
                let expected = match self.space.cardinality {
                    Cardinality::Equal if !groups.is_equal() => "all groups must have one size".to_string(),
                    _ => format!("the limits are {}", self.space),
                };
                return unfit(format!("has groups of {sizes:?} heads"), expected);
            }
            let of_first = *first.get_or_insert(k);
            if self.same_k && k != of_first {
                return unfit(
                    format!("has {k} groups"),
                    format!("all layers must have the {of_first} of layer 0"),
                );
            }
            if let Some(&fixed) = self.fixed.get(&layer).filter(|&&fixed| fixed != k) {
                return unfit(format!("has {k} groups"), format!("{fixed} were fixed"));
            }
            if let Some(all) = self.dividing.filter(|all| all % k != 0) {
                return unfit(format!("has {k} groups"), format!("their number must divide {all}"));
            }
        }
        Ok(())
    }
}
