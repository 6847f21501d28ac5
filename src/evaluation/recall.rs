use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use ndarray::ArrayView3;
use rayon::prelude::*;

use super::items::{Item, Items};
use crate::error::Result;
use crate::run::Run;
use crate::runtime::{CachePolicy, FullCache, Kept, KvCache, LayerCache, Model, Probe, Steps};
use crate::spec::Spec;
use crate::text::{RuntimeError, Windows};

/// How often a model that reads through a cache still knows what was said before.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Recall {
    /// Share of the tokens asked for that it held the likeliest.
    pub share: f64,
    /// Tokens asked for.
    pub asked: u64,
    /// Bytes that the cache held at the end of an item, mean over the items; 0 of none.
    pub bytes: f64,
}

/// Asks a model for the answers of some items, each read through an empty cache: of a policy, or one that keeps everything. Progress is
/// stage `"recall"`.
///
/// # Errors
/// As [`evaluate`](super::evaluate()); what the policy reports.
pub fn recall(
    model: &Model,
    policy: Option<&Arc<dyn CachePolicy>>,
    items: &Items,
    steps: Steps,
    run: Run<'_>,
) -> Result<Recall, RuntimeError> {
    let (done, total) = (AtomicU64::new(0), items.all().len() as u64);
    let ask = |item: &Item| {
        let cache = policy.map_or_else(KvCache::default, |policy| KvCache::shared(policy.clone()));
        let mut bytes = 0;
        let read = model.row_by_cache(&item.tokens, steps, cache, |held| bytes = held)?;
        // What stands before an answer foretells it.
        let before: Vec<u32> = item.answers.iter().map(|&place| place as u32 - 1).collect();
        let logits = model.head(&read.index_select(&Tensor::new(before, read.device())?, 0)?)?;
        let likeliest = logits.argmax(1)?.to_vec1::<u32>()?;
        let known =
            likeliest.iter().zip(&item.answers).filter(|(id, place)| **id == item.tokens[**place]).count();
        run.step("recall", done.fetch_add(1, Ordering::Relaxed) + 1, total)?;
        Ok((known as u64, bytes as u64))
    };
    let each: Vec<(u64, u64)> = items.all().par_iter().map(ask).collect::<Result<_, RuntimeError>>()?;
    let asked: u64 = items.all().iter().map(|item| item.answers.len() as u64).sum();
    let sum = |of: fn(&(u64, u64)) -> u64| each.iter().map(of).sum::<u64>() as f64;
    Ok(Recall {
        share: sum(|(known, _)| *known) / asked.max(1) as f64,
        asked,
        bytes: sum(|(_, bytes)| *bytes) / total.max(1) as f64,
    })
}

/// Needles by which heads are judged.
const NEEDLES: usize = 16;

/// Makes policies ready for the heads of one model: what they [have to know](CachePolicy::probe) is measured once, on a text which should be
/// none that results are reported on.
#[derive(Debug)]
pub struct Preparation<'a> {
    model: &'a Model,
    windows: &'a Windows,
    known: Vec<(Probe, Vec<Vec<f64>>)>,
}

impl<'a> Preparation<'a> {
    /// For this model, by this text.
    pub fn new(model: &'a Model, windows: &'a Windows) -> Self {
        Self { model, windows, known: Vec::new() }
    }

    /// The policy, knowing what it has to. Progress is stage `"probe"`, where something is measured.
    ///
    /// # Errors
    /// As [`head_importance`]; what the policy reports.
    pub fn ready(
        &mut self,
        policy: &Arc<dyn CachePolicy>,
        run: Run<'_>,
    ) -> Result<Arc<dyn CachePolicy>, RuntimeError> {
        let Some(probe) = policy.probe() else { return Ok(policy.clone()) };
        if !self.known.iter().any(|(known, _)| *known == probe) {
            self.known.push((probe, head_importance(self.model, probe, self.windows, run)?));
        }
        let known = self.known.iter().find(|(known, _)| *known == probe);
        Ok(policy.with_importance(known.map_or(&[], |(_, importance)| importance))?.into())
    }
}

