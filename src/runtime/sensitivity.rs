use std::fs;
use std::path::Path;

use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::evaluate::loss;
use super::{Model, RuntimeError, Windows};
use crate::checkpoint::{CheckpointError, WriteOptions, write_whole};
use crate::{Front, FrontPoint, KvPooler, LayerCosts, LayerHeads, Run};

/// Numbers of groups that are measured; those between are interpolated.
const MEASURED: &[usize] = &[1, 2, 3, 4, 6, 8, 12, 16];

/// How much each layer pays for being grouped: the rise of the mean loss when that layer alone is, in nats per
/// token of the calibration text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// What it was measured with: see [`Sensitivity::key`].
    key: String,
    /// KV heads of a layer, H.
    heads: usize,
    /// For each layer the numbers of groups, ascending, with the rise.
    layers: Vec<Vec<(usize, f64)>>,
}

impl Sensitivity {
    /// Measures each layer at k ∈ {1, 2, 3, 4, 6, 8, 12, 16}, k < H, as far as its front has a partition into k
    /// groups. `heads(i)` gives the heads of layer i, with whatever the pooler needs. Progress is stage
    /// `"sensitivity"`.
    ///
    /// The layers below the one that is grouped run once, not once for each k.
    ///
    /// # Errors
    /// [`Error::LayerCount`](crate::Error::LayerCount) unless there is a front for each layer; as
    /// [`Model::regrouped`] and [`evaluate`](super::evaluate()).
    pub fn measure(
        source: &Model,
        fronts: &[Front],
        heads: &dyn Fn(usize) -> crate::Result<LayerHeads>,
        pooler: &dyn KvPooler,
        windows: &Windows,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let key = Self::key(source, fronts, pooler, windows)?;
        let length = windows.length();
        let total = 1 + fronts.iter().map(|front| measured(front).count() as u64).sum::<u64>();
        let pass = source.pass(1, length, 0)?;
        let texts: Vec<&[u32]> = windows.batches(1).collect();
        // The mean loss of a model from layer `from` on; `inputs` are what enters that layer, (T, d) a window.
        let loss_from = |model: &Model, from: usize, inputs: &[Tensor]| -> Result<f64, RuntimeError> {
            let losses = inputs
                .par_iter()
                .zip(&texts)
                .map(|(x, tokens)| Ok(loss(&model.logits_from(from, x, &pass)?, tokens, length)));
            let losses: Vec<(f64, u64)> = losses.collect::<Result<_, RuntimeError>>()?;
            let (sum, n) = losses.iter().fold((0.0, 0), |(sum, all), (loss, n)| (sum + loss, all + n));
            let mean = sum / n as f64;
            let what = || format!("the loss with layer {from} grouped");
            if mean.is_finite() { Ok(mean) } else { Err(RuntimeError::NotFinite { what: what() }) }
        };
        run.step("sensitivity", 0, total)?;
        let mut inputs = texts.iter().map(|tokens| source.embed(tokens)).collect::<Result<Vec<_>, _>>()?;
        let before = loss_from(source, 0, &inputs)?;
        let mut done = 1;
        run.step("sensitivity", done, total)?;
        let mut layers = Vec::with_capacity(fronts.len());
        for (i, front) in fronts.iter().enumerate() {
            let heads = heads(i)?;
            let mut rises = Vec::new();
            for point in measured(front) {
                let model = source.regrouped(i, &heads, &point.partition, pooler)?;
                rises.push((point.partition.n_groups(), loss_from(&model, i, &inputs)? - before));
                done += 1;
                run.step("sensitivity", done, total)?;
            }
            layers.push(rises);
            let outputs = inputs.par_iter().map(|x| source.layer(i, x, &pass, None));
            inputs = outputs.collect::<Result<_, _>>()?;
        }
        Ok(Self { key, heads: source.source().kv_heads, layers })
    }

    /// The same, from the file `cache` where that was measured with the same [`Sensitivity::key`]; measured and
    /// written there otherwise.
    ///
    /// # Errors
    /// As [`Sensitivity::measure`]; [`RuntimeError::Io`], [`CheckpointError::Json`] for a file that is no
    /// sensitivity: it is not replaced.
    pub fn cached(
        cache: &Path,
        source: &Model,
        fronts: &[Front],
        heads: &dyn Fn(usize) -> crate::Result<LayerHeads>,
        pooler: &dyn KvPooler,
        windows: &Windows,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let key = Self::key(source, fronts, pooler, windows)?;
        let json = |source| CheckpointError::Json { path: cache.to_path_buf(), source };
        if cache.exists() {
            let text = fs::read(cache).map_err(|e| RuntimeError::io("read", cache, e))?;
            let held: Self = serde_json::from_slice(&text).map_err(json)?;
            if held.key == key && held.fits(fronts) {
                return Ok(held);
            }
        }
        let measured = Self::measure(source, fronts, heads, pooler, windows, run)?;
        let mut text = serde_json::to_vec_pretty(&measured).map_err(json)?;
        text.push(b'\n');
        write_whole(cache, &text, WriteOptions { force: true, dry_run: false })?;
        Ok(measured)
    }

