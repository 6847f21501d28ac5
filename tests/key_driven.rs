//! Key-driven grouping: sizes by averaged norms of keys, and groups found under perturbed distances, against their definitions.

mod common;

use std::sync::Arc;

use common::{all_partitions, integer_layer, layer, model, plain_wse};
use ndarray::{Array2, array};
use proptest::prelude::*;
use qcqa::budget::Budget;
use qcqa::fitness::{FITNESS, FitnessKind, PerturbedSharing, WeightSharingError};
use qcqa::grouping::{DynamicKeyNorm, GROUPINGS, KeyNorm};
use qcqa::heads::{Heads, KeyEnergies};
use qcqa::optimizer::{Exact, OPTIMIZERS};
use qcqa::partition::{Partition, SearchSpace};
use qcqa::pipeline::{Compress, Preset, Search};
use qcqa::spec::Spec;
use qcqa::{Error, FitnessFn, Grouping, Optimizer, Run};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const PRINT: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn energies(rows: Array2<f64>) -> KeyEnergies {
    KeyEnergies::new(rows).unwrap()
}

/// A layer whose keys have these norms on each window.
fn with_norms(norms: &Array2<f64>) -> Heads {
    let squares = energies(norms.mapv(|norm| norm * norm));
    layer(3, norms.ncols(), 2, 5, true).with_key_energies(squares).unwrap()
}

/// The exponential average with every weight written out: α (1 − α)^(windows after it), of the first (1 − α)^(W − 1).
fn slow_average(norms: &Array2<f64>, alpha: f64) -> Vec<f64> {
    let last = norms.nrows() - 1;
    let weight = |w: usize| (1.0 - alpha).powi((last - w) as i32) * if w == 0 { 1.0 } else { alpha };
    let average = |head: usize| (0..=last).map(|w| weight(w) * norms[[w, head]]).sum();
    (0..norms.ncols()).map(average).collect()
}

/// The perturbed distances by their formula, from numbers drawn as the documentation says.
fn slow_distances(heads: &Heads, noise: PerturbedSharing, layer: usize) -> Array2<f64> {
    let n = heads.n_heads();
    let pair = |i: usize, j: usize| {
        let labels: Vec<usize> = (0..n).map(|head| if head == j { i } else { head }).collect();
        // Two heads in one group cost half of their squared distance.
        2.0 * plain_wse(heads, &Partition::from_labels(&labels).unwrap())
    };
    let mut distances = Array2::zeros((n, n));
    (0..n).for_each(|i| (0..i).for_each(|j| distances[[i, j]] = pair(i, j)));
    let mean = distances.sum() / (n * (n - 1) / 2).max(1) as f64;
    let mut rng = ChaCha8Rng::seed_from_u64(Run::new(noise.seed).fork(layer as u64).seed());
    let mut found = Array2::zeros((n, n));
    for i in 0..n {
        for j in i + 1..n {
            let (radius, turn) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
            let normal = (-2.0 * radius.ln()).sqrt() * (2.0 * std::f64::consts::PI * turn).cos();
            let distance = (distances[[j, i]] + noise.scale * mean * normal).max(0.0);
            (found[[i, j]], found[[j, i]]) = (distance, distance);
        }
    }
    found
}

