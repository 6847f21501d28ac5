//! What the limits of a target cost: against the plan of the same budget that has none but the model's own.

use std::sync::Arc;

use super::search::BothFronts;
use super::stages::Stages;
use super::{Compress, Fronts, Stage};
use crate::error::Result;
use crate::heads::HeadSource;
use crate::plan::{Plan, SharedHeads};
use crate::run::Run;
use crate::targets::Expanded;

/// What a target's limits cost on the windows that validate. Both plans were pooled alike, and nothing was fitted again.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LimitCost {
    /// The plan of the same budget without the target's limits: what [`Expanded`] holds.
    pub plan: Plan,
    /// What it does to the model.
    pub without: Stage,
    /// What the plan within the limits does: the stage of [`Compressed::stages`](super::Compressed::stages) before any refit.
    pub within: Stage,
}

impl LimitCost {
    /// How much higher the loss is within the limits, in nats per token; below 0 where the search without them found what the
    /// model reads worse.
    pub fn loss(&self) -> f64 {
        self.within.loss() - self.without.loss()
    }

    /// How much further from the source the model is within the limits: the difference of [`Stage::kl`], in nats.
    pub fn kl(&self) -> f64 {
        self.within.kl() - self.without.kl()
    }
}

impl<'a> Compress<'a> {
    /// What the limits of the target cost a plan that was found within them and went through these stages; `None` without windows
    /// that validate, and where there are no limits but the model's. Fronts are searched again where the limits had narrowed
    /// what was searched.
    pub(super) fn limit_cost(
        &self,
        searched: &Fronts<'_>,
        plan: &Plan,
        stages: &[Stage],
        source: &'a dyn HeadSource,
        run: Run<'_>,
    ) -> Result<Option<LimitCost>> {
        let unfitted =
            stages.iter().rfind(|stage| stage.made.refit.is_none() && stage.made.distilled.is_none());
        let text = self.calibration.and_then(|calibration| calibration.text());
        if self.crosses_layers() {
            // No other target holds such plans.
            return Ok(None);
        }
        let (Some((model, texts)), Some(within)) = (text, unfitted) else { return Ok(None) };
        let free = Self { target: Some(&Expanded), refit: Some(None), distil: None, ..self.clone() };
        let limits = free.all_limits(source)?;
        if limits == searched.limits {
            return Ok(None);
        }
        let space = free.space_for(&limits, source, self.budget)?;
        let known = || BothFronts { searched: searched.fronts.clone(), ruled: searched.neighbours.clone() };
        let known = (space == searched.space).then(known);
        let (found, pooled) =
            free.search_within(source, limits, space, known, run)?.planned(self.budget, run)?;
        let (within, mut without) = (within.clone(), within.clone());
        if !found.groups().eq(plan.groups()) {
            let shared = SharedHeads::with_pooler(&found, source, Box::new(Arc::clone(&self.pooler)))?;
            let pooled = match pooled {
                Some(pooled) => pooled,
                None => model.watched_with_shared(&shared, run)?,
            };
            let mut stages = Stages::new(model, texts, run)?;
            stages.offer_model(shared, pooled, run)?;
            without = stages.stages.pop().unwrap_or(without);
        }
        without.kept = false;
        Ok(Some(LimitCost { plan: found, without, within }))
    }
}
