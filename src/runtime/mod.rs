//! Models, run: what a grouping does to perplexity, measured.
//!
//! A [`Model`] is a Llama-family forward pass in f32 on the CPU, of a checkpoint as it is
//! ([`Model::load`], source or converted) or of a checkpoint under a plan, without writing it to disk
//! ([`Model::planned`]). Attention works on the KV heads that the plan leaves, so its [`KvCache`] is as small as
//! the plan says.
//!
//! [`evaluate`] and [`evaluate_against`] measure perplexity and the divergence from the source on [`Windows`] of
//! text, [`Choices`] scores multiple choice items, [`Moments`] holds the second moments of the attention inputs
//! and [`Sensitivity`] how much each layer pays for being grouped; a [`Calibration`] is what decisions are made with,
//! moments and, if there is one, the text that they come from. Sums over tokens are taken in f64 and in the
//! order of the text: results do not depend on the number of threads.
//!
//! ```no_run
//! use qcqa::checkpoint::{Checkpoint, read_plan};
//! use qcqa::runtime::{Model, Vocabulary, Windows, evaluate_against, read_text};
//! use qcqa::Run;
//! use qcqa::pooler::MeanPooler;
//!
//! # fn main() -> Result<(), qcqa::runtime::RuntimeError> {
//! let checkpoint = Checkpoint::open("model")?;
//! let plan = read_plan("plan.json".as_ref())?;
//! let source = Model::load(&checkpoint)?;
//! let grouped = Model::planned(&checkpoint, &plan, &MeanPooler)?;
//! let ids = Vocabulary::open(&checkpoint)?.encode(&read_text("evaluation.txt".as_ref())?)?;
//! let windows = Windows::new(ids, source.window())?;
//! let (before, after) = evaluate_against(&source, &[&grouped], &windows, Run::new(0))?;
//! println!("{:.2} → {:.2}", before.perplexity(), after[0].perplexity());
//! # Ok(())
//! # }
//! ```

mod attention;
mod calibration;
mod choices;
mod error;
mod evaluate;
mod kernels;
mod load;
mod model;
mod moments;
mod refit;
mod rope;
mod sensitivity;
mod stored;
mod text;
mod trial;

pub use attention::KvCache;
pub use calibration::{Calibration, made_with, pool_layers};
pub use choices::{Accuracy, Choice, Choices};
pub use error::RuntimeError;
pub use evaluate::{Divergence, Evaluation, evaluate, evaluate_against};
pub use model::Model;
pub use moments::Moments;
pub use refit::{Refit, Refitted, refit};
pub use sensitivity::Sensitivity;
pub use text::{IdWidth, Vocabulary, Windows, read_ids, read_text};
pub use trial::{Trial, choose_model};