/// How important each KV head of each layer is for finding again what was said before: the mean over [needles](Items::needles) of this
/// text, and over the query heads of the group. Progress is stage `"probe"`.
///
/// For [`Probe::Retrieval`] (Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574) the share of a
/// needle's tokens for which the largest weight of the query that foretells them is on where they were said; for [`Probe::Reasoning`], of needles with twins, the weights
/// on where they were said among as many largest ones as the needle has tokens, as a mean over its tokens (Fu et al. 2024, arXiv 2410.19258).
///
/// # Errors
/// As [`Items::needles`] and [`evaluate`](super::evaluate()).
pub fn head_importance(
    model: &Model,
    probe: Probe,
    windows: &Windows,
    run: Run<'_>,
) -> Result<Vec<Vec<f64>>, RuntimeError> {
    let items = Items::needles(windows, NEEDLES, probe == Probe::Reasoning, run)?;
    let (done, total) = (AtomicU64::new(0), NEEDLES as u64);
    let of_item = |item: &Item| {
        let seen = Arc::new(Mutex::new(vec![Vec::new(); model.n_layers()]));
        let look = Look { probe, item: item.clone(), seen: seen.clone() };
        model.row_by_cache(&item.tokens, Steps::new(items.length(), 0)?, KvCache::by(look), |_| ())?;
        run.step("probe", done.fetch_add(1, Ordering::Relaxed) + 1, total)?;
        let seen = std::mem::take(&mut *seen.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(seen)
    };
    let each: Vec<Vec<Vec<f64>>> =
        items.all().par_iter().map(of_item).collect::<Result<_, RuntimeError>>()?;
    let mut sums = vec![Vec::new(); model.n_layers()];
    for (sums, i) in sums.iter_mut().zip(0..) {
        let heads = each.first().map_or(0, |item| item[i].len());
        let mean = |head: usize| each.iter().map(|item| item[i][head]).sum::<f64>() / each.len() as f64;
        *sums = (0..heads).map(mean).collect();
    }
    Ok(sums)
}

/// Keeps everything, and notes where a needle is looked at.
#[derive(Debug)]
struct Look {
    probe: Probe,
    item: Item,
    /// Of each layer, each head.
    seen: Arc<Mutex<Vec<Vec<f64>>>>,
}

impl CachePolicy for Look {
    fn spec(&self) -> Spec {
        Spec::new("look")
    }

    fn layer(&self, layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>> {
        let inner = FullCache::default().layer(layer, kv_heads, head_dim)?;
        let (probe, item, seen) = (self.probe, self.item.clone(), self.seen.clone());
        Ok(Box::new(Looking { inner, layer, look: Look { probe, item, seen } }))
    }
}

#[derive(Debug)]
struct Looking {
    inner: Box<dyn LayerCache>,
    layer: usize,
    look: Look,
}

impl LayerCache for Looking {
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]) {
        self.inner.append(keys, values, positions);
    }

    fn read(&self, head: usize) -> Kept {
        self.inner.read(head)
    }

    fn wants_weights(&self) -> bool {
        true
    }

    fn attended(&mut self, _head: usize, weights: ArrayView3<'_, f32>) {
        let Look { probe, item, seen } = &self.look;
        let mut sum = 0.0;
        for (&place, &said) in item.answers.iter().zip(&item.before) {
            for weights in weights.outer_iter().map(|of_query_head| of_query_head.row(place - 1).to_vec()) {
                sum += looked_at(*probe, &weights, said, item);
            }
        }
        let n = item.answers.len() * weights.dim().0;
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen[self.layer].push(sum / n.max(1) as f64);
    }

    fn settle(&mut self) {
        self.inner.settle();
    }

    fn bytes(&self) -> usize {
        self.inner.bytes()
    }
}

/// What one query, with these weights, looks at the place where its answer was said.
fn looked_at(probe: Probe, weights: &[f32], said: usize, item: &Item) -> f64 {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    match probe {
        Probe::Retrieval => f64::from(u8::from(order.first() == Some(&said))),
        Probe::Reasoning => {
            let span = item.span();
            let largest = order.iter().take(span.len()).filter(|place| span.contains(place));
            largest.map(|&place| f64::from(weights[place])).sum()
        }
    }
}
