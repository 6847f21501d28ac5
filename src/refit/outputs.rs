//! The output projection, solved for.

use candle_core::{DType, Tensor};
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Accum, Mat, Par};

use super::texts::{Text, Texts};
use crate::error::{Error, Result};
use crate::low_rank::from_rows;
use crate::run::map_ordered;
use crate::runtime::{Model, added, weighed};
use crate::text::RuntimeError;

/// How strongly the output holds on to what it was, as a share of the mean diagonal of its normal equations.
const RIDGE: f64 = 1e-3;
/// Columns that are solved for as one.
const BLOCK: usize = 128;

/// The model with the output projection of layer `i`, and its bias where there is one, by least squares on the text:
/// `argmin Σ_t w_t ‖W z_t − target_t‖² + λ ‖W − W₀‖²`, where z_t is what the query heads read.
pub(super) fn refit(model: &Model, i: usize, texts: &Texts) -> Result<Model, RuntimeError> {
    let mut weights = model.attention_weights(i)?;
    let (output, bias) = (weights.matrices[3].clone(), weights.biases[3].clone());
    let mut sums: Option<[Tensor; 2]> = None;
    let products_of = |text: &Text| {
        let (mut reads, _) = model.attention_reads(i, &text.input, &texts.pass)?;
        if bias.is_some() {
            reads = Tensor::cat(&[&reads, &text.weight.ones_like()?], 1)?;
        }
        let weighed = weighed(&reads, &text.weight)?.t()?;
        Ok([weighed.matmul(&reads)?, weighed.matmul(&text.target)?])
    };
    // f32 within a window, f64 over all; no more of the former at once than threads make.
    for windows in texts.parts(model) {
        for [squares, products] in texts.map(model, i, &windows, products_of)? {
            sums = Some(match sums.take() {
                None => [squares.to_dtype(DType::F64)?, products.to_dtype(DType::F64)?],
                Some([all_squares, all_products]) => {
                    [added(all_squares, &squares)?, added(all_products, &products)?]
                }
            });
        }
    }
    let [squares, products] = sums.ok_or(Error::NoLayer { layer: i, layers: 0 })?;
    let (mut squares, mut products) = (matrix(&squares)?, matrix(&products)?);
    let start = match &bias {
        Some(bias) => Tensor::cat(&[&output.t()?, &bias.unsqueeze(0)?], 0)?,
        None => output.t()?.contiguous()?,
    };
    let start = matrix(&start.to_dtype(DType::F64)?)?;
    let m = squares.nrows();
    let added = RIDGE * (0..m).map(|j| squares[(j, j)]).sum::<f64>() / m as f64;
    (0..m).for_each(|j| squares[(j, j)] += added);
    products += faer::Scale(added) * start;
    // What has no energy stays as it is.
    let Some(found) = solve_positive(squares, &products) else { return Ok(model.clone()) };
    let (d, columns) = (found.ncols(), m - usize::from(bias.is_some()));
    let numbers: Vec<f32> =
        (0..d).flat_map(|row| (0..columns).map(move |c| (c, row))).map(|at| found[at] as f32).collect();
    weights.matrices[3] = Tensor::from_vec(numbers, (d, columns), model.place())?;
    if bias.is_some() {
        let numbers: Vec<f32> = (0..d).map(|row| found[(columns, row)] as f32).collect();
        weights.biases[3] = Some(Tensor::from_vec(numbers, d, model.place())?);
    }
    let mut model = model.clone();
    model.set_weights(i, &weights)?;
    Ok(model)
}

fn matrix(tensor: &Tensor) -> Result<Mat<f64>, RuntimeError> {
    let ((_, columns), numbers) = (tensor.dims2()?, tensor.flatten_all()?.to_vec1::<f64>()?);
    Ok(from_rows(&numbers, columns, 0))
}

