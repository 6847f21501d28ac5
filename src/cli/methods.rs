//! Names of methods and of their parts, resolved into the pieces of the library.

use clap::{Args, ValueEnum};

use super::CliError;
use crate::checkpoint::{Checkpoint, targets};
use crate::{
    Allocator, Budget, Cardinality, CostScale, Error, Exact, ExactAllocation, FirstHead, FitnessFn, Front,
    Grouping, KeyNorm, KvPooler, LayerSelection, Limits, MeanPooler, Nsga2, Optimizer, Plan, Qcqa, Run,
    Search, SearchSpace, UniformAllocation, UniformGqa, Ward, WeightSharingError, optimize_layers,
};

/// What a method leaves open: each fixes grouping, cardinality, allocation, cost and pooler; these flags override.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Method")]
pub(super) struct MethodArgs {
    /// How the qcqa methods search; compare takes several
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    pub(super) optimizer: Vec<OptimizerName>,
    /// How the layers share the budget; uniform unless said
    #[arg(long, value_enum)]
    pub(super) allocation: Option<AllocationName>,
    /// How the errors of different layers are made comparable
    #[arg(long, value_enum, default_value_t = CostName::EnergyShare)]
    pub(super) cost: CostName,
    /// How the heads of a group are merged
    #[arg(long, value_enum, default_value_t = PoolerName::Mean)]
    pub(super) pooler: PoolerName,
    /// The most groups of a layer that shares
    #[arg(long, value_name = "K")]
    pub(super) max_groups: Option<usize>,
    /// The most heads of a group
    #[arg(long, value_name = "HEADS")]
    pub(super) max_group_size: Option<usize>,
    /// Individuals of nsga2
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(super) population: usize,
    /// Generations of nsga2
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(super) generations: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum MethodName {
    /// Neighbouring heads in equal groups
    Gqa,
    /// One group in every layer; takes no budget
    Mqa,
    /// Neighbouring heads, group sizes by the norms of their keys
    KeyNorm,
    /// Searched groups, all of one size
    QcqaEc,
    /// Searched groups of any size
    QcqaAc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OptimizerName {
    /// Exact up to 12 heads, ward above
    Auto,
    /// The optimum, up to 16 heads
    Exact,
    /// Agglomeration and local search
    Ward,
    /// The paper's genetic search
    Nsga2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AllocationName {
    /// One k in all layers
    Uniform,
    /// The paper's stage 2: one k, or no sharing, for each layer
    Selection,
    /// The best k for each layer
    Exact,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CostName {
    /// As a share of the layer's own energy
    EnergyShare,
    /// As they are: the paper's choice
    Raw,
}

/// The poolers that plans can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PoolerName {
    /// Their mean
    Mean,
    /// The first of them
    First,
}

impl PoolerName {
    pub(super) fn make(self) -> Box<dyn KvPooler> {
        match self {
            Self::Mean => Box::new(MeanPooler),
            Self::First => Box::new(FirstHead),
        }
    }
}

/// The name that the command line and plans use.
pub(super) fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}

enum Engine {
    Optimizer(Box<dyn Optimizer>),
    Grouping(Box<dyn Grouping>),
}

/// A method with everything resolved for one model.
pub(super) struct Resolved {
    name: MethodName,
    engine: Engine,
    allocator: Box<dyn Allocator>,
    cost: CostScale,
    limits: Limits,
    pooler: String,
    target: Option<String>,
}

impl Resolved {
    /// The method as the flags ask for it, within what the target can hold.
    pub(super) fn new(
        name: MethodName,
        args: &MethodArgs,
        target: Option<&str>,
        checkpoint: &Checkpoint,
    ) -> Result<Self, CliError> {
        let nsga2 = Nsga2 { population: args.population, generations: args.generations, ..Nsga2::default() };
        let exact_is_cheap = checkpoint.config().kv_heads <= 12;
        let [optimizer] = args.optimizer[..] else {
            return Err(CliError::Usage("one --optimizer at a time, but for compare".to_string()));
        };
        let search: Box<dyn Optimizer> = match optimizer {
            OptimizerName::Auto if exact_is_cheap => Box::new(Exact::default()),
            OptimizerName::Auto | OptimizerName::Ward => Box::new(Ward::default()),
            OptimizerName::Exact => Box::new(Exact::default()),
            OptimizerName::Nsga2 => Box::new(nsga2),
        };
        let engine = match name {
            MethodName::Gqa | MethodName::Mqa => Engine::Grouping(Box::new(UniformGqa)),
            MethodName::KeyNorm => Engine::Grouping(Box::new(KeyNorm)),
            MethodName::QcqaEc | MethodName::QcqaAc => Engine::Optimizer(search),
        };
        let allocator: Box<dyn Allocator> = match args.allocation.unwrap_or(AllocationName::Uniform) {
            AllocationName::Uniform => Box::new(UniformAllocation),
            AllocationName::Exact => Box::new(ExactAllocation),
            AllocationName::Selection => Box::new(LayerSelection {
                population: args.population,
                generations: args.generations,
                ..LayerSelection::default()
            }),
        };
        Ok(Self {
            name,
            engine,
            allocator,
            cost: match args.cost {
                CostName::Raw => CostScale::Raw,
                CostName::EnergyShare => CostScale::EnergyShare,
            },
            limits: limits(name, args, target)?,
            pooler: name_of(args.pooler),
            target: target.map(str::to_string),
        })
    }

    fn pipeline(&self) -> Qcqa<'_> {
        let search = match &self.engine {
            Engine::Optimizer(optimizer) => Search::Optimizer(optimizer.as_ref()),
            Engine::Grouping(grouping) => Search::Grouping(grouping.as_ref()),
        };
        Qcqa::new(search, self.allocator.as_ref())
            .with_cost(self.cost)
            .with_limits(self.limits.clone())
            .described(&name_of(self.name), &self.pooler, self.target.as_deref())
    }

    /// The front of every layer. An optimizer reads the mapped weights piece by piece and searches the layers side
    /// by side; a grouping looks at one decoded layer at a time.
    pub(super) fn fronts(&self, checkpoint: &Checkpoint, run: Run<'_>) -> Result<Vec<Front>, CliError> {
        let Engine::Optimizer(_) = &self.engine else {
            let layers =
                (0..checkpoint.config().n_layers).map(|i| checkpoint.key_value(i).map_err(Error::from));
            return Ok(self.pipeline().fronts(layers, run)?);
        };
        let fitness = weight_sharing(checkpoint, run)?;
        self.fronts_of(&fitness.iter().map(|f| f as &dyn FitnessFn).collect::<Vec<_>>(), run)
    }

    /// The same from fitness functions that are already there; empty for a grouping.
    pub(super) fn fronts_of(&self, fitness: &[&dyn FitnessFn], run: Run<'_>) -> Result<Vec<Front>, CliError> {
        match &self.engine {
            Engine::Optimizer(optimizer) => {
                Ok(optimize_layers(optimizer.as_ref(), fitness, &self.limits.space, run)?)
            }
            Engine::Grouping(_) => Ok(Vec::new()),
        }
    }

    /// The front of one decoded layer by the method's rule; `None` for a method that searches.
    pub(super) fn grouped(
        &self,
        heads: &crate::LayerHeads,
        fitness: &dyn FitnessFn,
        run: Run<'_>,
    ) -> Result<Option<Front>, CliError> {
        match &self.engine {
            Engine::Optimizer(_) => Ok(None),
            Engine::Grouping(grouping) => Ok(Some(Search::Grouping(grouping.as_ref()).front(
                heads,
                fitness,
                &self.limits.space,
                run,
            )?)),
        }
    }

    /// The plan within this share of the cache.
    pub(super) fn plan(
        &self,
        checkpoint: &Checkpoint,
        fronts: &[Front],
        kv: Option<f64>,
        run: Run<'_>,
    ) -> Result<Plan, CliError> {
        let budget = match (self.name, kv) {
            (MethodName::Mqa, _) => Budget::Heads(checkpoint.config().n_layers),
            (_, Some(kv)) => Budget::Fraction(kv),
            (_, None) => {
                return Err(CliError::Usage("--kv FRACTION is missing: 0.5 keeps half the cache".into()));
            }
        };
        Ok(self.pipeline().plan(fronts, budget, checkpoint.source()?, run)?)
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
    let own = match method {
        MethodName::Gqa | MethodName::Mqa | MethodName::QcqaEc => SearchSpace::equal(),
        MethodName::KeyNorm | MethodName::QcqaAc => SearchSpace::arbitrary(),
    };
    let mut limits = Limits::default();
    if let Some(name) = target {
        let known =
            targets::by_name(name).ok_or_else(|| CliError::Usage(format!("there is no target {name}")))?;
        limits = known.limits();
    }
    if limits.space.cardinality == Cardinality::Equal && own.cardinality == Cardinality::Arbitrary {
        return Err(CliError::Usage(format!(
            "--target {} holds equal groups only, which --method {} does not make; use --method qcqa-ec, or --target \
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
