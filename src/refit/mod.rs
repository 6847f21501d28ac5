//! Shared heads refitted on a calibration text: attention that adds what the source's adds.

mod layerwise;
mod outputs;
mod texts;

use self::texts::Texts;
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::plan::{Plan, Refit, SharedHeads};
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Windows};

/// The share of the energy that sums in f32 cannot tell from nothing: there is nothing to refit.
const NOTHING: f64 = 1e-7;

/// The shared heads of every layer after a refit, and what it gained.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refitted<'a> {
    /// The shared heads, for outputs and the runtime.
    pub shared: SharedHeads<'a>,
    /// The error of each layer's attention output on the calibration text, of more than 32 windows on 32 spaced ones, before and after, as a share of the energy of what
    /// it should add, by the weights of the tokens; 0 below the first layer that shares.
    pub errors: Vec<[f64; 2]>,
}

/// The shared heads of a plan, made as it says, its refit included: that runs the model of the calibration on its text.
/// Progress is stage `"refit"`.
///
/// # Errors
/// As [`SharedHeads::new`], but [`Error::PlanRefit`] only where the calibration has no text; as [`refit()`].
pub fn apply<'a>(
    plan: &Plan,
    calibration: &'a Calibration<'_>,
    run: Run<'_>,
) -> Result<SharedHeads<'a>, RuntimeError> {
    let shared = SharedHeads::unfitted(plan, calibration)?;
    let Some(level) = plan.pooling.refit else { return Ok(shared) };
    let (model, texts) = calibration.text().ok_or(Error::PlanRefit { refit: level.name() })?;
    Ok(refit(shared, model, texts.fit(), level, run.with_seed(plan.seed))?.shared)
}

/// Fits shared heads again on a text, from the first layer to the last, each on the inputs that the layers below leave it
/// (docs/method.md, "Refits"). `model` is the source. Works for any partition. What a layer's attention adds to the stream
/// should be what the source's adds and what the layers below lost; every token counts by one over the squared length of the
/// source's stream after that attention. A layer whose output would end up further from that stays as it was. Progress is
/// stage `"refit"`.
///
/// [`Refit::Output`] solves for the output projection; [`Refit::Full`] goes down the gradient by queries, keys, values and
/// outputs together, in an order of windows that the run's seed decides. All tokens are read, window by window.
///
/// Memory besides the model, of which one layer is needed at a time ([`Model::open`]): the residual streams of both models, two
/// times (tokens, d), in f32 up to 512 MiB and in bf16 beyond; the shared heads, of all layers.
///
/// ```
/// use qcqa::Run;
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::heads::HeadSource;
/// use qcqa::partition::Partition;
/// use qcqa::plan::{LayerPlan, Method, Plan, Pooling, Refit, SharedHeads};
/// use qcqa::refit::refit;
/// use qcqa::runtime::Model;
/// use qcqa::spec::Spec;
/// use qcqa::text::Windows;
///
/// let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
/// let model = Model::load(&checkpoint)?;
/// let pairs = Partition::from_groups(8, &[[0, 1], [2, 3], [4, 5], [6, 7]])?;
/// let by_hand = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
/// let (pooling, layers) = (Pooling::new(Spec::new("mean")), vec![LayerPlan::new(pairs, 0.0); 4]);
/// let plan = Plan::new(checkpoint.id()?, by_hand, pooling, layers, 0.5, 0)?;
///
/// let windows = Windows::new((0..128).map(|t| t * t % 1021).collect(), 64)?;
/// let shared = SharedHeads::new(&plan, &checkpoint)?;
/// let refitted = refit(shared, &model, &windows, Refit::Output, Run::new(0))?;
/// assert!(refitted.errors.iter().all(|[before, after]| after < before));
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
///
/// # Errors
/// [`Error::PlanSource`] unless the heads are of this model; as [`SharedHeads::layer`]; [`Error::NotFinite`];
/// [`Error::Cancelled`].
pub fn refit<'a>(
    shared: SharedHeads<'a>,
    model: &Model,
    windows: &Windows,
    level: Refit,
    run: Run<'_>,
) -> Result<Refitted<'a>, RuntimeError> {
    refit_from(shared, None, model, windows, level, run)
}

/// As [`refit()`]; `start` is the model with these shared heads, where there is one already.
pub(crate) fn refit_from<'a>(
    shared: SharedHeads<'a>,
    start: Option<&Model>,
    model: &Model,
    windows: &Windows,
    level: Refit,
    run: Run<'_>,
) -> Result<Refitted<'a>, RuntimeError> {
    shared.plan().source.check_same(model.id())?;
    shared.plan().no_pairs("a refit")?;
    let start = start.filter(|start| start.tells_heads());
    let n = model.n_layers();
    let mut texts = Texts::new(model, windows)?;
    let (mut layers, mut errors) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let (mut touched, mut fitted) = (false, model.clone());
    for i in 0..n {
        run.step("refit", i as u64, n as u64)?;
        let partition = shared.groups(i);
        touched |= partition.n_groups() < partition.n_heads();
        // The layers below have done their part: the streams come from them.
        let (mut merged, mut pooled) = match start {
            Some(start) => (model.with_layer_of(start, i), None),
            None => {
                let (heads, pooled) = shared.layer(i)?;
                (model.with_layer(&heads, partition, pooled.clone())?, Some(pooled))
            }
        };
        let mut error = [0.0; 2];
        if touched {
            texts.enter(model, i)?;
            let before = texts.error(&merged, i)?;
            error = [before; 2];
            if before > NOTHING {
                let fitted = match level {
                    Refit::Output => outputs::refit(&merged, i, &texts)?,
                    Refit::Full => layerwise::refit(&merged, i, &texts, run.fork(i as u64))?,
                };
                let after = texts.error(&fitted, i)?;
                if !after.is_finite() {
                    return Err(RuntimeError::NotFinite { what: format!("the refit of layer {i}") });
                }
                if after <= before {
                    (merged, error[1]) = (fitted, after);
                    if let Some(pooled) = &mut pooled {
                        let found = merged.pooled(i)?;
                        match level {
                            // All else stays bit for bit.
                            Refit::Output => {
                                (pooled.output, pooled.output_bias) = (found.output, found.output_bias);
                            }
                            Refit::Full => *pooled = found,
                        }
                    }
                }
            }
        }
        // Nothing is fitted above the last layer.
        if i + 1 < n {
            texts.leave(model, &merged, i, touched)?;
        }
        match pooled {
            Some(pooled) => layers.push(pooled),
            None => fitted.take_layer(&merged, i)?,
        }
        errors.push(error);
    }
    run.step("refit", n as u64, n as u64)?;
    let shared = match start {
        Some(_) => shared.refitted(fitted, level),
        None => shared.refitted(layers, level),
    };
    Ok(Refitted { shared, errors })
}
