//! Outputs refitted: the output projection, and with it the shared values, by least squares of what attention adds.

use faer::{Mat, Scale};
use ndarray::{Array2, s};
use rayon::prelude::*;

use super::attention::{Positions, product, read};
use super::descent::{Kronecker, descend, solve_positive};
use super::scores::Source;
use super::state::{State, basis, block, mixed};
use super::{RIDGE, Text};
use crate::error::{Error, Result};

const ROUNDS: usize = 4;
const ITERATIONS: usize = 15;
/// Windows whose statistics are held at once.
const BATCH: usize = 4;

/// All that least squares needs to know of a layer's merged attention, `z` being what every query head reads of the basis
/// of its group's values.
#[derive(Debug)]
pub(super) struct Outputs {
    /// For each group rows that its values are mixed from, (b, d+1).
    bases: Vec<Array2<f32>>,
    /// `V_g = M_g · basis`, (h, b).
    mixes: Vec<Mat<f64>>,
    /// Groups whose values may change.
    free: Vec<usize>,
    /// Where each query head's part of z lies.
    at: Vec<usize>,
    /// Σ z zᵀ.
    gram: Mat<f64>,
    /// Σ z yᵀ, y what the source adds.
    crossed: Mat<f64>,
    /// Σ ‖y‖².
    energy: f64,
}

impl Outputs {
    /// Reads the windows. Values stay as they are unless `values`.
    pub(super) fn new(
        state: &State,
        source: &Source,
        texts: &[Text],
        positions: &Positions,
        values: bool,
    ) -> Result<Self> {
        let h = state.h;
        let free: Vec<usize> = (0..state.groups.len()).filter(|&g| values && state.shared(g)).collect();
        let bases = (0..state.groups.len()).map(|g| {
            if !free.contains(&g) {
                return Ok(block(&state.value, g, h).to_owned());
            }
            let members: Vec<_> = state.groups[g].iter().map(|&i| block(&source.value, i, h)).collect();
            basis(block(&state.value, g, h), &members, 4 * h)
        });
        let bases: Vec<Array2<f32>> = bases.collect::<Result<_>>()?;
        let mixes = bases.iter().enumerate().map(|(g, basis)| match free.contains(&g) {
            true => mixed(block(&state.value, g, h), basis.view()),
            false => Mat::identity(h, h),
        });
        let mixes = mixes.collect();
        let mut width = 0;
        let at = state.group_of.iter().map(|&g| {
            width += bases[g].nrows();
            width - bases[g].nrows()
        });
        let at = at.collect();
        // The output bias reads a constant.
        width += usize::from(state.output_bias);
        let outputs = state.output.nrows();
        let mut found = Self {
            bases,
            mixes,
            free,
            at,
            gram: Mat::zeros(width, width),
            crossed: Mat::zeros(width, outputs),
            energy: 0.0,
        };
        for batch in texts.chunks(BATCH) {
            let each = |text: &Text| {
                let z = found.contexts(state, text, positions, width);
                (
                    product(z.t(), z.view()),
                    product(z.t(), text.target.view()),
                    text.target.mapv(|v| f64::from(v).powi(2)).sum(),
                )
            };
            let all: Vec<_> = batch.par_iter().map(each).collect();
            for (gram, crossed, energy) in all {
                for j in 0..width {
                    (0..width).for_each(|i| found.gram[(i, j)] += f64::from(gram[[i, j]]));
                }
                for j in 0..outputs {
                    (0..width).for_each(|i| found.crossed[(i, j)] += f64::from(crossed[[i, j]]));
                }
                found.energy += energy;
            }
        }
        if !(found.gram.is_all_finite() && found.crossed.is_all_finite() && found.energy.is_finite()) {
            return Err(Error::NotFinite {
                what: "what the calibration text makes of the attention".to_string(),
            });
        }
        Ok(found)
    }

    /// z of every token of a window, (T, width).
    fn contexts(&self, state: &State, text: &Text, positions: &Positions, width: usize) -> Array2<f32> {
        let h = state.h;
        let mut z = Array2::ones((text.merged.nrows(), width));
        let groups = self.bases.iter().enumerate().map(|(g, basis)| {
            (positions.turned(read(&text.merged, &state.key, g, h)), product(text.merged.view(), basis.t()))
        });
        let groups: Vec<_> = groups.collect();
        for (q, &g) in state.group_of.iter().enumerate() {
            let (key, value) = &groups[g];
            let query = positions.turned(read(&text.merged, &state.query, q, h)) * positions.scale;
            let mut weights = product(query.view(), key.t());
            positions.softmax(&mut weights);
            let part = s![.., self.at[q]..self.at[q] + value.ncols()];
            z.slice_mut(part).assign(&product(weights.view(), value.view()));
        }
        z
    }

