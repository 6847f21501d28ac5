//! Forms in which a converted model is written. A new target is a file here and its line in [`NAMES`] and
//! [`by_name`].

mod expanded;
mod stock;

use std::fmt::Debug;

use serde_json::{Map, Value};

use super::FileError;
use crate::budget::Limits;
use crate::partition::Partition;
use crate::plan::Plan;

pub use expanded::Expanded;
pub use stock::Stock;

/// Names of the targets, the most useful first.
pub const NAMES: &[&str] = &["stock", "expanded"];

/// The target of that name.
pub fn by_name(name: &str) -> Option<Box<dyn Target>> {
    match name {
        "stock" => Some(Box::new(Stock)),
        "expanded" => Some(Box::new(Expanded)),
        _ => None,
    }
}

/// A form in which a converted model is written: what it can hold, how it lays out the heads of a layer, and
/// what config.json says of it.
pub trait Target: Debug + Send + Sync {
    /// Its name, for the command line, messages and provenance.
    fn name(&self) -> &'static str;

    /// What a search must obey for its plan to fit.
    fn limits(&self) -> Limits;

    /// Whether a runtime that loads the output needs less KV cache.
    fn saves_memory(&self) -> bool;

    /// Whether the target can hold the plan.
    ///
    /// # Errors
    /// [`FileError::TargetPlan`] naming the first layer at fault.
    fn check(&self, plan: &Plan) -> Result<(), FileError>;

    /// How the heads of a layer lie in the output, where each KV head of the source has `queries_per_head`
    /// query heads.
    fn layout(&self, partition: &Partition, queries_per_head: usize) -> Layout;

    /// Changes config.json, of which keys keep their order.
    fn configure(&self, config: &mut Map<String, Value>, plan: &Plan);
}

/// Where the heads of a layer lie in the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The group whose shared head is stored in each output KV head.
    pub kv_rows: Vec<usize>,
    /// The source's query head at each output position; every one once.
    pub query_order: Vec<usize>,
}

impl Layout {
    /// Checks the one rule that all runtimes share: query head q reads KV head q / (query heads / KV heads), and
    /// must find its own group there. The message says what is wrong.
    pub(super) fn check(&self, partition: &Partition, queries_per_head: usize) -> Result<(), String> {
        let query_heads = partition.n_heads() * queries_per_head;
        let mut seen = self.query_order.clone();
        seen.sort_unstable();
        if !seen.into_iter().eq(0..query_heads) {
            return Err(format!("the query order is no permutation of {query_heads} query heads"));
        }
        let kv_heads = self.kv_rows.len();
        if kv_heads == 0 || query_heads % kv_heads != 0 {
            return Err(format!("{query_heads} query heads cannot be shared evenly by {kv_heads} KV heads"));
        }
        let readers = query_heads / kv_heads;
        for (position, &query) in self.query_order.iter().enumerate() {
            let (found, group) =
                (self.kv_rows[position / readers], partition.group_of(query / queries_per_head));
            if found != group {
                return Err(format!("query head {query} would read group {found} instead of {group}"));
            }
        }
        Ok(())
    }
}
