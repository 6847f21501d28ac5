use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::budget::Limits;
use crate::error::{Error, Result};
use crate::front::{Front, FrontPoint};

/// How the errors of different layers are made comparable before they are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum CostScale {
    /// The error as it is: the paper's choice. Layers of large weights then take the whole budget.
    Raw,
    /// The error as a share of the layer's own energy.
    #[default]
    EnergyShare,
    /// Not the error but what the model was measured to lose, for each layer and k: costs that come as a table.
    Measured,
}

/// What each number of groups costs in each layer: the one place where layers are made comparable.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCosts {
    /// `costs[layer][k − 1]`; `None` where k is not to be had.
    costs: Vec<Vec<Option<f64>>>,
    same_k: bool,
}

impl LayerCosts {
    /// The costs of the points of every layer's front, on one scale, without what the limits forbid.
    ///
    /// # Errors
    /// [`Error::NoEnergy`] when the scale needs an energy that a front lacks (or that is 0 while an error is
    /// not), [`Error::Setting`] for [`CostScale::Measured`], which no error can be put on; as
    /// [`LayerCosts::priced`].
    pub fn new(fronts: &[Front], scale: CostScale, limits: &Limits) -> Result<Self> {
        Self::priced(fronts, limits, |layer, point| {
            scaled(point.error, fronts[layer].energy(), scale, layer).map(Some)
        })
    }

    /// The costs that `price(layer, point)` names for the points of every layer's front, without what the limits
    /// forbid; `None` where that k is not to be had.
    ///
    /// # Errors
    /// [`Error::NoLayer`] when `limits` fixes a layer that does not exist, [`Error::GroupCount`] when it fixes a k
    /// that the layer's front has no point for; what `price` reports; as [`LayerCosts::from_table`].
    pub fn priced(
        fronts: &[Front],
        limits: &Limits,
        price: impl Fn(usize, &FrontPoint) -> Result<Option<f64>>,
    ) -> Result<Self> {
        if let Some((&layer, _)) = limits.fixed.last_key_value().filter(|(l, _)| **l >= fronts.len()) {
            return Err(Error::NoLayer { layer, layers: fronts.len() });
        }
        let layer_costs = |(layer, front): (usize, &Front)| -> Result<Vec<Option<f64>>> {
            let fixed = limits.fixed.get(&layer).copied();
            if let Some(k) = fixed.filter(|&k| front.get(k).is_none()) {
                return Err(Error::GroupCount { k, n_heads: front.n_heads() });
            }
            let mut costs = vec![None; front.n_heads()];
            for point in front.iter().filter(|p| limits.space.admits(&p.partition)) {
                let k = point.partition.n_groups();
                if fixed.is_none_or(|f| f == k) && limits.dividing.is_none_or(|all| all % k == 0) {
                    costs[k - 1] = price(layer, point)?;
                }
            }
            Ok(costs)
        };
        let costs = fronts.iter().enumerate().map(layer_costs).collect::<Result<_>>()?;
        Self::from_table(costs, limits.same_k)
    }

    /// Costs from anywhere: `costs[layer][k − 1]`, `None` where that k is not to be had.
    ///
    /// # Errors
    /// [`Error::NoLayer`] without layers, [`Error::InvalidFitness`] for a cost that is not finite and at
    /// least 0, [`Error::EmptySpace`] for a layer without any choice.
    pub fn from_table(costs: Vec<Vec<Option<f64>>>, same_k: bool) -> Result<Self> {
        if costs.is_empty() {
            return Err(Error::NoLayer { layer: 0, layers: 0 });
        }
        for layer in &costs {
            for (i, &value) in layer.iter().enumerate() {
                if let Some(value) = value.filter(|v| !(v.is_finite() && *v >= 0.0)) {
                    return Err(Error::InvalidFitness { k: i + 1, value });
                }
            }
            if layer.iter().all(Option::is_none) {
                return Err(Error::EmptySpace { n_heads: layer.len(), space: "a cost".into() });
            }
        }
        Ok(Self { costs, same_k })
    }