    /// The error of the layer's output as a share of the target's energy, `Σ ‖y − O Tᵀ z‖² / Σ ‖y‖²`; infinite where it is
    /// not a number.
    pub(super) fn error(&self, state: &State) -> f64 {
        let read = self.read(state);
        let crossed = read.transpose() * &self.crossed;
        let gram = read.transpose() * (&self.gram * &read);
        let output = &state.output;
        let both = output * gram;
        let mut error = self.energy;
        for j in 0..output.ncols() {
            for i in 0..output.nrows() {
                error += output[(i, j)] * (both[(i, j)] - 2.0 * crossed[(j, i)]);
            }
        }
        match error {
            error if error.is_nan() => f64::INFINITY,
            error if self.energy > 0.0 => error.max(0.0) / self.energy,
            _ => 0.0,
        }
    }

    /// T, from z to what the output reads: each query head its mix, (width, n_q·h + bias).
    fn read(&self, state: &State) -> Mat<f64> {
        let h = state.h;
        let mut read = Mat::zeros(self.gram.nrows(), state.output.ncols());
        for (q, &g) in state.group_of.iter().enumerate() {
            let mix = &self.mixes[g];
            read.submatrix_mut(self.at[q], q * h, mix.ncols(), h).copy_from(mix.transpose());
        }
        if state.output_bias {
            read[(self.gram.nrows() - 1, state.output.ncols() - 1)] = 1.0;
        }
        read
    }

    /// Output and free values in turn; stops when that no longer helps. The error cannot rise.
    pub(super) fn refit(&mut self, state: &mut State) {
        let rounds = if self.free.is_empty() { 1 } else { ROUNDS };
        for _ in 0..rounds {
            let before = self.error(state);
            let kept = (state.output.clone(), self.mixes.iter().map(Mat::to_owned).collect::<Vec<_>>());
            let taken = self.output_step(state).and_then(|()| self.value_step(state));
            if taken.is_none() || self.error(state) > before {
                (state.output, self.mixes) = kept;
                break;
            }
        }
        let h = state.h;
        for &g in &self.free {
            let mix = Array2::from_shape_fn((h, self.mixes[g].ncols()), |at| self.mixes[g][at]);
            let rows = mix.dot(&self.bases[g].mapv(f64::from)).mapv(|v| v as f32);
            state.value.slice_mut(s![g * h..(g + 1) * h, ..]).assign(&rows);
        }
    }

    /// The output projection by ridge regression towards what it is. `None` where that has no solution in f64.
    fn output_step(&self, state: &mut State) -> Option<()> {
        let read = self.read(state);
        let mut gram = read.transpose() * (&self.gram * &read);
        let wanted = self.crossed.transpose() * &read - &state.output * &gram;
        let n = gram.nrows();
        let mean = (0..n).map(|i| gram[(i, i)]).sum::<f64>() / n as f64;
        let ridge = if mean > 0.0 { RIDGE * mean } else { 1.0 };
        (0..n).for_each(|i| gram[(i, i)] += ridge);
        state.output += solve_positive(gram, wanted.transpose().to_owned())?.transpose();
        Some(())
    }

    /// The free mixes, all at once. `None` as above.
    fn value_step(&mut self, state: &State) -> Option<()> {
        if self.free.is_empty() {
            return Some(());
        }
        let h = state.h;
        let heads: Vec<Vec<usize>> = self
            .free
            .iter()
            .map(|&g| (0..state.n_queries()).filter(|&q| state.group_of[q] == g).collect())
            .collect();
        let own = state.output.subcols(0, state.n_queries() * h);
        let readers = own.transpose() * own;
        let widths: Vec<usize> = self.free.iter().map(|&g| self.bases[g].nrows()).collect();
        let mut metric = Vec::with_capacity(heads.len());
        for (heads, &b) in heads.iter().zip(&widths) {
            let (mut left, mut right) = (Mat::zeros(h, h), Mat::zeros(b, b));
            for &q in heads {
                left += readers.submatrix(q * h, q * h, h, h);
                let at = self.at[q];
                right += self.gram.submatrix(at, at, b, b) * Scale((heads.len() as f64).recip());
            }
            metric.push(Kronecker::new(left, right)?);
        }
        // Σ_{q∈g} O_qᵀ (Xᵀ − O Tᵀ Γ) over the columns of q.
        let read = self.read(state);
        let missing = self.crossed.transpose() - &state.output * (read.transpose() * &self.gram);
        let gradient = heads.iter().zip(&widths).map(|(heads, &b)| {
            heads.iter().fold(Mat::zeros(h, b), |sum, &q| {
                sum + state.output.subcols(q * h, h).transpose() * missing.subcols(self.at[q], b)
            })
        });
        let gradient = gradient.collect();
        let steps = descend(gradient, &metric, RIDGE, ITERATIONS, true, |guess| {
            let mut moved = Mat::zeros(state.n_queries() * h, self.gram.ncols());
            for ((heads, &b), guess) in heads.iter().zip(&widths).zip(guess) {
                for &q in heads {
                    moved.subrows_mut(q * h, h).copy_from(guess * self.gram.subrows(self.at[q], b));
                }
            }
            let back = heads.iter().zip(&widths).map(|(heads, &b)| {
                heads.iter().fold(Mat::zeros(h, b), |sum, &q| {
                    sum + readers.subrows(q * h, h) * moved.subcols(self.at[q], b)
                })
            });
            back.collect()
        })?;
        for (&g, step) in self.free.iter().zip(steps) {
            self.mixes[g] += step;
        }
        Some(())
    }
}
