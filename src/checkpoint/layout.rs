//! Heads in stored tensors, whatever their layout: rows or columns, alone or among others.

use ndarray::{Array2, Array3};

use crate::error::{Error, Result};
use crate::model::{Axis, Stored};

/// The numbers of a matrix (extent, other) or (other, extent) as heads, (n, h, other).
///
/// # Errors
/// None for a matrix of the shape that `stored` says.
pub(super) fn heads_of(numbers: Vec<f32>, stored: &Stored, n: usize, h: usize) -> Result<Array3<f32>> {
    let other = numbers.len() / stored.extent;
    // Alone in their tensor, they are there already.
    if (stored.first, stored.stride, stored.extent) == (0, h, n * h) {
        let array = match stored.axis {
            Axis::Rows => Array3::from_shape_vec((n, h, other), numbers),
            Axis::Columns => {
                Array3::from_shape_vec((other, n, h), numbers).map(|array| array.permuted_axes([1, 2, 0]))
            }
        };
        return array.map_err(Error::plugin);
    }
    let place = |head: usize, row: usize| stored.first + head * stored.stride + row;
    Ok(match stored.axis {
        Axis::Rows => Array3::from_shape_fn((n, h, other), |(i, r, c)| numbers[place(i, r) * other + c]),
        Axis::Columns => {
            Array3::from_shape_fn((n, h, other), |(i, r, c)| numbers[c * stored.extent + place(i, r)])
        }
    })
}

/// The numbers of a bias (extent) as heads, (n, h).
pub(super) fn bias_of(numbers: &[f32], stored: &Stored, n: usize, h: usize) -> Array2<f32> {
    Array2::from_shape_fn((n, h), |(i, r)| numbers[stored.first + i * stored.stride + r])
}

/// Heads (·, h, other), one after the other, in the order in which columns are stored: for each of `other` rows the h
/// numbers of every head.
pub(crate) fn columns_of<'a>(heads: &'a [ndarray::ArrayView2<'a, f32>]) -> impl Iterator<Item = f32> + 'a {
    let other = heads.first().map_or(0, |head| head.ncols());
    (0..other).flat_map(move |c| heads.iter().flat_map(move |head| head.column(c).into_iter().copied()))
}
