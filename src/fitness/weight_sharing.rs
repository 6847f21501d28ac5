use ndarray::{Array2, ArrayView2};

use super::gram::squared_distances;
use super::{FitnessFn, FitnessKind, SeparableFitness};
use crate::error::{Error, Result};
use crate::heads::{HeadRows, HeadSource, Heads, Needs};
use crate::partition::Partition;
use crate::spec::Spec;

/// The weight-sharing error of the paper (arXiv 2406.10247):
/// `WSE(P) = Σ_g Σ_{i∈g} ‖K_i − K̄_g‖² + ‖V_i − V̄_g‖²`, with `K̄_g`, `V̄_g` the group means.
///
/// Evaluated from the squared distances `D_ij = ‖K_i − K_j‖² + ‖V_i − V_j‖²` alone, as `Σ_g Σ_{i,j∈g} D_ij /
/// 2|g|`: the weights are read once, then no evaluation depends on d or h. Biases count as one more input
/// column. Unit: squared weights.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::FitnessFn;
/// use qcqa::fitness::WeightSharingError;
/// use qcqa::partition::Partition;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
/// let fitness = WeightSharingError::from_distances(distances, 62.0)?;
/// let error = fitness.evaluate(&Partition::from_labels(&[0, 0, 1, 1])?)?;
/// assert_eq!(error, 1.0); // two groups, each head ½ from its mean
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct WeightSharingError {
    distances: Array2<f64>,
    energy: f64,
}

/// Heads above which an error is summed up group by group.
const MANY: usize = 64;

/// What squared distances, and the energy with them, must be.
const DISTANCES: &str = "must be symmetric, finite and at least 0, with a zero diagonal and a finite energy";

impl WeightSharingError {
    /// The WSE of a layer, from its [`Heads`] or any other rows.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when a weight is NaN or infinite or its square overflows f32;
    /// [`Error::HeadCount`].
    pub fn new(rows: &dyn HeadRows) -> Result<Self> {
        let (distances, energy) = squared_distances(rows)?;
        Self::from_distances(distances, energy)
    }

    /// The weight-sharing error on calibration data: of what the heads compute instead of what they are,
    /// `Σ_g Σ_{i∈g} E‖(K_i − K̄_g) x‖² + E‖(V_i − V̄_g) x‖²` over the layer's inputs x.
    ///
    /// With the input moment `C̃` of the layer, `D_ij = tr((K_i − K_j) C̃ (K_i − K_j)ᵀ)` and the same for
    /// values; f64 throughout. Unit: squared keys and values.
    ///
    /// # Errors
    /// [`Error::NoMoment`] when the layer carries none; [`Error::Moment`] when that is no second moment: some
    /// squared distance would be negative.
    pub fn calibrated(heads: &Heads) -> Result<Self> {
        let moment = heads.moment().ok_or(Error::NoMoment)?;
        let n = heads.n_heads();
        let mut gram = Array2::<f64>::zeros((n, n));
        for projection in [heads.key(), heads.value()] {
            let rows = projection.augmented(0..projection.head_dim(), f64::from);
            let weighted = rows.dot(&moment.matrix());
            let of_heads = |rows: &Array2<f64>| rows.to_shape((n, rows.len() / n)).map(|r| r.into_owned());
            let (rows, weighted) = (of_heads(&rows), of_heads(&weighted));
            gram += &weighted.map_err(Error::plugin)?.dot(&rows.map_err(Error::plugin)?.t());
        }
        let energy = gram.diag().sum();
        let distance = |(i, j): (usize, usize)| {
            let distance = gram[[i, i]] + gram[[j, j]] - gram[[i, j]] - gram[[j, i]];
            // Equal heads may differ by a rounding, which grows with their energy.
            let rounding = 1e-12 * (gram[[i, i]].abs() + gram[[j, j]].abs());
            if i == j || distance.abs() <= rounding { 0.0 } else { distance }
        };
        let distances = Array2::from_shape_fn((n, n), |(i, j)| distance((i.min(j), i.max(j))));
        Self::from_distances(distances, energy).map_err(|error| match error {
            Error::Distances(_) => {
                Error::Moment { layer: None, rule: "makes squared distances of heads negative or infinite" }
            }
            error => error,
        })
    }

