use std::ops::Range;

use faer::{Mat, Side};

use crate::{Error, Heads, Projection, Result};

/// How far from symmetric, from ending with 1 and from having no negative eigenvalue a moment may be, as a share of
/// `√(C_ii C_jj)`, of 1 and of the trace.
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
    /// [`Error::Moment`] for what is no moment: not symmetric, with negative eigenvalues, or not 1 at the constant.
    pub(crate) fn new(heads: &Heads, ridge: f64) -> Result<Self> {
        let second = heads.moment().map(|moment| {
            let d = moment.nrows() - 1;
            let added = ridge * moment.diag().iter().take(d).sum::<f64>() / d as f64;
            let second =
                Mat::from_fn(d + 1, d + 1, |i, j| moment[[i, j]] + if i == j && i < d { added } else { 0.0 });
            if is_moment(&second) { Ok(second) } else { Err(no_moment()) }
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
    let (d, len) = (projection.inputs(), part.len());
    let (weight, bias) = (projection.weight(), projection.bias());
    Mat::from_fn(projection.n_heads() * len, d + 1, |row, column| {
        let (head, row) = (row / len, part.start + row % len);
        f64::from(match &bias {
            _ if column < d => weight[[head, row, column]],
            Some(bias) => bias[[head, row]],
            None => 0.0,
        })
    })
}

fn is_moment(second: &Mat<f64>) -> bool {
    let (size, at) = (second.nrows(), |i: usize, j: usize| second[(i, j)]);
    let trace: f64 = (0..size).map(|i| at(i, i)).sum();
    let symmetric = |i: usize, j: usize| {
        let scale = (at(i, i).max(0.0) * at(j, j).max(0.0)).sqrt();
        (at(i, j) - at(j, i)).abs() <= ROUNDING * scale
    };
    trace.is_finite()
        && (at(size - 1, size - 1) - 1.0).abs() <= ROUNDING
        && (0..size).all(|j| (0..j).all(|i| symmetric(i, j)))
        && {
            let mut shifted = second.clone();
            (0..size).for_each(|i| shifted[(i, i)] += ROUNDING * trace);
            shifted.llt(Side::Lower).is_ok()
        }
}

/// The error for what is no moment, however it shows.
pub(crate) fn no_moment() -> Error {
    let rule = "must be finite and symmetric, have no negative eigenvalue, and be 1 at the constant";
    Error::Moment { layer: None, rule }
}
