use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use faer::traits::ComplexField;
use faer::{Mat, MatRef, c64};
use ndarray::{Array2, ArrayView2};

use super::{FitnessFn, FitnessKind, SeparableFitness};
use crate::error::{Error, Result};
use crate::heads::{HeadSource, Heads, Needs};
use crate::low_rank::{self, Metric, eigenvalues, no_moment};
use crate::partition::Partition;
use crate::run::map_ordered;
use crate::spec::Spec;

/// The error of [`LowRankPooler`](crate::pooler::LowRankPooler): what the best shared heads of rank h leave of a group's keys and values, as attention
/// sees them under the layer's inputs.
///
/// Values: `Σ_{i∈g} ‖(O_i V_i − O_i' V_g) C^½‖²`, the eigenvalues beyond the first h of the group's Gram matrix. Keys:
/// `½ Σ_{i∈g} w_i ‖(κ_i − c_i κ_g) C^½‖²` for each frequency, half the eigenvalues beyond the first of a Hermitian
/// matrix; unrotated dimensions as values. Each is divided by what the layer has of it, so the error is a share of the
/// layer's energy, from 0 to 2 (docs/method.md, "Low-rank sharing"). C is the moment that the layer carries, or I; its
/// covariance `C − μμᵀ` where a constant is no loss: for unrotated keys, and for values where there is an output bias.
///
/// Groups are remembered. A search starts from the errors of pairs: `error(g) ≈ c_|g| Σ_{i<j∈g} D_ij`, where c_m is read off
/// a few groups of m heads. For heads of flat spectra it would be 1/m; real ones have more to lose the more share, since
/// what a head can best do without is small.
#[derive(Debug)]
pub struct LowRankError {
    values: Gram,
    /// `√(w_i w_j) κ_i C κ_j^H` for each frequency, (H, H).
    frequencies: Vec<Mat<c64>>,
    unrotated: Option<Gram>,
    energies: Residuals,
    n_heads: usize,
    proxy: Array2<f64>,
    /// `m c_m` of some sizes m, ascending from 2.
    growth: Vec<(usize, f64)>,
    known: Mutex<HashMap<Box<[usize]>, Residuals>>,
}

/// Sizes of the groups that show how errors grow with the size, and how many groups of each.
const SIZES: [usize; 6] = [3, 4, 8, 16, 32, 64];
const SAMPLES: usize = 3;

/// Rows of a Gram matrix whose eigenvalues take about a millisecond.
const CHEAP_ROWS: u64 = 192;

/// What is lost of the values and of the keys, or what there is of them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Residuals {
    /// In squared outputs, `Σ E‖O V x‖²` over query heads.
    pub values: f64,
    /// In squared scores: half the rotated part plus the unrotated one.
    pub keys: f64,
}

impl LowRankError {
    /// The error of a layer with its queries and outputs, under the pooler's own ridge.
    ///
    /// # Errors
    /// [`Error::NoQueries`] for a layer without queries and outputs, [`Error::Moment`] for a moment that is none.
    pub fn new(heads: &Heads) -> Result<Self> {
        Self::with_ridge(heads, low_rank::RIDGE)
    }

