use faer::Mat;
use ndarray::{Array2, Array3, ArrayView2, s};

use crate::error::{Error, Result};
use crate::heads::{Heads, Pooled, Projection};
use crate::low_rank::eigen;
use crate::partition::Partition;

/// One layer while it is refitted: rows over d+1 inputs, of which the last is the constant that biases multiply.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// Rows of a head, h.
    pub(super) h: usize,
    /// Query heads of a KV head, r.
    pub(super) r: usize,
    /// Of each group its members, ascending.
    pub(super) groups: Vec<Vec<usize>>,
    /// Of each query head its group.
    pub(super) group_of: Vec<usize>,
    /// (n_q·h, d+1).
    pub(super) query: Array2<f32>,
    /// (k·h, d+1).
    pub(super) key: Array2<f32>,
    /// (k·h, d+1).
    pub(super) value: Array2<f32>,
    /// (D, n_q·h), and the bias as one more column where there is one.
    pub(super) output: Mat<f64>,
    pub(super) output_bias: bool,
}

impl State {
    pub(super) fn new(heads: &Heads, partition: &Partition, pooled: &Pooled) -> Result<Self> {
        let (source_query, source_output) = heads.query().zip(heads.output()).ok_or(Error::NoQueries)?;
        let query = pooled.query.as_ref().unwrap_or(source_query);
        let output = pooled.output.as_ref().map_or(source_output, |o| o.view());
        let bias = pooled.output_bias.as_ref().map(|b| b.view()).or(heads.output_bias());
        let (n_q, d, h) = output.dim();
        let columns = n_q * h + usize::from(bias.is_some());
        let output = Mat::from_fn(d, columns, |i, j| {
            f64::from(match &bias {
                Some(bias) if j == n_q * h => bias[i],
                _ => output[[j / h, i, j % h]],
            })
        });
        let r = heads.queries_per_head();
        Ok(Self {
            h,
            r,
            groups: partition.groups(),
            group_of: (0..n_q).map(|q| partition.group_of(q / r)).collect(),
            query: rows(query),
            key: rows(&pooled.key),
            value: rows(&pooled.value),
            output,
            output_bias: bias.is_some(),
        })
    }

    /// Query heads, n_q.
    pub(super) fn n_queries(&self) -> usize {
        self.group_of.len()
    }

    /// Whether a group has more than one member.
    pub(super) fn shared(&self, group: usize) -> bool {
        self.groups[group].len() > 1
    }

    pub(super) fn finish(self, pooled: &Pooled, heads: &Heads) -> Result<Pooled> {
        let source_query = heads.query().ok_or(Error::NoQueries)?;
        let (n_q, d) = (self.n_queries(), self.output.nrows());
        let (h, output) = (self.h, &self.output);
        // With a bias where the source has one.
        let back = |rows: &Array2<f32>, like: &Projection| {
            Projection::from_augmented(rows, h, like.bias().is_some())
        };
        let columns = Array3::from_shape_fn((n_q, d, h), |(q, i, j)| output[(i, q * h + j)] as f32);
        let mut found = Pooled::new(back(&self.key, &pooled.key)?, back(&self.value, &pooled.value)?)
            .with_queries(back(&self.query, source_query)?, columns);
        found.output_bias = self.output_bias.then(|| (0..d).map(|i| output[(i, n_q * h)] as f32).collect());
        Ok(found)
    }
}

/// The rows of all heads with their bias as last column, (n·h, d+1).
pub(super) fn rows(projection: &Projection) -> Array2<f32> {
    projection.augmented(0..projection.head_dim(), |number| number)
}

