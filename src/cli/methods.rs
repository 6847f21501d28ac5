//! Names of methods and of their parts, as the command line and plans use them.

use std::path::Path;

use clap::{Args, ValueEnum};

use super::{CliError, about};
use crate::checkpoint::{self, Checkpoint, read_plan};
use crate::error::shown;
use crate::runtime::Refit;
use crate::{FirstHead, KvPooler, LowRankPooler, MeanPooler, Plan, ProcrustesPooler};

/// What a method leaves open: each fixes grouping, cardinality, allocation, cost and pooler; these flags override.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Method")]
pub(super) struct MethodArgs {
    /// How the qcqa methods search; compare takes several
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    pub(super) optimizer: Vec<OptimizerName>,
    /// How the layers share the budget; uniform unless said, but for low-rank: sensitivity with a calibration text, else
    /// exact
    #[arg(long, value_enum)]
    pub(super) allocation: Option<AllocationName>,
    /// How the errors of different layers are made comparable
    #[arg(long, value_enum, default_value_t = CostName::EnergyShare)]
    pub(super) cost: CostName,
    /// How the heads of a group are merged; mean unless said, but for low-rank
    #[arg(long, value_enum)]
    pub(super) pooler: Option<PoolerName>,
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
    /// Searched groups that share the best low-rank fit; sizes as the target allows
    LowRank,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OptimizerName {
    /// Exact up to 12 heads (8 for low-rank), local above
    Auto,
    /// The optimum, up to 16 heads
    Exact,
    /// Iterated local search, which starts from Ward's agglomeration
    #[value(alias = "ward")]
    Local,
    /// The paper's genetic search
    Nsga2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum AllocationName {
    /// One k in all layers
    Uniform,
    /// The paper's stage 2: one k, or no sharing, for each layer
    Selection,
    /// The best k for each layer by the errors
    Exact,
    /// The best k for each layer by what the model was measured to lose on the calibration text
    Sensitivity,
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
    /// Their mean after turning them towards one another
    Procrustes,
    /// Their best low-rank fit under the layer's inputs
    LowRank,
}

impl MethodName {
    /// Whether an optimizer searches its groups.
    pub(super) fn searches(self) -> bool {
        matches!(self, Self::QcqaEc | Self::QcqaAc | Self::LowRank)
    }
}

impl AllocationName {
    /// Those that need nothing but the errors.
    pub(super) const OF_ERRORS: [Self; 3] = [Self::Uniform, Self::Selection, Self::Exact];
}

impl PoolerName {
    /// The pooler asked for, or the method's own.
    pub(super) fn of(method: MethodName, asked: Option<Self>) -> Self {
        asked.unwrap_or(if method == MethodName::LowRank { Self::LowRank } else { Self::Mean })
    }

    pub(super) fn make(self) -> Box<dyn KvPooler> {
        match self {
            Self::Mean => Box::new(MeanPooler),
            Self::First => Box::new(FirstHead),
            Self::Procrustes => Box::new(ProcrustesPooler::default()),
            Self::LowRank => Box::new(LowRankPooler::default()),
        }
    }

    /// Whether it works under the moments of the layer's inputs.
    pub(super) fn uses_moments(self) -> bool {
        matches!(self, Self::Procrustes | Self::LowRank)
    }
}

/// The name that the command line and plans use.
pub(super) fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |v| v.get_name().to_string())
}

/// Reads a plan for this model, with the pooler that it names: what does not fit is found before anything is computed.
pub(super) fn plan_for(checkpoint: &Checkpoint, file: &Path) -> Result<(Plan, PoolerName), CliError> {
    let plan = read_plan(file)?;
    checkpoint::same_source(checkpoint, &plan).map_err(|e| about(file, e))?;
    let (name, refit) = (&plan.method.pooler, plan.method.refit.as_deref());
    let names = |which: fn(PoolerName) -> bool| {
        let names = PoolerName::value_variants().iter().filter(|&&p| which(p)).map(|&p| name_of(p));
        names.collect::<Vec<_>>().join(", ")
    };
    let wrong = |rule: String| about(file, CliError::Usage(rule));
    let pooler = PoolerName::from_str(name, false).map_err(|_| {
        wrong(format!("there is no pooler \"{}\"; known are {}", shown(name), names(|_| true)))
    })?;
    match refit {
        Some(refit) if refit != Refit::None.name() && !pooler.uses_moments() => Err(wrong(format!(
            "the refit {refit:?} starts from calibrated heads, but the pooler is {name:?}; refits belong to {}",
            names(PoolerName::uses_moments),
        ))),
        _ => Ok((plan, pooler)),
    }
}