    /// The error of a pooler with another [`ridge`](crate::pooler::LowRankPooler::ridge).
    ///
    /// # Errors
    /// As [`LowRankError::new`].
    pub fn with_ridge(heads: &Heads, ridge: f64) -> Result<Self> {
        let n_heads = heads.n_heads();
        let all: Vec<usize> = (0..n_heads).collect();
        let metric = Metric::new(heads, ridge)?;
        let h = heads.value().head_dim();
        let values = Gram { block: h, gram: low_rank::values(heads, &metric)?.gram(&all) };
        let keys = low_rank::keys(heads, &metric)?;
        drop(metric);
        let frequencies = keys
            .rotated
            .iter()
            .flat_map(|k| map_ordered(k.frequencies(), |f| k.hermitian(f, &all)))
            .collect();
        let block = h - heads.rotation().dims();
        let unrotated = keys.unrotated.map(|k| Gram { block, gram: k.gram(&all) });
        let mut error = Self {
            values,
            frequencies,
            unrotated,
            energies: Residuals::default(),
            n_heads,
            proxy: Array2::zeros((n_heads, n_heads)),
            growth: vec![(2, 1.0)],
            known: Mutex::default(),
        };
        error.energies = Residuals {
            values: error.values.trace(&all),
            keys: error.unrotated.as_ref().map_or(0.0, |k| k.trace(&all))
                + 0.5 * error.frequencies.iter().map(|a| trace(a, &all)).sum::<f64>(),
        };
        if !(error.energies.values.is_finite() && error.energies.keys.is_finite()) {
            return Err(no_moment());
        }
        let pairs: Vec<[usize; 2]> = (0..n_heads).flat_map(|j| (0..j).map(move |i| [i, j])).collect();
        let errors = map_ordered(pairs.len(), |p| error.group_error(&pairs[p]));
        for ([i, j], of_pair) in pairs.into_iter().zip(errors) {
            // A pair's error is D / 2.
            error.proxy[[i, j]] = 2.0 * of_pair?;
            error.proxy[[j, i]] = error.proxy[[i, j]];
        }
        error.growth = error.measured_growth()?;
        Ok(error)
    }

    /// How errors of groups grow beyond those of their pairs, from groups of neighbours of up to half the heads.
    fn measured_growth(&self) -> Result<Vec<(usize, f64)>> {
        let sizes: Vec<usize> = SIZES.into_iter().filter(|size| 2 * size <= self.n_heads).collect();
        let group = |size: usize, sample: usize| {
            let first = sample * self.n_heads / SAMPLES;
            let mut members: Vec<usize> = (first..first + size).map(|i| i % self.n_heads).collect();
            members.sort_unstable();
            members
        };
        let groups = sizes.iter().flat_map(|&size| (0..SAMPLES).map(move |sample| group(size, sample)));
        // The largest take the longest, so they begin.
        let groups: Vec<Vec<usize>> = groups.rev().collect();
        let mut errors = map_ordered(groups.len(), |g| self.group_error(&groups[g]));
        errors.reverse();
        let pairs = |members: &Vec<usize>| -> f64 {
            let of_pairs = members.iter().flat_map(|&i| members.iter().map(move |&j| self.proxy[[i, j]]));
            of_pairs.sum::<f64>() / 2.0
        };
        let mut growth = vec![(2, 1.0)];
        let (mut errors, mut groups) = (errors.into_iter(), groups.iter().rev());
        for size in sizes {
            let error = errors.by_ref().take(SAMPLES).sum::<Result<f64>>()?;
            let distance: f64 = groups.by_ref().take(SAMPLES).map(pairs).sum();
            if distance > 0.0 {
                growth.push((size, size as f64 * error / distance));
            }
        }
        Ok(growth)
    }

    /// What the layer has of values and keys: the denominators of the shares.
    pub fn energies(&self) -> Residuals {
        self.energies
    }

    /// What a group loses of its values and of its keys; `members` ascending.
    ///
    /// # Errors
    /// [`Error::HeadOutOfRange`]; [`Error::Moment`] for a moment that is none.
    pub fn residuals(&self, members: &[usize]) -> Result<Residuals> {
        let n_heads = self.n_heads;
        if let Some(&head) = members.iter().find(|&&m| m >= n_heads) {
            return Err(Error::HeadOutOfRange { head, n_heads });
        }
        if members.len() < 2 {
            return Ok(Residuals::default());
        }
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&found) = known().get(members) {
            return Ok(found);
        }
        let mut keys = match &self.unrotated {
            Some(gram) => gram.residual(members)?,
            None => 0.0,
        };
        for hermitian in &self.frequencies {
            let part = Mat::from_fn(members.len(), members.len(), |i, j| hermitian[(members[i], members[j])]);
            keys += 0.5 * beyond(part.as_ref(), 1)?;
        }
        let found = Residuals { values: self.values.residual(members)?, keys };
        known().insert(members.into(), found);
        Ok(found)
    }
}

/// The Gram matrix of the heads' rows as their readers see them, (H·b)².
#[derive(Debug)]
struct Gram {
    block: usize,
    gram: Mat<f64>,
}

