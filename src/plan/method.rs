use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::allocator::{ALLOCATORS, CostScale};
use crate::budget::Limits;
use crate::error::{Error, Result};
use crate::fitness::FITNESS;
use crate::grouping::GROUPINGS;
use crate::optimizer::OPTIMIZERS;
use crate::partition::SearchSpace;
use crate::spec::Spec;

/// How groups were decided, with every setting resolved. Nothing here is obeyed later: it is the record of a search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Method {
    /// Name of the method: that of a preset, or `custom`.
    pub name: String,
    /// What proposed groups: an optimizer or a rule, and the rules whose groups stood beside it.
    pub search: Vec<Spec>,
    /// Whether the loss on windows of calibration texts that fit nothing chose between them; else the least error did.
    #[serde(default, skip_serializing_if = "is_false")]
    pub chosen_by_loss: bool,
    /// The fitness function.
    pub fitness: Spec,
    /// Fingerprint of the calibration that had a part in the decision, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// The partitions that were searched.
    pub space: SearchSpace,
    /// Whether all layers had to have the same number of groups.
    #[serde(default, skip_serializing_if = "is_false")]
    pub same_k: bool,
    /// Layers whose number of groups was given beforehand: index → k.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fixed: BTreeMap<usize, usize>,
    /// A number that every layer's number of groups had to divide.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dividing: Option<usize>,
    /// The allocator.
    pub allocation: Spec,
    /// How layers were made comparable.
    pub cost: CostScale,
    /// The target whose limits the search obeyed, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

impl Method {
    /// A method of this name: `search` proposes, `fitness` judges, `allocation` divides the budget.
    pub fn new(name: impl Into<String>, search: Spec, fitness: Spec, allocation: Spec) -> Self {
        Self {
            name: name.into(),
            search: vec![search],
            chosen_by_loss: false,
            fitness,
            calibration: None,
            space: SearchSpace::default(),
            same_k: false,
            fixed: BTreeMap::new(),
            dividing: None,
            allocation,
            cost: CostScale::default(),
            target: None,
        }
    }

    /// The limits that the search obeyed.
    pub(super) fn limits(&self) -> Limits {
        let Self { space, same_k, dividing, .. } = *self;
        Limits { space, same_k, fixed: self.fixed.clone(), dividing }
    }

    /// Checks that everything has a name, and that what has the name of a part of this crate has its settings, too. Parts of others
    /// have names and settings of their own.
    pub(super) fn check(&self) -> Result<()> {
        let named = |what: &str, name: &str| match name.trim() {
            "" => Err(Error::PlanInconsistent(format!("its {what} has no name"))),
            _ => Ok(()),
        };
        named("method", &self.name)?;
        if let Some(target) = &self.target {
            named("target", target)?;
        }
        if self.search.is_empty() {
            return Err(Error::PlanInconsistent(
                "nothing proposed its groups (`search` is empty)".to_string(),
            ));
        }
        let ours = |what: &str, spec: &Spec, known: Result<()>| {
            named(what, spec.name())?;
            match known {
                Ok(()) | Err(Error::UnknownPlugin { .. }) => Ok(()),
                Err(error) => Err(Error::PlanInconsistent(format!("its {what} cannot be: {error}"))),
            }
        };
        for spec in &self.search {
            ours("search", spec, OPTIMIZERS.make(spec).map(drop))?;
            ours("search", spec, GROUPINGS.make(spec).map(drop))?;
        }
        ours("fitness", &self.fitness, FITNESS.make(&self.fitness).map(drop))?;
        ours("allocation", &self.allocation, ALLOCATORS.make(&self.allocation).map(drop))
    }

    /// Records the limits that the search obeyed.
    pub fn with_limits(self, limits: &Limits) -> Self {
        let Limits { space, same_k, dividing, .. } = *limits;
        Self { space, same_k, fixed: limits.fixed.clone(), dividing, ..self }
    }
}
