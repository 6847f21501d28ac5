use std::fmt::{self, Display};
use std::str::FromStr;
use std::sync::Arc;

use super::Search;
use crate::error::{Error, Result};
use crate::fitness::{FitnessKind, PerturbedSharing, WeightSharing};
use crate::grouping::{DynamicKeyNorm, KeyNorm, UniformGqa};
use crate::optimizer::Auto;
use crate::partition::{Cardinality, SearchSpace};
use crate::plan::Plan;
use crate::pooler::{KvPooler, MeanPooler};

/// A method of the field, whole: what proposes groups, what judges them, how a group merges.
///
/// ```
/// use qcqa::pipeline::Preset;
///
/// assert_eq!("qcqa-ac".parse::<Preset>().unwrap(), Preset::QcqaAc);
/// assert_eq!(Preset::Mqa.to_string(), "mqa");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Preset {
    /// Neighbouring heads in equal groups, mean-pooled (Ainslie et al. 2023, arXiv 2305.13245).
    Gqa,
    /// One group in every layer, mean-pooled (Shazeer 2019, arXiv 1911.02150); takes no budget.
    Mqa,
    /// Neighbouring heads, group sizes by the norms of their keys, mean-pooled (after Khan et al. 2024, arXiv 2408.08454).
    KeyNorm,
    /// Neighbouring heads, group sizes by the norms of their keys on a calibration text, averaged exponentially over its windows,
    /// mean-pooled (after Khan et al. 2024, arXiv 2408.08454).
    Dgqa,
    /// Groups of one size with the least weight-sharing error under perturbed distances, mean-pooled (after Khan et al. 2024, arXiv
    /// 2408.08454).
    Pgqa,
    /// Groups of one size with the least weight-sharing error, mean-pooled (Joshi et al. 2024, arXiv 2406.10247).
    QcqaEc,
    /// Groups of any size with the least weight-sharing error, mean-pooled (Joshi et al. 2024, arXiv 2406.10247).
    QcqaAc,
    /// Groups of any size over the heads of one layer or of two neighbouring ones, as loses least by weight-sharing error, mean-pooled: the
    /// upper layer reads what the lower one caches (cross-layer attention, Brandon et al. 2024, arXiv 2405.12981).
    Cla,
    /// As [`Preset::Cla`], with groups that share the best low-rank fit under the inputs of the lower layer, from which those of the upper one
    /// are predicted (docs/method.md, "Across layers").
    #[cfg(feature = "linalg")]
    ClaLowRank,
    /// Groups that share the best low-rank fit under the layer's inputs, as the target allows (docs/method.md).
    #[cfg(feature = "linalg")]
    LowRank,
}

