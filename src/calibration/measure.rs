use candle_core::{DType, Tensor};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};
use ndarray::Array2;
use rayon::prelude::*;

use super::Moments;
use crate::error::Result;
use crate::heads::Moment;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Texts, Windows};

impl Moments {
    /// Measures them on the windows of these texts that fit, and names them by the texts and their roles. Progress is stage
    /// `"calibrate"`.
    ///
    /// # Errors
    /// As [`Moments::measure`].
    pub fn of_texts(model: &Model, texts: &Texts, run: Run<'_>) -> Result<Self, RuntimeError> {
        Ok(Self { digest: texts.digest(model.id()), ..Self::measure(model, texts.fit(), run)? })
    }

    /// Measures them on a text; products and sums in f64. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// [`Error::Moment`](crate::Error::Moment) for a layer that nothing enters; as [`evaluate`](crate::evaluation::evaluate()).
    pub fn measure(model: &Model, windows: &Windows, run: Run<'_>) -> Result<Self, RuntimeError> {
        let (layers, size, length) = (model.n_layers(), model.width() + 1, windows.length());
        let (pass, together) = (model.pass(length, 0)?, model.together(length));
        let (mut done, total) = (0, (windows.count().div_ceil(together) * layers) as u64);
        let mut sums = vec![Mat::zeros(size, size); layers];
        for tokens in windows.batches(together) {
            let mut texts = model.embed_rows(tokens, &pass)?;
            for (i, sum) in sums.iter_mut().enumerate() {
                run.step("calibrate", done, total)?;
                let inputs = texts.par_iter().map(|x| model.attention_input(i, x));
                let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
                inputs.iter().try_for_each(|x| add_square(sum, x))?;
                // What the last layer puts out is nobody's input.
                if i + 1 < layers {
                    texts = texts.par_iter().map(|x| model.layer(i, x, &pass)).collect::<Result<_, _>>()?;
                }
                done += 1;
            }
        }
        run.step("calibrate", total, total)?;
        let tokens = windows.tokens().len();
        let moment = |(i, sum): (usize, Mat<f64>)| -> Result<Moment, RuntimeError> {
            if !(0..size).all(|j| (0..=j).all(|k| sum[(j, k)].is_finite())) {
                return Err(RuntimeError::NotFinite { what: format!("the attention input of layer {i}") });
            }
            let mean = |(j, k): (usize, usize)| sum[(j.max(k), j.min(k))] / tokens as f64;
            Ok(Moment::new(Array2::from_shape_fn((size, size), mean)).map_err(|e| e.of_layer(i))?)
        };
        let layers = sums.into_iter().enumerate().map(moment).collect::<Result<_, _>>()?;
        let (id, digest) = (model.id(), windows.digest(model.id()));
        Ok(Self { layers, tokens: tokens as u64, model: id.fingerprint.clone(), digest })
    }
}

/// Adds the square of inputs (N, d) with a constant 1 appended, `x̃ᵀ x̃`, to the lower half of a sum.
fn add_square(sum: &mut Mat<f64>, x: &Tensor) -> Result<(), RuntimeError> {
    let (n, d) = x.dims2()?;
    if !x.device().is_cpu() {
        let ones = Tensor::ones((n, 1), DType::F64, x.device())?;
        let x = Tensor::cat(&[&x.to_dtype(DType::F64)?, &ones], 1)?;
        let square: Vec<f64> = x.t()?.matmul(&x)?.flatten_all()?.to_vec1()?;
        *sum += MatRef::from_row_major_slice(&square, d + 1, d + 1);
        return Ok(());
    }
    let numbers: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let x = Mat::from_fn(n, d + 1, |t, j| if j < d { f64::from(numbers[t * d + j]) } else { 1.0 });
    let (half, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    let par = Par::rayon(0);
    triangular::matmul(sum, half, Accum::Add, x.transpose(), whole, &x, whole, 1.0, par);
    Ok(())
}
