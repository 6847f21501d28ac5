use serde_json::{Map, Value};

use crate::budget::Limits;
use crate::error::Result;
use crate::model::Architecture;
use crate::output::{OutputModel, Slot, Target};
use crate::plan::Plan;

/// The shape of the source, with each group's shared head copied to all its members: loads wherever the source
/// does and holds any plan, but **saves no memory**. For evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expanded;

impl Target for Expanded {
    fn name(&self) -> &'static str {
        "expanded"
    }

    fn limits(&self, _: &Architecture) -> Limits {
        Limits::default()
    }

    fn output(&self, model: &Architecture, config: &Map<String, Value>, plan: &Plan) -> Result<OutputModel> {
        OutputModel::from_slots(model, config.clone(), |layer| {
            let groups = &plan.layers[layer].groups;
            let copies = groups.labels().iter().map(|&group| Slot::Head(group.into()));
            (copies.collect(), (0..model.layers[layer].query_heads).map(Slot::Head).collect())
        })
    }
}
