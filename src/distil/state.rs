//! A distillation on disk: all that it takes to go on as if nothing had happened.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor, safetensors::load_buffer};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::Distill;
use super::trainer::Trainer;
use crate::files::{
    FileError, HeldDirectory, Mapped, check_writable, is_there, parent_of, sync_directory, sync_file,
};
use crate::runtime::LayerWeights;
use crate::text::RuntimeError;

/// How far a distillation is, beside the trainer's weights and memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SavedState {
    /// Steps done.
    pub(super) step: u64,
    /// Steps in all, once they are known.
    pub(super) total: Option<u64>,
    /// The divergence of every step's windows.
    #[serde(default)]
    pub(super) losses: Vec<f64>,
    /// Validations by tokens.
    pub(super) course: Vec<(u64, f64)>,
    /// The steps after which the best weights were found, and how many validations did not better them since.
    pub(super) best_step: u64,
    pub(super) worse: usize,
    #[serde(skip)]
    pub(super) best: Vec<LayerWeights>,
}

impl SavedState {
    /// How it goes, for people.
    pub(super) fn detail(&self) -> String {
        let validated = self.course.last().map(|(_, kl)| format!(", validation {kl:.4}")).unwrap_or_default();
        self.losses.last().map_or(format!("KL{validated}"), |kl| format!("KL {kl:.4}{validated}"))
    }
}

/// The metadata key of what is no tensor.
const STATE: &str = "state";

/// What is in that key.
#[derive(Serialize, Deserialize)]
struct Header<S> {
    key: String,
    state: S,
}

/// A file that holds a state, and what it must be of.
#[derive(Debug)]
pub(super) struct StateFile {
    pub(super) path: PathBuf,
    pub(super) key: String,
}

impl StateFile {
    /// The state in the file, where there is one; weights and memory go to the trainer.
    pub(super) fn read(&self, trainer: &mut Trainer<'_>) -> Result<Option<SavedState>, RuntimeError> {
        let bytes = match fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(|e| FileError::io("read", &self.path, e))?,
        };
        let path = || self.path.clone();
        let found = header(&bytes)
            .filter(|found| found.key == self.key)
            .ok_or_else(|| FileError::DistillState { path: path() })?;
        let tensors = load_buffer(&bytes, trainer.model.place())?;
        let take = |name: String, like: &Tensor| {
            let tensor = tensors.get(&name).filter(|t| t.dims() == like.dims() && t.dtype() == like.dtype());
            tensor.cloned().ok_or_else(|| RuntimeError::from(FileError::DistillState { path: path() }))
        };
        let mut state = found.state;
        for i in 0..trainer.memory.len() {
            let like = trainer.weights[i].clone();
            let read = |what: &str| {
                let mut n = 0;
                like.map(|tensor| {
                    n += 1;
                    take(name(what, i, n), tensor)
                })
            };
            let (weights, best) = (read("weights")?, read("best")?);
            trainer.set(i, weights)?;
            state.best.push(best);
            for (n, held) in trainer.memory[i].iter_mut().enumerate() {
                for (m, tensor) in held.iter_mut().enumerate() {
                    *tensor = take(name(&format!("memory.{m}"), i, n + 1), tensor)?;
                }
            }
        }
        Ok(Some(state))
    }

    /// Writes it, whole or not at all, in the place of an earlier one.
    pub(super) fn write(&self, trainer: &Trainer<'_>, state: &SavedState) -> Result<(), RuntimeError> {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for (i, (best, memory)) in state.best.iter().zip(&trainer.memory).enumerate() {
            for (what, layer) in [("weights", &trainer.weights[i]), ("best", best)] {
                tensors.extend(layer.tensors().enumerate().map(|(n, t)| (name(what, i, n + 1), t.clone())));
            }
            for (n, held) in memory.iter().enumerate() {
                let named = |(m, t): (usize, &Tensor)| (name(&format!("memory.{m}"), i, n + 1), t.clone());
                tensors.extend(held.iter().enumerate().map(named));
            }
        }
        for (_, tensor) in &mut tensors {
            *tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
        }
        let header = Header { key: self.key.clone(), state };
        let header = serde_json::to_string(&header).map_err(crate::error::Error::plugin)?;
        let failed = |source| FileError::io("write", &self.path, source);
        let parent = parent_of(&self.path);
        let hidden = HeldDirectory::new(parent).map_err(failed)?;
        let (file, metadata) = (hidden.path().join("state"), HashMap::from([(STATE.to_string(), header)]));
        safetensors::serialize_to_file(tensors, Some(metadata), &file)
            .map_err(|e| failed(io::Error::other(e)))?;
        sync_file(&file).map_err(failed)?;
        fs::rename(&file, &self.path).map_err(failed)?;
        Ok(sync_directory(parent)?)
    }
}

/// What is in a state beside tensors; `None` for what is none.
fn header(bytes: &[u8]) -> Option<Header<SavedState>> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
    serde_json::from_str(metadata.metadata().as_ref()?.get(STATE)?).ok()
}

impl Distill {
    /// Checks the place of the state, if there is one, before anything is computed: that it can be written, and that a file there is the
    /// state of a distillation.
    ///
    /// # Errors
    /// [`FileError::DistillState`], [`FileError::Io`], [`FileError::Dangling`].
    pub fn check(&self) -> Result<(), FileError> {
        self.state.as_deref().map_or(Ok(()), check)
    }

    /// Removes the state, where there is one: the result is where it belongs.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn forget(&self) -> Result<(), FileError> {
        match self.state.as_ref().map(|path| (path, fs::remove_file(path))) {
            Some((path, Err(error))) if error.kind() != io::ErrorKind::NotFound => {
                Err(FileError::io("remove", path, error))
            }
            _ => Ok(()),
        }
    }
}

/// Checks that a state can be written there, and that what is there is one, if anything is.
fn check(path: &Path) -> Result<(), FileError> {
    if is_there(path)? && header(&Mapped::open(path)?).is_none() {
        return Err(FileError::DistillState { path: path.to_path_buf() });
    }
    // What will be made for the output is made for it, too.
    let parent = parent_of(path);
    let made = if parent.is_dir() { check_writable(parent) } else { Ok(()) };
    made.map_err(|e| FileError::io("write", path, e))
}

fn name(what: &str, layer: usize, tensor: usize) -> String {
    format!("{what}.{layer}.{tensor}")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::descent::Descent;
    use crate::files::clear;
    use crate::plan::Trained;
    use crate::runtime::Model;

    #[test]
    fn runs_beside_it_that_clear_up_take_no_state() {
        let model = Model::load(&Checkpoint::open("tests/data/novels-1m").unwrap()).unwrap();
        let trainer = Trainer::new(&model, model.clone(), Descent::AdamW, Trained::Attention).unwrap();
        let state = SavedState { best: trainer.weights.clone(), ..SavedState::default() };
        let root = tempfile::tempdir().unwrap();
        let file = StateFile { path: root.path().join("out.distilling"), key: String::new() };
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    clear(root.path());
                }
            });
            let written: Vec<_> = (0..30).map(|_| file.write(&trainer, &state)).collect();
            done.store(true, Ordering::Relaxed);
            written.into_iter().for_each(|written| written.unwrap());
        });
        let left: Vec<_> = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [file.path]);
    }
}
