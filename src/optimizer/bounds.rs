//! Lower bounds on the error of any partition, for errors that are sums over pairs.

use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::fitness::FitnessFn;
use crate::front::Front;
#[cfg(feature = "linalg")]
use crate::low_rank::eigenvalues;
use crate::partition::{Cardinality, SearchSpace};

/// Attaches certified lower bounds to every point of a front of a pairwise fitness; other fronts stay as they
/// are.
///
/// Each point gets the largest of: the spectral bound ([`spectral_bounds`], feature `linalg`), the bound from
/// nearest heads ([`nearest_bounds`]), the exact value where it is known (k = 1, k = H − 1, pairs of heads
/// with the feature `matching`), and, with arbitrary cardinality, the bound for k + 1: some head of every
/// group leaves it without loss, so the optimum never rises with k.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::{Optimizer, Run};
/// use qcqa::fitness::WeightSharingError;
/// use qcqa::optimizer::{LocalSearch, attach_bounds};
/// use qcqa::partition::SearchSpace;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
/// let fitness = WeightSharingError::from_distances(distances, 62.0)?;
///
/// let space = SearchSpace::arbitrary();
/// let mut front = LocalSearch::default().optimize(&fitness, &space, Run::new(0))?;
/// attach_bounds(&mut front, &fitness, &space)?;
/// assert!(front.iter().all(|point| point.lower_bound.is_some_and(|bound| bound <= point.error)));
/// # Ok::<(), qcqa::Error>(())
/// ```
///
/// # Errors
/// [`Error::PartitionSize`] for a front of another number of heads, [`Error::Setting`] and
/// [`Error::Distances`] as the bounds themselves.
pub fn attach_bounds(front: &mut Front, fitness: &dyn FitnessFn, space: &SearchSpace) -> Result<()> {
    let n = fitness.n_heads();
    if front.n_heads() != n {
        return Err(Error::PartitionSize { expected: n, found: front.n_heads() });
    }
    let Some(distances) = fitness.separable().and_then(|s| s.pairwise()) else { return Ok(()) };
    let mut bounds = nearest_bounds(distances, &SearchSpace { max_groups: None, ..*space })?;
    #[cfg(feature = "linalg")]
    for (bound, spectral) in bounds.iter_mut().zip(spectral_bounds(distances)?) {
        *bound = bound.max(spectral);
    }
    let safe = |exact: f64| exact * (1.0 - margin(n));
    bounds[0] = bounds[0].max(safe(distances.sum() / 2.0 / n as f64));
    if n > 2 {
        let pairs = (0..n).flat_map(|i| (0..i).map(move |j| [i, j]));
        bounds[n - 2] =
            bounds[n - 2].max(safe(pairs.map(|ij| distances[ij]).fold(f64::INFINITY, f64::min) / 2.0));
    }
    match space.cardinality {
        Cardinality::Arbitrary => (1..n).rev().for_each(|i| bounds[i - 1] = bounds[i - 1].max(bounds[i])),
        Cardinality::Equal => {
            if let Some(labels) = super::matching::pairs(distances).filter(|_| n > 2) {
                let matched =
                    |(i, j): (usize, usize)| if labels[i] == labels[j] { distances[[i, j]] } else { 0.0 };
                let least: f64 = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(matched).sum();
                bounds[n / 2 - 1] = bounds[n / 2 - 1].max(safe(least / 2.0));
            }
        }
    }
    for (i, &bound) in bounds.iter().enumerate() {
        front.set_lower_bound(i + 1, bound);
    }
    Ok(())
}

/// For k = 1…H at index k − 1: the sum of all but the k − 1 largest eigenvalues of the centred Gram matrix
/// `−½ J D J` (Zha et al. 2001; Ding & He 2004, doi:10.1145/1015330.1015408), less what rounding may have
/// added.
///
/// With the normalised group indicators Y (H × k, orthonormal columns that span the ones), the error is `½
/// tr(Yᵀ D Y) = tr B − tr(P B)` for B = −½ J D J and P a projection of rank k − 1: Ky Fan bounds the last
/// term. This holds for any symmetric D of zero diagonal, and for every cardinality.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::optimizer::spectral_bounds;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
///
/// let bounds = spectral_bounds(distances.view())?;
/// // All heads in one group have the error 26; on a line nothing is left for more groups.
/// assert!((bounds[0] - 26.0).abs() < 1e-9 && bounds[1] < 1e-9);
/// # Ok::<(), qcqa::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] unless D is square, [`Error::Distances`].
#[cfg(feature = "linalg")]
pub fn spectral_bounds(distances: ArrayView2<'_, f64>) -> Result<Vec<f64>> {
    let n = check(distances)?;
    let size = n as f64;
    let means: Vec<f64> = distances.rows().into_iter().map(|row| row.sum() / size).collect();
    let mean = means.iter().sum::<f64>() / size;
    let centred = |i: usize, j: usize| -0.5 * (distances[[i, j]] - means[i] - means[j] + mean);
    let gram = faer::Mat::from_fn(n, n, |i, j| centred(i.max(j), i.min(j)));
    // Without convergence nothing is known but that errors are not negative.
    let Some(mut values) = eigenvalues(gram.as_ref()) else { return Ok(vec![0.0; n]) };
    values.reverse();
    // Backward stable: every eigenvalue is off by less than a small multiple of H·ε·‖B‖, a sum of H by H
    // times that.
    let largest = distances.iter().copied().fold(0.0, f64::max);
    let doubt = margin(n) * size * (gram.norm_l2() + largest);
    let mut bounds = vec![0.0; n];
    let mut sum = 0.0;
    for k in (1..=n).rev() {
        sum += values[k - 1];
        bounds[k - 1] = f64::max(sum - doubt, 0.0);
    }
    Ok(bounds)
}

