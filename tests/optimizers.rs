//! LocalSearch and Exact against brute force, on pairwise and on other people's fitness functions.

mod common;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

use common::all_partitions;
use ndarray::{Array2, ArrayView2};
use proptest::prelude::*;
use qcqa::fitness::{SeparableFitness, WeightSharingError};
use qcqa::front::Front;
use qcqa::optimizer::{Exact, LocalSearch};
use qcqa::partition::{Cardinality, Partition, SearchSpace};
use qcqa::{Error, FitnessFn, Optimizer, Progress, Result, Run, ndarray};

/// Squared distances and energy of points, from the definition.
fn fitness_of(points: &[Vec<f64>]) -> WeightSharingError {
    let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    let n = points.len();
    let distances = Array2::from_shape_fn((n, n), |(i, j)| square(&points[i.min(j)], &points[i.max(j)]));
    let energy = points.iter().flatten().map(|x| x * x).sum();
    WeightSharingError::from_distances(distances, energy).unwrap()
}

/// The error by its first definition: distances to group means.
fn plain_error(points: &[Vec<f64>], partition: &Partition) -> f64 {
    let mut error = 0.0;
    for members in partition.groups() {
        let column = |t: usize| members.iter().map(move |&i| points[i][t]);
        for t in 0..points[members[0]].len() {
            let mean = column(t).sum::<f64>() / members.len() as f64;
            error += column(t).map(|x| (x - mean).powi(2)).sum::<f64>();
        }
    }
    error
}

/// The least error of each k in the space, by looking at everything.
fn brute_force(fitness: &dyn FitnessFn, space: &SearchSpace) -> Vec<Option<f64>> {
    let mut best: Vec<Option<f64>> = vec![None; fitness.n_heads()];
    for partition in all_partitions(fitness.n_heads()).iter().filter(|p| space.admits(p)) {
        let error = fitness.evaluate(partition).unwrap();
        let held = &mut best[partition.n_groups() - 1];
        *held = Some(held.map_or(error, |b| b.min(error)));
    }
    best
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * (1e-6 + a.abs().max(b.abs()))
}

/// Every k of the space is there, admitted, and scored by the fitness.
fn check_front(front: &Front, fitness: &dyn FitnessFn, space: &SearchSpace) {
    let ks: Vec<usize> = front.iter().map(|p| p.partition.n_groups()).collect();
    assert_eq!(ks, space.group_counts(fitness.n_heads()).unwrap());
    for point in front.iter() {
        assert!(space.admits(&point.partition), "{:?} is not in {space:?}", point.partition);
        assert_eq!(point.error, fitness.evaluate(&point.partition).unwrap());
    }
}

fn points(heads: impl Strategy<Value = usize>) -> impl Strategy<Value = Vec<Vec<f64>>> {
    heads.prop_flat_map(|n| prop::collection::vec(prop::collection::vec(-3.0..3.0, 3), n))
}

fn spaces() -> impl Strategy<Value = SearchSpace> {
    let cardinality = prop_oneof![Just(Cardinality::Arbitrary), Just(Cardinality::Equal)];
    let limits = (prop::option::of(1usize..9), prop::option::of(1usize..6), prop::option::of(100usize..250));
    (cardinality, limits).prop_map(|(cardinality, (max_groups, max_group_size, max_filled))| SearchSpace {
        cardinality,
        max_groups,
        max_group_size,
        max_filled,
    })
}

/// A sum over groups that is not one over pairs: the largest distance to the group's first head, times its size.
#[derive(Debug)]
struct Radius(Array2<f64>);

impl FitnessFn for Radius {
    fn n_heads(&self) -> usize {
        self.0.nrows()
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        partition.groups().iter().map(|members| self.group_error(members)).sum()
    }

    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for Radius {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        assert!(members.is_sorted(), "members come ascending");
        let radius = members.iter().map(|&i| self.0[[members[0], i]]).fold(0.0, f64::max);
        Ok(radius * members.len() as f64)
    }
}

