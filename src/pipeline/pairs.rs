//! Fronts of two layers that share with one another, beside those of each alone.

use super::Compress;
use super::search::fronts;
use crate::allocator::{CostScale, ExactAllocation, LayerCosts, PairCosts};
use crate::budget::Limits;
use crate::cross_layer::LayerPairs;
use crate::error::{Error, Result};
#[cfg(feature = "runtime")]
use crate::evaluation::{PairSensitivity, Sensitivity, Trial};
use crate::front::Front;
use crate::heads::HeadSource;
use crate::partition::SearchSpace;
use crate::plan::LayerPlan;
use crate::run::Run;

/// The front of every pair of neighbouring layers that can share.
#[derive(Debug)]
pub(super) struct PairFronts {
    #[cfg(feature = "runtime")]
    calibrated: bool,
    lower: Vec<usize>,
    fronts: Vec<Front>,
    /// How much of each pair is a function of the lower layer's input.
    shares: Vec<f64>,
    #[cfg(feature = "runtime")]
    sensitivity: Option<PairSensitivity>,
}

impl Compress<'_> {
    /// Refuses sources whose layers share with one another already and, where they are to, targets that have no place for that.
    pub(super) fn check_pairs(&self, source: &dyn HeadSource) -> Result<()> {
        if let Some(layer) = source.architecture().first_below() {
            return Err(Error::Limits {
                layer,
                found: "reads the keys and values of the layer below".to_string(),
                expected: "heads are searched of layers with keys and values of their own: search the model that this one was made of"
                    .to_string(),
            });
        }
        #[cfg(feature = "checkpoint")]
        if let Some(target) = self.target.filter(|target| self.crosses_layers() && !target.holds_pairs()) {
            return Err(Error::Setting {
                name: "the target of layers that share",
                value: target.name().to_string(),
                expected: "one that can write a layer which reads the cache of the one below: remote-code",
            });
        }
        Ok(())
    }
}

impl PairFronts {
    /// Searches every pair as a layer of the heads of both.
    pub(super) fn search(
        compress: &Compress<'_>,
        source: &dyn HeadSource,
        (limits, space): (&Limits, &SearchSpace),
        run: Run<'_>,
    ) -> Result<Self> {
        if limits.same_k || limits.dividing.is_some() || !limits.fixed.is_empty() {
            return Err(Error::Setting {
                name: "the limits of layers that share",
                value: "numbers of heads of single layers".to_string(),
                expected: "no more than what a layer's groups may be",
            });
        }
        let calibrated = compress.pooler.needs().moment || compress.fitness.needs().moment;
        let pairs = LayerPairs::new(source, calibrated)?;
        let Some(_) = pairs.lower().first() else {
            let layers = source.architecture().n_layers();
            return Err(Error::Limits {
                layer: layers.saturating_sub(1),
                found: "cannot read the keys of the layer below, and no other layer can".to_string(),
                expected: "sharing across layers takes layers of equal heads, positions and masks whose keys go through no norms"
                    .to_string(),
            });
        };
        let found = fronts(&compress.search, None, compress.fitness.as_ref(), &pairs, space, run)?.searched;
        let shares = (0..found.len()).map(|pair| pairs.predicted_share(pair)).collect::<Result<_>>()?;
        Ok(Self {
            #[cfg(feature = "runtime")]
            calibrated,
            lower: pairs.lower().to_vec(),
            fronts: found,
            shares,
            #[cfg(feature = "runtime")]
            sensitivity: None,
        })
    }

    /// Estimates what each layer loses, alone and with its neighbour.
    #[cfg(feature = "runtime")]
    pub(super) fn measure(
        &mut self,
        trial: &Trial<'_>,
        fronts: &[Front],
        run: Run<'_>,
    ) -> Result<Sensitivity> {
        let pairs = LayerPairs::new(trial.source, self.calibrated)?;
        let (alone, both) = Sensitivity::estimate_with_pairs(trial, fronts, &pairs, &self.fronts, run)?;
        self.sensitivity = Some(both);
        Ok(alone)
    }

    /// What each k of each pair costs. As a share of the energies a pair counts as two layers, and what the lower layer's input does
    /// not predict is lost with any k.
    pub(super) fn costs(&self, scale: CostScale, limits: &Limits) -> Result<PairCosts> {
        #[cfg(feature = "runtime")]
        if let (CostScale::Measured, Some(sensitivity)) = (scale, &self.sensitivity) {
            return sensitivity.costs(&self.fronts, limits);
        }
        let mut table = Vec::new();
        for ((&lower, front), &share) in self.lower.iter().zip(&self.fronts).zip(&self.shares) {
            let mut of_pair = vec![None; front.n_heads()];
            for point in front.iter().filter(|point| limits.space.admits(&point.partition)) {
                let cost = match (scale, front.energy()) {
                    (CostScale::Raw, _) => point.error,
                    (_, Some(energy)) if energy > 0.0 => {
                        2.0 * (1.0 - share * (1.0 - (point.error / energy).min(1.0)))
                    }
                    _ if point.error == 0.0 => 0.0,
                    _ => return Err(Error::NoEnergy { layer: lower }),
                };
                of_pair[point.partition.n_groups() - 1] = Some(cost);
            }
            table.resize(lower, Vec::new());
            table.push(of_pair);
        }
        PairCosts::from_table(table)
    }

    /// The plan of every layer: of the front of each, or of each pair, the point that costs least in all.
    pub(super) fn layers(
        &self,
        alone: &[Front],
        costs: &LayerCosts,
        pairs: &PairCosts,
        kv_heads: usize,
        run: Run<'_>,
    ) -> Result<Vec<LayerPlan>> {
        let mut layers = Vec::with_capacity(alone.len());
        for span in ExactAllocation.with_pairs(costs, pairs, kv_heads, run)? {
            let pair = self.lower.iter().position(|&lower| span.paired && lower == span.layer);
            let front = pair.map_or(&alone[span.layer], |pair| &self.fronts[pair]);
            let point = front.get(span.k).ok_or(Error::GroupCount { k: span.k, n_heads: front.n_heads() })?;
            match pair {
                Some(_) => layers.extend(LayerPlan::from(point).split(alone[span.layer].n_heads())?),
                None => layers.push(LayerPlan::from(point)),
            }
        }
        Ok(layers)
    }
}
