use candle_core::Tensor;
use ndarray::Array2;
use rayon::prelude::*;

use super::Moments;
use super::sums::{CrossSum, Sum};
use crate::error::{Error, Result};
use crate::heads::{CrossMoment, KeyEnergies, Moment};
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Texts, Windows};

/// Layers whose moments are made of their sums side by side.
const ABREAST: usize = 4;

impl Moments {
    /// Measures them on the windows of these texts that fit, and names them by the texts and their roles. Progress is stage
    /// `"calibrate"`.
    ///
    /// # Errors
    /// As [`Moments::measure`].
    pub fn of_texts(model: &Model, texts: &Texts, run: Run<'_>) -> Result<Self, RuntimeError> {
        Ok(Self { digest: texts.digest(model.id()), ..Self::measure(model, texts.fit(), run)? })
    }

    /// Measures them on a text, and the energies of keys on each of its windows; products and sums in f64, on the device that reads it. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// [`Error::Moment`](crate::Error::Moment) for a layer that nothing enters; as [`evaluate`](crate::evaluation::evaluate()).
    pub fn measure(model: &Model, windows: &Windows, run: Run<'_>) -> Result<Self, RuntimeError> {
        let (layers, length) = (model.n_layers(), windows.length());
        let (pass, together) = (model.pass(length, 0)?, model.together(length));
        let (mut done, total) = (0, (windows.count().div_ceil(together) * layers) as u64);
        let mut sums: Vec<Option<Sum>> = (0..layers).map(|_| None).collect();
        let mut keys: Vec<Vec<Vec<f64>>> = vec![Vec::with_capacity(windows.count()); layers];
        for tokens in windows.batches(together) {
            let mut texts = model.embed_rows(tokens, &pass)?;
            for (i, sum) in sums.iter_mut().enumerate() {
                run.step("calibrate", done, total)?;
                let inputs = model.each(&texts, |x| {
                    let x = model.attention_input(i, x)?;
                    Ok((model.key_energies(i, &x, length)?, x))
                })?;
                for (energies, x) in inputs {
                    keys[i].extend(energies);
                    match &mut *sum {
                        Some(sum) => sum.add(&x)?,
                        none => *none = Some(Sum::new(&x)?),
                    }
                }
                // What the last layer puts out is nobody's input.
                if i + 1 < layers {
                    model.pass_layer(i, &mut texts, &pass)?;
                }
                done += 1;
            }
        }
        run.step("calibrate", total, total)?;
        let tokens = windows.tokens().len();
        let moment = |i: usize, sum: Option<Sum>| -> Result<Moment, RuntimeError> {
            let mean = sum.ok_or(Error::NoLayer { layer: i, layers })?.mean(tokens)?;
            let what = || format!("the attention input of layer {i}");
            let mean = mean.ok_or_else(|| RuntimeError::NotFinite { what: what() })?;
            Ok(Moment::new(mean).map_err(|e| e.of_layer(i))?)
        };
        let mut moments = Vec::with_capacity(layers);
        let mut sums = sums.into_iter().enumerate();
        loop {
            let some: Vec<_> = sums.by_ref().take(ABREAST).collect();
            if some.is_empty() {
                break;
            }
            let made = some.into_par_iter().map(|(i, sum)| moment(i, sum));
            moments.extend(made.collect::<Result<Vec<_>, _>>()?);
        }
        let keys = keys.into_iter().enumerate().map(|(i, rows)| energies(i, &rows));
        let keys = Some(keys.collect::<Result<_, _>>()?);
        let (id, digest) = (model.id(), windows.digest(model.id()));
        Ok(Self { layers: moments, keys, tokens: tokens as u64, model: id.fingerprint.clone(), digest })
    }
}

/// The energies of the keys of layer `i`, a row for each window.
fn energies(i: usize, rows: &[Vec<f64>]) -> Result<KeyEnergies, RuntimeError> {
    let shape = (rows.len(), rows.first().map_or(0, Vec::len));
    let matrix = Array2::from_shape_vec(shape, rows.concat()).map_err(Error::plugin)?;
    KeyEnergies::new(matrix).map_err(|error| match error {
        Error::KeyEnergies(_) => RuntimeError::NotFinite { what: format!("the keys of layer {i}") },
        error => error.into(),
    })
}

/// The moments of the attention inputs of every layer and the one above, on a text: of L layers L − 1. Progress is stage `"calibrate"`.
///
/// # Errors
/// As [`Moments::measure`].
pub(super) fn cross_moments(
    model: &Model,
    windows: &Windows,
    run: Run<'_>,
) -> Result<Vec<CrossMoment>, RuntimeError> {
    let (layers, length) = (model.n_layers(), windows.length());
    let (pass, together) = (model.pass(length, 0)?, model.together(length));
    let (mut done, total) = (0, (windows.count().div_ceil(together) * layers) as u64);
    let mut sums: Vec<Option<CrossSum>> = (1..layers).map(|_| None).collect();
    for tokens in windows.batches(together) {
        let mut texts = model.embed_rows(tokens, &pass)?;
        let mut below: Vec<Tensor> = Vec::new();
        for i in 0..layers {
            run.step("calibrate", done, total)?;
            let inputs = model.each(&texts, |x| model.attention_input(i, x))?;
            for (x, below) in inputs.iter().zip(&below) {
                match &mut sums[i - 1] {
                    Some(sum) => sum.add(x, below)?,
                    none => *none = Some(CrossSum::new(x, below)?),
                }
            }
            below = inputs;
            if i + 1 < layers {
                model.pass_layer(i, &mut texts, &pass)?;
            }
            done += 1;
        }
    }
    run.step("calibrate", total, total)?;
    let tokens = windows.tokens().len();
    let moment = |(i, sum): (usize, Option<CrossSum>)| {
        let mean = sum.ok_or(Error::NoLayer { layer: i, layers })?.mean(tokens)?;
        Ok(CrossMoment::new(mean).map_err(|error| error.of_layer(i + 1))?)
    };
    sums.into_iter().enumerate().map(moment).collect()
}