    /// SHA-256 over all that a measurement depends on: fingerprint of the model, calibration windows, pooler with
    /// its settings, and the partitions measured.
    ///
    /// # Errors
    /// [`Error::LayerCount`](crate::Error::LayerCount), [`Error::PartitionSize`](crate::Error::PartitionSize)
    /// unless there is a front of as many heads for each layer.
    pub fn key(
        source: &Model,
        fronts: &[Front],
        pooler: &dyn KvPooler,
        windows: &Windows,
    ) -> Result<String, RuntimeError> {
        let (expected, found) = (source.n_layers(), fronts.len());
        if expected != found {
            return Err(crate::Error::LayerCount { what: "fronts", expected, found }.into());
        }
        let expected = source.source().kv_heads;
        if let Some(front) = fronts.iter().find(|f| f.n_heads() != expected) {
            return Err(crate::Error::PartitionSize { expected, found: front.n_heads() }.into());
        }
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        field(source.source().fingerprint.as_deref().unwrap_or_default().as_bytes());
        field(format!("{:?} {pooler:?}", source.kv_heads()).as_bytes());
        field(&(windows.length() as u64).to_le_bytes());
        field(&windows.tokens().iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>());
        for front in fronts {
            let partitions: Vec<_> = measured(front).map(|p| p.partition.labels()).collect();
            field(format!("{partitions:?}").as_bytes());
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The rises that were measured: for each layer, pairs of k and nats per token, k ascending. Negative where
    /// grouping helped.
    pub fn measured(&self) -> &[Vec<(usize, f64)>] {
        &self.layers
    }

    /// The rise of a layer at k groups: linear between what was measured, 0 at k = H and where grouping helped;
    /// below the least k measured, `None`.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn rise(&self, layer: usize, k: usize) -> Option<f64> {
        let points = self.layers[layer].iter().copied().chain([(self.heads, 0.0)]);
        let (below, above): (Vec<_>, Vec<_>) = points.partition(|&(at, _)| at < k);
        let &(right, high) = above.first()?;
        if right == k {
            return Some(high.max(0.0));
        }
        let &(left, low) = below.last()?;
        let share = (k - left) as f64 / (right - left) as f64;
        Some((low + share * (high - low)).max(0.0))
    }

    /// The rises as costs of the points of `fronts`, for an [`Allocator`](crate::Allocator): `None` where a front
    /// has no point.
    ///
    /// # Errors
    /// [`Error::LayerCount`](crate::Error::LayerCount) unless there is a front for each layer; as
    /// [`LayerCosts::from_table`].
    pub fn costs(&self, fronts: &[Front], same_k: bool) -> crate::Result<LayerCosts> {
        let (expected, found) = (self.layers.len(), fronts.len());
        if expected != found {
            return Err(crate::Error::LayerCount { what: "fronts", expected, found });
        }
        let cost = |i: usize, k: usize| fronts[i].get(k).and_then(|_| self.rise(i, k));
        let table = (0..found).map(|i| (1..=fronts[i].n_heads()).map(|k| cost(i, k)).collect());
        LayerCosts::from_table(table.collect(), same_k)
    }

    /// Whether a file's contents are what a measurement of these fronts gives.
    fn fits(&self, fronts: &[Front]) -> bool {
        let same = |(layer, front): (&Vec<(usize, f64)>, &Front)| {
            let ks = layer.iter().map(|&(k, _)| k);
            layer.iter().all(|(_, rise)| rise.is_finite())
                && ks.eq(measured(front).map(|p| p.partition.n_groups()))
                && self.heads == front.n_heads()
        };
        self.layers.len() == fronts.len() && self.layers.iter().zip(fronts).all(same)
    }
}

/// The points of a front that are measured.
fn measured(front: &Front) -> impl Iterator<Item = &FrontPoint> {
    MEASURED.iter().filter(|&&k| k < front.n_heads()).filter_map(|&k| front.get(k))
}