impl Gram {
    fn at(&self, members: &[usize], i: usize) -> usize {
        members[i / self.block] * self.block + i % self.block
    }

    fn trace(&self, members: &[usize]) -> f64 {
        (0..members.len() * self.block).map(|i| self.at(members, i)).map(|i| self.gram[(i, i)]).sum()
    }

    /// The eigenvalues of a group beyond the first b.
    fn residual(&self, members: &[usize]) -> Result<f64> {
        let n = members.len() * self.block;
        let part = Mat::from_fn(n, n, |i, j| self.gram[(self.at(members, i), self.at(members, j))]);
        beyond(part.as_ref(), self.block)
    }
}

fn trace(hermitian: &Mat<c64>, members: &[usize]) -> f64 {
    members.iter().map(|&i| hermitian[(i, i)].re).sum()
}

/// The sum of all eigenvalues but the `kept` largest; they are not negative but for rounding.
fn beyond<T: ComplexField<Real = f64>>(matrix: MatRef<'_, T>, kept: usize) -> Result<f64> {
    let ascending = eigenvalues(matrix).ok_or_else(no_moment)?;
    Ok(ascending[..ascending.len() - kept].iter().map(|v| v.max(0.0)).sum())
}

impl FitnessFn for LowRankError {
    fn n_heads(&self) -> usize {
        self.n_heads
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        if partition.n_heads() != self.n_heads {
            return Err(Error::PartitionSize { expected: self.n_heads, found: partition.n_heads() });
        }
        partition.groups().iter().map(|members| self.group_error(members)).sum()
    }

    /// 2: all of the values and all of the keys; less 1 for each that the layer does not have.
    fn energy(&self) -> Option<f64> {
        Some([self.energies.values, self.energies.keys].iter().filter(|&&energy| energy > 0.0).count() as f64)
    }

    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for LowRankError {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        let Residuals { values, keys } = self.residuals(members)?;
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        Ok(share(values, self.energies.values) + share(keys, self.energies.keys))
    }

    fn pairwise_proxy(&self) -> Option<ArrayView2<'_, f64>> {
        Some(self.proxy.view())
    }

    /// Between the sizes that were measured, and beyond the last two, linear in the logarithm of the size.
    fn proxy_scale(&self, size: usize) -> f64 {
        let last = self.growth.len() - 1;
        let upper = self.growth.iter().position(|&(m, _)| m >= size).unwrap_or(last).clamp(1.min(last), last);
        let ((a, at_a), (b, at_b)) = (self.growth[upper.saturating_sub(1)], self.growth[upper]);
        let log = |m: usize| (m as f64).ln();
        let part = if a < b && size > 2 { (log(size) - log(a)) / (log(b) - log(a)) } else { 0.0 };
        (at_a + part * (at_b - at_a)).max(f64::MIN_POSITIVE) / size as f64
    }

    /// Eigenvalues take the cube of the size of a group's Gram matrix.
    fn group_cost(&self, size: usize) -> u64 {
        let rows = (size * self.values.block) as u64;
        (rows / CHEAP_ROWS).pow(3).max(1)
    }
}

/// [`LowRankError`] of every layer, under the moments that its heads carry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRankSharing {
    /// As [`LowRankPooler::ridge`](crate::pooler::LowRankPooler::ridge).
    pub ridge: f64,
}

impl Default for LowRankSharing {
    fn default() -> Self {
        Self { ridge: low_rank::RIDGE }
    }
}

impl LowRankSharing {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["ridge"])?;
        Ok(Self { ridge: spec.number("ridge")?.unwrap_or(low_rank::RIDGE) })
    }
}

impl FitnessKind for LowRankSharing {
    fn spec(&self) -> Spec {
        Spec::new("low-rank").with("ridge", self.ridge)
    }

    fn of(&self, source: &dyn HeadSource, layer: usize) -> Result<Box<dyn FitnessFn>> {
        let error = LowRankError::with_ridge(&source.heads(layer)?, self.ridge);
        Ok(Box::new(error.map_err(|e| e.of_layer(layer))?))
    }

    fn needs(&self) -> Needs {
        Needs::QUERIES_AND_MOMENT
    }
}
