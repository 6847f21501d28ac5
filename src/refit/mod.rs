//! Shared heads refitted on a calibration text: attention that looks where the source looked and adds what it added.

mod attention;
mod descent;
mod outputs;
mod scores;
mod state;

use candle_core::Tensor;
use ndarray::{Array2, Axis, concatenate};
use rayon::prelude::*;

use self::attention::Positions;
use self::outputs::Outputs;
use self::scores::{Source, refit_scores};
use self::state::{State, rows};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::heads::{Heads, Pooled};
use crate::partition::Partition;
use crate::plan::{Plan, Refit, SharedHeads};
use crate::run::Run;
use crate::runtime::{Model, Pass};
use crate::text::{RuntimeError, Windows};

/// How strongly a refit holds on to what it starts from, as a share of the mean diagonal of its normal equations.
const RIDGE: f64 = 1e-3;
/// The share of the energy that sums in f32 cannot tell from nothing: there is nothing to refit.
const NOTHING: f64 = 1e-7;
/// Tokens that outputs are fitted on, and of those, tokens that scores are fitted on.
const OUTPUT_TOKENS: usize = 1 << 15;
const SCORE_TOKENS: usize = 6 << 10;

/// The shared heads of every layer after a refit, and what it gained.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refitted<'a> {
    /// The shared heads, for outputs and the runtime.
    pub shared: SharedHeads<'a>,
    /// The error of each layer's attention output on the calibration text, before and after, as a share of the energy of what
    /// it should add; 0 below the first layer that shares.
    pub errors: Vec<[f64; 2]>,
}

/// One window of text, as the attention of one layer meets it.
#[derive(Debug)]
struct Text {
    /// What it reads in the source, (T, d+1) with the constant 1.
    original: Array2<f32>,
    /// What it reads in the merged model.
    merged: Array2<f32>,
    /// What it should add to the merged model's residual stream: what the source adds, and what the layers below lost.
    target: Array2<f32>,
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
    Ok(refit(shared, model, texts.fit(), level, run)?.shared)
}

/// Fits shared heads again on a text, from the first layer to the last, each on the inputs that the layers below leave it
/// (docs/method.md, "Refits"). `model` is the source. Works for any partition. A step that would raise its error on the text
/// is not taken, and a layer whose output would end up further from the source's stays as it was. Progress is stage `"refit"`.
///
/// Of the text at most 32 768 tokens are read, and for scores 6 144 of these, in whole windows evenly spaced.
///
/// Memory: of these tokens both residual streams and what the layer reads and adds, five times (tokens, d) in f32; for scores
/// two (T, T) in f32 a window and query head that shares (0.8 GB for 32 heads and windows of 512); for outputs the square of
/// what all query heads read of their groups' values, at most n_q·4h, in f64 and for four windows in f32.
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
    shared.plan().source.check_same(model.id())?;
    let n = model.n_layers();
    let pass = model.pass(1, windows.length(), 0)?;
    let texts: Vec<&[u32]> = windows.batches(1).collect();
    let texts = spaced(&texts, OUTPUT_TOKENS / windows.length());
    let streams = texts.iter().map(|tokens| Ok([model.embed(tokens)?, model.embed(tokens)?]));
    let mut streams: Vec<[Tensor; 2]> = streams.collect::<Result<_, RuntimeError>>()?;
    let mut merged = model.clone();
    let (mut layers, mut errors) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let mut touched = false;
    for i in 0..n {
        run.step("refit", i as u64, n as u64)?;
        let (partition, (heads, mut pooled)) = (shared.groups(i), shared.layer(i)?);
        touched |= partition.n_groups() < partition.n_heads();
        let mut error = [0.0; 2];
        if touched {
            let texts: Vec<Text> = streams
                .par_iter()
                .map(|streams| Text::new(model, i, streams, &pass))
                .collect::<Result<_, _>>()?;
            let positions = Positions::new(&pass, model.spec(i), i)?;
            (pooled, error) = refit_layer(&heads, partition, pooled, &texts, &positions, level)?;
        }
        // Nothing is fitted above the last layer.
        if i + 1 < n {
            merged = merged.with_layer(&heads, partition, pooled.clone())?;
            let advance = |[of_source, of_merged]: &[Tensor; 2]| {
                Ok([model.layer(i, of_source, &pass)?, merged.layer(i, of_merged, &pass)?])
            };
            streams = streams.par_iter().map(advance).collect::<Result<_, RuntimeError>>()?;
        }
        layers.push(pooled);
        errors.push(error);
    }
    run.step("refit", n as u64, n as u64)?;
    Ok(Refitted { shared: shared.refitted(layers, level), errors })
}

