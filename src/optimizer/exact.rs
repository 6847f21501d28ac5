use std::ops::RangeInclusive;

use ndarray::ArrayView2;

use super::Optimizer;
use crate::error::{Error, Result};
use crate::fitness::{FitnessFn, SeparableFitness};
use crate::front::Front;
use crate::partition::{Cardinality, Partition, SearchSpace};
use crate::run::Run;
use crate::spec::Spec;

/// The optimum for every number of groups, by dynamic programming over subsets of heads.
///
/// `f(S, k) = min_A e(A) + f(S∖A, k − 1)` over the A ⊆ S that hold the lowest head of S (Jensen 1969,
/// doi:10.1287/opre.17.6.1034). What is left of all heads never holds head 0, so (3^(H−1) − 1)/2 + 2^(H−1)
/// pairs (S, A) are looked at, for all k at once: each head more triples the time. A fitness without pairwise
/// distances is asked for every group that may be formed, up to 2^H of them.
///
/// Every point carries its own error as lower bound.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::{Optimizer, Run};
/// use qcqa::fitness::WeightSharingError;
/// use qcqa::optimizer::Exact;
/// use qcqa::partition::SearchSpace;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
/// let fitness = WeightSharingError::from_distances(distances, 62.0)?;
///
/// let front = Exact::default().optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0))?;
/// assert_eq!(front.error(2), Some(1.0));
/// assert_eq!(front.get(2).unwrap().gap(), Some(0.0));
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exact {
    /// The most heads of a layer; at most [`Exact::MOST`].
    pub max_heads: usize,
}

impl Default for Exact {
    /// Up to 16 heads: some tens of milliseconds.
    fn default() -> Self {
        Self { max_heads: 16 }
    }
}

impl Exact {
    /// The largest `max_heads`: memory grows as `4·(H + 2)·2^H` bytes, 0.4 GB for 22 heads.
    pub const MOST: usize = 22;
}

impl Exact {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["max_heads"])?;
        Ok(Self { max_heads: spec.count("max_heads")?.unwrap_or(Self::default().max_heads) })
    }
}

impl Optimizer for Exact {
    fn spec(&self) -> Spec {
        Spec::new("exact").with("max_heads", self.max_heads)
    }

    /// # Errors
    /// [`Error::TooManyHeads`] above the limit, [`Error::NotSeparable`] for a fitness that is not a sum over
    /// groups, [`Error::Setting`] for a limit above [`Exact::MOST`].
    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front> {
        let (n, max) = (fitness.n_heads(), self.max_heads);
        if max > Self::MOST {
            return Err(Error::Setting { name: "max_heads", value: max.to_string(), expected: "at most 22" });
        }
        if n > max {
            return Err(Error::TooManyHeads { n_heads: n, max });
        }
        let separable = fitness.separable().ok_or(Error::NotSeparable { optimizer: "Exact" })?;
        let mut front = Front::new(fitness)?;
        let counts: Vec<_> = space.group_counts(n)?.into_iter().filter(|&k| k < n).collect();
        // One table for all k of which groups may have the same sizes.
        let mut tables: Vec<(RangeInclusive<usize>, Vec<usize>)> = Vec::new();
        for k in counts {
            let sizes = match space.cardinality {
                Cardinality::Arbitrary => 1..=space.size_at_most(n, k),
                Cardinality::Equal => n / k..=n / k,
            };
            match tables.last_mut().filter(|(of, _)| *of == sizes) {
                Some((_, counts)) => counts.push(k),
                None => tables.push((sizes, vec![k])),
            }
        }
        let mut known = vec![None; 1 << n];
        for (sizes, counts) in tables {
            let table = Table::new(separable, &sizes, &mut known, run)?;
            for k in counts {
                if let Some(partition) = table.partition(k)? {
                    let error = fitness.evaluate(&partition)?;
                    front.offer(&partition, error)?;
                    front.set_lower_bound(k, error);
                }
            }
        }
        Ok(front)
    }
}

/// `e(S)` and `f(S, k)` for one layer. A set of heads is a number whose bit i is head i.
#[derive(Debug)]
struct Table {
    n: usize,
    /// `e(S)`; infinite where S may not be a group.
    errors: Vec<f64>,
    /// `f(S, k)` at `[S/2][k]` for the S without head 0.
    rest: Vec<f64>,
    /// `f(all heads, k)`.
    whole: Vec<f64>,
}