/// `Σ_g Σ_{i,j∈g} D_ij / 2|g|`.
fn by_pairs(distances: &Array2<f64>, partition: &Partition) -> f64 {
    let of = |group: &Vec<usize>| {
        let pairs = group.iter().flat_map(|&i| group.iter().map(move |&j| [i, j]));
        pairs.map(|pair| distances[pair]).sum::<f64>() / (2 * group.len()) as f64
    };
    partition.groups().iter().map(of).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn averages_are_exponential(
        (windows, heads) in (1usize..40, 1usize..9), alpha in 0.001f64..=1.0, seed: u64, k in 1usize..9,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let norms = Array2::from_shape_simple_fn((windows, heads), || rng.random_range(0.0..10.0));
        let rule = DynamicKeyNorm { smoothing: alpha };
        let heads = with_norms(&norms);
        let found = rule.norms(heads.key_energies().unwrap()).unwrap();
        let expected = slow_average(&norms, alpha);
        for (found, expected) in found.iter().zip(&expected) {
            prop_assert!((found - expected).abs() <= 1e-9 * expected.max(1e-3), "{found} {expected}");
        }
        let k = k.min(expected.len());
        let partition = rule.group(&heads, k).unwrap().unwrap();
        prop_assert_eq!(partition, KeyNorm::partition(&found, k).unwrap());
    }

    #[test]
    fn perturbed_errors_are_their_definition(
        seed: u64, noise: u64, scale in 0.0f64..2.0, index in 0usize..5, labels in prop::collection::vec(0usize..4, 1..9), bias: bool,
    ) {
        let heads = layer(seed, labels.len(), 3, 40, bias);
        let layers = (0..=index).map(|_| heads.clone());
        let kind = PerturbedSharing { scale, seed: noise };
        let fitness = kind.of(&model(layers), index).unwrap();
        let partition = Partition::from_labels(&labels).unwrap();
        let expected = by_pairs(&slow_distances(&heads, kind, index), &partition);
        let found = fitness.evaluate(&partition).unwrap();
        prop_assert!((found - expected).abs() <= 1e-5 * expected.max(1e-3), "{found} {expected}");
    }

    #[test]
    fn without_noise_it_is_the_weight_sharing_error(seed: u64, noise: u64, n in 1usize..8) {
        let heads = layer(seed, n, 2, 30, true);
        let plain = WeightSharingError::new(&heads).unwrap();
        let none = PerturbedSharing { scale: 0.0, seed: noise }.of(&model([heads]), 0).unwrap();
        prop_assert_eq!(none.energy(), plain.energy());
        for partition in all_partitions(n) {
            prop_assert_eq!(none.evaluate(&partition).unwrap(), plain.evaluate(&partition).unwrap());
        }
    }

    #[test]
    fn distances_stay_distances(seed: u64, scale in 0.0f64..1e6, n in 1usize..12) {
        let plain = WeightSharingError::new(&layer(seed, n, 2, 9, false)).unwrap().distances().to_owned();
        let found = PerturbedSharing { scale, seed }.perturbed(&plain, 0).unwrap();
        prop_assert_eq!(&found, &found.t());
        prop_assert!(found.iter().all(|&d| d >= 0.0 && d.is_finite()) && found.diag().iter().all(|&d| d == 0.0));
    }
}

#[test]
fn later_windows_count_more() {
    // Norms 2 and 6 on the first window, 10 and 6 on the second.
    let norms = array![[2.0, 6.0], [10.0, 6.0]];
    let average = |smoothing, norms: &Array2<f64>| {
        DynamicKeyNorm { smoothing }.norms(&energies(norms.mapv(|n| n * n))).unwrap()
    };
    assert_eq!(average(0.5, &norms), [6.0, 6.0]);
    assert_eq!(average(0.25, &norms), [4.0, 6.0]);
    assert_eq!(average(1.0, &norms), [10.0, 6.0], "the last window alone");
    let reversed = array![[10.0, 6.0], [2.0, 6.0]];
    assert_eq!(average(0.25, &reversed), [8.0, 6.0], "the order is part of it: it is no mean");
}

#[test]
fn groups_follow_the_averaged_norms() {
    let norms = array![[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 5.0, 5.0]];
    let groups = |smoothing| {
        DynamicKeyNorm { smoothing }.group(&with_norms(&norms), 2).unwrap().unwrap().groups().clone()
    };
    // Runs weigh 2 and 2.8, of four heads 1.67 and 2.33; then 2 and 10.
    assert_eq!(groups(0.1), [vec![0, 1], vec![2, 3]]);
    assert_eq!(groups(1.0), [vec![0], vec![1, 2, 3]]);
}

