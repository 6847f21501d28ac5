//! Hugging Face model directories: read, checked, converted to shared heads.
//!
//! [`Checkpoint::open`] maps and checks a directory of the Llama family (`model_type` `llama`, `mistral`,
//! `qwen2`); its layers are [`Heads`](crate::Heads) or, without decoding a layer whole,
//! [`HeadRows`](crate::HeadRows). [`convert`] writes the directory that a [`Plan`](crate::Plan) describes, in
//! the form of a [`Target`]. Weights are BF16, F16 or F32; quantised models and models that normalise queries
//! or keys are refused.
//!
//! Files are hostile until checked: nothing is allocated from a count that the files do not back, and nothing
//! is written before every rule holds.
//!
//! ```no_run
//! use qcqa::checkpoint::{Checkpoint, Expanded, WriteOptions, convert, read_plan};
//! use qcqa::{MeanPooler, Run};
//!
//! # fn main() -> Result<(), qcqa::checkpoint::FileError> {
//! let model = Checkpoint::open("model")?;
//! let plan = read_plan("plan.json".as_ref())?;
//! let (options, run) = (WriteOptions::default(), Run::new(0));
//! let report = convert(&model, &plan, &MeanPooler, &Expanded, "grouped".as_ref(), options, run)?;
//! assert_eq!(report.kv_bytes_after, report.kv_bytes_before); // expanded saves nothing
//! # Ok(())
//! # }
//! ```

mod config;
mod copy;
mod dtype;
mod error;
mod families;
mod fingerprint;
mod mapped;
mod output;
mod plan_file;
mod read;
mod rows;
mod shards;
pub mod targets;
mod views;
mod write;

pub use config::Config;
pub use dtype::Dtype;
pub use error::FileError;
pub use plan_file::{read_plan, write_plan};
pub use read::Checkpoint;
pub use rows::LayerRows;
pub use targets::{Expanded, Layout, Stock, Target};
pub use write::{Report, WriteOptions, convert, convert_with};

#[cfg(feature = "cli")]
pub(crate) use write::check_output;
#[cfg(feature = "runtime")]
pub(crate) use {output::write_whole, write::same_source};
