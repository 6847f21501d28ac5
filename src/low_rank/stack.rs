use faer::{Mat, MatRef};

use super::no_moment;
use super::phases::root_mean_square;
use super::spectra::{eigen, nearest_turn};
use crate::error::{Error, Result};
use crate::run::map_ordered;

/// Rows of heads of which any invertible map may be taken, because those who read them undo it: values, and keys
/// without rotation.
///
/// With `R_i` a root of what reads head i (`R_iᵀ R_i = Σ_q O_qᵀ O_q` for values), the best shared head of a group is the
/// best rank-b approximation of the stack of `R_i V_i C^½`: the top of the eigenvectors of its Gram matrix.
#[derive(Debug)]
pub(crate) struct Stack {
    /// Rows of a head, b.
    block: usize,
    /// (H·b, d+1).
    rows: Mat<f64>,
    /// The rows times the metric, (H·b, d+1).
    weighted: Mat<f64>,
    /// `R_i`, (b, b) each.
    roots: Vec<Mat<f64>>,
}

/// The shared head of a group.
#[derive(Debug)]
pub(crate) struct Fit {
    /// (b, d+1).
    pub(crate) rows: Mat<f64>,
    /// For each member i the map T_i (b, b) with `V_i ≈ T_i V_g`.
    pub(crate) maps: Vec<Mat<f64>>,
}

impl Stack {
    /// `readers` holds `R_iᵀ R_i` for each head; `unread` is what to say should they not be finite.
    pub(crate) fn new(
        rows: Mat<f64>,
        weighted: Mat<f64>,
        readers: Vec<Mat<f64>>,
        unread: impl Fn() -> Error + Sync + Send,
    ) -> Result<Self> {
        let block = readers.first().map_or(0, Mat::nrows);
        let root = |head: usize| {
            let (values, vectors) = eigen(readers[head].as_ref()).ok_or_else(&unread)?;
            Ok(Mat::from_fn(block, block, |i, j| values[i].max(0.0).sqrt() * vectors[(j, i)]))
        };
        let roots = map_ordered(readers.len(), root).into_iter().collect::<Result<_>>()?;
        Ok(Self { block, rows, weighted, roots })
    }

    /// The mean of some heads, times `length`, which all of them read as it is.
    pub(crate) fn mean(&self, heads: &[usize], length: f64) -> Fit {
        let mut rows = Mat::zeros(self.block, self.rows.ncols());
        heads.iter().for_each(|&head| rows += self.of(&self.rows, head));
        rows *= faer::Scale(length / heads.len() as f64);
        Fit { rows, maps: vec![Mat::identity(self.block, self.block); heads.len()] }
    }

    fn of<'a>(&self, rows: &'a Mat<f64>, head: usize) -> MatRef<'a, f64> {
        rows.subrows(head * self.block, self.block)
    }

    /// The rows of some heads, one after the other.
    fn gathered(&self, rows: &Mat<f64>, heads: &[usize]) -> Mat<f64> {
        let b = self.block;
        Mat::from_fn(heads.len() * b, rows.ncols(), |i, j| rows[(heads[i / b] * b + i % b, j)])
    }

    /// `G`, blocks `R_i V_i C V_jᵀ R_jᵀ` of some heads, (|heads|·b)².
    pub(crate) fn gram(&self, heads: &[usize]) -> Mat<f64> {
        let b = self.block;
        let all = heads.len() == self.roots.len();
        let mut gram = if all {
            &self.weighted * self.rows.transpose()
        } else {
            self.gathered(&self.weighted, heads) * self.gathered(&self.rows, heads).transpose()
        };
        for (i, &head) in heads.iter().enumerate() {
            let rows = &self.roots[head] * gram.subrows(i * b, b);
            gram.subrows_mut(i * b, b).copy_from(rows);
        }
        for (i, &head) in heads.iter().enumerate() {
            let columns = gram.subcols(i * b, b) * self.roots[head].transpose();
            gram.subcols_mut(i * b, b).copy_from(columns);
        }
        gram
    }

    /// The best shared head of a group, its rows with the root mean square of the members'.
    pub(crate) fn fit(&self, heads: &[usize]) -> Result<Fit> {
        let b = self.block;
        let (values, vectors) = eigen(self.gram(heads).as_ref()).ok_or_else(no_moment)?;
        let n = values.len();
        let stacked: Mat<f64> =
            heads.iter().enumerate().fold(Mat::zeros(b, self.rows.ncols()), |sum, (i, &head)| {
                // U_hᵀ R V, member by member; the largest eigenvalues come last.
                let top = vectors.subrows(i * b, b).subcols(n - b, b);
                sum + top.transpose() * (&self.roots[head] * self.of(&self.rows, head))
            });
        // Directions that hold nothing, to rounding, are left empty.
        let floor = values[n - 1].max(0.0) * n as f64 * f64::EPSILON;
        let inverse_root =
            |i: usize| if values[n - b + i] > floor { values[n - b + i].sqrt().recip() } else { 0.0 };
        let mut rows = Mat::from_fn(b, stacked.ncols(), |i, j| inverse_root(i) * stacked[(i, j)]);
        let mut maps: Vec<Mat<f64>> =
            heads.iter().map(|&head| self.of(&self.weighted, head) * rows.transpose()).collect();
        let wanted =
            heads.iter().map(|&head| root_mean_square(self.of(&self.rows, head)).powi(2)).sum::<f64>();
        let scale = (wanted / heads.len() as f64).sqrt() / root_mean_square(rows.as_ref());
        if scale.is_finite() && scale > 0.0 {
            rows *= faer::Scale(scale);
            maps.iter_mut().for_each(|map| *map *= faer::Scale(scale.recip()));
        }
        Ok(Fit { rows, maps })
    }

    /// The members turned by orthogonal maps alone until they agree best, then their mean (generalised Procrustes).
    pub(crate) fn align(&self, heads: &[usize], rounds: usize) -> Result<Fit> {
        let b = self.block;
        let mut maps: Vec<Mat<f64>> = heads.iter().map(|_| Mat::identity(b, b)).collect();
        // Σ_i T_iᵀ V_i, kept up while one member after the other turns.
        let turned = |head: usize, map: &Mat<f64>| map.transpose() * self.of(&self.rows, head);
        let mut sum = Mat::zeros(b, self.rows.ncols());
        for (&head, map) in heads.iter().zip(&maps) {
            sum += turned(head, map);
        }
        for _ in 0..rounds {
            for (&head, map) in heads.iter().zip(&mut maps) {
                sum -= turned(head, map);
                let product = self.of(&self.weighted, head) * sum.transpose();
                *map = nearest_turn(product.as_ref()).ok_or_else(no_moment)?;
                sum += turned(head, map);
            }
        }
        Ok(Fit { rows: sum * faer::Scale((heads.len() as f64).recip()), maps })
    }
}
