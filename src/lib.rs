//! placeholder
#![cfg_attr(docsrs, feature(doc_cfg))]

mod allocator;
mod budget;

#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod checkpoint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
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

pub use ndarray;

pub use allocator::{
    AllBudgets, Allocator, CostScale, ExactAllocation, LayerCosts, LayerSelection, UniformAllocation,
};
pub use budget::{Budget, Limits, kv_bytes_per_token};
pub use error::{Error, Result};
pub use fitness::{FitnessFn, HeadRows, SeparableFitness, WeightSharingError, squared_distances};
pub use front::{Front, FrontPoint, dominates};
pub use grouping::{Grouping, KeyNorm, UniformGqa};
pub use heads::{LayerHeads, PooledLayer, Projection, Rotation};
#[cfg(feature = "linalg")]
pub use optimizer::spectral_bounds;
pub use optimizer::{Exact, Nsga2, Optimizer, Ward, attach_bounds, nearest_bounds};
pub use partition::{Cardinality, Partition, SearchSpace};

pub use pipeline::{MakeFitness, Qcqa, Search, optimize_layers};
pub use plan::{LayerPlan, Method, Plan, PlanBudget, Source};
pub use pooler::{FirstHead, KvPooler, MeanPooler};
pub use run::{Observer, Progress, Run};
