use std::ops::Range;

use faer::{Mat, Side};

use super::layout::from_rows;
use crate::error::{Error, Result};
use crate::heads::{Heads, Projection};

/// How far below 0 an eigenvalue of a moment may be, as a share of the trace.
const ROUNDING: f64 = 1e-6;

/// The second moment in which errors count: `E[x̃ x̃ᵀ]` of the inputs with a constant 1 appended, (d+1)².
#[derive(Debug)]
pub(crate) struct Metric {
    /// `None`: the identity.
    second: Option<Mat<f64>>,
}

impl Metric {
    /// The moment that a layer carries, with `ridge` times its mean square added to every input: directions that a short
    /// text never showed still count a little. Inputs of a layer that carries none are taken as white.
    ///
    /// # Errors
    /// [`Error::Moment`] for a moment with negative eigenvalues.
    pub(crate) fn new(heads: &Heads, ridge: f64) -> Result<Self> {
        let second = heads.moment().map(|moment| {
            let moment = moment.matrix();
            let d = moment.nrows() - 1;
            let added = ridge * moment.diag().iter().take(d).sum::<f64>() / d as f64;
            // It is symmetric: columns are read where rows lie.
            let second =
                Mat::from_fn(d + 1, d + 1, |i, j| moment[[j, i]] + if i == j && i < d { added } else { 0.0 });
            if is_positive(&second) { Ok(second) } else { Err(no_moment()) }
        });
        Ok(Self { second: second.transpose()? })
    }

    /// `A C`, for rows A over d+1 inputs.
    pub(crate) fn weigh(&self, rows: &Mat<f64>) -> Mat<f64> {
        self.second.as_ref().map_or_else(|| rows.clone(), |second| rows * second)
    }

    /// `A (C − μ̃ μ̃ᵀ)`: by the covariance of the inputs, in which the constant counts nothing.
    pub(crate) fn centred(&self, rows: &Mat<f64>) -> Mat<f64> {
        let mut weighted = self.weigh(rows);
        let means = self.means(rows);
        let constant = rows.ncols() - 1;
        for column in 0..=constant {
            let mean = match &self.second {
                Some(second) => second[(constant, column)],
                None => f64::from(u8::from(column == constant)),
            };
            for (row, of_row) in means.iter().enumerate() {
                weighted[(row, column)] -= of_row * mean;
            }
        }
        weighted
    }

    /// `A μ̃`, what rows give on average.
    pub(crate) fn means(&self, rows: &Mat<f64>) -> Vec<f64> {
        let constant = rows.ncols() - 1;
        let mean = |row: usize| match &self.second {
            Some(second) => (0..=constant).map(|i| rows[(row, i)] * second[(i, constant)]).sum(),
            None => rows[(row, constant)],
        };
        (0..rows.nrows()).map(mean).collect()
    }
}

/// Rows `part` of every head of a projection, one head after the other, (n·|part|, d+1): the bias is the last column,
/// 0 where there is none.
pub(crate) fn projection_rows(projection: &Projection, part: Range<usize>) -> Mat<f64> {
    let (h, d) = (projection.head_dim(), projection.inputs());
    let weights = projection.weight_slice();
    let mut rows = match part.len() == h {
        true => from_rows(weights, d, 1),
        false => {
            let of_head = |head: &[f32]| head[part.start * d..part.end * d].to_vec();
            from_rows(&weights.chunks_exact(h * d).flat_map(of_head).collect::<Vec<_>>(), d, 1)
        }
    };
    if let Some(bias) = projection.bias_slice() {
        let of_part = bias.chunks_exact(h).flat_map(|head| &head[part.clone()]);
        of_part.enumerate().for_each(|(row, &b)| rows[(row, d)] = f64::from(b));
    }
    rows
}

/// Whether the eigenvalues are finite and, to rounding, not negative.
fn is_positive(second: &Mat<f64>) -> bool {
    let size = second.nrows();
    let trace: f64 = (0..size).map(|i| second[(i, i)]).sum();
    let mut shifted = second.clone();
    (0..size).for_each(|i| shifted[(i, i)] += ROUNDING * trace);
    trace.is_finite() && shifted.llt(Side::Lower).is_ok()
}

/// The error for what is no moment, however it shows.
pub(crate) fn no_moment() -> Error {
    let rule = "must be finite and have no negative eigenvalue";
    Error::Moment { layer: None, rule }
}
