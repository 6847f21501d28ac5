//! The paper's stage 1: complete, admissible, honest, ordered and reproducible fronts.

mod common;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{all_partitions, integer_layer, layer, plain_wse};
use proptest::prelude::*;
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::grouping::UniformGqa;
use qcqa::heads::Heads;
use qcqa::optimizer::Nsga2;
use qcqa::partition::{Cardinality, Partition, SearchSpace};
use qcqa::{Error, FitnessFn, Optimizer, Progress, Result, Run};

const SHORT: Nsga2 = Nsga2 { population: 20, generations: 10, crossover: 0.9 };

fn search(heads: &Heads, optimizer: Nsga2, space: SearchSpace, seed: u64) -> Front {
    let fitness = WeightSharingError::new(heads).unwrap();
    optimizer.optimize(&fitness, &space, Run::new(seed)).unwrap()
}

fn any_space() -> impl Strategy<Value = SearchSpace> {
    let limit = || prop::option::of(1usize..8);
    let filled = prop::option::of(100usize..250);
    (prop::bool::ANY, limit(), limit(), filled).prop_map(|(equal, max_groups, max_group_size, max_filled)| {
        let cardinality = if equal { Cardinality::Equal } else { Cardinality::Arbitrary };
        SearchSpace { cardinality, max_groups, max_group_size, max_filled }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn its_front_is_complete_admissible_and_honest(seed: u64, n in 1usize..17, space in any_space()) {
        let heads = layer(seed, n, 2, 5, false);
        let front = search(&heads, SHORT, space, seed);
        let ks: Vec<_> = front.iter().map(|p| p.partition.n_groups()).collect();
        prop_assert_eq!(ks, space.group_counts(n).unwrap(), "a point for every k of the space");
        for point in front.iter() {
            prop_assert!(space.admits(&point.partition), "{:?}", point.partition);
            let expected = plain_wse(&heads, &point.partition);
            prop_assert!((point.error - expected).abs() <= 1e-6 * expected);
        }
    }

    #[test]
    fn arbitrary_beats_equal_beats_neighbours_and_falls(seed: u64, n in prop::sample::select(vec![4usize, 6, 8, 12])) {
        let heads = layer(seed, n, 2, 5, false);
        let arbitrary = search(&heads, SHORT, SearchSpace::arbitrary(), seed);
        let equal = search(&heads, SHORT, SearchSpace::equal(), seed);
        let fitness = WeightSharingError::new(&heads).unwrap();
        for k in SearchSpace::equal().group_counts(n).unwrap() {
            let neighbours = UniformGqa::partition(n, k).unwrap().unwrap();
            prop_assert!(equal.error(k) <= Some(fitness.evaluate(&neighbours).unwrap()));
            prop_assert!(arbitrary.error(k) <= equal.error(k));
        }
        for k in 1..n {
            prop_assert!(arbitrary.error(k + 1) <= arbitrary.error(k), "the front is monotone");
        }
    }
}

#[test]
fn small_layers_are_solved() {
    // 203 partitions of six heads: the search sees them all.
    for seed in 0..5 {
        let heads = layer(seed, 6, 2, 5, false);
        let fitness = WeightSharingError::new(&heads).unwrap();
        for space in [SearchSpace::arbitrary(), SearchSpace::equal()] {
            let front = search(&heads, Nsga2::default(), space, seed);
            for partition in all_partitions(6).iter().filter(|p| space.admits(p)) {
                let error = fitness.evaluate(partition).unwrap();
                assert!(front.error(partition.n_groups()).unwrap() <= error, "{partition:?}");
            }
        }
    }
}

#[test]
fn hidden_groups_are_found() {
    // Four prototypes, four noisy copies of each, shuffled by a stride.
    let prototypes = layer(7, 4, 4, 30, false);
    let noise = layer(8, 16, 4, 30, false);
    let copy = |p: &qcqa::heads::Projection, e: &qcqa::heads::Projection| {
        let order: Vec<_> = (0..16).map(|i| i % 4).collect();
        let weight = p.weight().select(ndarray::Axis(0), &order) + &e.weight() * 0.1;
        qcqa::heads::Projection::new(weight, None).unwrap()
    };
    let heads =
        Heads::new(copy(prototypes.key(), noise.key()), copy(prototypes.value(), noise.value())).unwrap();
    let hidden = Partition::from_labels(&(0..16).map(|i| i % 4).collect::<Vec<_>>()).unwrap();
    for space in [SearchSpace::arbitrary(), SearchSpace::equal()] {
        assert_eq!(search(&heads, Nsga2::default(), space, 3).get(4).unwrap().partition, hidden);
    }
}

#[test]
fn the_same_seed_gives_the_same_front() {
    let heads = layer(11, 12, 3, 8, false);
    let once = search(&heads, SHORT, SearchSpace::arbitrary(), 5);
    assert_eq!(once, search(&heads, SHORT, SearchSpace::arbitrary(), 5));
    let others = (6..12).map(|seed| search(&heads, SHORT, SearchSpace::arbitrary(), seed));
    assert!(others.into_iter().any(|front| front != once), "the seed matters");
}

#[test]
fn pinned_on_whole_numbers() {
    // Exact in any order of summation, on any machine. A change here is value-breaking: say so in CHANGELOG.
    let front = search(&integer_layer(1, 8, 2, 3), SHORT, SearchSpace::arbitrary(), 2024);
    let found: Vec<_> = front.iter().map(|p| format!("{:?}", p.partition)).collect();
    assert_eq!(found, PINNED);
}

const PINNED: [&str; 8] = [
    "Partition[[0, 1, 2, 3, 4, 5, 6, 7]]",
    "Partition[[0, 1, 2, 4], [3, 5, 6, 7]]",
    "Partition[[0, 1], [2, 4, 6], [3, 5, 7]]",
    "Partition[[0, 1], [2, 6], [3, 5, 7], [4]]",
    "Partition[[0], [1], [2, 6], [3, 5, 7], [4]]",
    "Partition[[0], [1], [2, 6], [3, 5], [4], [7]]",
    "Partition[[0], [1], [2], [3, 5], [4], [6], [7]]",
    "Partition[[0], [1], [2], [3], [4], [5], [6], [7]]",
];

#[test]
fn an_observer_sees_every_generation_and_can_stop() {
    let heads = layer(1, 8, 2, 5, false);
    let fitness = WeightSharingError::new(&heads).unwrap();
    let seen = AtomicU32::new(0);
    let count = |progress: &Progress<'_>| {
        assert_eq!((progress.stage, progress.total), ("nsga2", 10));
        seen.fetch_add(1, Ordering::Relaxed);
        ControlFlow::Continue(())
    };
    let run = Run::new(0).with_observer(&count);
    SHORT.optimize(&fitness, &SearchSpace::arbitrary(), run).unwrap();
    assert!(seen.into_inner() >= 11);
    let stop = |_: &Progress<'_>| ControlFlow::Break(());
    let stopped = SHORT.optimize(&fitness, &SearchSpace::equal(), Run::new(0).with_observer(&stop));
    assert!(matches!(stopped, Err(Error::Cancelled)));
}

#[test]
fn settings_out_of_range_are_named() {
    let fitness = WeightSharingError::new(&layer(1, 4, 2, 5, false)).unwrap();
    for (bad, name) in [
        (Nsga2 { population: 1, ..SHORT }, "population"),
        (Nsga2 { crossover: f64::NAN, ..SHORT }, "crossover"),
        (Nsga2 { crossover: 1.5, ..SHORT }, "crossover"),
    ] {
        match bad.optimize(&fitness, &SearchSpace::equal(), Run::new(0)) {
            Err(Error::Setting { name: found, .. }) => assert_eq!(found, name),
            other => panic!("{other:?}"),
        }
    }
}

/// A fitness that goes wrong for one number of groups.
#[derive(Debug)]
struct Broken(f64);

impl FitnessFn for Broken {
    fn n_heads(&self) -> usize {
        5
    }
    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        Ok(if partition.n_groups() == 3 { self.0 } else { 1.0 })
    }
}

#[test]
fn a_fitness_that_is_no_number_is_refused_where_it_enters() {
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        let result = SHORT.optimize(&Broken(bad), &SearchSpace::arbitrary(), Run::new(0));
        assert!(matches!(result, Err(Error::InvalidFitness { k: 3, .. })), "{result:?}");
    }
}
