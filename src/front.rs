//! The Pareto front of one layer: the least error found for every number of groups.

use crate::error::{Error, Result};
use crate::fitness::FitnessFn;
use crate::partition::Partition;

/// A partition and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct FrontPoint {
    /// The partition.
    pub partition: Partition,
    /// Its error, in the unit of the fitness function that scored it; finite, not negative.
    pub error: f64,
    /// A certified lower bound on the error of any partition into as many groups, where one is known.
    pub lower_bound: Option<f64>,
}

impl FrontPoint {
    /// How far the error may be above the optimum, relative to the lower bound: `error / bound − 1`.
    /// 0 when both are 0; `None` without a bound or when the bound alone is 0.
    pub fn gap(&self) -> Option<f64> {
        gap(self.error, self.lower_bound)
    }
}

/// The rule of [`FrontPoint::gap`].
pub(crate) fn gap(error: f64, lower_bound: Option<f64>) -> Option<f64> {
    let bound = lower_bound?;
    match (error > bound, bound > 0.0) {
        (false, _) => Some(0.0),
        (true, true) => Some(error / bound - 1.0),
        (true, false) => None,
    }
}

/// The best partition found for each number of groups k. k = H, no sharing, is always there.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::FitnessFn;
/// use qcqa::fitness::WeightSharingError;
/// use qcqa::front::Front;
/// use qcqa::partition::Partition;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
/// let fitness = WeightSharingError::from_distances(distances, 62.0)?;
/// let mut front = Front::new(&fitness)?;
/// for labels in [[0, 1, 0, 1], [0, 0, 1, 1]] {
///     let partition = Partition::from_labels(&labels)?;
///     assert!(front.offer(&partition, fitness.evaluate(&partition)?)?, "better than before");
/// }
/// assert_eq!((front.error(2), front.error(4), front.error(3)), (Some(1.0), Some(0.0), None));
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Front {
    points: Vec<Option<FrontPoint>>,
    energy: Option<f64>,
}

impl Front {
    /// The front that holds only the layer without sharing, k = H.
    ///
    /// # Errors
    /// [`Error::InvalidFitness`] and whatever the fitness reports.
    pub fn new(fitness: &dyn FitnessFn) -> Result<Self> {
        let n_heads = fitness.n_heads();
        let mha = Partition::singletons(n_heads)?;
        let mut front = Self { points: vec![None; n_heads], energy: fitness.energy() };
        front.offer(&mha, fitness.evaluate(&mha)?)?;
        front.set_lower_bound(n_heads, front.error(n_heads).unwrap_or(0.0));
        Ok(front)
    }

    /// Takes the partition in when it is better than the one held for its k; tells whether it did.
    ///
    /// # Errors
    /// [`Error::InvalidFitness`] when the error is NaN, infinite or negative, [`Error::PartitionSize`] when
    /// the partition is of another number of heads.
    pub fn offer(&mut self, partition: &Partition, error: f64) -> Result<bool> {
        let k = partition.n_groups();
        if !(error.is_finite() && error >= 0.0) {
            return Err(Error::InvalidFitness { k, value: error });
        }
        if partition.n_heads() != self.n_heads() {
            return Err(Error::PartitionSize { expected: self.n_heads(), found: partition.n_heads() });
        }
        let held = &mut self.points[k - 1];
        if held.as_ref().is_some_and(|p| p.error <= error) {
            return Ok(false);
        }
        let lower_bound = held.as_ref().and_then(|p| p.lower_bound).map(|b| b.min(error));
        *held = Some(FrontPoint { partition: partition.clone(), error, lower_bound });
        Ok(true)
    }

    /// Attaches a certified lower bound to the point of k groups, when there is one; the larger of two bounds
    /// stays. Rounding may put a bound a hair above an optimum: it is cut at the error.
    pub fn set_lower_bound(&mut self, k: usize, bound: f64) {
        if let Some(Some(point)) = k.checked_sub(1).and_then(|i| self.points.get_mut(i)) {
            let bound = bound.max(0.0).min(point.error);
            point.lower_bound = Some(point.lower_bound.map_or(bound, |b| b.max(bound)));
        }
    }

    /// Number of heads, H.
    pub fn n_heads(&self) -> usize {
        self.points.len()
    }

    /// What the errors are a share of, where the fitness named it.
    pub fn energy(&self) -> Option<f64> {
        self.energy
    }

    /// The point with k groups.
    pub fn get(&self, k: usize) -> Option<&FrontPoint> {
        self.points.get(k.checked_sub(1)?)?.as_ref()
    }

    /// The error with k groups.
    pub fn error(&self, k: usize) -> Option<f64> {
        self.get(k).map(|p| p.error)
    }

    /// All points, k ascending.
    pub fn iter(&self) -> impl Iterator<Item = &FrontPoint> {
        self.points.iter().flatten()
    }

    /// The points that no other beats: k ascending, error strictly falling.
    pub fn pareto(&self) -> Vec<&FrontPoint> {
        let mut least = f64::INFINITY;
        self.iter()
            .filter(|p| {
                let better = p.error < least;
                least = least.min(p.error);
                better
            })
            .collect()
    }

    /// The area that the front dominates in the plane (k/H, error), as a share of the rectangle from the
    /// origin to `reference`; larger is better. With NSGA-II one takes (1 + 1/H, 1.01 · error at k = 1).
    pub fn hypervolume(&self, reference: [f64; 2]) -> f64 {
        let h = self.n_heads() as f64;
        let mut corners: Vec<_> =
            self.pareto().iter().map(|p| [p.partition.n_groups() as f64 / h, p.error]).collect();
        corners.retain(|c| c[0] < reference[0] && c[1] < reference[1]);
        let right = corners.iter().skip(1).map(|c| c[0]).chain([reference[0]]);
        let area: f64 =
            corners.iter().zip(right).map(|(c, right)| (right - c[0]) * (reference[1] - c[1])).sum();
        area / (reference[0] * reference[1])
    }
}

/// Whether `a` Pareto-dominates `b` (minimisation): nowhere worse, somewhere better.
pub fn dominates(a: [f64; 2], b: [f64; 2]) -> bool {
    a[0] <= b[0] && a[1] <= b[1] && (a[0] < b[0] || a[1] < b[1])
}
