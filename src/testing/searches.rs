use ndarray::Array2;

use super::{Verdict, layer, rule, unexpected};
use crate::error::Error;
use crate::fitness::{FitnessFn, WeightSharingError};
use crate::front::Front;
use crate::grouping::Grouping;
use crate::heads::KeyEnergies;
use crate::optimizer::Optimizer;
use crate::partition::{Partition, SearchSpace};
use crate::run::Run;

/// A fitness by its definition alone, which offers no shortcut.
#[derive(Debug)]
struct Opaque(WeightSharingError);

impl FitnessFn for Opaque {
    fn n_heads(&self) -> usize {
        self.0.n_heads()
    }

    fn evaluate(&self, partition: &Partition) -> crate::error::Result<f64> {
        self.0.evaluate(partition)
    }
}

/// An [`Optimizer`]: fronts that are complete (a point for every k of the space), admissible and honest (every error is what
/// the fitness says), that keep MHA, and that are the same for the same seed, over several spaces, with a fitness that offers
/// its distances. One that says [`Error::NotSeparable`] of others may; one that takes them must be as good as its word there, too.
///
/// # Errors
/// The first rule that is broken.
pub fn check_optimizer(optimizer: &dyn Optimizer) -> Verdict {
    let spaces = [
        SearchSpace::arbitrary(),
        SearchSpace::equal(),
        SearchSpace { max_groups: Some(4), ..SearchSpace::arbitrary() },
        SearchSpace { max_group_size: Some(3), ..SearchSpace::arbitrary() },
    ];
    for (n, seed) in [(1, 0), (2, 1), (8, 2)] {
        let heads = unexpected("a layer", layer(seed, n, 3, 5, false))?;
        let wse = unexpected("a fitness", WeightSharingError::new(&heads))?;
        for space in &spaces {
            check_front(optimizer, &wse, space)?;
        }
        match optimizer.optimize(&Opaque(wse.clone()), &spaces[0], Run::new(1)) {
            Err(Error::NotSeparable { .. }) => {}
            Err(error) => return Err(format!("a fitness without shortcuts failed: {error}")),
            Ok(_) => check_front(optimizer, &Opaque(wse), &spaces[0])?,
        }
    }
    Ok(())
}

fn check_front(optimizer: &dyn Optimizer, fitness: &dyn FitnessFn, space: &SearchSpace) -> Verdict {
    let n = fitness.n_heads();
    let search = |seed| unexpected("the search", optimizer.optimize(fitness, space, Run::new(seed)));
    let front: Front = search(7)?;
    rule(search(7)? == front, || format!("one seed gave two fronts of {n} heads ({space})"))?;
    for k in unexpected("the space", space.group_counts(n))? {
        let Some(point) = front.get(k) else {
            return Err(format!("no partition of {n} heads into {k} ({space})"));
        };
        rule(point.partition.n_groups() == k, || format!("the point of {k} groups has another number"))?;
        rule(space.admits(&point.partition), || format!("{:?} is not one of {space}", point.partition))?;
        let error = unexpected("the fitness", fitness.evaluate(&point.partition))?;
        rule((point.error - error).abs() <= 1e-9 * error.max(1e-9), || {
            format!("{:?} is said to cost {}, but costs {error}", point.partition, point.error)
        })?;
        rule(point.lower_bound.is_none_or(|bound| bound <= point.error), || {
            format!("the lower bound of {k} groups is above their error")
        })?;
    }
    Ok(())
}

/// A [`Grouping`]: partitions into exactly k groups of all heads or none, the same twice; k = H is always there where it makes
/// any; k outside 1 … H is refused. The heads carry energies of their keys.
///
/// # Errors
/// The first rule that is broken.
pub fn check_grouping(grouping: &dyn Grouping) -> Verdict {
    for n in [1, 6, 7] {
        let energies = Array2::from_shape_fn((3, n), |(window, head)| (1 + (window + 2 * head) % 5) as f64);
        let heads = KeyEnergies::new(energies)
            .and_then(|energies| layer(9, n, 3, 5, true)?.with_key_energies(energies));
        let heads = unexpected("a layer", heads)?;
        for k in 1..=n {
            let partition = unexpected("grouping", grouping.group(&heads, k))?;
            rule(unexpected("grouping", grouping.group(&heads, k))? == partition, || {
                format!("{k} groups of {n} heads are not the same twice")
            })?;
            let Some(partition) = partition else { continue };
            let found = (partition.n_heads(), partition.n_groups());
            rule(found == (n, k), || format!("asked for {k} groups of {n} heads, it made {found:?}"))?;
        }
        for k in [0, n + 1] {
            let refused = matches!(grouping.group(&heads, k), Err(Error::GroupCount { .. }));
            rule(refused, || {
                format!("{k} groups of {n} heads are impossible, but were not refused as such")
            })?;
        }
    }
    Ok(())
}

/// A [`FitnessFn`] that is bound to some layer: nothing is lost without sharing, errors are finite, not negative and the same
/// twice; another number of heads is refused; where it says that it is a sum over groups, or over pairs, it is.
///
/// # Errors
/// The first rule that is broken.
pub fn check_fitness(fitness: &dyn FitnessFn) -> Verdict {
    let n = fitness.n_heads();
    let evaluate = |p: &Partition| unexpected("the fitness", fitness.evaluate(p));
    let alone = unexpected("a partition", Partition::singletons(n))?;
    rule(evaluate(&alone)? == 0.0, || "something is lost without sharing".to_string())?;
    let one = unexpected("a partition", Partition::one_group(n))?;
    let halves =
        unexpected("a partition", Partition::from_labels(&(0..n).map(|i| i % 2).collect::<Vec<_>>()))?;
    for partition in [&alone, &one, &halves] {
        let error = evaluate(partition)?;
        rule(error.is_finite() && error >= 0.0, || format!("{partition:?} costs {error}"))?;
        rule(evaluate(partition)? == error, || format!("{partition:?} does not cost the same twice"))?;
        let Some(separable) = fitness.separable() else { continue };
        let groups = partition.groups();
        let each: Vec<f64> = groups
            .iter()
            .map(|members| unexpected("a group", separable.group_error(members)))
            .collect::<Result<_, _>>()?;
        let sum: f64 = each.iter().sum();
        rule((sum - error).abs() <= 1e-6 * error.max(1e-12), || {
            format!("{partition:?} costs {error}, its groups {sum}")
        })?;
        let Some(distances) = separable.pairwise() else { continue };
        rule(distances.dim() == (n, n), || format!("its distances are {:?}", distances.dim()))?;
        for (members, error) in groups.iter().zip(each) {
            let pairs = members.iter().flat_map(|&i| members.iter().map(move |&j| [i, j]));
            let by_pairs = pairs.map(|pair| distances[pair]).sum::<f64>() / (2 * members.len()) as f64;
            rule((by_pairs - error).abs() <= 1e-6 * error.max(1e-12), || {
                format!("{members:?} cost {error}, by their distances {by_pairs}")
            })?;
        }
    }
    let other = unexpected("a partition", Partition::singletons(n + 1))?;
    let refused = matches!(fitness.evaluate(&other), Err(Error::PartitionSize { .. }));
    rule(refused, || "a partition of another number of heads was not refused as such".to_string())
}
