//! Share the key and value heads of trained transformers at the least loss.
//!
//! A model's KV cache grows with its number of key/value heads. This crate finds which heads of a layer can share
//! one key head and one value head, for a cache budget that the user names, and merges them. It implements QCQA
//! (Joshi et al. 2024, [arXiv 2406.10247](https://arxiv.org/abs/2406.10247)) to the letter, with grouped-query
//! (GQA, [arXiv 2305.13245](https://arxiv.org/abs/2305.13245)) and multi-query attention (MQA,
//! [arXiv 1911.02150](https://arxiv.org/abs/1911.02150)) as baselines, and adds exact optimizers, certified gaps
//! and an exact division of the budget among the layers.
//!
//! # The road
//!
//! ```text
//! data ─▶ HeadSource ─▶ FitnessFn ─▶ Optimizer ─▶ Front ─▶ Allocator ─▶ Plan ─▶ KvPooler ─▶ SharedHeads ─▶ Target ─▶ files
//! ```
//!
//! The middle works on plain [`ndarray`] tensors; files and running models are optional features around it. Every part is a
//! trait that can be used through `dyn`, with ours and others' side by side:
//!
//! | trait | decides | here |
//! |---|---|---|
//! | [`HeadSource`] | where heads come from | [`heads::InMemory`], `checkpoint::Checkpoint`, `calibration::Calibration` |
//! | [`Grouping`] | groups by a rule | [`grouping::UniformGqa`] (k = 1 is MQA), [`grouping::KeyNorm`], [`grouping::DynamicKeyNorm`] |
//! | [`FitnessFn`] | what a partition costs | [`fitness::WeightSharingError`], [`fitness::PerturbedSharing`], `fitness::LowRankError` |
//! | [`Optimizer`] | groups by a search | [`optimizer::Nsga2`] (the paper), [`optimizer::LocalSearch`], [`optimizer::Exact`] |
//! | [`Allocator`] | k of every layer | [`allocator::UniformAllocation`], [`allocator::LayerSelection`] (the paper), [`allocator::ExactAllocation`] |
//! | [`KvPooler`] | how a group is merged | [`pooler::MeanPooler`], [`pooler::FirstHead`], `pooler::LowRankPooler`, `pooler::ProcrustesPooler` |
//! | `runtime::CachePolicy` | what is kept of tokens | `runtime::POLICIES` |
//! | `checkpoint::Family` | how a model is read | `families::FAMILIES` |
//! | `output::Target` | how a model is written | `targets::TARGETS` |
//!
//! [`pipeline::Compress`] composes them over a whole model, from a [`pipeline::Preset`] or from parts.
//!
//! # Words and symbols
//!
//! One layer has H KV heads of h dimensions over inputs of width d; head i has key rows `K_i` and value rows `V_i`,
//! both (h, d). A [`Partition`](partition::Partition) puts each head in exactly one group; k is its number of groups. The KV cache of
//! the layer is k/H of what it was. In a model that already uses GQA the items are its KV heads, each with its r query
//! heads. Errors are f64, tensors f32.
//!
//! # One layer
//!
//! ```
//! use qcqa::fitness::WeightSharingError;
//! use qcqa::heads::{Heads, Projection};
//! use qcqa::ndarray::Array3;
//! use qcqa::optimizer::Exact;
//! use qcqa::partition::SearchSpace;
//! use qcqa::pooler::MeanPooler;
//! use qcqa::{KvPooler, Optimizer, Run};
//!
//! # fn main() -> qcqa::Result<()> {
//! // Four heads of 2 × 3; heads 0 and 2 are alike, and so are 1 and 3.
//! let weight = Array3::from_shape_fn((4, 2, 3), |(i, r, c)| (10 * (i % 2) + 3 * r + c) as f32 + 0.01 * i as f32);
//! let heads = Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)?;
//!
//! let fitness = WeightSharingError::new(&heads)?;
//! let front = Exact::default().optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0))?;
//! let best = front.get(2).expect("a partition into two groups");
//! assert_eq!(best.partition.groups(), [[0, 2], [1, 3]]);
//!
//! let pooled = MeanPooler.pool(&heads, &best.partition)?;
//! assert_eq!(pooled.key.weight().dim(), (2, 2, 3));
//! # Ok(())
//! # }
//! ```
//!
//! A whole checkpoint, in ten lines: `examples/compress.rs`.
//!
//! # Features
//!
//! None is on by default.
//!
//! * `rayon`: several threads. Results do not depend on their number: variation is serial, evaluation parallel, and
//!   sums are taken over fixed blocks in order.
//! * `simd`: AVX2 where the processor has it, for the one pass over the weights: several times faster.
//! * `linalg`: spectral lower bounds, low-rank sharing.
//! * `matching`: exact pairs of heads (equal cardinality, k = H/2); needs Rust 1.87.
//! * `checkpoint`: Hugging Face directories in and out, files of moments.
//! * `runtime`: models run for real, on the CPU: perplexity, divergence from the source, multiple choice, second
//!   moments of the inputs, sensitivity of the layers, refits. Brings `checkpoint`, `linalg` and `rayon`.
//! * `cuda`: models on an NVIDIA GPU, too ([`Device::Cuda`]). Needs the CUDA toolkit to build, and is part of no other feature.
//! * `testing`: the contracts of the traits, for the tests of plugins.
//! * `cli`: the binary `qcqa`, with all of the above but `cuda` and `testing`.
//!
//! # Limits
//!
//! * The weight-sharing error is a proxy: it sees the weights and not what the model computes. A lower error need
//!   not mean a lower perplexity; `runtime` measures it.
//! * Mean pooling loses much: at half the cache the small trained models in the tests need fine-tuning to be of use.
//!   Calibrated low-rank sharing, refitted, does not.
//! * For near-orthogonal heads of unequal norms the least error is one large group and single heads; look at the
//!   group sizes, and limit them by [`SearchSpace::max_group_size`](partition::SearchSpace::max_group_size).
//! * Spectral bounds are loose for strongly clustered heads; a gap is what is certified, not what is lost.
//! * Tested on Linux, x86-64. Big-endian machines, Windows and 32-bit machines are not.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod allocator;
pub mod budget;
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod calibration;
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod checkpoint;
pub mod cross_layer;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod descent;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod distil;
mod error;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod evaluation;
mod evolution;
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod families;
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod files;
pub mod fitness;
pub mod front;
pub mod grouping;
pub mod heads;
#[cfg(feature = "linalg")]
mod low_rank;
pub mod model;
pub mod optimizer;
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod output;
pub mod partition;
pub mod pipeline;
pub mod plan;
pub mod pooler;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod refit;
mod run;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod runtime;
pub mod spec;
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub mod targets;
#[cfg(feature = "testing")]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub mod text;

pub use ndarray;

pub use allocator::Allocator;
pub use error::{Error, Result};
pub use fitness::FitnessFn;
pub use grouping::Grouping;
pub use heads::HeadSource;
pub use optimizer::Optimizer;
pub use pooler::KvPooler;
pub use run::{Device, Observer, Precision, Progress, Run};

#[doc = include_str!("../README.md")]
#[cfg(all(doctest, feature = "runtime"))]
struct Readme;
