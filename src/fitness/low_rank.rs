use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use faer::{Mat, Side, c64};
use ndarray::{Array2, ArrayView2};

use super::{FitnessFn, SeparableFitness};
use crate::low_rank::{self, Metric, no_moment};
use crate::run::map_ordered;
use crate::{Error, LayerHeads, LowRankPooler, Partition, Result};

/// The error of [`LowRankPooler`]: what the best shared heads of rank h leave of a group's keys and values, as attention
/// sees them under the layer's inputs.
///
/// Values: `Σ_{i∈g} ‖(O_i V_i − O_i' V_g) C^½‖²`, the eigenvalues beyond the first h of the group's Gram matrix. Keys:
/// `Σ_{i∈g} w_i ‖(κ_i − c_i κ_g) C^½‖²` for each frequency, the eigenvalues beyond the first of a Hermitian matrix;
/// unrotated dimensions as values. Each is divided by what the layer has of it, so the error is a share of the layer's
/// energy, from 0 to 2 (docs/method.md, "Low-rank sharing"). C is the moment that the layer carries, or I.
///
/// Groups are remembered. The distances for starting a search are those of pairs of heads.
#[derive(Debug)]
pub struct LowRankError {
    values: Gram,
    /// `√(w_i w_j) κ_i C κ_j^H` for each frequency, (H, H).
    frequencies: Vec<Mat<c64>>,
    unrotated: Option<Gram>,
    energies: Residuals,
    n_heads: usize,
    proxy: Array2<f64>,
    known: Mutex<HashMap<Box<[usize]>, Residuals>>,
}

/// What is lost of the values and of the keys, or what there is of them.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Residuals {
    /// In squared outputs, `Σ E‖O V x‖²` over query heads.
    pub values: f64,
    /// In squared scores: half the rotated part plus the unrotated one.
    pub keys: f64,
}

impl LowRankError {
    /// The error of a layer with its queries and outputs, under [`LowRankPooler::default`]'s ridge.
    ///
    /// # Errors
    /// [`Error::NoQueries`] for a layer without queries and outputs, [`Error::NotFinite`] for a moment that is none.
    pub fn new(heads: &LayerHeads) -> Result<Self> {
        Self::of(heads, LowRankPooler::default())
    }

    /// The error of a pooler with other settings.
    ///
    /// # Errors
    /// As [`LowRankError::new`].
    pub fn of(heads: &LayerHeads, pooler: LowRankPooler) -> Result<Self> {
        let n_heads = heads.n_heads();
        let all: Vec<usize> = (0..n_heads).collect();
        let metric = Metric::new(heads, pooler.ridge)?;
        let h = heads.value().head_dim();
        let values = Gram { block: h, gram: low_rank::values(heads, &metric)?.gram(&all) };
        let keys = low_rank::keys(heads, &metric)?;
        drop(metric);
        let frequencies =
            keys.rotated.iter().flat_map(|k| (0..k.frequencies()).map(|f| k.hermitian(f, &all))).collect();
        let block = h - heads.rotation().dims();
        let unrotated = keys.unrotated.map(|k| Gram { block, gram: k.gram(&all) });
        let mut error = Self {
            values,
            frequencies,
            unrotated,
            energies: Residuals::default(),
            n_heads,
            proxy: Array2::zeros((n_heads, n_heads)),
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
        Ok(error)
    }

    /// What the layer has of values and keys: the denominators of the shares.
    pub fn energies(&self) -> Residuals {
        self.energies
    }

    /// What a group loses of its values and of its keys; `members` ascending.
    ///
    /// # Errors
    /// [`Error::HeadOutOfRange`]; [`Error::NotFinite`] for a moment that is none.
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
            let values = part.self_adjoint_eigenvalues(Side::Lower).map_err(|_| no_moment())?;
            keys += 0.5 * beyond(values, 1)?;
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
        beyond(part.self_adjoint_eigenvalues(Side::Lower).map_err(|_| no_moment())?, self.block)
    }
}

fn trace(hermitian: &Mat<c64>, members: &[usize]) -> f64 {
    members.iter().map(|&i| hermitian[(i, i)].re).sum()
}

/// The sum of all eigenvalues but the `kept` largest; they come ascending, and are not negative but for rounding.
fn beyond(values: Vec<f64>, kept: usize) -> Result<f64> {
    if values.iter().any(|v| v.is_nan()) {
        return Err(no_moment());
    }
    Ok(values[..values.len() - kept].iter().map(|v| v.max(0.0)).sum())
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
}
