use serde_json::{Map, Value};

use super::{Layout, Target};
use crate::checkpoint::FileError;
use crate::budget::Limits;
use crate::partition::Partition;
use crate::plan::Plan;

/// The shape of the source, with each group's shared head copied to all its members: loads wherever the source
/// does and holds any plan, but **saves no memory**. For evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expanded;

impl Target for Expanded {
    fn name(&self) -> &'static str {
        "expanded"
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn saves_memory(&self) -> bool {
        false
    }

    fn check(&self, _: &Plan) -> Result<(), FileError> {
        Ok(())
    }

    fn layout(&self, partition: &Partition, queries_per_head: usize) -> Layout {
        Layout {
            kv_rows: (0..partition.n_heads()).map(|head| partition.group_of(head)).collect(),
            query_order: (0..partition.n_heads() * queries_per_head).collect(),
        }
    }

    fn configure(&self, _: &mut Map<String, Value>, _: &Plan) {}
}
