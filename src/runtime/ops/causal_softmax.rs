use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, D, Device, InplaceOp1, Layout, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use rayon::prelude::*;

use super::exponential::{exp, largest, sum};

/// For each query the keys that it may look at, where both are given by their positions, ascending: those at positions
/// p ≤ t with t − p < `reach`.
pub(crate) fn visible(queries: &[usize], keys: &[usize], reach: usize) -> Vec<Range<usize>> {
    let of = |&t: &usize| {
        let end = keys.partition_point(|&p| p <= t);
        keys[..end].partition_point(|&p| t - p >= reach)..end
    };
    queries.iter().map(of).collect()
}

/// Softmax of scores (…, T, S) over the keys that each of T queries may look at, in place; 0 elsewhere. Heads may have a sink each:
/// one more score, whose share is left out.
#[derive(Debug, Clone)]
pub(crate) struct CausalSoftmax {
    /// Of each query, T.
    pub(crate) visible: Vec<Range<usize>>,
    /// Keys, S.
    pub(crate) keys: usize,
    /// Where the mask is kept, spread over rows: elsewhere than on the CPU an addition of two tensors of one shape takes a tenth of one
    /// that repeats the other.
    pub(crate) kept: Option<KeptMask>,
}

/// A mask for as many heads as there were the most so far, (heads, T·S); for those who share what is visible.
pub(crate) type KeptMask = Arc<Mutex<Option<Tensor>>>;

impl CausalSoftmax {
    /// Of contiguous scores of these heads, one after the other: on the CPU in place, elsewhere of candle's operations. `sinks`:
    /// one for each head, or none.
    pub(crate) fn of(&self, scores: Tensor, sinks: &[f32]) -> Result<Tensor> {
        if !scores.device().is_cpu() {
            return self.by_mask(&scores, sinks);
        }
        scores.inplace_op1(&Rows { softmax: self, sinks })?;
        Ok(scores)
    }

    /// Scores and −∞ where nothing may be looked at, then the softmax of whole rows: every query has to see a key.
    fn by_mask(&self, scores: &Tensor, sinks: &[f32]) -> Result<Tensor> {
        let (t, s) = (self.visible.len(), self.keys);
        // Every dimension of a broadcast is a division for each number.
        let flat = scores.reshape(((), t * s))?;
        let masked = match &self.kept {
            Some(kept) => (&flat + self.spread(kept, &flat)?)?,
            None => flat.broadcast_add(&self.mask(scores.device())?.reshape((1, t * s))?)?,
        };
        if sinks.is_empty() {
            return softmax_last_dim(&masked.reshape(((), s))?)?.reshape(scores.shape());
        }
        let masked = masked.reshape(((), sinks.len(), t, s))?;
        let sinks = Tensor::new(sinks, scores.device())?.reshape((1, sinks.len(), 1, 1))?;
        let sinks = sinks.broadcast_as((masked.dim(0)?, sinks.elem_count(), t, 1))?;
        let shares = softmax_last_dim(&Tensor::cat(&[&masked, &sinks], D::Minus1)?.contiguous()?)?;
        shares.narrow(D::Minus1, 0, s)?.contiguous()?.reshape(scores.shape())
    }

    /// The mask as often as there are heads, of what is kept.
    fn spread(&self, kept: &KeptMask, flat: &Tensor) -> Result<Tensor> {
        let (heads, size) = flat.dims2()?;
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mask) = kept.as_ref().filter(|mask| mask.dims()[0] >= heads) {
            return mask.narrow(0, 0, heads);
        }
        let mask = self.mask(flat.device())?.reshape((1, size))?.broadcast_as((heads, size))?.contiguous()?;
        *kept = Some(mask.clone());
        Ok(mask)
    }

    /// 0 where a query may look, −∞ elsewhere, (T, S).
    fn mask(&self, device: &Device) -> Result<Tensor> {
        let (t, s) = (self.visible.len(), self.keys);
        let bounds = |bound: fn(&Range<usize>) -> usize| {
            let bounds: Vec<u32> = self.visible.iter().map(|range| bound(range) as u32).collect();
            Tensor::from_vec(bounds, (t, 1), device)
        };
        let keys = Tensor::arange(0, s as u32, device)?.unsqueeze(0)?;
        let begun = keys.broadcast_ge(&bounds(|range| range.start)?)?;
        let seen = (begun * keys.broadcast_lt(&bounds(|range| range.end)?)?)?;
        let [nothing, hidden] = [0.0, f32::NEG_INFINITY].map(|value| Tensor::full(value, (t, s), device));
        seen.where_cond(&nothing?, &hidden?)
    }

    /// Softmax of one row of scores over a part of it, and a sink.
    pub(crate) fn row(row: &mut [f32], visible: Range<usize>, sink: Option<f32>) {
        let Range { start, end } = visible;
        let seen = &mut row[start..end];
        let most = sink.map_or(largest(seen), |sink| largest(seen).max(sink));
        seen.iter_mut().for_each(|score| *score = exp(*score - most));
        let share = (sum(seen) + sink.map_or(0.0, |sink| exp(sink - most))).recip();
        seen.iter_mut().for_each(|weight| *weight *= share);
        row[..start].fill(0.0);
        row[end..].fill(0.0);
    }
}

