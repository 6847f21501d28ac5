use std::sync::Arc;

use super::pairs::PairFronts;
use super::{Compress, Preset};
use crate::allocator::{Allocator, CostScale, LayerCosts, PairCosts};
use crate::budget::{Budget, Limits};
use crate::error::{Error, Result};
#[cfg(feature = "runtime")]
use crate::evaluation::{Sensitivity, Trial, choose_model};
use crate::front::Front;
use crate::heads::HeadSource;
#[cfg(feature = "runtime")]
use crate::partition::SearchSpace;
use crate::plan::{LayerPlan, Method, Plan, Pooling, Refit};
use crate::run::Run;
#[cfg(feature = "runtime")]
use crate::runtime::Model;
use crate::spec::Spec;

/// The most windows that decide between groups: the order of two losses shows early.
#[cfg(feature = "runtime")]
const CHOOSING_WINDOWS: usize = 32;
/// The most windows that tell how much each layer pays: it is compared with the same model on the same text.
#[cfg(feature = "runtime")]
const MEASURING_WINDOWS: usize = 16;

/// A model under a plan, before anything was fitted.
#[cfg(feature = "runtime")]
pub(super) type Chosen = Model;
/// Nothing is run.
#[cfg(not(feature = "runtime"))]
pub(super) type Chosen = std::convert::Infallible;

/// The front of every layer, as a search found them: plans for any budget are made of these.
#[derive(Debug)]
pub struct Fronts<'s> {
    pub(super) compress: &'s Compress<'s>,
    pub(super) source: &'s dyn HeadSource,
    pub(super) limits: Limits,
    /// What was searched.
    #[cfg(feature = "runtime")]
    pub(super) space: SearchSpace,
    pub(super) refit: Option<Refit>,
    pub(super) search: Vec<Spec>,
    /// And whether by measured costs.
    pub(super) allocation: (Arc<dyn Allocator>, bool),
    pub(super) fronts: Vec<Front>,
    /// Groups of neighbours by the same fitness, where windows that validate are to choose between the two.
    pub(super) neighbours: Vec<Front>,
    /// Of two layers that share with one another, where they may.
    pub(super) pairs: Option<PairFronts>,
    #[cfg(feature = "runtime")]
    pub(super) sensitivity: Option<Sensitivity>,
}