impl Preset {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Gqa,
        Self::Mqa,
        Self::KeyNorm,
        Self::Dgqa,
        Self::Pgqa,
        Self::QcqaEc,
        Self::QcqaAc,
        Self::Cla,
        #[cfg(feature = "linalg")]
        Self::ClaLowRank,
        #[cfg(feature = "linalg")]
        Self::LowRank,
    ];

    /// Its name: `gqa`, `mqa`, `key-norm`, `dgqa`, `pgqa`, `qcqa-ec`, `qcqa-ac`, `cla`, `cla-low-rank`, `low-rank`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gqa => "gqa",
            Self::Mqa => "mqa",
            Self::KeyNorm => "key-norm",
            Self::Dgqa => "dgqa",
            Self::Pgqa => "pgqa",
            Self::QcqaEc => "qcqa-ec",
            Self::QcqaAc => "qcqa-ac",
            Self::Cla => "cla",
            #[cfg(feature = "linalg")]
            Self::ClaLowRank => "cla-low-rank",
            #[cfg(feature = "linalg")]
            Self::LowRank => "low-rank",
        }
    }

    /// What it does, in a line.
    pub fn summary(self) -> &'static str {
        match self {
            Self::Gqa => "Neighbouring heads in equal groups",
            Self::Mqa => "One group in every layer; takes no budget",
            Self::KeyNorm => "Neighbouring heads, group sizes by the norms of their keys",
            Self::Dgqa => "Neighbouring heads, group sizes by the norms of their keys on a calibration text",
            Self::Pgqa => "Groups of one size, searched under perturbed distances of heads",
            Self::QcqaEc => "Searched groups, all of one size",
            Self::QcqaAc => "Searched groups of any size",
            Self::Cla => {
                "Searched groups of any size within layers or across two, whose upper one reads the lower one's cache"
            }
            #[cfg(feature = "linalg")]
            Self::ClaLowRank => {
                "As cla, with the best low-rank fit; of the inputs of a calibration text where there is one"
            }
            #[cfg(feature = "linalg")]
            Self::LowRank => "Searched groups that share the best low-rank fit; sizes as the target allows",
        }
    }

    /// Whether an optimizer searches its groups.
    pub fn searches(self) -> bool {
        !matches!(self, Self::Gqa | Self::Mqa | Self::KeyNorm | Self::Dgqa)
    }

    pub(super) fn search(self) -> Search {
        match self {
            Self::Gqa | Self::Mqa => Search::Grouping(Arc::new(UniformGqa)),
            Self::KeyNorm => Search::Grouping(Arc::new(KeyNorm)),
            Self::Dgqa => Search::Grouping(Arc::new(DynamicKeyNorm::default())),
            Self::Pgqa | Self::QcqaEc | Self::QcqaAc | Self::Cla => {
                Search::Optimizer(Arc::new(Auto::default()))
            }
            // Every group that is looked at is an eigenproblem.
            #[cfg(feature = "linalg")]
            Self::ClaLowRank | Self::LowRank => Search::Optimizer(Arc::new(Auto { exact_heads: 8 })),
        }
    }

    pub(super) fn fitness(self) -> Arc<dyn FitnessKind> {
        match self {
            #[cfg(feature = "linalg")]
            Self::ClaLowRank | Self::LowRank => Arc::new(crate::fitness::LowRankSharing::default()),
            Self::Pgqa => Arc::new(PerturbedSharing::default()),
            _ => Arc::new(WeightSharing),
        }
    }

    pub(super) fn pooler(self) -> Arc<dyn KvPooler> {
        match self {
            #[cfg(feature = "linalg")]
            Self::ClaLowRank | Self::LowRank => Arc::new(crate::pooler::LowRankPooler::default()),
            _ => Arc::new(MeanPooler),
        }
    }

    /// The partitions that it makes; `None`: whatever the target allows.
    pub(super) fn space(self) -> Option<SearchSpace> {
        match self {
            Self::Gqa | Self::Pgqa | Self::QcqaEc => Some(SearchSpace::equal()),
            Self::Mqa => Some(SearchSpace { max_groups: Some(1), ..SearchSpace::equal() }),
            Self::KeyNorm | Self::Dgqa | Self::QcqaAc | Self::Cla => Some(SearchSpace::arbitrary()),
            #[cfg(feature = "linalg")]
            Self::ClaLowRank => Some(SearchSpace::arbitrary()),
            #[cfg(feature = "linalg")]
            Self::LowRank => None,
        }
    }

    /// Whether it shares heads across layers.
    pub fn crosses_layers(self) -> bool {
        match self {
            Self::Cla => true,
            #[cfg(feature = "linalg")]
            Self::ClaLowRank => true,
            _ => false,
        }
    }

    /// Checks that this method can have made the groups of a plan that has its name.
    ///
    /// # Errors
    /// [`Error::PlanInconsistent`] naming the first layer that it cannot have made.
    pub fn check(self, plan: &Plan) -> Result<()> {
        if let Some(layer) = plan.first_below().filter(|_| !self.crosses_layers()) {
            let what = format!(
                "its method is {self}, which shares within layers, but layer {layer} reads the one below; call it `custom` if that is meant"
            );
            return Err(Error::PlanInconsistent(what));
        }
        let Some(space) = self.space() else { return Ok(()) };
        let other = plan.groups().enumerate().find(|(_, groups)| !space.admits(groups));
        other.map_or(Ok(()), |(layer, groups)| {
            let what = format!(
                "its method is {self}, which makes {space}, but layer {layer} has groups of {:?} heads; call it `custom` if they are meant",
                groups.sizes()
            );
            Err(Error::PlanInconsistent(what))
        })
    }

    /// Whether neighbouring groups are candidates beside those found, where all must have one size.
    pub(super) fn tries_neighbours(self, cardinality: Cardinality) -> bool {
        self.space().is_none() && cardinality == Cardinality::Equal
    }
}

impl Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|preset| preset.name() == name).ok_or_else(|| {
            let known = Self::ALL.iter().map(|preset| preset.name()).collect::<Vec<_>>().join(", ");
            Error::UnknownPlugin { kind: "method", name: crate::error::shown(name), known }
        })
    }
}
