//! Forms in which a model is written. A new target is a file here and its line in [`TARGETS`].

mod deci;
mod expanded;
mod form;
mod gguf;
mod padded;
mod remote_code;
mod runtimes;
mod serving;
mod stock;

use crate::checkpoint::Dtype;
use crate::output::Target;

pub use deci::Deci;
pub use expanded::Expanded;
pub use gguf::Gguf;
pub use padded::Padded;
pub use remote_code::RemoteCode;
pub use runtimes::{RUNTIMES, Runtime};
pub use serving::serving_notes;
pub use stock::Stock;

/// The targets of this crate, the most useful first.
pub static TARGETS: &[&dyn Target] = &[
    &Stock,
    &Padded,
    &RemoteCode,
    &Gguf { dtype: None },
    &Gguf { dtype: Some(Dtype::F16) },
    &Gguf { dtype: Some(Dtype::F32) },
    &Deci,
    &Expanded,
];

/// The target of that name.
///
/// ```
/// use qcqa::targets::{TARGETS, by_name};
///
/// assert!(TARGETS.iter().all(|target| by_name(target.name()).is_some()));
/// assert!(by_name("onnx").is_none());
/// ```
pub fn by_name(name: &str) -> Option<&'static dyn Target> {
    TARGETS.iter().copied().find(|target| target.name() == name)
}