/// A softmax on the CPU.
struct Rows<'a> {
    softmax: &'a CausalSoftmax,
    sinks: &'a [f32],
}

impl InplaceOp1 for Rows<'_> {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(scores), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("scores must be contiguous and f32");
        };
        let CausalSoftmax { visible, keys, .. } = self.softmax;
        scores[from..to].par_chunks_exact_mut(keys * visible.len()).enumerate().for_each(|(i, head)| {
            let sink = self.sinks.get(i % self.sinks.len().max(1)).copied();
            for (row, visible) in head.chunks_exact_mut(*keys).zip(visible) {
                CausalSoftmax::row(row, visible.clone(), sink);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever gaps there are, the keys seen are those that the rule names, and their weights are the softmax.
        #[test]
        fn positions_decide_what_is_seen(
            gaps in prop::collection::vec(1usize..5, 1..24), first in 0usize..9, new in 1usize..6,
            reach in prop_oneof![1usize..12, Just(usize::MAX)], sink in prop::option::of(-3.0f32..3.0),
        ) {
            let keys: Vec<usize> = gaps.iter().scan(first, |at, gap| { *at += gap; Some(*at) }).collect();
            let queries = &keys[keys.len().saturating_sub(new)..];
            let ranges = visible(queries, &keys, reach);
            for (&t, range) in queries.iter().zip(ranges) {
                let sees = |&i: &usize| keys[i] <= t && t - keys[i] < reach;
                prop_assert!(range.clone().eq((0..keys.len()).filter(sees)));
                let scores: Vec<f32> = keys.iter().map(|p| (p * 7 % 5) as f32 - 2.0).collect();
                let mut weights = scores.clone();
                CausalSoftmax::row(&mut weights, range, sink);
                let part = |i: usize| if sees(&i) { f64::from(scores[i]).exp() } else { 0.0 };
                let all: f64 = (0..keys.len()).map(part).sum::<f64>() + sink.map_or(0.0, |s| f64::from(s).exp());
                for (i, &weight) in weights.iter().enumerate() {
                    prop_assert!((f64::from(weight) - part(i) / all).abs() < 1e-6);
                }
            }
        }
    }

    proptest! {
        /// What other devices compute is what the CPU computes, rows of several heads one after the other.
        #[test]
        fn both_ways_agree(
            t in 1usize..12, before in 0usize..9, heads in 1usize..4, reach in prop_oneof![1usize..12, Just(usize::MAX)],
            seed in 0usize..1000, sunk: bool,
        ) {
            let keys: Vec<usize> = (0..before + t).collect();
            let softmax = CausalSoftmax { visible: visible(&keys[before..], &keys, reach), keys: keys.len(), kept: None };
            let n = 2 * heads * t * keys.len();
            let scores: Vec<f32> = (0..n).map(|i| ((i * 7919 + seed * 31) % 401) as f32 / 20.0 - 10.0).collect();
            let scores = Tensor::from_vec(scores, (2, heads, t, keys.len()), &Device::Cpu).unwrap();
            let sinks: Vec<f32> = (0..heads * usize::from(sunk)).map(|head| head as f32 - 1.0).collect();
            let general = softmax.by_mask(&scores, &sinks).unwrap();
            let keeping = CausalSoftmax { kept: Some(KeptMask::default()), ..softmax.clone() };
            for heads in [1, 2] {
                let some = scores.narrow(0, 0, heads).unwrap().contiguous().unwrap();
                let apart = keeping.by_mask(&some, &sinks).unwrap() - general.narrow(0, 0, heads).unwrap();
                let apart = apart.unwrap().abs().unwrap().max_all().unwrap();
                prop_assert_eq!(apart.to_scalar::<f32>().unwrap(), 0.0);
            }
            let apart = (softmax.of(scores, &sinks).unwrap() - general).unwrap().abs().unwrap().max_all().unwrap();
            prop_assert!(apart.to_scalar::<f32>().unwrap() < 1e-6);
        }
    }

    #[test]
    fn positions_without_gaps_are_counted() {
        assert_eq!(visible(&[2, 3], &[0, 1, 2, 3], usize::MAX), [0..3, 0..4]);
        assert_eq!(visible(&[2, 3], &[0, 1, 2, 3], 2), [1..3, 2..4]);
        assert!(visible(&[9], &[0, 1, 4], 5)[0].is_empty(), "all lie too far back");
    }
}
