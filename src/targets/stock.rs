use serde_json::{Map, Value};

use crate::budget::Limits;
use crate::error::{Error, Result};
use crate::model::Architecture;
use crate::output::{OutputModel, Slot, Target};
use crate::partition::SearchSpace;
use crate::plan::Plan;

/// An ordinary grouped-query model, for every runtime: equal groups, as many in every layer. Query heads are
/// reordered group by group; in config.json only `num_key_value_heads` changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stock;

impl Target for Stock {
    fn name(&self) -> &'static str {
        "stock"
    }

    fn limits(&self, _: &Architecture) -> Limits {
        Limits { space: SearchSpace::equal(), same_k: true, ..Limits::default() }
    }

    fn output(&self, model: &Architecture, config: &Map<String, Value>, plan: &Plan) -> Result<OutputModel> {
        let place = model
            .kv_heads_at
            .as_deref()
            .ok_or_else(|| Error::NoGroupedForm { model: model.model_type.clone() })?;
        let mut output = OutputModel::from_slots(model, config.clone(), |layer| {
            let (groups, r) = (&plan.layers[layer].groups, model.layers[layer].queries_per_head());
            let heads = groups.groups().into_iter().flatten();
            let queries = heads.flat_map(|head| head * r..(head + 1) * r);
            ((0..groups.n_groups()).map(Slot::Head).collect(), queries.map(Slot::Head).collect())
        })?;
        if let Some(&kv_heads) = output.kv_heads.first() {
            let (objects, key) = place.rsplit_once('/').unwrap_or_default();
            let config = objects.split('/').skip(1).try_fold(&mut output.config, |object, key| {
                object.get_mut(key).and_then(Value::as_object_mut)
            });
            if let Some(config) = config {
                config.insert(key.to_string(), kv_heads.into());
            }
        }
        Ok(output)
    }
}
