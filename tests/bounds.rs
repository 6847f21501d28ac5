//! Lower bounds never above the optimum; pairs of heads against brute force.

use ndarray::Array2;
use proptest::prelude::*;
use qcqa::fitness::WeightSharingError;
use qcqa::optimizer::{Exact, attach_bounds, nearest_bounds};
use qcqa::partition::{Cardinality, SearchSpace};
use qcqa::{Optimizer, Run, ndarray};

fn fitness_of(points: &[Vec<f64>]) -> WeightSharingError {
    let square = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    let n = points.len();
    let distances = Array2::from_shape_fn((n, n), |(i, j)| square(&points[i.min(j)], &points[i.max(j)]));
    WeightSharingError::from_distances(distances, 1.0).unwrap()
}

/// Heads in few dimensions (low rank), in many (nearly equal distances), and in clumps.
fn points() -> impl Strategy<Value = Vec<Vec<f64>>> {
    let clumped = (2usize..11, 1usize..12).prop_flat_map(|(n, d)| {
        let noise = prop::collection::vec(prop::collection::vec(-1.0..1.0, d), n);
        (noise, prop::collection::vec(0usize..3, n), prop_oneof![Just(0.0), Just(5.0), Just(1000.0)])
    });
    clumped.prop_map(|(noise, clumps, far)| {
        let moved = |(mut x, clump): (Vec<f64>, usize)| {
            x[0] += far * clump as f64;
            x
        };
        noise.into_iter().zip(clumps).map(moved).collect()
    })
}

fn spaces() -> impl Strategy<Value = SearchSpace> {
    let cardinality = prop_oneof![Just(Cardinality::Arbitrary), Just(Cardinality::Equal)];
    (cardinality, prop::option::of(1usize..6), prop::option::of(1usize..9)).prop_map(
        |(cardinality, max_group_size, max_groups)| SearchSpace {
            cardinality,
            max_group_size,
            max_groups,
            ..SearchSpace::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_bound_is_above_the_optimum(points in points(), space in spaces()) {
        let fitness = fitness_of(&points);
        let optimum = Exact::default().optimize(&fitness, &space, Run::new(0)).unwrap();
        let nearest = nearest_bounds(fitness.distances(), &space).unwrap();
        for point in optimum.iter() {
            let k = point.partition.n_groups();
            prop_assert!(nearest[k - 1] <= point.error, "nearest, k = {k}");
            #[cfg(feature = "linalg")]
            prop_assert!(qcqa::optimizer::spectral_bounds(fitness.distances()).unwrap()[k - 1] <= point.error, "spectral, k = {k}");
        }
        // A front that is deliberately poor shows bounds that are not cut at the error.
        let mut poor = qcqa::front::Front::new(&fitness).unwrap();
        for point in optimum.iter().filter(|p| p.error > 0.0) {
            poor.offer(&point.partition, 2.0 * point.error).unwrap();
        }
        attach_bounds(&mut poor, &fitness, &space).unwrap();
        for point in poor.iter() {
            let k = point.partition.n_groups();
            let (bound, least) = (point.lower_bound.expect("every point has one"), optimum.error(k).unwrap());
            prop_assert!(bound <= least, "k = {k}: {bound} above {least}");
            if [1, points.len() - 1].contains(&k) && space.cardinality == Cardinality::Arbitrary {
                prop_assert!(bound >= least * (1.0 - 1e-9), "k = {k} is known exactly");
            }
        }
    }
}

#[cfg(feature = "matching")]
proptest! {
    #[test]
    fn pairs_of_heads_are_optimal_and_certified(points in points()) {
        let points = &points[..points.len() / 2 * 2];
        let fitness = fitness_of(points);
        let k = points.len() / 2;
        let space = SearchSpace::equal();
        let mut found = qcqa::optimizer::LocalSearch::default().optimize(&fitness, &space, Run::new(0)).unwrap();
        let least = Exact::default().optimize(&fitness, &space, Run::new(0)).unwrap().error(k).unwrap();
        prop_assert!((found.error(k).unwrap() - least).abs() <= 1e-12 * least);
        attach_bounds(&mut found, &fitness, &space).unwrap();
        prop_assert!(found.get(k).unwrap().lower_bound.unwrap() >= least * (1.0 - 1e-12));
    }
}

#[test]
fn bounds_refuse_what_is_no_distance_matrix() {
    let space = SearchSpace::arbitrary();
    assert!(nearest_bounds(Array2::zeros((2, 3)).view(), &space).is_err());
    assert!(nearest_bounds(Array2::from_elem((2, 2), f64::NAN).view(), &space).is_err());
    assert!(nearest_bounds(Array2::zeros((0, 0)).view(), &space).is_err());
    let mut front = qcqa::front::Front::new(&fitness_of(&[vec![0.0], vec![1.0]])).unwrap();
    assert!(attach_bounds(&mut front, &fitness_of(&[vec![0.0], vec![1.0], vec![2.0]]), &space).is_err());
}
