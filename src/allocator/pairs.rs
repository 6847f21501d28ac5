use super::{ExactAllocation, LayerCosts};
use crate::error::{Error, Result};
use crate::run::Run;

/// What each number of shared heads costs in each pair of neighbouring layers that share with one another, comparable with
/// [`LayerCosts`] of the same layers.
#[derive(Debug, Clone, PartialEq)]
pub struct PairCosts {
    /// `costs[lower][k − 1]`; empty where the two cannot share.
    costs: Vec<Vec<Option<f64>>>,
}

impl PairCosts {
    /// Costs from anywhere: `costs[l][k − 1]` is that of k heads for the layers l and l + 1 together, `None` where that k is not to
    /// be had.
    ///
    /// # Errors
    /// [`Error::InvalidFitness`] for a cost that is not finite and at least 0.
    pub fn from_table(costs: Vec<Vec<Option<f64>>>) -> Result<Self> {
        let all = costs.iter().flat_map(|pair| pair.iter().enumerate());
        let wrong =
            all.filter_map(|(i, cost)| Some((i + 1, (*cost)?))).find(|(_, v)| !(v.is_finite() && *v >= 0.0));
        wrong.map_or(Ok(Self { costs }), |(k, value)| Err(Error::InvalidFitness { k, value }))
    }

    /// The numbers of heads that the layers `lower` and `lower + 1` may share, ascending, with their costs.
    pub fn choices(&self, lower: usize) -> impl Iterator<Item = (usize, f64)> {
        let costs = self.costs.get(lower).map_or(&[][..], |costs| costs);
        costs.iter().enumerate().filter_map(|(i, cost)| Some((i + 1, (*cost)?)))
    }
}

/// A layer, or two that share with one another, and how many KV heads they keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Span {
    /// The layer, the lower of two.
    pub layer: usize,
    /// Whether the layer above shares its heads.
    pub paired: bool,
    /// KV heads, of one layer or of both together.
    pub k: usize,
}

impl ExactAllocation {
    /// Which layers share with the one above and how many heads every layer, or two together, keep: the choice of the least summed
    /// cost with at most `kv_heads`, exact.
    ///
    /// As [`ExactAllocation::all_budgets`], with a second way to go on from each layer:
    /// `best_l(t) = min(min_k cost_l(k) + best_{l+1}(t − k), min_k pair_l(k) + best_{l+2}(t − k))`. Among choices of equal cost it takes
    /// the one with the fewest KV heads, then the one that leaves the first layer alone, then the one with the fewest heads there, and
    /// so on.
    ///
    /// ```
    /// use qcqa::allocator::{ExactAllocation, LayerCosts, PairCosts};
    /// use qcqa::Run;
    ///
    /// // Three layers of two heads; the upper two lose little where they share two heads.
    /// let costs = LayerCosts::from_table(vec![vec![Some(3.0), Some(0.0)]; 3], false)?;
    /// let pairs = PairCosts::from_table(vec![vec![], vec![None, Some(0.5)]])?;
    /// let spans = ExactAllocation.with_pairs(&costs, &pairs, 4, Run::new(0))?;
    /// let found: Vec<_> = spans.iter().map(|span| (span.layer, span.paired, span.k)).collect();
    /// assert_eq!(found, [(0, false, 2), (1, true, 2)]);
    /// # Ok::<(), qcqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::BudgetUnreachable`]; [`Error::Setting`] for layers that must all have one k; [`Error::Cancelled`].
    pub fn with_pairs(
        &self,
        costs: &LayerCosts,
        pairs: &PairCosts,
        kv_heads: usize,
        run: Run<'_>,
    ) -> Result<Vec<Span>> {
        if costs.same_k() {
            let (value, expected) = ("one number of heads in all layers".to_string(), "a number for each");
            return Err(Error::Setting { name: "the allocation of layers that share", value, expected });
        }
        let layers = costs.n_layers();
        // From layer l on, by total: the least cost, and what the first of these layers does.
        let mut least = vec![vec![0.0]; layers + 1];
        let mut chosen: Vec<Vec<Option<Span>>> = vec![Vec::new(); layers];
        for layer in (0..layers).rev() {
            let own = costs.choices(layer).map(|(k, cost)| (Span { layer, paired: false, k }, cost));
            let both = pairs.choices(layer).filter(|_| layer + 1 < layers);
            let both = both.map(|(k, cost)| (Span { layer, paired: true, k }, cost));
            let choices: Vec<(Span, f64)> = own.chain(both).collect();
            let after = |span: &Span| &least[layer + 1 + usize::from(span.paired)];
            let most = choices.iter().map(|(span, _)| span.k + after(span).len()).max().unwrap_or(0);
            let (mut totals, mut first) = (vec![f64::INFINITY; most], vec![None; most]);
            for (span, cost) in &choices {
                for (total, rest) in after(span).iter().enumerate() {
                    let sum = cost + rest;
                    if sum < totals[span.k + total] {
                        (totals[span.k + total], first[span.k + total]) = (sum, Some(*span));
                    }
                }
            }
            (least[layer], chosen[layer]) = (totals, first);
            run.step("allocation", (layers - layer) as u64, layers as u64)?;
        }
        let reached = |total: &usize| least[0][*total].is_finite();
        let within = (0..least[0].len().min(kv_heads.saturating_add(1))).filter(reached);
        let Some(mut total) = within.min_by(|&a, &b| least[0][a].total_cmp(&least[0][b])) else {
            let reachable = (0..least[0].len()).filter(reached).collect();
            return Err(Error::BudgetUnreachable { asked: kv_heads, reachable });
        };
        let (mut spans, mut layer) = (Vec::new(), 0);
        while let Some(span) = chosen.get(layer).and_then(|chosen| chosen[total]) {
            (total, layer) = (total - span.k, layer + 1 + usize::from(span.paired));
            spans.push(span);
        }
        Ok(spans)
    }
}
