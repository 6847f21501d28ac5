use ndarray::Array2;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{FitnessFn, FitnessKind, WeightSharingError};
use crate::error::{Error, Result};
use crate::heads::{HeadSource, Needs};
use crate::run::Run;
use crate::spec::Spec;

/// The weight-sharing error under perturbed similarities of heads: PGQA of key-driven grouping (Khan et al. 2024, arXiv
/// 2408.08454) as a fitness.
///
/// With D the squared distances of a layer's heads ([`WeightSharingError`]) and m their mean over the pairs of different heads,
/// `D'_ij = max(0, D_ij + σ m ε_ij)`, where ε is symmetric with a zero diagonal and independent standard normal numbers elsewhere;
/// a partition costs `Σ_g Σ_{i,j∈g} D'_ij / 2|g|`, in squared weights. Layer l draws ε from `Run::new(seed).fork(l)`, row by row
/// above the diagonal, so one seed gives one result. With σ = 0 it is the weight-sharing error, bit for bit.
///
/// The paper subtracts noise from attention maps, to weaken what the queries of a group have in common, and leaves the groups as they
/// are; merging has no attention maps, and what decides there which heads become alike is D (docs/method.md, "Key-driven grouping").
///
/// ```
/// use qcqa::fitness::PerturbedSharing;
/// use qcqa::ndarray::Array2;
///
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| (i as f64 - j as f64).powi(2));
/// let none = PerturbedSharing { scale: 0.0, ..PerturbedSharing::default() };
/// assert_eq!(none.perturbed(&distances, 0)?, distances);
/// assert_ne!(PerturbedSharing::default().perturbed(&distances, 0)?, distances);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PerturbedSharing {
    /// σ, the standard deviation of the noise as a share of the mean distance, from 0 to 1e6; 0.1 by default.
    pub scale: f64,
    /// Seed of the noise, 0 by default: the fitness is part of the question, so it does not follow the seed of the search.
    pub seed: u64,
}

impl Default for PerturbedSharing {
    fn default() -> Self {
        Self { scale: 0.1, seed: 0 }
    }
}

impl PerturbedSharing {
    /// The most that the scale can be.
    const MOST: f64 = 1e6;

    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["scale", "seed"])?;
        let Self { scale, seed } = Self::default();
        let seed = spec.count("seed")?.map_or(seed, |seed| seed as u64);
        Self { scale: spec.number("scale")?.unwrap_or(scale), seed }.checked()
    }

    fn checked(self) -> Result<Self> {
        match (0.0..=Self::MOST).contains(&self.scale) {
            true => Ok(self),
            false => Err(Error::setting("scale", self.scale, "from 0 to 1000000")),
        }
    }

    /// The squared distances D (H, H) of layer `layer`, perturbed.
    ///
    /// # Errors
    /// [`Error::Setting`] for a scale out of range; [`Error::Shape`] unless D is square.
    pub fn perturbed(&self, distances: &Array2<f64>, layer: usize) -> Result<Array2<f64>> {
        let (Self { scale, seed }, (n, m)) = (self.checked()?, distances.dim());
        if n != m {
            return Err(Error::shape("squared distances", &[n, n], &[n, m]));
        }
        let pairs = || (0..n).flat_map(|i| (i + 1..n).map(move |j| [i, j]));
        let count = pairs().count().max(1) as f64;
        // Divided first: distances near the largest number have a mean, too.
        let mean: f64 = pairs().map(|pair| distances[pair] / count).sum();
        let mut rng = Run::new(seed).fork(layer as u64).rng();
        let mut perturbed = distances.clone();
        for [i, j] in pairs() {
            let distance = (distances[[i, j]] + scale * mean * normal(&mut rng)).max(0.0);
            (perturbed[[i, j]], perturbed[[j, i]]) = (distance, distance);
        }
        Ok(perturbed)
    }
}

/// A standard normal number (Box & Muller 1958, doi:10.1214/aoms/1177706645).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    // Above 0, where the logarithm ends.
    let (radius, turn) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * turn).cos()
}

impl FitnessKind for PerturbedSharing {
    fn spec(&self) -> Spec {
        Spec::new("pgqa").with("scale", self.scale).with("seed", self.seed)
    }

    fn of(&self, source: &dyn HeadSource, layer: usize) -> Result<Box<dyn FitnessFn>> {
        let plain = WeightSharingError::new(source.rows(layer)?.as_ref())?;
        let perturbed = self.perturbed(&plain.distances().to_owned(), layer)?;
        Ok(Box::new(WeightSharingError::from_distances(perturbed, plain.energy().unwrap_or(0.0))?))
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }
}
