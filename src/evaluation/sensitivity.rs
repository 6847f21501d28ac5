use std::path::Path;

use serde::{Deserialize, Serialize};

use super::trial::Reading;
use super::{Reference, Trial};
use crate::allocator::LayerCosts;
use crate::budget::Limits;
use crate::error::{Error, Result};
use crate::files::{FileError, WriteOptions, fingerprint, replace_whole, sha256};
use crate::front::{Front, FrontPoint};
use crate::partition::Partition;
use crate::run::Run;
use crate::text::{RuntimeError, read_file};

/// Numbers of groups that are measured; those between are interpolated.
const MEASURED: &[usize] = &[1, 2, 3, 4, 6, 8, 12, 16];

/// How much each layer pays for being grouped: KL(source ‖ shared) when that layer alone is, in nats per token of the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// What it was measured with: see [`Sensitivity::key`].
    key: String,
    /// KV heads of each layer, H.
    heads: Vec<usize>,
    /// For each layer the numbers of groups, ascending, with the rise.
    layers: Vec<Vec<(usize, f64)>>,
}

impl Sensitivity {
    /// Measures each layer at k ∈ {1, 2, 3, 4, 6, 8, 12, 16}, k < H, as far as its front has a partition into k
    /// groups. Progress is stage `"sensitivity"`.
    ///
    /// The layers below the one that is grouped run once, not once for each k. By KL and not by the loss, which differs between
    /// two models that are equally far away by more than most layers pay, as long as the text is short.
    ///
    /// # Errors
    /// [`Error::LayerCount`] unless there is a front for each layer; as
    /// [`Trial::grouped`] and [`evaluate`](super::evaluate()).
    pub fn measure(trial: &Trial<'_>, fronts: &[Front], run: Run<'_>) -> Result<Self, RuntimeError> {
        let (key, model) = (Self::key(trial, fronts)?, trial.model);
        let total = 1 + fronts.iter().map(|front| measured(front).count() as u64).sum::<u64>();
        run.step("sensitivity", 0, total)?;
        let reference = Reference::new(model, trial.windows, run.unwatched())?;
        let mut reading = Reading::new(model, trial.windows)?;
        let mut done = 1;
        run.step("sensitivity", done, total)?;
        let mut layers = Vec::with_capacity(fronts.len());
        for (i, front) in fronts.iter().enumerate() {
            let heads = trial.source.heads(i)?;
            let mut rises = Vec::new();
            let partitions: Vec<&Partition> = measured(front).map(|point| &point.partition).collect();
            for (partition, grouped) in partitions.iter().zip(trial.regrouped(&heads, &partitions)?) {
                let k = partition.n_groups();
                let found = reference.divergence(&reading, &grouped).map_err(|error| match error {
                    RuntimeError::NotFinite { .. } => not_finite(i, k),
                    other => other,
                });
                rises.push((k, found?));
                done += 1;
                run.step("sensitivity", done, total)?;
            }
            layers.push(rises);
            reading.pass_layer(model)?;
        }
        Ok(Self::from_rises(key, fronts, layers))
    }

    pub(super) fn from_rises(key: String, fronts: &[Front], layers: Vec<Vec<(usize, f64)>>) -> Self {
        Self { key, heads: fronts.iter().map(Front::n_heads).collect(), layers }
    }

    /// Reads the file `cache` where that was measured with the same [`Sensitivity::key`]; else measures, and writes the file.
    ///
    /// # Errors
    /// As [`Sensitivity::measure`]; [`FileError::Io`], [`FileError::Json`] for a file that is no
    /// sensitivity: it is not replaced.
    pub fn cached(
        cache: &Path,
        trial: &Trial<'_>,
        fronts: &[Front],
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let key = Self::key(trial, fronts)?;
        if cache.exists() {
            let text = read_file(cache)?;
            let held = serde_json::from_slice(&text);
            let held: Self = held.map_err(|source| FileError::json(cache, &text, source))?;
            if held.key == key && held.fits(fronts) {
                return Ok(held);
            }
        }
        let measured = Self::measure(trial, fronts, run)?;
        let text = serde_json::to_vec_pretty(&measured);
        let mut text = text.map_err(|source| FileError::unwritten(cache, source))?;
        text.push(b'\n');
        replace_whole(cache, &text, WriteOptions::default().force(true))?;
        Ok(measured)
    }

