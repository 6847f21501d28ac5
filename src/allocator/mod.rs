//! Choosing the number of groups of every layer.

mod costs;
mod exact;
mod pairs;
mod selection;
mod uniform;

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::Result;
use crate::run::Run;
use crate::spec::{Registry, Spec};

pub use costs::{CostScale, LayerCosts};
pub use exact::{AllBudgets, ExactAllocation};
pub use pairs::{PairCosts, Span};
pub use selection::LayerSelection;
pub use uniform::UniformAllocation;

/// The allocators of this crate by name.
pub static ALLOCATORS: Registry<dyn Allocator> = Registry::new(
    "allocator",
    &[
        ("uniform", |spec| spec.only(&[]).map(|()| Box::new(UniformAllocation) as _)),
        ("selection", |spec| Ok(Box::new(LayerSelection::from_spec(spec)?))),
        ("exact", |spec| spec.only(&[]).map(|()| Box::new(ExactAllocation) as _)),
    ],
);

/// A rule that chooses a number of groups for every layer.
pub trait Allocator: Debug + Send + Sync {
    /// Its name and settings, as plans record them.
    fn spec(&self) -> Spec;

    /// The number of groups of each layer, with a finite cost in `costs`, at most `kv_heads` in all.
    ///
    /// # Errors
    /// [`Error::BudgetUnreachable`](crate::Error::BudgetUnreachable) when no choice is that small,
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, run: Run<'_>) -> Result<Vec<usize>>;
}

impl<A: Allocator + ?Sized> Allocator for Arc<A> {
    fn spec(&self) -> Spec {
        (**self).spec()
    }

    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, run: Run<'_>) -> Result<Vec<usize>> {
        (**self).allocate(costs, kv_heads, run)
    }
}
