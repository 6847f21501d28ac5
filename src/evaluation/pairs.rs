use super::Trial;
use crate::allocator::PairCosts;
use crate::budget::Limits;
use crate::cross_layer::{LayerPairs, parted};
use crate::error::{Error, Result};
use crate::front::{Front, FrontPoint};
use crate::plan::LayerPlan;
use crate::runtime::Model;
use crate::text::RuntimeError;

/// Numbers of heads that are measured, besides that of sharing nothing; those between are interpolated.
const MEASURED: &[usize] = &[1, 2, 3, 4, 6, 8, 12, 16, 24, 32];

/// How much two neighbouring layers pay for sharing with one another, in nats per token: for each pair, by its lower layer, what was
/// estimated at some numbers of heads ([`Sensitivity::estimate_with_pairs`](super::Sensitivity::estimate_with_pairs)).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PairSensitivity {
    /// Lower layer; numbers of heads with the rise.
    pairs: Vec<(usize, Vec<(usize, f64)>)>,
}

impl PairSensitivity {
    /// The rises by the lower layer of each pair: pairs of k and nats per token, k ascending.
    pub fn measured(&self) -> &[(usize, Vec<(usize, f64)>)] {
        &self.pairs
    }

    /// The rise of the layers `lower` and `lower + 1` at k heads: linear between what was measured; `None` beyond.
    pub fn rise(&self, lower: usize, k: usize) -> Option<f64> {
        let (_, rises) = self.pairs.iter().find(|(layer, _)| *layer == lower)?;
        let above = rises.iter().position(|(at, _)| *at >= k)?;
        let (right, high) = rises[above];
        if right == k {
            return Some(high.max(0.0));
        }
        let (left, low) = *rises.get(above.checked_sub(1)?)?;
        let share = (k - left) as f64 / (right - left) as f64;
        Some((low + share * (high - low)).max(0.0))
    }

    /// The rises as costs of the points of the pairs' fronts, in the order of what was measured, without what the limits forbid.
    ///
    /// # Errors
    /// [`Error::LayerCount`] unless there is a front for each pair.
    pub fn costs(&self, fronts: &[Front], limits: &Limits) -> Result<PairCosts> {
        let mut pairs: Vec<&(usize, Vec<(usize, f64)>)> = self.pairs.iter().collect();
        pairs.sort_by_key(|(lower, _)| *lower);
        if pairs.len() != fronts.len() {
            return Err(Error::LayerCount {
                what: "fronts of pairs",
                expected: pairs.len(),
                found: fronts.len(),
            });
        }
        let mut table = Vec::new();
        for ((lower, _), front) in pairs.into_iter().zip(fronts) {
            let mut costs = vec![None; front.n_heads()];
            for point in front.iter().filter(|point| limits.space.admits(&point.partition)) {
                let k = point.partition.n_groups();
                costs[k - 1] = self.rise(*lower, k);
            }
            table.resize(*lower, Vec::new());
            table.push(costs);
        }
        PairCosts::from_table(table)
    }

    /// The models in which layer `upper` and the one below share, with their numbers of heads; none where they cannot.
    pub(super) fn begin(
        &mut self,
        trial: &Trial<'_>,
        pairs: &LayerPairs<'_>,
        fronts: &[Front],
        upper: usize,
    ) -> Result<Vec<(usize, Model)>, RuntimeError> {
        let lower = upper.checked_sub(1);
        let pair = lower.and_then(|lower| Some((lower, pairs.lower().binary_search(&lower).ok()?)));
        let Some((lower, front)) = pair.and_then(|(lower, pair)| Some((lower, fronts.get(pair)?))) else {
            return Ok(Vec::new());
        };
        self.pairs.push((lower, Vec::new()));
        let points: Vec<&FrontPoint> = front
            .iter()
            .filter(|point| {
                let k = point.partition.n_groups();
                MEASURED.contains(&k) || k == front.n_heads()
            })
            .collect();
        let joint = pairs.of_lower(lower)?;
        let partitions: Vec<_> = points.iter().map(|point| &point.partition).collect();
        let pooled = trial.pooler.pool_each(&joint, &partitions).map_err(|error| error.of_layer(lower))?;
        let heads = [trial.source.heads(lower)?, trial.source.heads(upper)?];
        let queries = heads[0].n_heads() * heads[0].queries_per_head();
        let model = |(point, pooled): (&FrontPoint, _)| {
            let layers = LayerPlan::from(point).split(heads[0].n_heads())?;
            let below = layers[1].below.as_ref().map_or(&[][..], |below| below.heads());
            let mut model = trial.model.clone();
            for ((heads, layer), pooled) in heads.iter().zip(&layers).zip(parted(pooled, queries, below)?) {
                model = model.with_sharing(heads, layer.into(), pooled)?;
            }
            Ok((point.partition.n_groups(), model))
        };
        points.iter().copied().zip(pooled).map(model).collect()
    }

    /// Adds what one of both layers loses at k heads.
    pub(super) fn add(&mut self, lower: usize, k: usize, rise: f64) {
        let Some((_, rises)) = self.pairs.iter_mut().find(|(layer, _)| *layer == lower) else { return };
        match rises.iter_mut().find(|(at, _)| *at == k) {
            Some((_, sum)) => *sum += rise,
            None => rises.push((k, rise)),
        }
    }
}
