//! From what the weights alone give to what was fitted the most: no stage is kept that ends further from the source than one
//! before it.

use std::sync::Arc;

use super::Compress;
use crate::distil::Distilled;
use crate::error::{Error, Result};
use crate::evaluation::{Evaluation, Reference, evaluate_against};
use crate::heads::HeadSource;
use crate::plan::{Plan, Pooling, Refit, SharedHeads};
use crate::refit::refit_from;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{Text, Texts, Windows};

/// A model before and after, on one text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Effect {
    /// The source.
    pub before: Evaluation,
    /// The model with shared heads, with how far it is from its source.
    pub after: Evaluation,
}

impl Effect {
    /// How much the loss rises, in nats per token.
    pub fn rise(&self) -> f64 {
        self.after.loss - self.before.loss
    }
}

/// What became of a model on one calibration text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TextEffect {
    /// The text.
    pub name: String,
    /// On its windows that validate, which fitted nothing.
    pub validation: Effect,
    /// On as many of its windows that fitted, or all where there are fewer.
    pub fitted: Effect,
}

impl TextEffect {
    /// Whether perplexity rises by another factor on windows that fitted nothing than on those that fitted: by more than 2%.
    pub fn is_fitted_closely(&self) -> bool {
        (self.validation.rise() - self.fitted.rise()).abs() > 1.02f64.ln()
    }
}

/// A stage on the way to the shared heads, as the windows that validate see it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Stage {
    /// What was done until then, as plans record it.
    pub made: Pooling,
    /// The model before and after, on each text with windows that validate.
    pub effects: Vec<Effect>,
    /// Whether this is what was kept: the least [`Stage::kl`], the earlier of equals.
    pub kept: bool,
}

impl Stage {
    /// Its name: `weights only`, `closed form`, `output refit`, `full refit`, `distilled`.
    pub fn name(&self) -> &'static str {
        if self.made.distilled.is_some() {
            return "distilled";
        }
        match (self.made.refit, &self.made.calibration) {
            (Some(Refit::Full), _) => "full refit",
            (Some(Refit::Output), _) => "output refit",
            (None, Some(_)) => "closed form",
            (None, None) => "weights only",
        }
    }

    /// Mean KL(source ‖ model) over the tokens of all windows that validate, in nats.
    pub fn kl(&self) -> f64 {
        self.mean(|effect| effect.after.divergence.map_or(f64::INFINITY, |d| d.kl))
    }

    /// Mean loss over the tokens of all windows that validate, in nats.
    pub fn loss(&self) -> f64 {
        self.mean(|effect| effect.after.loss)
    }

    fn mean(&self, of: impl Fn(&Effect) -> f64) -> f64 {
        let tokens = |effect: &Effect| effect.after.tokens as f64;
        let sum: f64 = self.effects.iter().map(|effect| of(effect) * tokens(effect)).sum();
        sum / self.effects.iter().map(tokens).sum::<f64>()
    }
}

/// Shared heads, and how they came about.
pub(super) struct Made<'a> {
    pub(super) shared: SharedHeads<'a>,
    /// The model with them, where windows validated it.
    pub(super) model: Option<Model>,
    pub(super) stages: Vec<Stage>,
    /// KL on validation by tokens of distillation, and whether that was broken off.
    pub(super) course: Vec<(u64, f64)>,
    pub(super) interrupted: bool,
}

impl<'a> Made<'a> {
    fn new(shared: SharedHeads<'a>, stages: Vec<Stage>) -> Self {
        Self { shared, model: None, stages, course: Vec::new(), interrupted: false }
    }
}

/// The stages so far, and the shared heads of the one that is nearest to the source, with the model that has them.
pub(super) struct Stages<'j, 'a> {
    model: &'j Model,
    references: Vec<Reference<'j>>,
    pub(super) stages: Vec<Stage>,
    kept: Option<(SharedHeads<'a>, Model)>,
}

impl<'j, 'a> Stages<'j, 'a> {
    /// None so far. The source reads the windows that validate, once for all stages.
    pub(super) fn new(model: &'j Model, texts: &'j Texts, run: Run<'_>) -> Result<Self> {
        let windows = texts.each().iter().filter_map(Text::validation);
        let references =
            windows.map(|windows| Reference::new(model, windows, run)).collect::<Result<_, _>>()?;
        Ok(Self { model, references, stages: Vec::new(), kept: None })
    }

    /// One more stage, kept if it is nearer to the source than all before it. Whether it was.
    fn offer(&mut self, shared: SharedHeads<'a>, run: Run<'_>) -> Result<bool> {
        let model = self.model.watched_with_shared(&shared, run)?;
        self.offer_model(shared, model, run)
    }

