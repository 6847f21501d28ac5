//! Least squares in which the matrix is only known by what it does to a guess.

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Scale, Side};

use crate::{Error, Result};

/// What a matrix of least squares is roughly, for one unknown matrix D: `L D R`. Preconditions the descent, and measures
/// how far a step goes.
#[derive(Debug)]
pub(super) struct Kronecker {
    left: Mat<f64>,
    right: Mat<f64>,
    left_inverse: Mat<f64>,
    right_inverse: Mat<f64>,
}

impl Kronecker {
    /// `left` and `right` symmetric and not negative; a small share of their mean is added.
    pub(super) fn new(mut left: Mat<f64>, mut right: Mat<f64>) -> Result<Self> {
        let left_inverse = inverted(&mut left)?;
        let right_inverse = inverted(&mut right)?;
        Ok(Self { left, right, left_inverse, right_inverse })
    }

    fn apply(&self, guess: &Mat<f64>) -> Mat<f64> {
        &self.left * guess * &self.right
    }

    fn solve(&self, residual: &Mat<f64>) -> Mat<f64> {
        &self.left_inverse * residual * &self.right_inverse
    }
}

/// Inverts what it lifts a little from zero.
fn inverted(matrix: &mut Mat<f64>) -> Result<Mat<f64>> {
    const LIFT: f64 = 1e-4;
    let n = matrix.nrows();
    let mean = (0..n).map(|i| matrix[(i, i)]).sum::<f64>() / n.max(1) as f64;
    let added = if mean > 0.0 { LIFT * mean } else { 1.0 };
    (0..n).for_each(|i| matrix[(i, i)] += added);
    let factor = matrix.llt(Side::Lower).map_err(|_| not_finite())?;
    Ok(factor.inverse())
}

fn not_finite() -> Error {
    Error::NotFinite { what: "what the calibration text makes of the attention".to_string() }
}

/// Conjugate gradients for `(A + ridge · M) D = residual`, where `operator` applies A to all unknowns at once and M is
/// `metric`. `coupled`: the unknowns are one system; otherwise each is its own, and they only share the work.
///
/// From D = 0 every iteration lowers `½⟨D, A D⟩ − ⟨D, residual⟩`, so that the error of least squares cannot rise.
pub(super) fn descend(
    residual: Vec<Mat<f64>>,
    metric: &[Kronecker],
    ridge: f64,
    iterations: usize,
    coupled: bool,
    mut operator: impl FnMut(&[Mat<f64>]) -> Result<Vec<Mat<f64>>>,
) -> Result<Vec<Mat<f64>>> {
    let n = residual.len();
    let mut residual = residual;
    let mut solution: Vec<Mat<f64>> = residual.iter().map(|r| Mat::zeros(r.nrows(), r.ncols())).collect();
    let mut direction: Vec<Mat<f64>> = residual.iter().zip(metric).map(|(r, m)| m.solve(r)).collect();
    let products = |a: &[Mat<f64>], b: &[Mat<f64>]| {
        let mut each: Vec<f64> = a.iter().zip(b).map(|(a, b)| dot(a, b)).collect();
        if coupled {
            let sum = each.iter().sum();
            each.fill(sum);
        }
        each
    };
    let mut decrease = products(&residual, &direction);
    for _ in 0..iterations {
        if !decrease.iter().any(|&d| d > 0.0) {
            break;
        }
        let mut image = operator(&direction)?;
        for ((image, direction), metric) in image.iter_mut().zip(&direction).zip(metric) {
            *image += metric.apply(direction) * Scale(ridge);
        }
        let curvature = products(&direction, &image);
        if curvature.iter().any(|c| !c.is_finite()) {
            return Err(not_finite());
        }
        // A system that has nothing left to gain rests.
        let step =
            |i: usize| if curvature[i] > 0.0 && decrease[i] > 0.0 { decrease[i] / curvature[i] } else { 0.0 };
        for i in 0..n {
            solution[i] += &direction[i] * Scale(step(i));
            residual[i] -= &image[i] * Scale(step(i));
        }
        let next: Vec<Mat<f64>> = residual.iter().zip(metric).map(|(r, m)| m.solve(r)).collect();
        let remaining = products(&residual, &next);
        for (i, next) in next.into_iter().enumerate() {
            let share = if decrease[i] > 0.0 { remaining[i] / decrease[i] } else { 0.0 };
            direction[i] = next + &direction[i] * Scale(share);
        }
        decrease = remaining;
    }
    Ok(solution)
}

fn dot(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    a.col_iter().zip(b.col_iter()).map(|(a, b)| a.iter().zip(b.iter()).map(|(a, b)| a * b).sum::<f64>()).sum()
}