impl Fronts<'_> {
    /// The front of every layer.
    pub fn layers(&self) -> &[Front] {
        &self.fronts
    }

    /// How the layers share the budget: the allocator's name, or `sensitivity` where costs were measured.
    pub fn allocation(&self) -> String {
        if self.allocation.1 {
            "sensitivity".to_string()
        } else {
            self.allocation.0.spec().name().to_string()
        }
    }

    /// The plan within a budget: of every layer's front the point that the allocator chooses.
    ///
    /// # Errors
    /// [`Error::BudgetRange`] and [`Error::BudgetUnreachable`], what [`LayerCosts::new`] and the allocator report; what
    /// running the model reports, where a text chooses between groups.
    pub fn plan(&self, budget: Budget, run: Run<'_>) -> Result<Plan> {
        Ok(self.planned(budget, run)?.0)
    }

    /// The plan, and the model under it where one was made to choose between groups.
    pub(super) fn planned(&self, budget: Budget, run: Run<'_>) -> Result<(Plan, Option<Chosen>)> {
        let cost = if self.allocation.1 { CostScale::Measured } else { self.compress.cost };
        let pairs = self.pairs.as_ref().map(|pairs| pairs.costs(cost, &self.limits)).transpose()?;
        self.allocated(self.allocation.0.as_ref(), (&self.costs()?, pairs), cost, budget, run)
    }

    /// The plan within a budget that another allocator chooses, from the errors; layers do not share with one another then.
    ///
    /// # Errors
    /// As [`Fronts::plan`].
    pub fn plan_by(&self, allocator: &dyn Allocator, budget: Budget, run: Run<'_>) -> Result<Plan> {
        let cost = self.compress.cost;
        let costs = LayerCosts::new(&self.fronts, cost, &self.limits)?;
        Ok(self.allocated(allocator, (&costs, None), cost, budget, run)?.0)
    }

    /// The plan within a budget under costs from elsewhere: `costs` holds what each k of each layer loses, under the limits
    /// (see [`LayerCosts::priced`]). Plans then say [`CostScale::Measured`], and layers do not share with one another.
    ///
    /// # Errors
    /// As [`Fronts::plan`]; [`Error::LayerCount`] unless there are costs for every layer.
    pub fn plan_with_costs(&self, costs: &LayerCosts, budget: Budget, run: Run<'_>) -> Result<Plan> {
        Ok(self.allocated(self.allocation.0.as_ref(), (costs, None), CostScale::Measured, budget, run)?.0)
    }

    fn allocated(
        &self,
        allocator: &dyn Allocator,
        (costs, of_pairs): (&LayerCosts, Option<PairCosts>),
        cost: CostScale,
        budget: Budget,
        run: Run<'_>,
    ) -> Result<(Plan, Option<Chosen>)> {
        let (compress, heads) = (self.compress, self.source.architecture().kv_heads());
        let budget = if compress.preset == Some(Preset::Mqa) { Budget::Heads(heads.len()) } else { budget };
        if costs.n_layers() != heads.len() {
            let (what, expected, found) = ("layer costs", heads.len(), costs.n_layers());
            return Err(Error::LayerCount { what, expected, found });
        }
        let most = budget.kv_heads(&heads)?;
        let point = |front: &Front, k: usize| {
            front.get(k).map(LayerPlan::from).ok_or(Error::GroupCount { k, n_heads: front.n_heads() })
        };
        let layers: Vec<LayerPlan> = match self.pairs.as_ref().zip(of_pairs) {
            Some((pairs, of_pairs)) => pairs.layers(&self.fronts, costs, &of_pairs, most, run)?,
            None => {
                let ks = allocator.allocate(costs, most, run)?;
                self.fronts.iter().zip(&ks).map(|(front, &k)| point(front, k)).collect::<Result<_>>()?
            }
        };
        let (layers, model) = self.chosen(layers, run)?;
        let moments = self.source.calibration();
        let calibrated = compress.pooler.needs().moment;
        let counts = calibrated
            || compress.fitness.needs().moment
            || compress.search.needs().key_energies
            || cost == CostScale::Measured;
        let name = compress.name.clone();
        let method = Method::new(name, Spec::default(), compress.fitness.spec(), allocator.spec());
        let method = Method {
            search: self.search.clone(),
            chosen_by_loss: !self.neighbours.is_empty(),
            calibration: moments.clone().filter(|_| counts),
            cost,
            target: compress.target_limits(self.source).0.map(str::to_string),
            ..method.with_limits(&self.limits)
        };
        let pooling = Pooling::new(compress.pooler.spec())
            .with_calibration(moments.filter(|_| calibrated))
            .with_refit(self.refit);
        let share = budget.fraction(&heads);
        Ok((Plan::new(self.source.id()?, method, pooling, layers, share, run.seed())?, model))
    }

    fn costs(&self) -> Result<LayerCosts> {
        #[cfg(feature = "runtime")]
        if let Some(sensitivity) = &self.sensitivity {
            return sensitivity.costs(&self.fronts, &self.limits);
        }
        LayerCosts::new(&self.fronts, self.compress.cost, &self.limits)
    }

    #[cfg(not(feature = "runtime"))]
    pub(super) fn measure(&mut self, _run: Run<'_>) -> Result<()> {
        Ok(())
    }

    /// What each layer pays, where that divides the budget.
    #[cfg(feature = "runtime")]
    pub(super) fn measure(&mut self, run: Run<'_>) -> Result<()> {
        if let (true, Some((model, windows))) = (self.allocation.1, self.compress.validation()) {
            let windows = windows.spaced(MEASURING_WINDOWS);
            let trial = Trial::new(self.source, model, self.compress.pooler.as_ref(), &windows);
            self.sensitivity = Some(match &mut self.pairs {
                Some(pairs) => pairs.measure(&trial, &self.fronts, run)?,
                None => Sensitivity::estimate(&trial, &self.fronts, run)?,
            });
        }
        Ok(())
    }

    #[cfg(not(feature = "runtime"))]
    fn chosen(&self, layers: Vec<LayerPlan>, _run: Run<'_>) -> Result<(Vec<LayerPlan>, Option<Chosen>)> {
        Ok((layers, None))
    }

    /// Groups of neighbours in the place of those found, where the model then reads the windows that validate better.
    #[cfg(feature = "runtime")]
    fn chosen(&self, layers: Vec<LayerPlan>, run: Run<'_>) -> Result<(Vec<LayerPlan>, Option<Chosen>)> {
        let Some((model, windows)) = self.compress.validation() else { return Ok((layers, None)) };
        // A bound holds for every partition of that many equal groups.
        let other = |(layer, front): (&LayerPlan, &Front)| match front.get(layer.groups.n_groups()) {
            Some(point) => LayerPlan { lower_bound: layer.lower_bound, ..LayerPlan::from(point) },
            None => layer.clone(),
        };
        let others: Vec<LayerPlan> = layers.iter().zip(&self.neighbours).map(other).collect();
        let groups = |layers: &[LayerPlan]| layers.iter().map(|l| l.groups.clone()).collect::<Vec<_>>();
        let (found, neighbours) = (groups(&layers), groups(&others));
        if others.is_empty() || found == neighbours {
            return Ok((layers, None));
        }
        let windows = windows.spaced(CHOOSING_WINDOWS);
        let trial = Trial::new(self.source, model, self.compress.pooler.as_ref(), &windows);
        let mut models = trial.grouped_each(&[&found, &neighbours], run)?;
        let best = choose_model(&models, &windows, run)?.0;
        Ok((if best == 1 { others } else { layers }, Some(models.swap_remove(best))))
    }
}
