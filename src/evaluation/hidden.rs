use candle_core::Tensor;
use rayon::prelude::*;

use super::comparable;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Windows};

/// How far the hidden states of a model, those that an output embedding would read, are from its source's.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct HiddenDistance {
    /// Their squared error as a share of the source's energy, `Σ_t ‖h_t − h'_t‖² / Σ_t ‖h_t‖²`.
    pub error: f64,
    /// Mean cosine of the states of a token, `1/T Σ_t ⟨h_t, h'_t⟩ / (‖h_t‖ ‖h'_t‖)`.
    pub cosine: f64,
    /// Tokens read, T.
    pub tokens: u64,
    /// Windows read.
    pub windows: u64,
}

/// Reads a text with a source and a model made of it, and compares what comes out of their last layers: what there is to compare of
/// encoders, which predict no tokens. Progress is stage `"evaluate"`.
///
/// ```
/// use qcqa::Run;
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::evaluation::hidden_distance;
/// use qcqa::runtime::Model;
/// use qcqa::text::Windows;
///
/// let model = Model::load(&Checkpoint::open("tests/data/novels-1m")?)?;
/// let windows = Windows::new((0..64).map(|t| t * t % 1021).collect(), 32)?;
/// let distance = hidden_distance(&model, &model, &windows, Run::new(0))?;
/// assert!(distance.error == 0.0 && (distance.cosine - 1.0).abs() < 1e-6);
/// # Ok::<(), qcqa::text::RuntimeError>(())
/// ```
///
/// # Errors
/// As [`evaluate_against`](super::evaluate_against()).
pub fn hidden_distance(
    source: &Model,
    model: &Model,
    windows: &Windows,
    run: Run<'_>,
) -> Result<HiddenDistance, RuntimeError> {
    comparable(source, model)?;
    let (length, total) = (windows.length(), windows.count() as u64);
    let (mut sums, mut done) = ([0.0; 3], 0);
    for tokens in windows.batches(source.together(length)) {
        run.step("evaluate", done, total)?;
        let rows = tokens.len() / length;
        let both = [source, model].map(|model| model.rows(tokens, rows));
        let [theirs, own] = both;
        let parts = theirs?.into_par_iter().zip(own?).map(|(theirs, own)| {
            let states = |model: &Model, x: &Tensor| model.last(x)?.to_vec2::<f32>();
            Ok(distances(&states(source, &theirs)?, &states(model, &own)?))
        });
        for part in parts.collect::<Result<Vec<_>, RuntimeError>>()? {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        done += rows as u64;
    }
    run.step("evaluate", total, total)?;
    let ([off, energy, cosines], tokens) = (sums, windows.tokens().len() as u64);
    if !(off.is_finite() && cosines.is_finite()) {
        return Err(RuntimeError::NotFinite { what: "the hidden states of the model".to_string() });
    }
    let error = if energy > 0.0 { off / energy } else { 0.0 };
    Ok(HiddenDistance { error, cosine: cosines / tokens as f64, tokens, windows: total })
}

/// Sums over tokens: squared error, energy of the source, cosines.
fn distances(source: &[Vec<f32>], own: &[Vec<f32>]) -> [f64; 3] {
    let token = |(theirs, own): (&Vec<f32>, &Vec<f32>)| {
        let [mut off, mut a, mut b, mut ab] = [0.0; 4];
        for (&x, &y) in theirs.iter().zip(own) {
            let (x, y) = (f64::from(x), f64::from(y));
            (off, a, b, ab) = (off + (x - y).powi(2), a + x * x, b + y * y, ab + x * y);
        }
        [off, a, ab / (a * b).sqrt().max(f64::MIN_POSITIVE)]
    };
    source.iter().zip(own).map(token).fold([0.0; 3], |sum, next| [0, 1, 2].map(|i| sum[i] + next[i]))
}
