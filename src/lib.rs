//! placeholder
#![cfg_attr(docsrs, feature(doc_cfg))]

mod allocator;
mod budget;

#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod checkpoint;
mod error;
mod fitness;
mod front;
mod grouping;
mod heads;
mod optimizer;
mod partition;
mod pipeline;

mod plan;
mod pooler;
mod run;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod runtime;

pub use ndarray;

pub use allocator::{Allocator, CostScale, LayerCosts, LayerSelection, UniformAllocation};
pub use budget::{Budget, Limits, kv_bytes_per_token};
pub use error::{Error, Result};
pub use fitness::{FitnessFn, HeadRows, SeparableFitness, WeightSharingError, squared_distances};
pub use front::{Front, FrontPoint, dominates};
pub use grouping::{Grouping, UniformGqa};
pub use heads::{LayerHeads, PooledLayer, Projection, Rotation};
pub use optimizer::{Nsga2, Optimizer};
pub use partition::{Cardinality, Partition, SearchSpace};

pub use pipeline::{MakeFitness, Qcqa, Search};
pub use plan::{LayerPlan, Method, Plan, PlanBudget, Source};
pub use pooler::{FirstHead, KvPooler, MeanPooler};
pub use run::{Observer, Progress, Run};
