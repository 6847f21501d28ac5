use super::{Allocator, LayerCosts};
use crate::error::Result;
use crate::run::Run;
use crate::spec::Spec;

/// The largest one k that fits the budget, in all layers; a layer whose k is fixed keeps its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UniformAllocation;

impl Allocator for UniformAllocation {
    fn spec(&self) -> Spec {
        Spec::new("uniform")
    }

    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, _run: Run<'_>) -> Result<Vec<usize>> {
        let layers = 0..costs.n_layers();
        let largest = layers.clone().map(|l| costs.n_heads(l)).max().unwrap_or(0);
        // A layer with a single choice is fixed: it takes that one whatever the others do.
        let only: Vec<_> = layers
            .clone()
            .map(|l| {
                let mut choices = costs.choices(l).map(|(k, _)| k);
                choices.next().filter(|_| choices.next().is_none() && !costs.same_k())
            })
            .collect();
        (1..=largest)
            .rev()
            .map(|k| layers.clone().map(|l| only[l].unwrap_or(k)).collect::<Vec<_>>())
            .find(|ks| ks.iter().sum::<usize>() <= kv_heads && costs.total(ks).is_some())
            .ok_or_else(|| costs.unreachable(kv_heads))
    }
}