/// For k = 1…H at index k − 1: a bound from the distances of every head to its nearest heads.
///
/// In a group of m heads, head i pays half the mean of its m distances, at least `c_i(m) = 1/2m · (sum of its
/// m − 1 smallest D_ij)`. Sizes obey `Σ_i 1/m_i = k`, so for every μ the error is at least
/// `Σ_i min_m (c_i(m) + μ/m) − μ k`; the best μ is found by bisection. m keeps to the sizes of the space. It
/// is strong where the spectral bound is weak: for equal and for small groups. D must be at least 0.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::optimizer::nearest_bounds;
/// use qcqa::partition::SearchSpace;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
///
/// let bounds = nearest_bounds(distances.view(), &SearchSpace::equal())?;
/// // Each head pays at least a quarter of the distance to its neighbour, 1: the error of two pairs.
/// assert!((bounds[1] - 1.0).abs() < 1e-9);
/// # Ok::<(), qcqa::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] unless D is square, [`Error::Distances`], [`Error::Setting`] for a limit of 0.
pub fn nearest_bounds(distances: ArrayView2<'_, f64>, space: &SearchSpace) -> Result<Vec<f64>> {
    let n = check(distances)?;
    let inverse: Vec<f64> = (1..=n).map(|m| 1.0 / m as f64).collect();
    // costs[i][m − 1]
    let costs: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let mut row: Vec<f64> = (0..n).filter(|&j| j != i).map(|j| distances[[i, j]]).collect();
            row.sort_by(f64::total_cmp);
            let mut sum = 0.0;
            let rest = row.iter().zip(&inverse[1..]).map(|(&distance, inverse)| {
                sum += distance;
                0.5 * sum * inverse
            });
            [0.0].into_iter().chain(rest).collect()
        })
        .collect();
    let mut bounds = vec![0.0; n];
    for k in space.group_counts(n)?.into_iter().filter(|&k| k < n) {
        if space.cardinality == Cardinality::Equal {
            let sum: f64 = costs.iter().map(|costs| costs[n / k - 1]).sum();
            bounds[k - 1] = sum * (1.0 - margin(n));
            continue;
        }
        let most = space.size_at_most(n, k).min(n - k + 1);
        let dual = |mu: f64| {
            let (mut sum, mut groups) = (0.0, 0.0);
            for costs in &costs {
                let (mut least, mut at) = (f64::INFINITY, 0.0);
                for (cost, inverse) in costs[..most].iter().zip(&inverse) {
                    let value = cost + mu * inverse;
                    if value < least {
                        (least, at) = (value, *inverse);
                    }
                }
                sum += least;
                groups += at;
            }
            let doubt = margin(n) * (sum + mu * k as f64);
            (sum - mu * k as f64 - doubt, groups)
        };
        // The dual rises while more than k groups would be made.
        let (mut low, mut high) = (0.0, distances.iter().copied().fold(0.0, f64::max) * n as f64);
        for _ in 0..40 {
            let mu = 0.5 * (low + high);
            let (value, groups) = dual(mu);
            bounds[k - 1] = f64::max(bounds[k - 1], value);
            if groups > k as f64 { low = mu } else { high = mu }
        }
    }
    Ok(bounds)
}

/// A generous relative error of a sum of up to H² terms.
fn margin(n_heads: usize) -> f64 {
    16.0 * (n_heads as f64 + 4.0) * f64::EPSILON
}

fn check(distances: ArrayView2<'_, f64>) -> Result<usize> {
    let (n, columns) = distances.dim();
    if n == 0 || n != columns {
        return Err(Error::shape("squared distances", &[n.max(1), n.max(1)], &[n, columns]));
    }
    if !distances.iter().all(|d| d.is_finite() && *d >= 0.0) {
        return Err(Error::Distances("must be finite and at least 0"));
    }
    Ok(n)
}