/// `A⁻¹ B` for a symmetric positive A, of which the lower half is read. Decompositions and blocks of columns are each on one
/// thread, and products round alike on any number: so does this. `None` where A is not positive or the answer not finite.
fn solve_positive(mut matrix: Mat<f64>, right: &Mat<f64>) -> Option<Mat<f64>> {
    let (n, columns) = (right.nrows(), right.ncols());
    decompose(&mut matrix)?;
    let blocks = map_ordered(columns.div_ceil(BLOCK), |block| {
        let first = block * BLOCK;
        let mut part = right.subcols(first, BLOCK.min(columns - first)).to_owned();
        let mut memory = MemBuffer::new(llt::solve::solve_in_place_scratch::<f64>(n, part.ncols(), Par::Seq));
        llt::solve::solve_in_place(matrix.as_ref(), part.as_mut(), Par::Seq, MemStack::new(&mut memory));
        part
    });
    let mut found = Mat::zeros(n, columns);
    for (block, part) in blocks.iter().enumerate() {
        found.subcols_mut(block * BLOCK, part.ncols()).copy_from(part);
    }
    found.is_all_finite().then_some(found)
}

/// The Cholesky factor in the place of the lower half, block of columns by block of columns: `A₂₂ − L₂₁ L₂₁ᵀ` is all but a
/// little of the work.
fn decompose(matrix: &mut Mat<f64>) -> Option<()> {
    let n = matrix.nrows();
    for first in (0..n).step_by(BLOCK) {
        let (end, width) = ((first + BLOCK).min(n), BLOCK.min(n - first));
        let mut corner = matrix.submatrix(first, first, width, width).to_owned();
        let space = llt::factor::cholesky_in_place_scratch::<f64>(width, Par::Seq, Default::default());
        let (mut memory, none, settings) = (MemBuffer::new(space), Default::default(), Default::default());
        let stack = MemStack::new(&mut memory);
        llt::factor::cholesky_in_place(corner.as_mut(), none, Par::Seq, stack, settings).ok()?;
        let below = map_ordered((n - end).div_ceil(BLOCK), |block| {
            let row = end + block * BLOCK;
            let mut rows = matrix.submatrix(row, first, BLOCK.min(n - row), width).transpose().to_owned();
            solve_lower_triangular_in_place(corner.as_ref(), rows.as_mut(), Par::Seq);
            rows
        });
        matrix.submatrix_mut(first, first, width, width).copy_from(&corner);
        for (block, rows) in below.iter().enumerate() {
            let place = matrix.submatrix_mut(end + block * BLOCK, first, rows.ncols(), width);
            place.transpose_mut().copy_from(rows);
        }
        let (left, mut rest) = matrix.as_mut().split_at_col_mut(end);
        let below = left.as_ref().submatrix(end, first, n - end, width);
        let (half, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
        let rest = rest.as_mut().subrows_mut(end, n - end);
        triangular::matmul(
            rest,
            half,
            Accum::Add,
            below,
            whole,
            below.transpose(),
            whole,
            -1.0,
            Par::rayon(0),
        );
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// `A X = B`, however many blocks there are.
        #[test]
        fn solves(
            n in prop_oneof![1usize..12, BLOCK - 1..2 * BLOCK + 2], columns in prop_oneof![1usize..5, BLOCK - 1..2 * BLOCK + 2], seed in 0usize..1000,
        ) {
            let number = |i: usize| ((i * 7919 + seed * 31) % 1009) as f64 / 500.0 - 1.0;
            let root = Mat::from_fn(n, n, |i, j| number(i * n + j));
            let matrix = &root * root.transpose() * faer::Scale((n as f64).recip()) + Mat::<f64>::identity(n, n);
            let right = Mat::from_fn(n, columns, |i, j| number(n * n + i * columns + j));
            let found = solve_positive(matrix.clone(), &right).unwrap();
            prop_assert!((&matrix * &found - &right).norm_max() < 1e-9);
            prop_assert!(solve_positive(-matrix, &right).is_none());
        }
    }
}
