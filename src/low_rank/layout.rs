//! Matrices of rows as faer lays them out.

use faer::Mat;

/// Rows that are copied side by side: a whole column at a time would leave the cache for every number.
const BLOCK: usize = 16;

/// The matrix of rows that lie one after the other, each with `more` columns of zeros behind it.
pub(crate) fn from_rows<T: Copy + Into<f64>>(rows: &[T], columns: usize, more: usize) -> Mat<f64> {
    let n = rows.len().checked_div(columns).unwrap_or(0);
    let mut matrix = Mat::zeros(n, columns + more);
    for first in (0..n).step_by(BLOCK) {
        for column in 0..columns {
            let mut part = matrix.col_mut(column);
            for row in first..n.min(first + BLOCK) {
                part[row] = rows[row * columns + column].into();
            }
        }
    }
    matrix
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_number_is_in_its_place(n in 0usize..40, columns in 1usize..9, more in 0usize..3) {
            let rows: Vec<f32> = (0..n * columns).map(|i| i as f32 + 1.0).collect();
            let found = from_rows(&rows, columns, more);
            let number = |i: usize, j: usize| if j < columns { f64::from(rows[i * columns + j]) } else { 0.0 };
            prop_assert_eq!(found, Mat::from_fn(n, columns + more, number));
        }
    }
}
