//! A method with every name resolved into the pieces of the library, for one model.

use super::CliError;
use super::methods::{AllocationName, CostName, MethodArgs, MethodName, OptimizerName, PoolerName, name_of};
use crate::checkpoint::{Checkpoint, targets};
use crate::runtime::{Calibration, Model, Moments, Sensitivity, Trial, Windows, choose_model};
use crate::{
    Allocator, Budget, Cardinality, CostScale, Error, Exact, ExactAllocation, FitnessFn, Front, Grouping,
    Heads, KeyNorm, KvPooler, LayerPlan, LayerSelection, Limits, LocalSearch, LowRankError, Nsga2, Optimizer,
    Partition, Plan, Qcqa, Run, Search, SearchSpace, UniformAllocation, UniformGqa, WeightSharingError,
    optimize_layers,
};

/// Windows that decide between groups: the order of two losses shows early.
const CHOOSING_WINDOWS: usize = 32;
/// Windows that measure how much each layer pays: losses of the same text differ by little but what is measured.
const MEASURING_WINDOWS: usize = 16;

enum Engine {
    Optimizer(Box<dyn Optimizer>),
    Grouping(Box<dyn Grouping>),
}

/// What a search found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The front of every layer.
    pub(super) fronts: Vec<Front>,
    /// Groups of neighbours by the same fitness, where the calibration text is to choose between the two.
    neighbours: Option<Vec<Front>>,
    /// What the layers were measured to lose, where that allots the budget.
    sensitivity: Option<Sensitivity>,
}

/// A method with everything resolved for one model.
pub(super) struct Resolved<'a> {
    name: MethodName,
    engine: Engine,
    allocation: AllocationName,
    allocator: Box<dyn Allocator>,
    cost: CostScale,
    limits: Limits,
    pooler_name: PoolerName,
    pooler: Box<dyn KvPooler>,
    target: Option<String>,
    checkpoint: &'a Checkpoint,
    calibration: Option<&'a Calibration>,
}

impl<'a> Resolved<'a> {
    /// The method as the flags ask for it, within what the target can hold.
    pub(super) fn new(
        name: MethodName,
        args: &MethodArgs,
        target: Option<&str>,
        checkpoint: &'a Checkpoint,
        calibration: Option<&'a Calibration>,
    ) -> Result<Self, CliError> {
        let nsga2 = Nsga2 { population: args.population, generations: args.generations, ..Nsga2::default() };
        // An error of low-rank sharing takes an eigenproblem for each group that is looked at.
        let cheap = if name == MethodName::LowRank { 8 } else { 12 };
        let [optimizer] = args.optimizer[..] else {
            return Err(CliError::Usage("one --optimizer at a time, but for compare".to_string()));
        };
        let search: Box<dyn Optimizer> = match optimizer {
            OptimizerName::Auto if checkpoint.config().kv_heads <= cheap => Box::new(Exact::default()),
            OptimizerName::Auto | OptimizerName::Local => Box::new(LocalSearch::default()),
            OptimizerName::Exact => Box::new(Exact::default()),
            OptimizerName::Nsga2 => Box::new(nsga2),
        };
        let engine = match name {
            MethodName::Gqa | MethodName::Mqa => Engine::Grouping(Box::new(UniformGqa)),
            MethodName::KeyNorm => Engine::Grouping(Box::new(KeyNorm)),
            MethodName::QcqaEc | MethodName::QcqaAc | MethodName::LowRank => Engine::Optimizer(search),
        };
        let limits = limits(name, args, target)?;
        let allocation = allocation(name, args, &limits, calibration)?;
        let allocator: Box<dyn Allocator> = match allocation {
            AllocationName::Uniform => Box::new(UniformAllocation),
            AllocationName::Exact | AllocationName::Sensitivity => Box::new(ExactAllocation),
            AllocationName::Selection => Box::new(LayerSelection {
                population: args.population,
                generations: args.generations,
                ..LayerSelection::default()
            }),
        };
        let pooler_name = PoolerName::of(name, args.pooler);
        Ok(Self {
            name,
            engine,
            allocation,
            allocator,
            cost: match args.cost {
                CostName::Raw => CostScale::Raw,
                CostName::EnergyShare => CostScale::EnergyShare,
            },
            limits,
            pooler_name,
            pooler: pooler_name.make(),
            target: target.map(str::to_string),
            checkpoint,
            calibration,
        })
    }

