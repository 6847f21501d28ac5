//! What a method leaves open, resolved where target, text and what the user allows are known.

use std::sync::Arc;

use super::{Allocation, Compress, Preset};
use crate::allocator::{Allocator, ExactAllocation, UniformAllocation};
use crate::budget::{Budget, Limits};
use crate::error::{Error, Result};
use crate::heads::HeadSource;
use crate::partition::{Cardinality, SearchSpace};
use crate::plan::Refit;

impl Compress<'_> {
    /// The name of the target, and what it holds.
    pub(super) fn target_limits(&self, source: &dyn HeadSource) -> (Option<&'static str>, Limits) {
        #[cfg(feature = "checkpoint")]
        if let Some(target) = self.target {
            return (Some(target.name()), target.search_limits(source.architecture()));
        }
        let _ = source;
        (None, Limits::default())
    }

    /// What method, target and user allow together.
    pub(super) fn all_limits(&self, source: &dyn HeadSource) -> Result<Limits> {
        let (target, held) = self.target_limits(source);
        let own = self.preset.map_or(Some(self.limits.space), Preset::space).unwrap_or(held.space);
        if held.space.cardinality == Cardinality::Equal && own.cardinality == Cardinality::Arbitrary {
            let (target, method) = (target.unwrap_or_default().to_string(), self.name.clone());
            return Err(Error::TargetMethod { target, method });
        }
        let least = |of: fn(&SearchSpace) -> Option<usize>| {
            [own, held.space, self.limits.space].iter().filter_map(of).min()
        };
        let space = SearchSpace {
            cardinality: own.cardinality,
            max_groups: least(|s| s.max_groups),
            max_group_size: least(|s| s.max_group_size),
            max_filled: least(|s| s.max_filled),
        };
        let mut fixed = held.fixed;
        for (&layer, &asked) in &self.limits.fixed {
            let held = *fixed.entry(layer).or_insert(asked);
            if held != asked {
                let target = target.unwrap_or_default();
                return Err(Error::Limits {
                    layer,
                    found: format!("is fixed to {asked} groups"),
                    expected: format!("the target {target} fixes {held}"),
                });
            }
        }
        let dividing = held.dividing.into_iter().chain(self.limits.dividing).reduce(gcd);
        Ok(Limits { space, same_k: held.same_k || self.limits.same_k, fixed, dividing })
    }

    /// Where equal groups of costly error have one k in all layers: that of the budget alone, which is then searched with all
    /// that others would have asked.
    pub(super) fn space_for(
        &self,
        limits: &Limits,
        source: &dyn HeadSource,
        budget: Budget,
    ) -> Result<SearchSpace> {
        let (space, heads) = (limits.space, source.architecture().kv_heads());
        let own = matches!(self.allocation, Allocation::Own | Allocation::Measured);
        let costly = self.preset.is_some_and(|preset| preset.tries_neighbours(space.cardinality));
        let Some(&n) = heads.first().filter(|&&n| costly && own && heads.iter().all(|&other| other == n))
        else {
            return Ok(space);
        };
        if !limits.same_k || !limits.fixed.is_empty() || limits.dividing.is_some() {
            return Ok(space);
        }
        let most = budget.kv_heads(&heads)?;
        let fits = |&k: &usize| k < n && k * heads.len() <= most;
        Ok(match space.group_counts(n)?.into_iter().rev().find(fits) {
            Some(k) if most < n * heads.len() => {
                SearchSpace { max_groups: Some(k), max_group_size: Some(n / k), ..space }
            }
            _ => space,
        })
    }

    /// How the layers share the budget, and whether by measured costs. One k in all layers leaves nothing to measure.
    pub(super) fn resolved_allocation(&self, limits: &Limits) -> Result<(Arc<dyn Allocator>, bool)> {
        if self.crosses_layers() {
            return self.allocation_across();
        }
        let low_rank = self.preset.is_some_and(|preset| preset.space().is_none());
        match &self.allocation {
            Allocation::By(allocator) => Ok((Arc::clone(allocator), false)),
            _ if limits.same_k => Ok((Arc::new(UniformAllocation), false)),
            Allocation::Measured if !self.can_choose() => Err(Error::NeedsText {
                what: "measuring how much each layer pays, on windows that fit nothing,",
            }),
            Allocation::Measured => Ok((Arc::new(ExactAllocation), true)),
            // Without a text one k in all layers does better than shares of energy (docs/quality.md).
            Allocation::Own if low_rank && self.can_choose() => Ok((Arc::new(ExactAllocation), true)),
            Allocation::Own => Ok((Arc::new(UniformAllocation), false)),
        }
    }

    /// How layers share the budget that may share heads with one another: exactly, by measured costs where a text is there that fits nothing.
    fn allocation_across(&self) -> Result<(Arc<dyn Allocator>, bool)> {
        match &self.allocation {
            Allocation::By(allocator) if allocator.spec().name() == ExactAllocation.spec().name() => {
                Ok((Arc::clone(allocator), false))
            }
            Allocation::By(allocator) => {
                let (value, expected) = (allocator.spec().to_string(), "exact, or by measured costs");
                Err(Error::Setting { name: "the allocation of layers that share", value, expected })
            }
            Allocation::Measured if !self.can_choose() => Err(Error::NeedsText {
                what: "measuring how much each layer pays, on windows that fit nothing,",
            }),
            _ => Ok((Arc::new(ExactAllocation), self.can_choose())),
        }
    }

    /// Whether heads may be shared across layers.
    pub(super) fn crosses_layers(&self) -> bool {
        self.preset.is_some_and(Preset::crosses_layers)
    }

    /// The refit asked for, or a full one where the pooler is calibrated and a text is there.
    pub(super) fn resolved_refit(&self) -> Result<Option<Refit>> {
        let calibrated = self.pooler.needs().moment;
        match self.refit {
            // A refit has no place for layers that read one another's heads.
            None if self.crosses_layers() => Ok(None),
            Some(Some(_)) if self.crosses_layers() => Err(Error::Setting {
                name: "the refit of layers that share",
                value: "a refit".to_string(),
                expected: "none: gradients do not pass from one layer's attention to another's keys",
            }),
            None => Ok((calibrated && self.has_text()).then_some(Refit::Full)),
            Some(Some(_)) if !calibrated => {
                Err(Error::RefitPooler { pooler: self.pooler.spec().name().to_string() })
            }
            Some(Some(_)) if !self.has_text() => Err(Error::NeedsText { what: "a refit" }),
            Some(asked) => Ok(asked),
        }
    }
}

/// The greatest number that divides both.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
