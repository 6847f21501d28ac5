//! Shared heads refitted on a calibration text: attention that looks where the source looked and adds what it added.

mod attention;
mod descent;
mod outputs;
mod scores;
mod state;

use std::str::FromStr;

use candle_core::Tensor;
use ndarray::{Array2, Axis, concatenate};
use rayon::prelude::*;

use self::attention::Positions;
use self::outputs::Outputs;
use self::scores::{Source, refit_scores};
use self::state::{State, rows};
use super::{Model, RuntimeError, Windows};
use crate::{Heads, Partition, PoolLayer, Pooled, Run};

/// How strongly a refit holds on to what it starts from, as a share of the mean diagonal of its normal equations.
const RIDGE: f64 = 1e-3;
/// The share of the energy that sums in f32 cannot tell from nothing: there is nothing to refit.
const NOTHING: f64 = 1e-7;
/// Tokens that outputs are fitted on, and of those, tokens that scores are fitted on.
const OUTPUT_TOKENS: usize = 1 << 15;
const SCORE_TOKENS: usize = 6 << 10;

/// What is fitted again after heads were merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Refit {
    /// Nothing.
    #[default]
    None,
    /// The output projection.
    Output,
    /// Queries and shared keys on attention scores, then shared values and the output projection.
    Full,
}

impl Refit {
    /// Its name: `none`, `output`, `full`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Output => "output",
            Self::Full => "full",
        }
    }
}

impl FromStr for Refit {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::None, Self::Output, Self::Full];
        all.into_iter()
            .find(|refit| refit.name() == name)
            .ok_or_else(|| format!("there is no refit {name:?}; known are none, output, full"))
    }
}

/// The shared heads of every layer after a refit, and what it gained.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Refitted {
    /// The layers, as [`convert_with`](crate::checkpoint::convert_with) takes them.
    pub layers: Vec<Pooled>,
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

/// Fits merged layers again on a text, from the first to the last, each on the inputs that the layers below leave it
/// (docs/method.md, "Refits"). `heads(i)` gives the source's heads of layer i, `pool(i, heads)` the shared heads to start
/// from. Works for any partition. A step that would raise its error on the text is not taken, and a layer whose output
/// would end up further from the source's stays as it was. Progress is stage `"refit"`.
///
/// Of the text at most 32 768 tokens are read, and for scores 6 144 of these, in whole windows evenly spaced.
///
/// Memory: of these tokens both residual streams and what the layer reads and adds, five times (tokens, d) in f32; for scores
/// two (T, T) in f32 a window and query head that shares (0.8 GB for 32 heads and windows of 512); for outputs the square of
/// what all query heads read of their groups' values, at most n_q·4h, in f64 and for four windows in f32.
///
/// # Errors
/// [`Error::LayerCount`](crate::Error::LayerCount) unless there is a partition for each layer,
/// [`Error::PartitionSize`](crate::Error::PartitionSize) unless it is one of the layer's heads; what `heads` and `pool` report; [`Error::NotFinite`](crate::Error::NotFinite); [`Error::Cancelled`](crate::Error::Cancelled).
pub fn refit(
    source: &Model,
    groups: &[&Partition],
    heads: &dyn Fn(usize) -> crate::Result<Heads>,
    pool: &PoolLayer<'_>,
    windows: &Windows,
    level: Refit,
    run: Run<'_>,
) -> Result<Refitted, RuntimeError> {
    let n = source.n_layers();
    if groups.len() != n {
        return Err(crate::Error::LayerCount { what: "partitions", expected: n, found: groups.len() }.into());
    }
    let pass = source.pass(1, windows.length(), 0)?;
    let positions = Positions::new(&pass)?;
    let texts: Vec<&[u32]> = windows.batches(1).collect();
    let texts = spaced(&texts, OUTPUT_TOKENS / windows.length());
    let streams = texts.iter().map(|tokens| Ok([source.embed(tokens)?, source.embed(tokens)?]));
    let mut streams: Vec<[Tensor; 2]> = streams.collect::<Result<_, RuntimeError>>()?;
    let mut merged = source.clone();
    let mut refitted = Refitted { layers: Vec::with_capacity(n), errors: Vec::with_capacity(n) };
    let mut touched = false;
    for (i, &partition) in groups.iter().enumerate() {
        run.step("refit", i as u64, n as u64)?;
        let heads = heads(i)?;
        let mut pooled = pool(i, &heads)?;
        pooled.check(&heads, partition)?;
        touched |= partition.n_groups() < partition.n_heads();
        let mut errors = [0.0; 2];
        if touched && level != Refit::None {
            let texts: Vec<Text> = streams
                .par_iter()
                .map(|streams| Text::new(source, i, streams, &pass))
                .collect::<Result<_, _>>()?;
            (pooled, errors) = refit_layer(&heads, partition, pooled, &texts, &positions, level)?;
        }
        merged = merged.with_pooled(i, &heads, partition, pooled.clone())?;
        let advance = |[of_source, of_merged]: &[Tensor; 2]| {
            Ok([source.layer(i, of_source, &pass, None)?, merged.layer(i, of_merged, &pass, None)?])
        };
        // Nothing is fitted above the last layer.
        if i + 1 < n {
            streams = streams.par_iter().map(advance).collect::<Result<_, RuntimeError>>()?;
        }
        refitted.layers.push(pooled);
        refitted.errors.push(errors);
    }
    run.step("refit", n as u64, n as u64)?;
    Ok(refitted)
}

fn refit_layer(
    heads: &Heads,
    partition: &Partition,
    pooled: Pooled,
    texts: &[Text],
    positions: &Positions,
    level: Refit,
) -> crate::Result<(Pooled, [f64; 2])> {
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

fn source_of(heads: &Heads) -> crate::Result<Source> {
    let (query, output) = heads.query().zip(heads.output()).ok_or(crate::Error::NoQueries)?;
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
        source: &Model,
        layer: usize,
        [of_source, of_merged]: &[Tensor; 2],
        pass: &super::attention::Pass,
    ) -> Result<Self, RuntimeError> {
        let input = source.attention_input(layer, of_source)?;
        let target = ((source.attend(layer, &input, pass)? + of_source)? - of_merged)?;
        let array = |t: &Tensor| -> Result<Array2<f32>, RuntimeError> {
            let shape = t.dims2()?;
            Ok(Array2::from_shape_vec(shape, t.flatten_all()?.to_vec1()?).map_err(crate::Error::plugin)?)
        };
        let with_constant = |t: &Tensor| -> Result<Array2<f32>, RuntimeError> {
            let rows = array(t)?;
            let ones = Array2::ones((rows.nrows(), 1));
            Ok(concatenate![Axis(1), rows, ones].as_standard_layout().into_owned())
        };
        Ok(Self {
            original: with_constant(&input)?,
            merged: with_constant(&source.attention_input(layer, of_merged)?)?,
            target: array(&target)?,
        })
    }
}
