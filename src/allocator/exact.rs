use super::{Allocator, LayerCosts};
use crate::{Result, Run};

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
    pub fn all_budgets<'a>(&self, costs: &'a LayerCosts, run: Run<'_>) -> Result<AllBudgets<'a>> {
        let layers = costs.n_layers();
        let mut tables = vec![vec![0.0]];
        if costs.same_k() {
            let largest = costs.common().last().map_or(0, |k| k * layers);
            let mut totals = vec![f64::INFINITY; largest + 1];
            for k in costs.common() {
                totals[k * layers] = costs.total(&vec![k; layers]).unwrap_or(f64::INFINITY);
            }
            return Ok(AllBudgets { costs, tables: vec![totals] });
        }
        for layer in (0..layers).rev() {
            let after = &tables[tables.len() - 1];
            let mut totals = vec![f64::INFINITY; after.len() + costs.n_heads(layer)];
            for (k, cost) in costs.choices(layer) {
                for (total, after) in totals[k..].iter_mut().zip(after) {
                    let sum = cost + after;
                    *total = if sum < *total { sum } else { *total };
                }
            }
            tables.push(totals);
            run.step("allocation", (layers - layer) as u64, layers as u64)?;
        }
        tables.reverse();
        Ok(AllBudgets { costs, tables })
    }
}

impl Allocator for ExactAllocation {
    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, run: Run<'_>) -> Result<Vec<usize>> {
        self.all_budgets(costs, run)?.within(kv_heads).ok_or_else(|| costs.unreachable(kv_heads))
    }
}

/// The best choice for every total of KV heads, as [`ExactAllocation::all_budgets`] found it.
#[derive(Debug, Clone)]
pub struct AllBudgets<'a> {
    costs: &'a LayerCosts,
    /// `tables[l][t]`: the least cost of the layers l… with t KV heads in all; the first alone where all layers
    /// have one k.
    tables: Vec<Vec<f64>>,
}

impl AllBudgets<'_> {
    /// The least cost with exactly `total` KV heads in all layers; `None` where no choice has that many.
    pub fn cost(&self, total: usize) -> Option<f64> {
        self.tables[0].get(total).copied().filter(|c| c.is_finite())
    }

    /// The best choice with exactly `total` KV heads.
    pub fn choice(&self, mut total: usize) -> Option<Vec<usize>> {
        self.cost(total)?;
        let layers = self.costs.n_layers();
        if self.costs.same_k() {
            return Some(vec![total / layers; layers]);
        }
        let layer_choice = |layer: usize| {
            // The sum that was the least is met again, bit for bit.
            let gives = |&(k, cost): &(usize, f64)| {
                let after = total.checked_sub(k).and_then(|rest| self.tables[layer + 1].get(rest));
                after.is_some_and(|after| cost + after == self.tables[layer][total])
            };
            let k = self.costs.choices(layer).find(gives).map(|(k, _)| k)?;
            total -= k;
            Some(k)
        };
        (0..layers).map(layer_choice).collect()
    }

    /// The total within a budget that costs least, the smallest such.
    pub fn best_total(&self, kv_heads: usize) -> Option<usize> {
        let totals = (0..self.tables[0].len().min(kv_heads.saturating_add(1)))
            .filter_map(|t| Some((t, self.cost(t)?)));
        totals.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(total, _)| total)
    }

    /// The best choice with at most `kv_heads` KV heads.
    pub fn within(&self, kv_heads: usize) -> Option<Vec<usize>> {
        self.choice(self.best_total(kv_heads)?)
    }
}