    pub(super) fn pooler(&self) -> PoolerName {
        self.pooler_name
    }

    /// How the layers share the budget.
    pub(super) fn allocation(&self) -> AllocationName {
        self.allocation
    }

    /// The moments that the pooler works under.
    fn pooler_moments(&self) -> Option<&'a Moments> {
        self.calibration.filter(|_| self.pooler_name.uses_moments()).map(Calibration::moments)
    }

    fn trial<'b>(&'b self, source: &'b Model, windows: &'b Windows) -> Trial<'b> {
        let (checkpoint, pooler) = (self.checkpoint, self.pooler.as_ref());
        Trial { checkpoint, source, moments: self.pooler_moments(), pooler, windows }
    }

    fn search(&self) -> Search<'_> {
        match &self.engine {
            Engine::Optimizer(optimizer) => Search::Optimizer(optimizer.as_ref()),
            Engine::Grouping(grouping) => Search::Grouping(grouping.as_ref()),
        }
    }

    fn pipeline(&self) -> Qcqa<'_> {
        let pipeline = Qcqa::new(self.search(), self.allocator.as_ref())
            .with_cost(self.cost)
            .with_limits(self.limits.clone())
            .described(&name_of(self.name), &name_of(self.pooler_name), self.target.as_deref());
        match self.name {
            MethodName::LowRank => {
                pipeline.with_fitness("low-rank", &|heads| Ok(Box::new(LowRankError::new(heads)?)))
            }
            _ => pipeline,
        }
    }

    /// Searches every layer, and measures what the allocation needs.
    pub(super) fn found(&self, run: Run<'_>) -> Result<Found, CliError> {
        let layers = 0..self.checkpoint.config().n_layers;
        match &self.engine {
            _ if self.name == MethodName::LowRank => self.low_rank(run),
            // The mapped weights are read piece by piece and the layers searched side by side.
            Engine::Optimizer(_) => {
                let fitness = weight_sharing(self.checkpoint, run)?;
                self.of_fitness(&fitness.iter().map(|f| f as &dyn FitnessFn).collect::<Vec<_>>(), run)
            }
            Engine::Grouping(_) => {
                let layers = layers.map(|i| self.checkpoint.key_value(i).map_err(Error::from));
                self.measured(self.pipeline().fronts(layers, run)?, run)
            }
        }
    }

    /// The same for a method that searches by fitness functions that are already there.
    pub(super) fn of_fitness(&self, fitness: &[&dyn FitnessFn], run: Run<'_>) -> Result<Found, CliError> {
        let fronts = match &self.engine {
            Engine::Optimizer(o) => optimize_layers(o.as_ref(), fitness, &self.limits.space, run)?,
            Engine::Grouping(_) => Vec::new(),
        };
        self.measured(fronts, run)
    }

    /// The front of one decoded layer by the method's rule.
    pub(super) fn front(
        &self,
        heads: &Heads,
        fitness: &dyn FitnessFn,
        run: Run<'_>,
    ) -> Result<Front, CliError> {
        Ok(self.search().front(heads, fitness, &self.limits.space, run)?)
    }

    /// Low-rank sharing: one layer is held at a time. Where groups must be equal, those of neighbours are candidates,
    /// too: a text chooses, or the error.
    fn low_rank(&self, run: Run<'_>) -> Result<Found, CliError> {
        let layers = self.checkpoint.config().n_layers;
        let equal = self.limits.space.cardinality == Cardinality::Equal;
        let text_chooses = self.calibration.is_some_and(|c| c.text().is_some());
        let (mut fronts, mut neighbours) = (Vec::new(), Vec::new());
        for i in 0..layers {
            run.step("layers", i as u64, layers as u64)?;
            let heads = self.checkpoint.layer(i)?;
            let heads = match self.calibration {
                Some(calibration) => calibration.moments().attach(i, heads)?,
                None => heads,
            };
            let fitness = LowRankError::new(&heads).map_err(|e| e.of_layer(i))?;
            let mut front = self.front(&heads, &fitness, run.fork(i as u64))?;
            if equal {
                let others = Search::Grouping(&UniformGqa);
                let others = others.front(&heads, &fitness, &self.limits.space, run.fork(i as u64))?;
                if text_chooses {
                    neighbours.push(others);
                } else {
                    for point in others.iter() {
                        front.offer(&point.partition, point.error)?;
                    }
                }
            }
            fronts.push(front);
        }
        run.step("layers", layers as u64, layers as u64)?;
        let found = self.measured(fronts, run)?;
        Ok(Found { neighbours: (equal && text_chooses).then_some(neighbours), ..found })
    }

    /// Fronts with what the allocation needs.
    pub(super) fn measured(&self, fronts: Vec<Front>, run: Run<'_>) -> Result<Found, CliError> {
        let text = self.calibration.and_then(Calibration::text);
        let sensitivity = match (self.allocation, text) {
            (AllocationName::Sensitivity, Some((source, windows))) => {
                let windows = windows.clone().first(MEASURING_WINDOWS);
                Some(Sensitivity::measure(&self.trial(source, &windows), &fronts, run)?)
            }
            _ => None,
        };
        Ok(Found { fronts, neighbours: None, sensitivity })
    }

    /// The plan within this share of the cache.
    pub(super) fn plan(&self, found: &Found, kv: Option<f64>, run: Run<'_>) -> Result<Plan, CliError> {
        let budget = match (self.name, kv) {
            (MethodName::Mqa, _) => Budget::Heads(self.checkpoint.config().n_layers),
            (_, Some(kv)) => Budget::Fraction(kv),
            (_, None) => {
                return Err(CliError::Usage("--kv FRACTION is missing: 0.5 keeps half the cache".into()));
            }
        };
        let (fronts, source) = (&found.fronts, self.checkpoint.source()?);
        let mut plan = match &found.sensitivity {
            Some(sensitivity) => {
                let costs = sensitivity.costs(fronts, &self.limits)?;
                self.pipeline().plan_with_costs(fronts, &costs, budget, source, run)?
            }
            None => self.pipeline().plan(fronts, budget, source, run)?,
        };
        if let Some(neighbours) = &found.neighbours {
            self.choose(&mut plan, neighbours, run)?;
        }
        let counts = self.name == MethodName::LowRank
            || self.pooler_name.uses_moments()
            || found.sensitivity.is_some();
        let calibration = self.calibration.filter(|_| counts);
        plan.calibration = calibration.map(|c| c.moments().fingerprint());
        Ok(plan)
    }

    /// Puts groups of neighbours in the place of searched ones where the model then reads the calibration text better.
    fn choose(&self, plan: &mut Plan, neighbours: &[Front], run: Run<'_>) -> Result<(), CliError> {
        let Some((source, windows)) = self.calibration.and_then(Calibration::text) else { return Ok(()) };
        // A bound holds for every partition of that many equal groups.
        let other = |(layer, front): (&LayerPlan, &Front)| match front.get(layer.groups.n_groups()) {
            Some(point) => LayerPlan { lower_bound: layer.lower_bound, ..LayerPlan::from(point) },
            None => layer.clone(),
        };
        let others: Vec<LayerPlan> = plan.layers.iter().zip(neighbours).map(other).collect();
        let groups =
            |layers: &[LayerPlan]| layers.iter().map(|l| l.groups.clone()).collect::<Vec<Partition>>();
        if groups(&plan.layers) != groups(&others) {
            let windows = windows.clone().first(CHOOSING_WINDOWS);
            let trial = self.trial(source, &windows);
            let models = [trial.grouped(&groups(&plan.layers))?, trial.grouped(&groups(&others))?];
            if choose_model(&models, &windows, run)?.0 == 1 {
                plan.layers = others;
            }
        }
        plan.method.search += " or UniformGqa, by calibration loss";
        Ok(())
    }
}

