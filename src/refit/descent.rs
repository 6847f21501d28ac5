//! Least squares in which the matrix is only known by what it does to a guess.

use faer::dyn_stack::{MemBuffer, MemStack, StackReq};
use faer::linalg::cholesky::llt;
use faer::{Mat, Par, Scale};

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
    /// `left` and `right` symmetric and not negative; a small share of their mean is added. `None` where they are neither.
    pub(super) fn new(mut left: Mat<f64>, mut right: Mat<f64>) -> Option<Self> {
        let left_inverse = inverted(&mut left)?;
        let right_inverse = inverted(&mut right)?;
        Some(Self { left, right, left_inverse, right_inverse })
    }

    fn apply(&self, guess: &Mat<f64>) -> Mat<f64> {
        &self.left * guess * &self.right
    }

    fn solve(&self, residual: &Mat<f64>) -> Mat<f64> {
        &self.left_inverse * residual * &self.right_inverse
    }
}

/// Inverts what it lifts a little from zero.
fn inverted(matrix: &mut Mat<f64>) -> Option<Mat<f64>> {
    const LIFT: f64 = 1e-4;
    let n = matrix.nrows();
    let mean = (0..n).map(|i| matrix[(i, i)]).sum::<f64>() / n.max(1) as f64;
    let added = if mean > 0.0 { LIFT * mean } else { 1.0 };
    (0..n).for_each(|i| matrix[(i, i)] += added);
    solve_positive(matrix.clone(), Mat::identity(n, n))
}

/// `A⁻¹ B` for a symmetric positive A, of which the lower half is read, on one thread: the same on any number. `None` where
/// it is not positive or not finite.
pub(super) fn solve_positive(mut matrix: Mat<f64>, mut right: Mat<f64>) -> Option<Mat<f64>> {
    let (n, columns) = (right.nrows(), right.ncols());
    let factor_space = llt::factor::cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default());
    let solve_space = llt::solve::solve_in_place_scratch::<f64>(n, columns, Par::Seq);
    let mut memory = MemBuffer::new(StackReq::any_of(&[factor_space, solve_space]));
    let stack = MemStack::new(&mut memory);
    let (none, settings) = (Default::default(), Default::default());
    llt::factor::cholesky_in_place(matrix.as_mut(), none, Par::Seq, stack, settings).ok()?;
    let stack = MemStack::new(&mut memory);
    llt::solve::solve_in_place(matrix.as_ref(), right.as_mut(), Par::Seq, stack);
    right.is_all_finite().then_some(right)
}

/// Conjugate gradients for `(A + ridge · M) D = residual`, where `operator` applies A to all unknowns at once and M is
/// `metric`. `coupled`: the unknowns are one system; otherwise each is its own, and they only share the work.
///
/// From D = 0 every iteration lowers `½⟨D, A D⟩ − ⟨D, residual⟩`, so that the error of least squares cannot rise. `None` where
/// numbers run out of range.
pub(super) fn descend(
    residual: Vec<Mat<f64>>,
    metric: &[Kronecker],
    ridge: f64,
    iterations: usize,
    coupled: bool,
    mut operator: impl FnMut(&[Mat<f64>]) -> Vec<Mat<f64>>,
) -> Option<Vec<Mat<f64>>> {
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
        let mut image = operator(&direction);
        for ((image, direction), metric) in image.iter_mut().zip(&direction).zip(metric) {
            *image += metric.apply(direction) * Scale(ridge);
        }
        let curvature = products(&direction, &image);
        if curvature.iter().any(|c| !c.is_finite()) {
            return None;
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
    Some(solution)
}

fn dot(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    a.col_iter().zip(b.col_iter()).map(|(a, b)| a.iter().zip(b.iter()).map(|(a, b)| a * b).sum::<f64>()).sum()
}