    /// As [`Stages::offer`], of shared heads that a model has already.
    pub(super) fn offer_model(
        &mut self,
        shared: SharedHeads<'a>,
        model: Model,
        run: Run<'_>,
    ) -> Result<bool> {
        let effect = |reference: &Reference<'_>| -> Result<Effect> {
            let (before, after) = (reference.source().clone(), reference.compare(&model, run)?);
            Ok(Effect { before, after })
        };
        let effects = self.references.iter().map(effect).collect::<Result<_>>()?;
        let mut stage = Stage { made: shared.done().clone(), effects, kept: false };
        stage.kept = self.stages.iter().all(|other| stage.kl() < other.kl());
        let kept = stage.kept;
        if kept {
            self.stages.iter_mut().for_each(|other| other.kept = false);
            self.kept = Some((shared, model));
        }
        self.stages.push(stage);
        Ok(kept)
    }
}

impl<'a> Compress<'a> {
    /// The shared heads of a plan, refitted as it says, and the stages on the way, where windows validate them: then the nearest
    /// to the source is kept, and its plan says so. A full refit that ends above another stage is tried again on outputs alone.
    /// `pooled` is the model under the plan, where there is one.
    pub(super) fn made(
        &self,
        plan: &Plan,
        source: &'a dyn HeadSource,
        pooled: Option<Model>,
        run: Run<'_>,
    ) -> Result<Made<'a>> {
        let by = |source, pooler| SharedHeads::with_pooler(plan, source, Box::new(pooler));
        let text = self.calibration.and_then(|calibration| Some((calibration, calibration.text()?)));
        let Some((calibration, (model, texts))) = text else {
            return Ok(Made::new(by(source, Arc::clone(&self.pooler))?, Vec::new()));
        };
        let refitted = |shared, pooled: Option<&Model>, level| {
            Ok::<_, Error>(refit_from(shared, pooled, model, texts.fit(), level, run)?.shared)
        };
        let distilled = |shared| {
            let distilled = self.distil.as_ref().map(|distil| {
                distil.run(model, shared, texts.fit(), texts.validation(), run).map_err(Error::from)
            });
            distilled.transpose()
        };
        if texts.validation().is_none() {
            let closed = by(source, Arc::clone(&self.pooler))?;
            let shared = match plan.pooling.refit {
                Some(level) => refitted(closed, pooled.as_ref(), level)?,
                None => closed,
            };
            return Ok(match distilled(shared.clone())? {
                Some(Distilled { shared, course, interrupted, .. }) => {
                    Made { course, interrupted, ..Made::new(shared, Vec::new()) }
                }
                None => Made::new(shared, Vec::new()),
            });
        }
        let mut stages = Stages::new(model, texts, run)?;
        if self.pooler.needs().moment {
            stages.offer(by(calibration.source(), Arc::clone(&self.pooler))?, run)?;
        }
        let pooled = match pooled {
            Some(pooled) => pooled,
            None => model.watched_with_shared(&by(source, Arc::clone(&self.pooler))?, run)?,
        };
        // Every layer is pooled once: what comes after takes its heads from the model that has them. Of layers that share with one
        // another heads are not told apart by layer.
        let mut closed = by(source, Arc::clone(&self.pooler))?;
        if plan.first_below().is_none() && pooled.tells_heads() {
            closed = closed.given(pooled.clone());
        }
        stages.offer_model(closed.clone(), pooled.clone(), run)?;
        if let Some(level) = plan.pooling.refit {
            let refitted = |level| refitted(closed.clone(), Some(&pooled), level);
            if !stages.offer(refitted(level)?, run)? && level == Refit::Full {
                stages.offer(refitted(Refit::Output)?, run)?;
            }
        }
        drop(pooled);
        let kept = stages.kept.as_ref().map_or(closed, |(shared, _)| shared.clone());
        let (mut course, mut interrupted) = (Vec::new(), false);
        if let Some(distilled) = distilled(kept.clone())? {
            (course, interrupted) = (distilled.course, distilled.interrupted);
            // Whoever breaks off from here on wants what there is.
            stages.offer(distilled.shared, run.to_the_end())?;
        }
        let Stages { stages, kept: nearest, .. } = stages;
        let (shared, model) = match nearest {
            Some((shared, model)) => (shared.settled(), Some(model)),
            None => (kept, None),
        };
        Ok(Made { shared, model, stages, course, interrupted })
    }

    /// What the model that was kept does on each text that validates it, beside what it does on windows that fitted it.
    pub(super) fn effects(
        &self,
        model: Option<&Model>,
        stages: &[Stage],
        run: Run<'_>,
    ) -> Result<Vec<TextEffect>> {
        let texts = self.calibration.and_then(|calibration| calibration.text());
        let kept = stages.iter().find(|stage| stage.kept);
        let Some((((source, texts), kept), model)) = texts.zip(kept).zip(model) else {
            return Ok(Vec::new());
        };
        let validated = texts.each().iter().filter_map(|text| Some((text, text.validation()?)));
        let effect = |((text, validation), effect): ((&Text, &Windows), &Effect)| {
            let windows = text.fit().spaced(validation.count());
            let (before, after) = evaluate_against(source, &[model], &windows, run)?;
            let after = after.into_iter().next().unwrap_or_else(|| before.clone());
            let fitted = Effect { before, after };
            Ok(TextEffect { name: text.name().to_string(), validation: effect.clone(), fitted })
        };
        validated.zip(&kept.effects).map(effect).collect()
    }
}
