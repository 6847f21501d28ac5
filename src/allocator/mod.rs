//! Choosing the number of groups of every layer.

mod costs;
mod exact;
mod selection;
mod uniform;

use std::fmt::Debug;

use crate::{Result, Run};

pub use costs::{CostScale, LayerCosts};
pub use exact::{AllBudgets, ExactAllocation};
pub use selection::LayerSelection;
pub use uniform::UniformAllocation;

/// A rule that chooses a number of groups for every layer.
pub trait Allocator: Debug + Send + Sync {
    /// The number of groups of each layer, with a finite cost in `costs`, at most `kv_heads` in all.
    ///
    /// # Errors
    /// [`Error::BudgetUnreachable`](crate::Error::BudgetUnreachable) when no choice is that small,
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, run: Run<'_>) -> Result<Vec<usize>>;
}