    /// The WSE of heads of which only the squared distances D (H, H) and the energy `Σ_i ‖K_i‖² + ‖V_i‖²` are
    /// known.
    ///
    /// # Errors
    /// [`Error::Shape`] unless D is square, [`Error::HeadCount`], [`Error::Distances`] unless D is symmetric,
    /// finite and at least 0 with a zero diagonal, and the energy finite and at least 0.
    pub fn from_distances(distances: Array2<f64>, energy: f64) -> Result<Self> {
        let (n, m) = distances.dim();
        if n != m {
            return Err(Error::shape("squared distances", &[n, n], &[n, m]));
        }
        Partition::singletons(n)?;
        let legal = |(i, j): (usize, usize), d: f64| {
            d.is_finite() && d >= 0.0 && d == distances[[j, i]] && (i != j || d == 0.0)
        };
        let legal_distances = distances.indexed_iter().all(|(at, &d)| legal(at, d));
        if !(legal_distances && energy.is_finite() && energy >= 0.0) {
            return Err(Error::Distances(DISTANCES));
        }
        Ok(Self { distances: distances.as_standard_layout().into_owned(), energy })
    }

    /// `Σ_g Σ_{i,j∈g} D_ij / 2|g|`, each pair once: every head meets all earlier ones, those of other groups
    /// with weight 0. The genetic search spends a quarter of its time here, so four sums run side by side and
    /// nothing branches on the partition.
    fn error_of(&self, partition: &Partition) -> Result<f64> {
        const LANES: usize = 4;
        if self.n_heads() > MANY {
            return partition.groups().iter().map(|members| self.group_error(members)).sum();
        }
        // Labels as wide as the distances, so that comparing and adding take the same lanes; of each group the sum
        // over its pairs, and its size.
        let (mut labels, mut groups) = ([0.0; MANY], [[0.0; 2]; MANY]);
        labels.iter_mut().zip(partition.labels()).for_each(|(wide, &label)| *wide = f64::from(label));
        let rows = self.distances.as_slice().expect("contiguous since it was made");
        for (head, (&group, row)) in
            partition.labels().iter().zip(rows.chunks_exact(self.n_heads())).enumerate()
        {
            let own = labels[head];
            let within = |(&other, &distance): (&f64, &f64)| if other == own { distance } else { 0.0 };
            let (others, row) = (labels[..head].chunks_exact(LANES), row[..head].chunks_exact(LANES));
            let rest: f64 = others.remainder().iter().zip(row.remainder()).map(within).sum();
            let mut lanes = [0.0; LANES];
            for (others, distances) in others.zip(row) {
                let pairs = others.iter().zip(distances);
                lanes.iter_mut().zip(pairs).for_each(|(lane, pair)| *lane += within(pair));
            }
            let [sum, size] = &mut groups[usize::from(group)];
            *sum += lanes.iter().sum::<f64>() + rest;
            *size += 1.0;
        }
        Ok(groups[..partition.n_groups()].iter().map(|[sum, size]| sum / size).sum())
    }

    /// The squared distances D, (H, H).
    pub fn distances(&self) -> ArrayView2<'_, f64> {
        self.distances.view()
    }
}

impl FitnessFn for WeightSharingError {
    fn n_heads(&self) -> usize {
        self.distances.nrows()
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        if partition.n_heads() != self.n_heads() {
            return Err(Error::PartitionSize { expected: self.n_heads(), found: partition.n_heads() });
        }
        self.error_of(partition)
    }

    /// `Σ_i ‖K_i‖² + ‖V_i‖²`.
    fn energy(&self) -> Option<f64> {
        Some(self.energy)
    }

    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for WeightSharingError {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        let n_heads = self.n_heads();
        if let Some(&head) = members.iter().find(|&&m| m >= n_heads) {
            return Err(Error::HeadOutOfRange { head, n_heads });
        }
        let rows = members.iter().enumerate();
        let pairs = rows.flat_map(|(at, &i)| members[..at].iter().map(move |&j| (i, j)));
        Ok(pairs.map(|pair| self.distances[pair]).sum::<f64>() / members.len().max(1) as f64)
    }

    fn pairwise(&self) -> Option<ArrayView2<'_, f64>> {
        Some(self.distances.view())
    }
}

/// [`WeightSharingError`] of every layer, from its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightSharing;

impl WeightSharing {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&[]).map(|()| Self)
    }
}

impl FitnessKind for WeightSharing {
    fn spec(&self) -> Spec {
        Spec::new("wse")
    }

    fn of(&self, source: &dyn HeadSource, layer: usize) -> Result<Box<dyn FitnessFn>> {
        Ok(Box::new(WeightSharingError::new(source.rows(layer)?.as_ref())?))
    }

    fn needs(&self) -> Needs {
        Needs::NOTHING
    }
}
