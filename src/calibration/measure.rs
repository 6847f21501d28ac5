use candle_core::{DType, Tensor};
use ndarray::Array2;

use super::Moments;
use crate::error::{Error, Result};
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

    /// Measures them on a text, window by window; products and sums in f64. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// [`Error::Moment`] for a layer that nothing enters; as [`evaluate`](crate::evaluation::evaluate()).
    pub fn measure(model: &Model, windows: &Windows, run: Run<'_>) -> Result<Self, RuntimeError> {
        let total = windows.count() as u64;
        let mut sums: Vec<Option<Tensor>> = vec![None; model.n_layers()];
        for (done, tokens) in windows.batches(1).enumerate() {
            run.step("calibrate", done as u64, total)?;
            model.attention_inputs(tokens, |i, x| {
                let x = x.to_dtype(DType::F64)?;
                let ones = Tensor::ones((x.dim(0)?, 1), DType::F64, x.device())?;
                let x = Tensor::cat(&[&x, &ones], 1)?;
                let product = x.t()?.matmul(&x)?;
                let sum = match sums[i].take() {
                    Some(sum) => (sum + product)?,
                    None => product,
                };
                sums[i] = Some(sum);
                Ok(())
            })?;
        }
        run.step("calibrate", total, total)?;
        let tokens = windows.tokens().len();
        let moment = |(i, sum): (usize, Tensor)| -> Result<Moment, RuntimeError> {
            let (shape, sum) = (sum.dims2()?, sum.flatten_all()?.to_vec1()?);
            let sum: Array2<f64> = Array2::from_shape_vec(shape, sum).map_err(Error::plugin)?;
            if !sum.iter().all(|v| v.is_finite()) {
                return Err(RuntimeError::NotFinite { what: format!("the attention input of layer {i}") });
            }
            let symmetric = (&sum + &sum.t()) * 0.5;
            Ok(Moment::new(symmetric / tokens as f64).map_err(|e| e.of_layer(i))?)
        };
        let layers = sums.into_iter().flatten().enumerate().map(moment).collect::<Result<_, _>>()?;
        let (id, digest) = (model.id(), windows.digest(model.id()));
        Ok(Self { layers, tokens: tokens as u64, model: id.fingerprint.clone(), digest })
    }
}
