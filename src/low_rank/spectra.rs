//! Decompositions on one thread. faer rounds eigenvalues differently on several, from sizes of about 100 on; its products
//! do not depend on the number of threads.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::{evd, svd};
use faer::traits::ComplexField;
use faer::traits::ext::ComplexFieldExt;
use faer::{Mat, MatRef, Par, diag::Diag};

/// Eigenvalues, ascending, of a symmetric or Hermitian matrix, of which the lower half is read. `None` where it is not
/// finite.
pub(crate) fn eigenvalues<T: ComplexField<Real = f64>>(matrix: MatRef<'_, T>) -> Option<Vec<f64>> {
    decompose(matrix, false).map(|(values, _)| values)
}

/// Eigenvalues, ascending, and eigenvectors as columns.
pub(crate) fn eigen<T: ComplexField<Real = f64>>(matrix: MatRef<'_, T>) -> Option<(Vec<f64>, Mat<T>)> {
    decompose(matrix, true)
}

fn decompose<T: ComplexField<Real = f64>>(
    matrix: MatRef<'_, T>,
    with_vectors: bool,
) -> Option<(Vec<f64>, Mat<T>)> {
    if !matrix.is_all_finite() {
        return None;
    }
    let n = matrix.nrows();
    let (mut values, mut vectors) = (Diag::<T>::zeros(n), Mat::<T>::zeros(n, n));
    let compute = if with_vectors { evd::ComputeEigenvectors::Yes } else { evd::ComputeEigenvectors::No };
    let scratch = evd::self_adjoint_evd_scratch::<T>(n, compute, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let (out, stack) = (with_vectors.then(|| vectors.as_mut()), MemStack::new(&mut memory));
    evd::self_adjoint_evd(matrix, values.as_mut(), out, Par::Seq, stack, Default::default()).ok()?;
    let values: Vec<f64> = values.column_vector().iter().map(|v| v.real()).collect();
    values.iter().all(|v| v.is_finite()).then_some((values, vectors))
}

/// `U Vᵀ` of the singular vectors: the orthogonal T with the largest `tr(Tᵀ A)`. `None` where A is not finite.
pub(super) fn nearest_turn(matrix: MatRef<'_, f64>) -> Option<Mat<f64>> {
    if !matrix.is_all_finite() {
        return None;
    }
    let n = matrix.nrows();
    let (mut values, mut left, mut right) = (Diag::<f64>::zeros(n), Mat::zeros(n, n), Mat::zeros(n, n));
    let full = svd::ComputeSvdVectors::Full;
    let mut memory = MemBuffer::new(svd::svd_scratch::<f64>(n, n, full, full, Par::Seq, Default::default()));
    let (u, v) = (Some(left.as_mut()), Some(right.as_mut()));
    let stack = MemStack::new(&mut memory);
    svd::svd(matrix, values.as_mut(), u, v, Par::Seq, stack, Default::default()).ok()?;
    Some(left * right.transpose())
}
