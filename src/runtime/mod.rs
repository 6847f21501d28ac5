//! Models, run: what a grouping does, computed.
//!
//! A [`Model`] is a forward pass in f32, on the CPU ([`Model::load`]) or a GPU ([`Model::load_on`]), made of the
//! [`Architecture`](crate::model::Architecture) of a checkpoint, source or converted, as it is or under a plan, without
//! writing that to disk ([`Model::with_shared`]). Attention works on the KV heads that the plan leaves, so its [`KvCache`] is
//! as small as the plan says. Sums over tokens are taken in the order of the text: results do not depend on the number of
//! threads.
//!
//! ```
//! use qcqa::checkpoint::Checkpoint;
//! use qcqa::heads::HeadSource;
//! use qcqa::partition::Partition;
//! use qcqa::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
//! use qcqa::runtime::Model;
//! use qcqa::spec::Spec;
//!
//! let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
//! let pairs = Partition::from_groups(8, &[[0, 1], [2, 3], [4, 5], [6, 7]])?;
//! let layers = vec![LayerPlan::new(pairs, 0.0); 4];
//! let by_hand = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
//! let plan = Plan::new(checkpoint.id()?, by_hand, Pooling::new(Spec::new("mean")), layers, 0.5, 0)?;
//!
//! let model = Model::load(&checkpoint)?;
//! let shared = model.with_shared(&SharedHeads::new(&plan, &checkpoint)?)?;
//! assert_eq!(shared.kv_heads(), [4, 4, 4, 4]);
//! assert_eq!(2 * shared.kv_bytes_per_token(), model.kv_bytes_per_token());
//! # Ok::<(), qcqa::runtime::RuntimeError>(())
//! ```

mod aside;
mod asked;
mod attention;
mod backward;
mod cache;
mod cached;
mod device;
mod ends;
mod energies;
mod experts;
mod handed;
mod head;
mod layer;
mod mlp;
mod model;
mod norms;
mod ops;
mod pass;
mod rest;
mod rope;
mod shared;
mod shelf;
mod sizes;
mod tiles;
mod trace;
mod weights;

pub use crate::text::RuntimeError;
pub use cache::{
    CachePolicy, Corm, FullCache, HeadKv, Kept, KvCache, LayerCache, POLICIES, Probe, Qaq, SlidingWindow,
    Steps,
};
pub use device::best_device;
pub use model::Model;

pub(crate) use asked::Asked;
pub(crate) use head::Predicted;
pub(crate) use model::{Joint, LONGEST_WINDOW};
pub(crate) use ops::{
    added, combined, largest, numbers_on_cpu, squared_lengths, sum_of_exp, sum_of_exp_apart, times, weighed,
};
pub(crate) use pass::Pass;
pub(crate) use trace::There;
pub(crate) use weights::LayerWeights;
