//! The whole model, layer by layer: heads → fitness → front → allocation → plan.

use std::fmt;

use crate::allocator::{Allocator, CostScale, LayerCosts};
use crate::fitness::{FitnessFn, WeightSharingError};
use crate::grouping::Grouping;
use crate::optimizer::{Optimizer, attach_bounds};
use crate::run::map_ordered;
use crate::budget::{Budget, Limits};
use crate::error::{Error, Result};
use crate::front::Front;
use crate::heads::Heads;
use crate::model::Source;
use crate::partition::SearchSpace;
use crate::plan::{LayerPlan, Method, Plan, PlanBudget};
use crate::run::Run;

/// How the partitions of a layer come about.
#[derive(Debug, Clone, Copy)]
pub enum Search<'a> {
    /// By searching for the least error.
    Optimizer(&'a dyn Optimizer),
    /// By a rule, for every k of the space for which it has a partition.
    Grouping(&'a dyn Grouping),
}

impl Search<'_> {
    /// The best partitions of one layer, one for each k of the space that can be had.
    ///
    /// # Errors
    /// What the optimizer, the grouping and the fitness report; [`Error::InvalidFitness`].
    pub fn front(
        &self,
        heads: &Heads,
        fitness: &dyn FitnessFn,
        space: &SearchSpace,
        run: Run<'_>,
    ) -> Result<Front> {
        let grouping = match self {
            Self::Optimizer(optimizer) => return bounded(*optimizer, fitness, space, run),
            Self::Grouping(grouping) => grouping,
        };
        let mut front = Front::new(fitness)?;
        for k in space.group_counts(heads.n_heads())? {
            if let Some(partition) = grouping.group(heads, k)?.filter(|p| space.admits(p)) {
                front.offer(&partition, fitness.evaluate(&partition)?)?;
            }
        }
        attach_bounds(&mut front, fitness, space)?;
        Ok(front)
    }
}

/// The optimizer's front, with lower bounds where the fitness has them.
fn bounded(
    optimizer: &dyn Optimizer,
    fitness: &dyn FitnessFn,
    space: &SearchSpace,
    run: Run<'_>,
) -> Result<Front> {
    let mut front = optimizer.optimize(fitness, space, run)?;
    attach_bounds(&mut front, fitness, space)?;
    Ok(front)
}

/// The front of every layer whose fitness function is already there, layers side by side where the feature `rayon`
/// allows. Layer i is searched with `run.fork(i)`: the same fronts as [`Qcqa::fronts`], on any number of threads.
///
/// # Errors
/// What the optimizer and the fitness report; [`Error::Cancelled`].
pub fn optimize_layers(
    optimizer: &dyn Optimizer,
    fitness: &[&dyn FitnessFn],
    space: &SearchSpace,
    run: Run<'_>,
) -> Result<Vec<Front>> {
    // The observer is called from this thread alone: between batches, not within.
    const BATCH: usize = 8;
    let total = fitness.len() as u64;
    let mut fronts = Vec::with_capacity(fitness.len());
    for batch in fitness.chunks(BATCH) {
        let done = fronts.len();
        run.step("search", done as u64, total)?;
        let seeds: Vec<u64> = (0..batch.len()).map(|i| run.fork((done + i) as u64).seed()).collect();
        let search = |i: usize| bounded(optimizer, batch[i], space, Run::new(seeds[i]));
        for front in map_ordered(batch.len(), search) {
            fronts.push(front?);
        }
    }
    run.step("search", total, total)?;
    Ok(fronts)
}

/// Makes the fitness function of a layer.
pub type MakeFitness<'a> = dyn Fn(&Heads) -> Result<Box<dyn FitnessFn>> + 'a;

/// The pipeline over a whole model, composed of plugins: fronts from layers, plans from fronts.
///
/// Starts with the weight-sharing error, mean pooling, costs as shares of the layers' energies and no limits.
#[derive(Clone)]
pub struct Qcqa<'a> {
    search: Search<'a>,
    allocator: &'a dyn Allocator,
    fitness: &'a MakeFitness<'a>,
    cost: CostScale,
    limits: Limits,
    method: Method,
}

impl<'a> Qcqa<'a> {
    /// A pipeline that forms groups by `search` and chooses the layers' k by `allocator`.
    pub fn new(search: Search<'a>, allocator: &'a dyn Allocator) -> Self {
        let method = Method {
            name: "custom".into(),
            fitness: "wse".into(),
            pooler: "mean".into(),
            ..Method::default()
        };
        let wse = &|heads: &Heads| Ok(Box::new(WeightSharingError::new(heads)?) as Box<dyn FitnessFn>);
        Self {
            search,
            allocator,
            fitness: wse,
            cost: CostScale::default(),
            limits: Limits::default(),
            method,
        }
    }

    /// Uses another fitness function; `name` is what plans call it.
    pub fn with_fitness(mut self, name: &str, make: &'a MakeFitness<'a>) -> Self {
        self.method.fitness = name.into();
        Self { fitness: make, ..self }
    }