/// How the layers share the budget: as asked, or as the method does of itself. One k in all layers leaves nothing to
/// measure.
fn allocation(
    method: MethodName,
    args: &MethodArgs,
    limits: &Limits,
    calibration: Option<&Calibration>,
) -> Result<AllocationName, CliError> {
    let has_text = calibration.is_some_and(|c| c.text().is_some());
    let asked = args.allocation.unwrap_or(match method {
        MethodName::LowRank if limits.same_k => AllocationName::Uniform,
        MethodName::LowRank if has_text => AllocationName::Sensitivity,
        MethodName::LowRank => AllocationName::Exact,
        _ => AllocationName::Uniform,
    });
    match asked {
        AllocationName::Sensitivity if limits.same_k => Ok(AllocationName::Uniform),
        AllocationName::Sensitivity if !has_text => Err(CliError::Usage(
            "--allocation sensitivity measures the model on a text: give --calibration TEXT (moments do not suffice), or \
             use --allocation exact"
                .to_string(),
        )),
        asked => Ok(asked),
    }
}

/// The weight-sharing error of every layer, read piece by piece.
fn weight_sharing(checkpoint: &Checkpoint, run: Run<'_>) -> Result<Vec<WeightSharingError>, CliError> {
    let layers = checkpoint.config().n_layers;
    let fitness = |i: usize| {
        run.step("layers", i as u64, layers as u64)?;
        let rows = checkpoint.rows(i)?;
        WeightSharingError::new(&rows).map_err(|error| match (error, rows.check_finite()) {
            // The rows know which tensor it was.
            (Error::NotFinite { .. }, Err(named)) => named.into(),
            (error, _) => error.into(),
        })
    };
    (0..layers).map(fitness).collect()
}