impl Table {
    /// `known` keeps the errors that were asked for from table to table.
    fn new(
        fitness: &dyn SeparableFitness,
        sizes: &RangeInclusive<usize>,
        known: &mut [Option<f64>],
        run: Run<'_>,
    ) -> Result<Self> {
        let n = fitness.n_heads();
        let mut errors = match fitness.pairwise() {
            Some(distances) => pair_sums(distances),
            None => vec![0.0; 1 << n],
        };
        for (set, error) in errors.iter_mut().enumerate().skip(1) {
            let size = set.count_ones() as usize;
            if !sizes.contains(&size) {
                *error = f64::INFINITY;
            } else if fitness.pairwise().is_some() {
                *error /= size as f64;
            } else if size > 1 {
                *error = match known[set] {
                    Some(error) => error,
                    None => {
                        let members: Vec<_> = (0..n).filter(|head| set >> head & 1 == 1).collect();
                        let error = fitness.group_error(&members)?;
                        run.step("exact: groups", set as u64, 1 << n)?;
                        *known[set].insert(error)
                    }
                };
            }
        }
        let width = n + 1;
        let mut rest = vec![f64::INFINITY; width << (n - 1)];
        rest[0] = 0.0;
        let mut least = vec![0.0; width];
        let sets = 1 << (n - 1);
        for half in 1..sets {
            best_first_groups(2 * half, &errors, &rest, &mut least);
            rest[half * width..][..width].copy_from_slice(&least);
            if half % 256 == 0 {
                run.step("exact", half as u64, sets as u64)?;
            }
        }
        best_first_groups(2 * sets - 1, &errors, &rest, &mut least);
        Ok(Self { n, errors, rest, whole: least })
    }

    /// An optimal partition into k groups; `None` where the allowed sizes have none.
    fn partition(&self, k: usize) -> Result<Option<Partition>> {
        if self.whole[k] == f64::INFINITY {
            return Ok(None);
        }
        let width = self.n + 1;
        let mut labels = vec![0; self.n];
        let (mut set, mut error) = ((1 << self.n) - 1, self.whole[k]);
        for label in 0..k {
            // Adding the same numbers again gives the same sum: the group that gave the least is found by
            // equality.
            let left = k - 1 - label;
            let gives =
                |&group: &usize| self.errors[group] + self.rest[(set ^ group) / 2 * width + left] == error;
            let group = groups_of(set).find(gives).expect("the least was found among these");
            for (head, of) in labels.iter_mut().enumerate() {
                if group >> head & 1 == 1 {
                    *of = label;
                }
            }
            set ^= group;
            error = self.rest[set / 2 * width + left];
        }
        Partition::from_labels(&labels).map(Some)
    }
}

/// The subsets of `set` that hold its lowest head, the set itself first.
fn groups_of(set: usize) -> impl Iterator<Item = usize> {
    let lowest = set & set.wrapping_neg();
    let others = set ^ lowest;
    let next = move |&subset: &usize| (subset > 0).then(|| (subset - 1) & others);
    std::iter::successors(Some(others), next).map(move |subset| subset | lowest)
}

/// `least[k] = f(set, k)`.
fn best_first_groups(set: usize, errors: &[f64], rest: &[f64], least: &mut [f64]) {
    let width = least.len();
    least.fill(f64::INFINITY);
    for group in groups_of(set) {
        let error = errors[group];
        if error == f64::INFINITY {
            continue;
        }
        let left = set ^ group;
        // m heads make at most m groups.
        let most = left.count_ones() as usize + 1;
        let row = &rest[left / 2 * width..][..most];
        for (least, rest) in least[1..][..most].iter_mut().zip(row) {
            let sum = error + rest;
            *least = if sum < *least { sum } else { *least };
        }
    }
}

/// `Σ_{i<j∈S} D_ij` of every set S, each from a smaller one by one addition of positive numbers.
fn pair_sums(distances: ArrayView2<'_, f64>) -> Vec<f64> {
    let n = distances.nrows();
    let mut sums = vec![0.0; 1 << n];
    // From the last head down: those above it are done. `row[T]` is Σ_{j∈T} D_ij over sets T of heads above
    // i.
    for i in (0..n).rev() {
        let mut row = vec![0.0; 1 << (n - 1 - i)];
        for above in 1..row.len() {
            let lowest = above.trailing_zeros() as usize;
            row[above] = row[above & (above - 1)] + distances[[i, i + 1 + lowest]];
            sums[1 << i | above << (i + 1)] = sums[above << (i + 1)] + row[above];
        }
    }
    sums
}