fn refit_layer(
    heads: &Heads,
    partition: &Partition,
    pooled: Pooled,
    texts: &[Text],
    positions: &Positions,
    level: Refit,
) -> Result<(Pooled, [f64; 2])> {
    let full = level == Refit::Full;
    let source = source_of(heads)?;
    let start = State::new(heads, partition, &pooled)?;
    let mut outputs = Outputs::new(&start, &source, texts, positions, full)?;
    let before = outputs.error(&start);
    if before <= NOTHING {
        return Ok((pooled, [before, before]));
    }
    let mut best = start.clone();
    outputs.refit(&mut best);
    let mut after = outputs.error(&best);
    drop(outputs);
    if full && partition.n_groups() < partition.n_heads() {
        let mut state = start;
        let length = texts.first().map_or(1, |text| text.merged.nrows());
        let all: Vec<&Text> = texts.iter().collect();
        refit_scores(&mut state, &source, &spaced(&all, SCORE_TOKENS / length), positions)?;
        let mut outputs = Outputs::new(&state, &source, texts, positions, true)?;
        outputs.refit(&mut state);
        // Better scores need not mean a better output.
        let error = outputs.error(&state);
        if error < after {
            (best, after) = (state, error);
        }
    }
    if after > before {
        return Ok((pooled, [before, before]));
    }
    Ok((best.finish(&pooled, heads)?, [before, after]))
}

fn source_of(heads: &Heads) -> Result<Source> {
    let (query, output) = heads.query().zip(heads.output()).ok_or(Error::NoQueries)?;
    let readers = output.outer_iter().map(|o| o.t().dot(&o)).collect();
    Ok(Source { query: rows(query), key: rows(heads.key()), value: rows(heads.value()), readers })
}

/// At most `most` of these, but at least one, evenly spaced.
fn spaced<'a, T: ?Sized>(all: &[&'a T], most: usize) -> Vec<&'a T> {
    let n = most.clamp(1, all.len().max(1)).min(all.len());
    (0..n).map(|i| all[i * all.len() / n]).collect()
}

impl Text {
    fn new(
        model: &Model,
        layer: usize,
        [of_source, of_merged]: &[Tensor; 2],
        pass: &Pass,
    ) -> Result<Self, RuntimeError> {
        let input = model.attention_input(layer, of_source)?;
        let target = ((model.attend(layer, &input, pass)? + of_source)? - of_merged)?;
        let array = |t: &Tensor| -> Result<Array2<f32>, RuntimeError> {
            let shape = t.dims2()?;
            Ok(Array2::from_shape_vec(shape, t.flatten_all()?.to_vec1()?).map_err(Error::plugin)?)
        };
        let with_constant = |t: &Tensor| -> Result<Array2<f32>, RuntimeError> {
            let rows = array(t)?;
            let ones = Array2::ones((rows.nrows(), 1));
            Ok(concatenate![Axis(1), rows, ones].as_standard_layout().into_owned())
        };
        Ok(Self {
            original: with_constant(&input)?,
            merged: with_constant(&model.attention_input(layer, of_merged)?)?,
            target: array(&target)?,
        })
    }
}