    /// Makes layers comparable in another way.
    pub fn with_cost(self, cost: CostScale) -> Self {
        Self { cost, ..self }
    }

    /// Obeys the limits of a target or a user.
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// What plans say about the method: its name, and the pooler and target they are meant for.
    pub fn described(mut self, name: &str, pooler: &str, target: Option<&str>) -> Self {
        self.method.name = name.into();
        self.method.pooler = pooler.into();
        self.method.target = target.map(str::to_string);
        self
    }

    /// The front of every layer; one layer is held at a time.
    ///
    /// Layer i is searched with `run.fork(i)`, so its front does not depend on the others.
    ///
    /// # Errors
    /// What the layers, the search and the fitness report; [`Error::Cancelled`].
    pub fn fronts<I>(&self, layers: I, run: Run<'_>) -> Result<Vec<Front>>
    where
        I: IntoIterator<Item = Result<Heads>, IntoIter: ExactSizeIterator>,
    {
        let layers = layers.into_iter();
        let total = layers.len() as u64;
        let mut fronts = Vec::new();
        for (i, heads) in layers.enumerate() {
            run.step("layers", i as u64, total)?;
            let heads = heads?;
            let fitness = (self.fitness)(&heads)?;
            fronts.push(self.search.front(
                &heads,
                fitness.as_ref(),
                &self.limits.space,
                run.fork(i as u64),
            )?);
        }
        run.step("layers", total, total)?;
        Ok(fronts)
    }

    /// The plan that takes from every layer's front the point that the allocator chooses.
    ///
    /// # Errors
    /// [`Error::BudgetRange`] and [`Error::BudgetUnreachable`], what [`LayerCosts::new`] and the allocator
    /// report, [`Error::PlanInconsistent`] when `source` does not describe these fronts.
    pub fn plan(&self, fronts: &[Front], budget: Budget, source: Source, run: Run<'_>) -> Result<Plan> {
        let costs = LayerCosts::new(fronts, self.cost, &self.limits)?;
        self.allocated(fronts, &costs, budget, source, run)
    }

    /// The same with costs that were measured: `costs` holds what each k of each layer loses, under the limits (see
    /// [`LayerCosts::priced`]). Plans then say [`CostScale::Measured`].
    ///
    /// # Errors
    /// As [`Qcqa::plan`]; [`Error::LayerCount`] unless there are costs for every layer.
    pub fn plan_with_costs(
        &self,
        fronts: &[Front],
        costs: &LayerCosts,
        budget: Budget,
        source: Source,
        run: Run<'_>,
    ) -> Result<Plan> {
        self.clone().with_cost(CostScale::Measured).allocated(fronts, costs, budget, source, run)
    }

    fn allocated(
        &self,
        fronts: &[Front],
        costs: &LayerCosts,
        budget: Budget,
        source: Source,
        run: Run<'_>,
    ) -> Result<Plan> {
        let (layers, heads) = (source.layers, source.kv_heads);
        for (what, found) in [("fronts", fronts.len()), ("layer costs", costs.n_layers())] {
            if found != layers {
                return Err(Error::LayerCount { what, expected: layers, found });
            }
        }
        let most = budget.kv_heads(layers, heads)?;
        let ks = self.allocator.allocate(costs, most, run)?;
        let points = fronts.iter().zip(&ks).map(|(front, &k)| {
            front.get(k).map(LayerPlan::from).ok_or(Error::GroupCount { k, n_heads: front.n_heads() })
        });
        let layers: Vec<LayerPlan> = points.collect::<Result<_>>()?;
        let kv_heads = ks.iter().sum();
        let all = (source.layers * heads) as f64;
        let asked = match budget {
            Budget::Fraction(fraction) => fraction,
            Budget::Heads(n) => n as f64 / all,
        };
        let plan = Plan {
            version: Plan::VERSION,
            qcqa: env!("CARGO_PKG_VERSION").into(),
            source,
            method: self.method(),
            calibration: None,
            seed: run.seed(),
            budget: PlanBudget { asked, reached: kv_heads as f64 / all, kv_heads },
            layers,
        };
        plan.check()?;
        Ok(plan)
    }

    /// The resolved method, as plans record it.
    pub fn method(&self) -> Method {
        Method {
            search: match self.search {
                Search::Optimizer(optimizer) => format!("{optimizer:?}"),
                Search::Grouping(grouping) => format!("{grouping:?}"),
            },
            cardinality: self.limits.space.cardinality,
            max_groups: self.limits.space.max_groups,
            max_group_size: self.limits.space.max_group_size,
            fixed: self.limits.fixed.clone(),
            allocation: format!("{:?}", self.allocator),
            cost: self.cost,
            ..self.method.clone()
        }
    }
}

impl fmt::Debug for Qcqa<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcqa")
            .field("method", &self.method())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
