//! The attention of one layer on arrays, as the refits take it apart.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, s};

use crate::error::Result;
use crate::model::AttentionSpec;
use crate::runtime::{CausalSoftmax, Pass, visible};
use crate::text::RuntimeError;

/// How positions turn the heads of a layer, and which tokens look at which: the same in all windows.
#[derive(Debug)]
pub(super) struct Positions {
    /// What products of queries and keys are multiplied by.
    pub(super) scale: f32,
    /// Dimensions that turn together.
    pairs: Vec<(usize, usize)>,
    /// Of each token and frequency, one token after the other.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The tokens that each token may look at.
    visible: Vec<Range<usize>>,
}

impl Positions {
    /// Of layer `i`, whose attention is `spec`.
    pub(super) fn new(pass: &Pass, spec: &AttentionSpec, i: usize) -> Result<Self, RuntimeError> {
        let [cos, sin] = pass.rope(i).tables()?;
        let pairs = pass.rope(i).rotation().pairs().collect();
        // √h, which it mostly is the inverse of, is what is rounded first.
        let scale = (spec.scale.recip() as f32).recip();
        let visible = visible(pass.positions(), pass.positions(), spec.mask.reach());
        Ok(Self { scale, pairs, cos, sin, visible })
    }

    /// Turns the rows (T, h) of a window's tokens.
    pub(super) fn turned(&self, rows: Array2<f32>) -> Array2<f32> {
        self.turn(rows, 1.0)
    }

    /// Turns them back.
    pub(super) fn turned_back(&self, rows: Array2<f32>) -> Array2<f32> {
        self.turn(rows, -1.0)
    }

    fn turn(&self, mut rows: Array2<f32>, sign: f32) -> Array2<f32> {
        let f = self.pairs.len();
        for (t, mut row) in rows.rows_mut().into_iter().enumerate() {
            let angles = self.cos[t * f..].iter().zip(&self.sin[t * f..]);
            for (&(a, b), (cos, sin)) in self.pairs.iter().zip(angles) {
                let (re, im, sin) = (row[a], row[b], sign * sin);
                row[a] = re * cos - im * sin;
                row[b] = im * cos + re * sin;
            }
        }
        rows
    }

    /// The mean over the two dimensions of every pair: what commutes with turning.
    pub(super) fn paired(&self, mut diagonal: Vec<f64>) -> Vec<f64> {
        for &(a, b) in &self.pairs {
            let mean = 0.5 * (diagonal[a] + diagonal[b]);
            (diagonal[a], diagonal[b]) = (mean, mean);
        }
        diagonal
    }

    /// Probabilities (T, T) of scores, in place.
    pub(super) fn softmax(&self, scores: &mut Array2<f32>) {
        for (mut row, visible) in scores.rows_mut().into_iter().zip(&self.visible) {
            CausalSoftmax::row(row.as_slice_mut().expect("a product is contiguous"), visible.clone());
        }
    }
}

/// `x wᵀ` for head `i` of h rows: (T, m) and (n·h, m) → (T, h).
pub(super) fn read(x: &Array2<f32>, weight: &Array2<f32>, i: usize, h: usize) -> Array2<f32> {
    product(x.view(), weight.slice(s![i * h..(i + 1) * h, ..]).t())
}

/// A product whose rows are contiguous.
pub(super) fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    ndarray::linalg::general_mat_mul(1.0, &a, &b, 0.0, &mut c);
    c
}

/// Takes its mean under the weights, which sum to 1, from every row, and multiplies by the weights.
pub(super) fn centre(values: &mut Array2<f32>, weights: &Array2<f32>) {
    for (mut row, weights) in values.rows_mut().into_iter().zip(weights.rows()) {
        let mean: f32 = row.iter().zip(weights).map(|(v, w)| v * w).sum();
        row.iter_mut().zip(weights).for_each(|(v, w)| *v = (*v - mean) * w);
    }
}
