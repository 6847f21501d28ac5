use super::padded::filled;
use crate::budget::Limits;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families::with_heads;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::Architecture;
use crate::output::{OutputModel, Target};
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

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let (model, config) = (source.architecture(), source.config().raw());
        let queries = queries(model)?;
        let kv_heads = plan.layers.first().map_or(1, |layer| layer.groups.n_groups());
        let changed = with_heads(model, config, queries, kv_heads)?;
        let laid = OutputModel::from_slots(model, changed, |layer| {
            filled(model, plan, layer, queries / plan.layers[layer].groups.n_groups())
        })?;
        Ok(laid)
    }
}

/// Query heads of all layers, where these have as many.
pub(super) fn queries(model: &Architecture) -> Result<usize> {
    let of = |layer: usize| model.layers[layer].query_heads;
    let queries = model.layers.first().map_or(0, |_| of(0));
    match (0..model.n_layers()).find(|&layer| of(layer) != queries) {
        None => Ok(queries),
        Some(layer) => {
            let found = format!("has {} query heads", of(layer));
            Err(Error::Limits { layer, found, expected: format!("layer 0 has {queries}") })
        }
    }
}