/// What method, target and flags allow together.
fn limits(method: MethodName, args: &MethodArgs, target: Option<&str>) -> Result<Limits, CliError> {
    let mut limits = Limits::default();
    if let Some(name) = target {
        let known =
            targets::by_name(name).ok_or_else(|| CliError::Usage(format!("there is no target {name}")))?;
        limits = known.limits();
    }
    let own = match method {
        MethodName::Gqa | MethodName::Mqa | MethodName::QcqaEc => SearchSpace::equal(),
        MethodName::KeyNorm | MethodName::QcqaAc => SearchSpace::arbitrary(),
        MethodName::LowRank => limits.space,
    };
    if limits.space.cardinality == Cardinality::Equal && own.cardinality == Cardinality::Arbitrary {
        return Err(CliError::Usage(format!(
            "--target {} holds equal groups only, which --method {} does not make; use --method low-rank or qcqa-ec, or --target \
             expanded (for evaluation: saves no memory)",
            target.unwrap_or_default(),
            name_of(method),
        )));
    }
    let least = |a: Option<usize>, b: Option<usize>| a.into_iter().chain(b).min();
    let one_group = (method == MethodName::Mqa).then_some(1);
    let space = SearchSpace {
        cardinality: own.cardinality,
        max_groups: least(least(limits.space.max_groups, args.max_groups), one_group),
        max_group_size: least(limits.space.max_group_size, args.max_group_size),
    };
    Ok(Limits { space, ..limits })
}