/// [`Radius`] with a hint where to start.
#[derive(Debug)]
struct Hinted(Radius);

impl FitnessFn for Hinted {
    fn n_heads(&self) -> usize {
        self.0.n_heads()
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        self.0.evaluate(partition)
    }

    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for Hinted {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        self.0.group_error(members)
    }

    fn pairwise_proxy(&self) -> Option<ArrayView2<'_, f64>> {
        Some(self.0.0.view())
    }
}

/// A sum over pairs that grows faster with the size than a mean would: `Σ_{i<j} D_ij` itself. Its groups cost the square of
/// their size to look at, which is written down.
#[derive(Debug)]
struct Pairs {
    distances: Array2<f64>,
    /// Groups cost eight times the cube of their size instead.
    dear: bool,
    spent: AtomicU64,
}

impl FitnessFn for Pairs {
    fn n_heads(&self) -> usize {
        self.distances.nrows()
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        let pairs = |g: &Vec<usize>| {
            g.iter().flat_map(|&i| g.iter().map(move |&j| self.distances[[i, j]])).sum::<f64>() / 2.0
        };
        Ok(partition.groups().iter().map(pairs).sum())
    }

    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for Pairs {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        self.spent.fetch_add(self.group_cost(members.len()), Ordering::Relaxed);
        let mut labels = vec![0; self.n_heads()];
        members.iter().for_each(|&i| labels[i] = 1);
        let alone = (2..).zip(labels.iter_mut().filter(|label| **label == 0));
        alone.for_each(|(other, label)| *label = other);
        self.evaluate(&Partition::from_labels(&labels)?)
    }

    fn pairwise_proxy(&self) -> Option<ArrayView2<'_, f64>> {
        Some(self.distances.view())
    }

    fn proxy_scale(&self, _size: usize) -> f64 {
        1.0
    }

    fn group_cost(&self, size: usize) -> u64 {
        if self.dear { 8 * (size as u64).pow(3) } else { (size as u64).pow(2) }
    }
}

/// No sum over groups: the worst group counts.
#[derive(Debug)]
struct WorstGroup(WeightSharingError);