    /// These costs with every layer's multiplied by its weight: how much more it matters than others.
    ///
    /// # Errors
    /// [`Error::LayerCount`] unless there is a weight for every layer, [`Error::Setting`] for a weight that is not
    /// finite and at least 0, [`Error::InvalidFitness`] for a product that overflows.
    pub fn weighted(self, weights: &[f64]) -> Result<Self> {
        if weights.len() != self.n_layers() {
            return Err(Error::LayerCount {
                what: "layer weights",
                expected: self.n_layers(),
                found: weights.len(),
            });
        }
        if let Some(weight) = weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
            let (name, expected) = ("a layer weight", "finite and at least 0");
            return Err(Error::Setting { name, value: weight.to_string(), expected });
        }
        let scaled = |(layer, &weight): (Vec<Option<f64>>, &f64)| {
            layer.iter().map(|c| c.map(|c| c * weight)).collect()
        };
        Self::from_table(self.costs.into_iter().zip(weights).map(scaled).collect(), self.same_k)
    }

    /// Number of layers, L.
    pub fn n_layers(&self) -> usize {
        self.costs.len()
    }

    /// Number of KV heads of a layer, H.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn n_heads(&self, layer: usize) -> usize {
        self.costs[layer].len()
    }

    /// Whether all layers must have the same number of groups.
    pub fn same_k(&self) -> bool {
        self.same_k
    }

    /// The cost of k groups in a layer; `None` where that is not to be had.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn get(&self, layer: usize, k: usize) -> Option<f64> {
        *self.costs[layer].get(k.checked_sub(1)?)?
    }

    /// The numbers of groups that a layer may have, ascending, with their costs.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn choices(&self, layer: usize) -> impl Iterator<Item = (usize, f64)> {
        self.costs[layer].iter().enumerate().filter_map(|(i, c)| c.map(|c| (i + 1, c)))
    }

    /// The sum of the costs of a choice for every layer; `None` when one of them is not to be had.
    pub fn total(&self, ks: &[usize]) -> Option<f64> {
        (ks.len() == self.n_layers()).then_some(())?;
        ks.iter().enumerate().map(|(layer, &k)| self.get(layer, k)).sum()
    }

    /// The k that every layer may have, ascending.
    pub fn common(&self) -> Vec<usize> {
        self.choices(0)
            .map(|(k, _)| k)
            .filter(|&k| (1..self.n_layers()).all(|l| self.get(l, k).is_some()))
            .collect()
    }

    /// All totals of KV heads that a choice can have, ascending.
    pub fn reachable(&self) -> Vec<usize> {
        if self.same_k {
            return self.common().iter().map(|k| k * self.n_layers()).collect();
        }
        let mut totals = BTreeSet::from([0]);
        for layer in 0..self.n_layers() {
            totals = totals.iter().flat_map(|t| self.choices(layer).map(move |(k, _)| t + k)).collect();
        }
        totals.into_iter().collect()
    }

    /// The error for a budget that nothing here meets.
    pub(crate) fn unreachable(&self, asked: usize) -> Error {
        Error::BudgetUnreachable { asked, reachable: self.reachable() }
    }
}

fn scaled(error: f64, energy: Option<f64>, scale: CostScale, layer: usize) -> Result<f64> {
    match (scale, energy) {
        (CostScale::Raw, _) => Ok(error),
        (CostScale::EnergyShare, Some(energy)) if energy > 0.0 => Ok(error / energy),
        (CostScale::EnergyShare, Some(_)) if error == 0.0 => Ok(0.0),
        (CostScale::EnergyShare, _) => Err(Error::NoEnergy { layer }),
        (CostScale::Measured, _) => Err(Error::Setting {
            name: "the cost scale",
            value: "measured".to_string(),
            expected: "raw or a share of the energy (measured costs come as a table)",
        }),
    }
}
