use serde_json::{Map, Value};

use super::{Layout, Target};
use crate::checkpoint::FileError;
use crate::budget::Limits;
use crate::partition::{Partition, SearchSpace};
use crate::plan::Plan;

/// An ordinary grouped-query model, for every runtime: equal groups, as many in every layer. Query heads are
/// reordered group by group; in config.json only `num_key_value_heads` changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stock;

impl Target for Stock {
    fn name(&self) -> &'static str {
        "stock"
    }

    fn limits(&self) -> Limits {
        Limits { space: SearchSpace::equal(), same_k: true, ..Limits::default() }
    }

    fn saves_memory(&self) -> bool {
        true
    }

    fn check(&self, plan: &Plan) -> Result<(), FileError> {
        let unfit = |layer, found: String, expected: String| FileError::TargetPlan {
            target: "stock",
            layer,
            found,
            expected,
            hint: "convert with `--target expanded` (for evaluation), or search with `--target stock`"
                .to_string(),
        };
        let first = plan.layers.first().map_or(0, |l| l.groups.n_groups());
        for (i, layer) in plan.layers.iter().enumerate() {
            if !layer.groups.is_equal() {
                let found = format!("has groups of {:?} heads", layer.groups.sizes());
                return Err(unfit(i, found, "all groups must have one size".to_string()));
            }
            let k = layer.groups.n_groups();
            if k != first {
                let expected = format!("all layers must have the {first} of layer 0");
                return Err(unfit(i, format!("has {k} groups"), expected));
            }
        }
        Ok(())
    }

    fn layout(&self, partition: &Partition, queries_per_head: usize) -> Layout {
        let heads = partition.groups().into_iter().flatten();
        let query_order = heads.flat_map(|head| head * queries_per_head..(head + 1) * queries_per_head);
        Layout { kv_rows: (0..partition.n_groups()).collect(), query_order: query_order.collect() }
    }

    fn configure(&self, config: &mut Map<String, Value>, plan: &Plan) {
        if let Some(layer) = plan.layers.first() {
            config.insert("num_key_value_heads".to_string(), layer.groups.n_groups().into());
        }
    }
}
