use super::{Allocator, LayerCosts};
use crate::error::Result;
use crate::run::Run;
use crate::spec::Spec;

/// The choice of the least summed cost, exact for every total of KV heads at once.
///
/// Costs and KV heads of layers add up, so this is a multiple-choice knapsack, solved by min-plus dynamic
/// programming over the total: `best_l(t) = min_k cost_l(k) + best_{l+1}(t − k)` (Dudziński & Walukiewicz 1987,
/// doi:10.1016/0377-2217(87)90165-2), in O(L · H · total) time.
///
/// Among choices of equal cost it takes the one with the fewest KV heads, then the one whose first layer has the
/// fewest, then the second, and so on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExactAllocation;

impl ExactAllocation {
    /// The best choices for all totals, in one pass.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn all_budgets(&self, costs: &LayerCosts, run: Run<'_>) -> Result<AllBudgets> {
        let layers = costs.n_layers();
        if costs.same_k() {
            let common = costs.common();
            let mut least = vec![f64::INFINITY; common.last().map_or(0, |k| k * layers) + 1];
            for k in common {
                least[k * layers] = costs.total(&vec![k; layers]).unwrap_or(f64::INFINITY);
            }
            return Ok(AllBudgets { layers, least, choices: Vec::new() });
        }
        let mut least = vec![0.0];
        let mut choices = Vec::with_capacity(layers);
        for layer in (0..layers).rev() {
            let mut totals = vec![f64::INFINITY; least.len() + costs.n_heads(layer)];
            // As wide as the costs, so that both are chosen in the same lanes.
            let mut chosen = vec![0u64; totals.len()];
            for (k, cost) in costs.choices(layer) {
                let places = totals[k..].iter_mut().zip(&mut chosen[k..]);
                for ((total, chosen), after) in places.zip(&least) {
                    let sum = cost + after;
                    let better = sum < *total;
                    *total = if better { sum } else { *total };
                    *chosen = if better { k as u64 } else { *chosen };
                }
            }
            choices.push(chosen.into_iter().map(|k| k as u32).collect());
            least = totals;
            run.step("allocation", (layers - layer) as u64, layers as u64)?;
        }
        choices.reverse();
        Ok(AllBudgets { layers, least, choices })
    }
}

impl Allocator for ExactAllocation {
    fn spec(&self) -> Spec {
        Spec::new("exact")
    }

    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, run: Run<'_>) -> Result<Vec<usize>> {
        self.all_budgets(costs, run)?.within(kv_heads).ok_or_else(|| costs.unreachable(kv_heads))
    }
}

/// The best choice for every total of KV heads, as [`ExactAllocation::all_budgets`] found it.
#[derive(Debug, Clone)]
pub struct AllBudgets {
    layers: usize,
    /// The least cost of each total.
    least: Vec<f64>,
    /// `choices[l][t]`: the k of layer l in the best choice for the layers l… with t KV heads in all; empty where
    /// all layers have one k.
    choices: Vec<Vec<u32>>,
}

impl AllBudgets {
    /// The least cost with exactly `total` KV heads in all layers; `None` where no choice has that many.
    pub fn cost(&self, total: usize) -> Option<f64> {
        self.least.get(total).copied().filter(|c| c.is_finite())
    }

    /// The best choice with exactly `total` KV heads.
    pub fn choice(&self, mut total: usize) -> Option<Vec<usize>> {
        self.cost(total)?;
        if self.choices.is_empty() {
            return Some(vec![total / self.layers; self.layers]);
        }
        let layer_choice = |choices: &Vec<u32>| {
            let k = choices[total] as usize;
            total -= k;
            k
        };
        Some(self.choices.iter().map(layer_choice).collect())
    }

    /// The total within a budget that costs least, the smallest such.
    pub fn best_total(&self, kv_heads: usize) -> Option<usize> {
        let totals =
            (0..self.least.len().min(kv_heads.saturating_add(1))).filter_map(|t| Some((t, self.cost(t)?)));
        totals.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(total, _)| total)
    }

    /// The best choice with at most `kv_heads` KV heads.
    pub fn within(&self, kv_heads: usize) -> Option<Vec<usize>> {
        self.choice(self.best_total(kv_heads)?)
    }
}