impl FitnessFn for WorstGroup {
    fn n_heads(&self) -> usize {
        self.0.n_heads()
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        partition
            .groups()
            .iter()
            .map(|g| self.0.group_error(g))
            .try_fold(0.0, |worst, e| Ok(f64::max(worst, e?)))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn exact_is_brute_force(points in points(1usize..9), space in spaces()) {
        let fitness = fitness_of(&points);
        let front = Exact::default().optimize(&fitness, &space, Run::new(0)).unwrap();
        check_front(&front, &fitness, &space);
        for (i, least) in brute_force(&fitness, &space).into_iter().enumerate() {
            let point = front.get(i + 1);
            prop_assert_eq!(point.is_some(), least.is_some());
            if let (Some(point), Some(least)) = (point, least) {
                prop_assert!(close(point.error, least), "k = {}: {} against {least}", i + 1, point.error);
                prop_assert!(close(plain_error(&points, &point.partition), point.error));
                prop_assert_eq!(point.gap(), Some(0.0));
            }
        }
    }

    #[test]
    fn exact_asks_groups_where_there_are_no_pairs(points in points(2usize..8), space in spaces()) {
        let fitness = Radius(fitness_of(&points).distances().to_owned());
        let front = Exact::default().optimize(&fitness, &space, Run::new(0)).unwrap();
        check_front(&front, &fitness, &space);
        for (i, least) in brute_force(&fitness, &space).into_iter().enumerate() {
            prop_assert!(least.is_none_or(|least| close(front.error(i + 1).unwrap(), least)));
        }
    }

    #[test]
    fn local_search_is_complete_admissible_and_never_below_exact(
        points in points(2usize..12), space in spaces(), seed: u64, rounds in 0usize..6,
    ) {
        let fitness = fitness_of(&points);
        let local = LocalSearch { rounds, ..LocalSearch::default() };
        let front = local.optimize(&fitness, &space, Run::new(seed)).unwrap();
        check_front(&front, &fitness, &space);
        let best = Exact::default().optimize(&fitness, &space, Run::new(0)).unwrap();
        for point in front.iter() {
            let k = point.partition.n_groups();
            let (found, least) = (point.error, best.error(k).unwrap());
            prop_assert!(found >= least || close(found, least), "k = {k}: {found} below {least}");
        }
        prop_assert_eq!(front, local.optimize(&fitness, &space, Run::new(seed)).unwrap());
    }

    #[test]
    fn local_search_serves_any_fitness(points in points(2usize..9), space in spaces(), evaluations in 0u64..400) {
        let distances = fitness_of(&points).distances().to_owned();
        let local = LocalSearch { rounds: 3, evaluations };
        let fitnesses: [Box<dyn FitnessFn>; 3] = [
            Box::new(Radius(distances.clone())),
            Box::new(Hinted(Radius(distances))),
            Box::new(WorstGroup(fitness_of(&points))),
        ];
        for fitness in fitnesses {
            let front = local.optimize(&*fitness, &space, Run::new(1)).unwrap();
            check_front(&front, &*fitness, &space);
            prop_assert_eq!(&front, &local.optimize(&*fitness, &space, Run::new(1)).unwrap());
        }
    }
}

/// Points from a fixed generator, so that a share of optima is a fact and not luck.
fn fixed_points(n: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64 - 0.5
    };
    (0..n).map(|_| (0..8).map(|_| uniform()).collect()).collect()
}

/// On how many k LocalSearch finds the optimum, of how many.
fn optima(
    local: LocalSearch,
    space: &SearchSpace,
    fitness_at: impl Fn(u64) -> Box<dyn FitnessFn>,
) -> (usize, usize) {
    let (mut met, mut all) = (0, 0);
    for seed in 0..8 {
        let fitness = fitness_at(seed);
        let found = local.optimize(&*fitness, space, Run::new(seed)).unwrap();
        let least = brute_force(&*fitness, space);
        met += found.iter().filter(|p| close(p.error, least[p.partition.n_groups() - 1].unwrap())).count();
        all += found.iter().count();
    }
    (met, all)
}

#[test]
fn local_search_finds_most_optima() {
    let pairwise = |n: usize| move |seed| Box::new(fitness_of(&fixed_points(n, seed))) as Box<dyn FitnessFn>;
    let radius = |seed| {
        Box::new(Radius(fitness_of(&fixed_points(8, seed)).distances().to_owned())) as Box<dyn FitnessFn>
    };
    let worst = |seed| Box::new(WorstGroup(fitness_of(&fixed_points(8, seed)))) as Box<dyn FitnessFn>;
    let share = |(met, all): (usize, usize)| met as f64 / all as f64;
    let arbitrary = SearchSpace::arbitrary();
    assert!(share(optima(LocalSearch::default(), &arbitrary, pairwise(9))) >= 0.9);
    assert_eq!(share(optima(LocalSearch::thorough(), &arbitrary, pairwise(9))), 1.0);
    assert_eq!(share(optima(LocalSearch::thorough(), &SearchSpace::equal(), pairwise(8))), 1.0);
    assert!(share(optima(LocalSearch::default(), &arbitrary, radius)) >= 0.7);
    assert!(share(optima(LocalSearch { rounds: 30, ..LocalSearch::default() }, &arbitrary, radius)) >= 0.9);
    assert!(share(optima(LocalSearch { rounds: 30, ..LocalSearch::default() }, &arbitrary, worst)) >= 0.9);
}

