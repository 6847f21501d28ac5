//! Who loads which target.

use super::{Deci, Gguf, Padded, RemoteCode, Stock};
use crate::checkpoint::Checkpoint;
use crate::files::FileError;
use crate::output::{Target, check_plan};
use crate::plan::Plan;

/// A program that serves models, and the targets that it loads. docs/targets.md says which were tried.
#[derive(Debug)]
#[non_exhaustive]
pub struct Runtime {
    /// Its name.
    pub name: &'static str,
    /// The targets that it loads, from the plainest to the one that holds the most plans.
    pub targets: &'static [&'static dyn Target],
    /// Those that it is to load besides, as models of an ordinary type: not tried, and not chosen by [`Runtime::plainest`].
    pub besides: &'static [&'static dyn Target],
}

/// The runtimes that are known.
pub static RUNTIMES: &[Runtime] = &[
    Runtime { name: "transformers", targets: &[&Stock, &Padded, &RemoteCode], besides: &[] },
    Runtime { name: "vllm", targets: &[&Stock, &Deci], besides: &[&Padded] },
    Runtime { name: "llama.cpp", targets: &[&Gguf { dtype: None }], besides: &[] },
    Runtime { name: "candle", targets: &[&Stock, &Padded], besides: &[] },
    Runtime { name: "mlx", targets: &[&Stock, &Padded], besides: &[] },
];

impl Runtime {
    /// The runtime of that name.
    ///
    /// ```
    /// use qcqa::targets::{RUNTIMES, Runtime};
    ///
    /// assert!(RUNTIMES.iter().all(|runtime| Runtime::by_name(runtime.name).is_some()));
    /// assert_eq!(Runtime::by_name("llama.cpp").unwrap().widest().name(), "gguf");
    /// ```
    pub fn by_name(name: &str) -> Option<&'static Self> {
        RUNTIMES.iter().find(|runtime| runtime.name == name)
    }

    /// Whether it loads a target.
    pub fn loads(&self, target: &dyn Target) -> bool {
        self.targets.iter().chain(self.besides).any(|loaded| loaded.name() == target.name())
    }

    /// The target that holds the most plans: what a search for this runtime keeps to.
    ///
    /// # Panics
    /// When there is none.
    pub fn widest(&self) -> &'static dyn Target {
        *self.targets.last().expect("a runtime loads something")
    }

    /// The plainest target that holds a plan of this source.
    ///
    /// # Errors
    /// What keeps the widest from it.
    pub fn plainest(&self, source: &Checkpoint, plan: &Plan) -> Result<&'static dyn Target, FileError> {
        let (widest, plainer) = (self.widest(), &self.targets[..self.targets.len() - 1]);
        let held = plainer.iter().copied().find(|&target| check_plan(source, plan, target).is_ok());
        held.map_or_else(|| check_plan(source, plan, widest).map(|()| widest), Ok)
    }
}
