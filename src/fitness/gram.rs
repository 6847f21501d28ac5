//! Squared distances between the heads of a layer, from one pass over its weights.

use ndarray::{Array2, s};

use super::product::{TILE, add_gram, padded};
use crate::error::{Error, Result};
use crate::heads::HeadRows;
use crate::run::map_ordered;

/// Tiles summed by one task. Fixed, so that the order of the sum does not depend on the number of threads.
const TILES_PER_TASK: usize = 32;
/// Pairs nearer than this, as a share of their two energies, are recomputed from the rows in f64: the
/// difference of two nearly equal f32 sums has no digits left.
const NEAR: f64 = 0.25;

/// `D_ij = ‖x_i − x_j‖²` (H, H) between the rows, and the energy `Σ_i ‖x_i‖²`.
///
/// One Gram matrix, f32 products summed in f64, near pairs again from the rows in f64: right to 1e-6
/// relative however close two heads are (docs/method.md, "Accuracy").
///
/// # Errors
/// [`Error::OutOfRange`] when a row holds NaN or an infinity, or values whose squares overflow f32; what
/// [`HeadRows::check_finite`] says of the first two.
pub fn squared_distances(rows: &dyn HeadRows) -> Result<(Array2<f64>, f64)> {
    let n = rows.n_heads();
    let gram = gram(rows);
    if !gram.iter().all(|v| v.is_finite()) {
        rows.check_finite()?;
        return Err(Error::OutOfRange { what: "keys and values of a layer".to_string() });
    }
    let mut distances = Array2::zeros((n, n));
    let mut near = Vec::new();
    for i in 0..n {
        for j in i + 1..n {
            let energies = gram[[i, i]] + gram[[j, j]];
            let distance = energies - 2.0 * gram[[j, i]];
            if distance < NEAR * energies {
                near.push((i, j));
            }
            distances[[i, j]] = distance;
        }
    }
    let exact = map_ordered(near.len(), |t| direct_distance(rows, near[t]));
    for (&(i, j), distance) in near.iter().zip(exact) {
        distances[[i, j]] = distance;
    }
    for i in 0..n {
        for j in 0..i {
            distances[[i, j]] = distances[[j, i]];
        }
    }
    Ok((distances, gram.diag().sum()))
}

/// `x xᵀ` of the rows, (H, H), lower triangle.
fn gram(rows: &dyn HeadRows) -> Array2<f64> {
    let (n, len) = (rows.n_heads(), rows.row_len());
    let height = padded(n);
    let columns = TILE * TILES_PER_TASK;
    let partial = map_ordered(len.div_ceil(columns), |task| {
        let mut tile = vec![0.0; height * TILE];
        let mut sum = Array2::zeros((height, height));
        let end = len.min((task + 1) * columns);
        for start in (task * columns..end).step_by(TILE) {
            let width = TILE.min(end - start);
            for (head, row) in tile.chunks_exact_mut(TILE).take(n).enumerate() {
                rows.read(head, start, &mut row[..width]);
                row[width..].fill(0.0);
            }
            add_gram(&tile, sum.as_slice_mut().expect("contiguous as made"));
        }
        sum
    });
    let sum = partial.into_iter().fold(Array2::zeros((height, height)), |sum, part| sum + part);
    sum.slice_move(s![..n, ..n])
}

/// `‖x_i − x_j‖²` from the rows, in f64.
fn direct_distance(rows: &dyn HeadRows, (i, j): (usize, usize)) -> f64 {
    const LANES: usize = 8;
    let len = rows.row_len();
    let (mut a, mut b) = ([0.0; TILE], [0.0; TILE]);
    let mut sums = [0.0; LANES];
    for start in (0..len).step_by(TILE) {
        let width = TILE.min(len - start);
        rows.read(i, start, &mut a[..width]);
        rows.read(j, start, &mut b[..width]);
        for (a, b) in a[..width].chunks(LANES).zip(b[..width].chunks(LANES)) {
            for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
                let difference = f64::from(a) - f64::from(b);
                *sum += difference * difference;
            }
        }
    }
    sums.iter().sum()
}