    /// SHA-256 over all that a measurement depends on: fingerprints of the model and of the moments, calibration
    /// windows, pooler with its settings, and the partitions measured.
    ///
    /// # Errors
    /// [`Error::LayerCount`], [`Error::PartitionSize`]
    /// unless there is a front of as many heads for each layer.
    pub fn key(trial: &Trial<'_>, fronts: &[Front]) -> Result<String, RuntimeError> {
        let Trial { source, model, pooler, windows } = trial;
        let (expected, found) = (model.n_layers(), fronts.len());
        if expected != found {
            return Err(Error::LayerCount { what: "fronts", expected, found }.into());
        }
        for (front, layer) in fronts.iter().zip(&model.id().layers) {
            let (expected, found) = (layer.kv_heads, front.n_heads());
            if expected != found {
                return Err(Error::PartitionSize { expected, found }.into());
            }
        }
        let (text, moments) = (windows.fingerprint(model.id()), source.calibration().unwrap_or_default());
        let head = format!("kl {text} {moments} {:?} {:?}", model.kv_heads(), pooler.spec());
        let partitions = |front: &Front| {
            let labels: Vec<_> = measured(front).map(|p| p.partition.labels()).collect();
            format!("{labels:?}").into_bytes()
        };
        Ok(fingerprint(sha256([head.into_bytes()].into_iter().chain(fronts.iter().map(partitions)))))
    }

    /// What was measured: for each layer, pairs of k and nats per token, k ascending.
    pub fn measured(&self) -> &[Vec<(usize, f64)>] {
        &self.layers
    }

    /// What a layer pays at k groups: linear between what was measured, 0 at k = H and never less; below the least k
    /// measured, `None`.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn rise(&self, layer: usize, k: usize) -> Option<f64> {
        let points = self.layers[layer].iter().copied().chain([(self.heads[layer], 0.0)]);
        let (below, above): (Vec<_>, Vec<_>) = points.partition(|&(at, _)| at < k);
        let &(right, high) = above.first()?;
        if right == k {
            return Some(high.max(0.0));
        }
        let &(left, low) = below.last()?;
        let share = (k - left) as f64 / (right - left) as f64;
        Some((low + share * (high - low)).max(0.0))
    }

    /// The rises as costs of the points of `fronts`, for an [`Allocator`](crate::allocator::Allocator), without what the limits
    /// forbid; `None` where a front has no point.
    ///
    /// # Errors
    /// [`Error::LayerCount`] unless there is a front for each layer; as
    /// [`LayerCosts::priced`].
    pub fn costs(&self, fronts: &[Front], limits: &Limits) -> Result<LayerCosts> {
        let (expected, found) = (self.layers.len(), fronts.len());
        if expected != found {
            return Err(Error::LayerCount { what: "fronts", expected, found });
        }
        LayerCosts::priced(fronts, limits, |i, point| Ok(self.rise(i, point.partition.n_groups())))
    }

    /// Whether a file's contents are what a measurement of these fronts gives.
    fn fits(&self, fronts: &[Front]) -> bool {
        let same = |(layer, front): (&Vec<(usize, f64)>, &Front)| {
            let ks = layer.iter().map(|&(k, _)| k);
            layer.iter().all(|(_, rise)| rise.is_finite())
                && ks.eq(measured(front).map(|p| p.partition.n_groups()))
        };
        self.layers.len() == fronts.len()
            && self.layers.iter().zip(fronts).all(same)
            && self.heads.iter().copied().eq(fronts.iter().map(Front::n_heads))
    }
}

/// What is said where a layer's costs are no number.
pub(super) fn not_finite(layer: usize, k: usize) -> RuntimeError {
    RuntimeError::NotFinite { what: format!("what layer {layer} loses at {k} heads") }
}

/// The points of a front that are measured.
pub(super) fn measured(front: &Front) -> impl Iterator<Item = &FrontPoint> {
    MEASURED.iter().filter(|&&k| k < front.n_heads()).filter_map(|&k| front.get(k))
}