/// Orthonormal rows (b, d+1) that span the shared rows of a group and, as far as `most` rows go, the directions in which
/// its members' own rows differ the most from them. Nothing is in them that no row has: without biases no constant.
pub(super) fn basis(
    shared: ArrayView2<'_, f32>,
    members: &[ArrayView2<'_, f32>],
    most: usize,
) -> Result<Array2<f32>> {
    let own = wide(shared);
    let first = spanning(&own, usize::MAX, own.squared_norm_l2())?;
    let stacked = members
        .iter()
        .fold(Mat::zeros(0, shared.ncols()), |all: Mat<f64>, rows| faer::concat![[all], [wide(*rows)]]);
    // What is left of the members' rows beside the shared ones.
    let left = &stacked - (&stacked * first.transpose()) * &first;
    let rest =
        spanning(&left, most.min(shared.ncols()).saturating_sub(first.nrows()), stacked.squared_norm_l2())?;
    let all = faer::concat![[first], [rest]];
    Ok(Array2::from_shape_fn((all.nrows(), all.ncols()), |at| all[at] as f32))
}

/// At most `most` orthonormal rows that span these, the strongest first, as far as they are more than rounding of f32.
fn spanning(rows: &Mat<f64>, most: usize, whole: f64) -> Result<Mat<f64>> {
    let failed = || Error::NotFinite { what: "a shared head".to_string() };
    let (values, vectors) = eigen((rows * rows.transpose()).as_ref()).ok_or_else(failed)?;
    let floor = 1e-12 * whole;
    let n = values.iter().filter(|&&v| v > floor).count().min(most);
    let spanned = vectors.transpose() * rows;
    let at = |i: usize| values.len() - 1 - i;
    Ok(Mat::from_fn(n, rows.ncols(), |i, j| spanned[(at(i), j)] / values[at(i)].sqrt()))
}

pub(super) fn wide(rows: ArrayView2<'_, f32>) -> Mat<f64> {
    Mat::from_fn(rows.nrows(), rows.ncols(), |i, j| f64::from(rows[[i, j]]))
}

/// Rows `i·h..(i+1)·h`.
pub(super) fn block(rows: &Array2<f32>, i: usize, h: usize) -> ArrayView2<'_, f32> {
    rows.slice(s![i * h..(i + 1) * h, ..])
}

/// `a bᵀ` of small arrays in f64.
pub(super) fn mixed(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Mat<f64> {
    wide(a) * wide(b).transpose()
}

/// `rows += step · basis`.
pub(super) fn add(rows: &mut Array2<f32>, i: usize, h: usize, step: &Mat<f64>, basis: ArrayView2<'_, f32>) {
    let step = Array2::from_shape_fn((step.nrows(), step.ncols()), |(i, j)| step[(i, j)]);
    let change = step.dot(&basis.mapv(f64::from));
    let mut rows = rows.slice_mut(s![i * h..(i + 1) * h, ..]);
    rows.zip_mut_with(&change, |row, change| *row = (f64::from(*row) + change) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 37 + j * 101 + seed * 13 + i * j * 7) % 97) as f32 / 48.0 - 1.0
        })
    }

    /// Orthonormal, holding the shared rows, no constant where no row has one; for heads wider than their inputs, too.
    #[test]
    fn a_basis_spans_what_it_should() {
        for (h, d) in [(4, 24), (16, 8), (5, 4)] {
            let constant = |mut rows: Array2<f32>| {
                rows.column_mut(d).fill(0.0);
                rows
            };
            let shared = constant(numbers(h, d + 1, 0));
            let members: Vec<_> = (1..4).map(|seed| constant(numbers(h, d + 1, seed))).collect();
            let members: Vec<_> = members.iter().map(|rows| rows.view()).collect();
            let basis = basis(shared.view(), &members, 2 * h).unwrap();
            assert!(basis.nrows() <= d.min(2 * h) && basis.column(d).iter().all(|&v| v == 0.0));
            let product = basis.dot(&basis.t());
            let off = |((i, j), v): ((usize, usize), &f32)| (v - f32::from(u8::from(i == j))).abs();
            assert!(product.indexed_iter().map(off).fold(0.0, f32::max) < 1e-5);
            let held = shared.dot(&basis.t()).dot(&basis);
            assert!((&held - &shared).iter().all(|v| v.abs() < 1e-5));
        }
    }

    /// Large enough for the linear algebra to share out its work.
    #[test]
    fn a_basis_is_the_same_on_any_number_of_threads() {
        let shared = numbers(64, 513, 0);
        let members: Vec<_> = (1..7).map(|seed| numbers(64, 513, seed)).collect();
        let members: Vec<_> = members.iter().map(|rows| rows.view()).collect();
        let [one, three] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| basis(shared.view(), &members, 256).unwrap())
        });
        assert!(one == three);
    }
}