/// A proxy that is the error itself finds what there is to find, whatever its scale, and asks for what it scores.
#[test]
fn local_search_searches_by_the_scale_of_a_proxy_and_within_its_budget() {
    let pairs = |n, seed| {
        let distances = fitness_of(&fixed_points(n, seed)).distances().to_owned();
        Pairs { distances, dear: false, spent: AtomicU64::new(0) }
    };
    let few = LocalSearch { evaluations: 0, ..LocalSearch::default() };
    let (met, all) = optima(few, &SearchSpace::arbitrary(), |seed| Box::new(pairs(9, seed)));
    assert!(met as f64 >= 0.9 * all as f64, "{met} of {all}");
    let spent = |evaluations| {
        let fitness = pairs(20, 3);
        let local = LocalSearch { rounds: 2, evaluations };
        let front = local.optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0)).unwrap();
        assert_eq!(front.iter().count(), 20);
        fitness.spent.into_inner()
    };
    let owed = spent(0);
    for evaluations in [1_000, 10_000, 30_000] {
        let spent = spent(evaluations);
        assert!((owed..=owed + evaluations).contains(&spent), "{spent} of {owed} + {evaluations}");
    }
    assert!(spent(30_000) > owed);
    // However dear what is owed, every k has its share.
    let fitness = Pairs { dear: true, ..pairs(40, 3) };
    let front = LocalSearch::default().optimize(&fitness, &SearchSpace::equal(), Run::new(0)).unwrap();
    let owed: u64 = front
        .iter()
        .map(|p| p.partition.n_groups() as u64 * fitness.group_cost(40 / p.partition.n_groups()))
        .sum();
    assert!(owed > 20_000 && fitness.spent.into_inner() > owed);
}

#[test]
fn exact_names_its_limit_and_the_way_out() {
    let fitness = fitness_of(&fixed_points(17, 1));
    let space = SearchSpace::arbitrary();
    let error = Exact::default().optimize(&fitness, &space, Run::new(0)).unwrap_err();
    assert!(matches!(error, Error::TooManyHeads { n_heads: 17, max: 16 }), "{error}");
    assert!(error.to_string().contains("local search"));
    let error = Exact { max_heads: 40 }.optimize(&fitness, &space, Run::new(0)).unwrap_err();
    assert!(matches!(error, Error::Setting { name: "max_heads", .. }), "{error}");
    let whole = WorstGroup(fitness_of(&fixed_points(6, 1)));
    let error = Exact::default().optimize(&whole, &space, Run::new(0)).unwrap_err();
    assert!(matches!(error, Error::NotSeparable { .. }), "{error}");
}

#[test]
fn identical_heads_cost_nothing() {
    let fitness = fitness_of(&vec![vec![1.5, -2.0]; 12]);
    let optimizers: [&dyn Optimizer; 3] =
        [&LocalSearch::default(), &LocalSearch::thorough(), &Exact::default()];
    for optimizer in optimizers {
        for space in [SearchSpace::arbitrary(), SearchSpace::equal()] {
            let front = optimizer.optimize(&fitness, &space, Run::new(3)).unwrap();
            check_front(&front, &fitness, &space);
            assert!(front.iter().all(|p| p.error == 0.0));
        }
    }
}

#[test]
fn observers_stop_every_search() {
    let stop = |_: &Progress<'_>| ControlFlow::Break(());
    let run = Run::new(0).with_observer(&stop);
    let pairs = fitness_of(&fixed_points(12, 2));
    let groups = Radius(pairs.distances().to_owned());
    let optimizers: [&dyn Optimizer; 2] = [&LocalSearch::default(), &Exact::default()];
    for optimizer in optimizers {
        for fitness in [&pairs as &dyn FitnessFn, &groups] {
            for space in [SearchSpace::arbitrary(), SearchSpace::equal()] {
                assert!(matches!(optimizer.optimize(fitness, &space, run), Err(Error::Cancelled)));
            }
        }
    }
}
