//! Plans of version 1, whose method was prose.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{LayerPlan, Method, Plan, PlanBudget, Pooling, Refit};
use crate::allocator::CostScale;
use crate::error::{Error, Result, shown};
use crate::model::ModelId;
use crate::partition::{Cardinality, SearchSpace};
use crate::pooler::POOLERS;
use crate::spec::Spec;

/// What version 1 added to the search where a text had chosen between its groups and neighbouring ones.
const OR_NEIGHBOURS: &str = " or UniformGqa, by calibration loss";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanV1 {
    #[serde(rename = "version")]
    _version: u32,
    qcqa: String,
    source: ModelId,
    method: MethodV1,
    calibration: Option<String>,
    seed: u64,
    budget: PlanBudget,
    layers: Vec<LayerPlan>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MethodV1 {
    name: String,
    search: String,
    fitness: String,
    cardinality: Cardinality,
    max_groups: Option<usize>,
    max_group_size: Option<usize>,
    #[serde(default)]
    fixed: BTreeMap<usize, usize>,
    allocation: String,
    cost: CostScale,
    pooler: String,
    target: Option<String>,
    refit: Option<String>,
}

impl PlanV1 {
    /// The plan in the present form. What was prose stays so, as the name of a spec; what is obeyed is named.
    ///
    /// # Errors
    /// [`Error::UnknownPlugin`] for a pooler, [`Error::PlanInconsistent`] for a refit that there is not.
    pub(super) fn migrated(self) -> Result<Plan> {
        let Self { qcqa, source, method, calibration, seed, budget, layers, .. } = self;
        let refit = match method.refit.as_deref() {
            None | Some("none") => None,
            Some("output") => Some(Refit::Output),
            Some("full") => Some(Refit::Full),
            Some(other) => {
                let rule = format!("there is no refit \"{}\"; known are none, output, full", shown(other));
                return Err(Error::PlanInconsistent(rule));
            }
        };
        // Version 1 knew poolers by their own settings alone.
        let pooler = POOLERS.by_name(&method.pooler)?;
        let moments = calibration.clone().filter(|_| pooler.needs().moment);
        let pooling = Pooling::new(pooler.spec()).with_calibration(moments).with_refit(refit);
        let (search, chosen_by_loss) = match method.search.strip_suffix(OR_NEIGHBOURS) {
            Some(search) => (vec![Spec::new(search), Spec::new("uniform")], true),
            None => (vec![Spec::new(method.search)], false),
        };
        let (cardinality, max_groups, max_group_size) =
            (method.cardinality, method.max_groups, method.max_group_size);
        let method = Method {
            name: method.name,
            search,
            chosen_by_loss,
            fitness: Spec::new(method.fitness),
            calibration,
            space: SearchSpace { cardinality, max_groups, max_group_size, ..SearchSpace::default() },
            same_k: false,
            dividing: None,
            fixed: method.fixed,
            allocation: Spec::new(method.allocation),
            cost: method.cost,
            target: method.target,
        };
        Ok(Plan { version: Plan::VERSION, qcqa, source, method, pooling, seed, budget, layers })
    }
}