#[test]
fn energies_that_are_missing_are_asked_for() {
    let rule = GROUPINGS.by_name("key-norm-ema").unwrap();
    let heads = layer(1, 4, 2, 3, false);
    let message = |heads: &Heads| match rule.group(heads, 2) {
        Err(error @ Error::KeyEnergies(_)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(message(&heads).contains("give a calibration text"), "{}", message(&heads));
    let moment = qcqa::heads::Moment::new(Array2::eye(4)).unwrap();
    let old = heads.clone().with_moment(moment).unwrap();
    assert!(message(&old).contains("not among these moments: measure them again"), "{}", message(&old));
    let compress = Compress::new(Preset::Dgqa).budget(Budget::Fraction(0.5));
    assert!(matches!(compress.plan(&model([heads]), Run::new(0)), Err(Error::KeyEnergies(_))));
}

#[test]
fn hostile_energies_and_settings_are_refused() {
    for bad in [f64::NAN, f64::INFINITY, -1e-300] {
        assert!(matches!(KeyEnergies::new(array![[1.0, bad]]), Err(Error::KeyEnergies(_))), "{bad}");
    }
    for shape in [(0, 3), (3, 0)] {
        assert!(matches!(KeyEnergies::new(Array2::zeros(shape)), Err(Error::Shape { .. })), "{shape:?}");
    }
    let heads = layer(1, 4, 2, 3, false);
    let other = heads.clone().with_key_energies(energies(array![[1.0, 2.0, 3.0]]));
    assert!(matches!(other, Err(Error::Shape { .. })));
    let known = with_norms(&array![[1.0, 2.0]]);
    for smoothing in [0.0, -0.1, 1.1, f64::NAN, f64::INFINITY] {
        let rule = DynamicKeyNorm { smoothing };
        assert!(
            matches!(rule.group(&known, 1), Err(Error::Setting { name: "smoothing", .. })),
            "{smoothing}"
        );
        assert!(GROUPINGS.make(&rule.spec()).is_err(), "{smoothing}");
    }
    for scale in [-0.1, 1.1e6, f64::NAN, f64::INFINITY] {
        let kind = PerturbedSharing { scale, seed: 0 };
        let refused = kind.of(&model([heads.clone()]), 0);
        assert!(matches!(refused, Err(Error::Setting { name: "scale", .. })), "{scale}");
        assert!(FITNESS.make(&kind.spec()).is_err(), "{scale}");
    }
    let words = Spec::new("pgqa").with("seed", -0.5);
    assert!(matches!(FITNESS.make(&words), Err(Error::Setting { .. })));
    let flat = PerturbedSharing::default().perturbed(&Array2::zeros((2, 3)), 0);
    assert!(matches!(flat, Err(Error::Shape { .. })));
    // All heads are one, or there is but one: nothing to be perturbed.
    for n in [1, 5] {
        let nothing = Array2::zeros((n, n));
        assert_eq!(PerturbedSharing::default().perturbed(&nothing, 0).unwrap(), nothing);
    }
}

/// The noise is standard normal, and depends on seed and layer alone.
#[test]
fn noise_is_normal_and_seeded() {
    let n = 120;
    let ones = Array2::from_shape_fn((n, n), |(i, j)| f64::from(u8::from(i != j)));
    let noise =
        |seed: u64, layer: usize| PerturbedSharing { scale: 0.1, seed }.perturbed(&ones, layer).unwrap();
    assert_eq!(noise(4, 2), noise(4, 2));
    assert_ne!(noise(4, 2), noise(5, 2));
    assert_ne!(noise(4, 2), noise(4, 3));
    let (found, pairs) = (noise(1, 0), (n * (n - 1) / 2) as f64);
    let numbers: Vec<f64> =
        (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|at| (found[at] - 1.0) / 0.1).collect();
    let moment = |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / pairs;
    // Four standard errors each: 1, √2, √15 and √96 over √7140.
    assert!(moment(1).abs() < 0.05, "{}", moment(1));
    assert!((moment(2) - 1.0).abs() < 0.07, "{}", moment(2));
    assert!(moment(3).abs() < 0.19, "{}", moment(3));
    assert!((moment(4) - 3.0).abs() < 0.47, "{}", moment(4));
}

#[test]
fn every_optimizer_searches_under_noise() {
    let source = model([layer(8, 7, 3, 12, false)]);
    let fitness = PerturbedSharing { scale: 0.3, seed: 5 }.of(&source, 0).unwrap();
    let best = Exact::default().optimize(fitness.as_ref(), &SearchSpace::arbitrary(), Run::new(0)).unwrap();
    let all = all_partitions(7);
    for k in 1..=7 {
        let of_k = all.iter().filter(|p| p.n_groups() == k);
        let least = of_k.map(|p| fitness.evaluate(p).unwrap()).fold(f64::INFINITY, f64::min);
        assert!((best.get(k).unwrap().error - least).abs() <= 1e-12 * least.max(1.0), "{k}");
        for name in OPTIMIZERS.names() {
            let optimizer = OPTIMIZERS.by_name(name).unwrap();
            let front = optimizer.optimize(fitness.as_ref(), &SearchSpace::arbitrary(), Run::new(0)).unwrap();
            let point = front.get(k).unwrap();
            assert!(
                point.error >= least - 1e-9 && point.error <= 1.1 * least + 1e-9,
                "{name} {k}: {point:?}"
            );
        }
    }
}

/// What the presets are, and what plans say of them.
#[test]
fn presets_compose_them() {
    let heads = with_norms(&array![[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 20.0, 20.0]]);
    let source = qcqa::heads::InMemory::new(vec![heads]).unwrap().with_calibration(PRINT);
    let plan = |preset: Preset| Compress::new(preset).plan(&source, Run::new(0)).unwrap();
    let dgqa = plan(Preset::Dgqa);
    assert_eq!(
        (dgqa.method.name.as_str(), dgqa.method.search[0].to_string()),
        ("dgqa", "key-norm-ema (smoothing 0.1)".into())
    );
    assert_eq!(dgqa.method.calibration.as_deref(), Some(PRINT), "its norms decided");
    assert_eq!(dgqa.layers[0].groups.groups(), [vec![0], vec![1, 2, 3]]);
    let pgqa = plan(Preset::Pgqa);
    assert_eq!(pgqa.method.fitness.to_string(), "pgqa (scale 0.1, seed 0)");
    assert_eq!((pgqa.method.calibration, pgqa.layers[0].groups.sizes()), (None, vec![2, 2]));
    let last = Search::Grouping(Arc::new(DynamicKeyNorm { smoothing: 1.0 }));
    let custom =
        Compress::custom(last, Arc::new(PerturbedSharing::default()), Arc::new(qcqa::pooler::MeanPooler));
    let both = custom.plan(&source, Run::new(0)).unwrap();
    assert_eq!(both.method.search[0].to_string(), "key-norm-ema (smoothing 1)");
}

/// Groups of whole numbers under the noise of seed 0: a change of these moves results.
#[test]
fn seeded_groups_stay_as_they_are() {
    let source = model([integer_layer(1, 8, 2, 6), integer_layer(2, 8, 2, 6)]);
    let groups = |compress: Compress<'_>| {
        let plan = compress.plan(&source, Run::new(0)).unwrap();
        plan.groups().map(Partition::groups).collect::<Vec<_>>()
    };
    let noisy = |scale| Compress::new(Preset::Pgqa).fitness(PerturbedSharing { scale, seed: 0 });
    let [first, second] = [[[0, 7], [1, 2], [3, 6], [4, 5]], [[0, 2], [1, 6], [3, 5], [4, 7]]];
    assert_eq!(groups(noisy(0.5)), [first, second]);
    assert_ne!(groups(noisy(0.0)), [first, second]);
    assert_eq!(groups(noisy(0.0)), groups(Compress::new(Preset::QcqaEc)));
}
