use super::{Exact, LocalSearch, Optimizer};
use crate::error::Result;
use crate::fitness::FitnessFn;
use crate::front::Front;
use crate::partition::SearchSpace;
use crate::run::Run;
use crate::spec::Spec;

/// [`Exact`] for layers of few heads, local search for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Auto {
    /// The most heads that are searched exactly.
    pub exact_heads: usize,
}

impl Default for Auto {
    /// Up to 12 heads: below a millisecond. Where every group is an eigenproblem, 8 are enough.
    fn default() -> Self {
        Self { exact_heads: 12 }
    }
}

impl Auto {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["exact_heads"])?;
        Ok(Self { exact_heads: spec.count("exact_heads")?.unwrap_or(Self::default().exact_heads) })
    }
}

impl Optimizer for Auto {
    fn spec(&self) -> Spec {
        Spec::new("auto").with("exact_heads", self.exact_heads)
    }

    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front> {
        match fitness.n_heads() {
            n if n <= self.exact_heads => Exact { max_heads: n }.optimize(fitness, space, run),
            _ => LocalSearch::default().optimize(fitness, space, run),
        }
    }
}
