//! Low-rank sharing where there is little to go by, what it refuses, and searches over it.
#![cfg(feature = "linalg")]

mod common;

use common::all_partitions;
use common::attention::{
    Shape, inputs, losses, moment, rounding, rows, same_loss, second, sum, whole, with_parts,
};
use ndarray::{Array2, Array3, Axis, s};
use qcqa::fitness::{LowRankError, Residuals};
use qcqa::heads::{Heads, Moment, Pooled, Projection};
use qcqa::model::Rotation;
use qcqa::optimizer::{Exact, LocalSearch};
use qcqa::partition::{Partition, SearchSpace};
use qcqa::pooler::{LowRankPooler, ProcrustesPooler};
use qcqa::{Error, FitnessFn, KvPooler, Optimizer, Run};

const UNRIDGED: LowRankPooler = LowRankPooler { ridge: 0.0 };

const ROTATIONS: [Rotation; 4] = [
    Rotation::None,
    Rotation::HalfSplit { dims: 4 },
    Rotation::Interleaved { dims: 4 },
    Rotation::HalfSplit { dims: 2 },
];

fn labels(labels: &[usize]) -> Partition {
    Partition::from_labels(labels).unwrap()
}

/// The layer measured on other inputs.
fn on(heads: Heads, moment: Array2<f64>) -> Heads {
    heads.with_moment(Moment::new(moment).unwrap()).unwrap()
}

/// Inputs that leave directions unseen: what is found is what is lost, and nothing is out of all bounds.
#[test]
fn singular_moments_are_no_trouble() {
    let d = 10;
    // What a layer norm with a shift puts out: a fixed sum of its numbers is a constant.
    let mut normed = inputs(3, d, 200);
    for mut row in normed.rows_mut() {
        row -= row.mean().unwrap();
        row /= row.mapv(|v| v * v).mean().unwrap().sqrt();
        row.iter_mut().enumerate().for_each(|(i, v)| *v = *v * (1.0 + i as f64) + 0.3 * i as f64);
    }
    let still = Array2::from_elem((7, d), 0.7);
    // And inputs that were all but 0: nothing at all is no moment.
    let hardly = Array2::from_elem((4, d), 1e-150);
    for x in [inputs(1, d, 1), inputs(2, d, 3), normed, still, hardly] {
        for (rotation, pooler) in ROTATIONS.into_iter().zip([UNRIDGED, LowRankPooler::default()].repeat(2)) {
            for biases in [[true; 4], [false; 4]] {
                let shape = Shape { rotation, biases, tokens: None, queries: 2, ..Shape::new(4, 4, d) };
                let heads = on(shape.layer(), moment(&x));
                let (partition, c) = (labels(&[0, 0, 1, 0]), second(&heads, pooler.ridge));
                let pooled = pooler.pool(&heads, &partition).unwrap();
                pooled.check(&heads, &partition).unwrap();
                let expected = sum(&losses(&heads, &partition, &pooled, &c), &[0, 1, 3]);
                let fitness = LowRankError::with_ridge(&heads, pooler.ridge).unwrap();
                let found = fitness.residuals(&[0, 1, 3]).unwrap();
                same_loss(found, expected, rounding(&heads, &c, expected));
                let error = fitness.evaluate(&partition).unwrap();
                assert!((0.0..=2.0 + 1e-9).contains(&error), "{error} {:?} {shape:?}", fitness.energies());
                ProcrustesPooler { ridge: pooler.ridge, rounds: 4 }
                    .pool(&heads, &partition)
                    .unwrap()
                    .check(&heads, &partition)
                    .unwrap();
            }
        }
    }
}

/// Nobody looks, nobody listens, or there is nothing to see: no NaN, and nothing lost of what is not there.
#[test]
fn layers_without_energy_are_no_trouble() {
    let zero = |p: &mut Projection| {
        let (weight, bias) = p.clone().into_parts();
        *p = Projection::new(weight * 0.0, bias.map(|b| b * 0.0)).unwrap();
    };
    for (rotation, tokens) in ROTATIONS.into_iter().zip([None, Some(30)].repeat(2)) {
        for part in 0..4 {
            let shape = Shape { rotation, tokens, biases: [true; 4], ..Shape::new(4, 4, 6) };
            let heads = with_parts(&shape.layer(), |key, value, query, output| match part {
                0 => zero(key),
                1 => zero(value),
                2 => zero(query),
                _ => output.fill(0.0),
            });
            let partition = labels(&[0, 0, 0, 1]);
            for pooler in [&LowRankPooler::default() as &dyn KvPooler, &ProcrustesPooler::default()] {
                pooler.pool(&heads, &partition).unwrap().check(&heads, &partition).unwrap();
            }
            if part == 2 && rotation.dims() > 0 {
                // Keys that nobody looks at are kept as well as may be.
                let pooled = LowRankPooler::default().pool(&heads, &partition).unwrap();
                assert!(rotation.pairs().all(|(a, _)| rows(&pooled.key, 0).row(a).iter().any(|&v| v != 0.0)));
            }
            let fitness = LowRankError::new(&heads).unwrap();
            let Residuals { values, keys } = fitness.energies();
            assert_eq!((values == 0.0, keys == 0.0), (part % 2 == 1, part % 2 == 0), "{part} {rotation:?}");
            assert_eq!(fitness.energy(), Some(1.0));
            let error = fitness.evaluate(&partition).unwrap();
            assert!((1e-3..1.0).contains(&error), "{error}");
        }
    }
}

/// One head that nobody reads costs nothing to anybody, and its own reading stays empty.
#[test]
fn a_silent_head_costs_nothing() {
    for rotation in ROTATIONS {
        let shape = Shape { rotation, ..Shape::new(3, 4, 9) };
        let heads = with_parts(&shape.layer(), |_, _, query, output| {
            let (mut weight, bias) = query.clone().into_parts();
            weight.slice_mut(s![1, .., ..]).fill(0.0);
            *query = Projection::new(weight, bias).unwrap();
            output.slice_mut(s![1, .., ..]).fill(0.0);
        });
        let fitness = LowRankError::with_ridge(&heads, UNRIDGED.ridge).unwrap();
        let (lost, energies) = (fitness.residuals(&[0, 1]).unwrap(), fitness.energies());
        assert!(lost.values <= 1e-12 * energies.values && lost.keys <= 1e-12 * energies.keys);
        let partition = labels(&[0, 0, 1]);
        let pooled = UNRIDGED.pool(&heads, &partition).unwrap();
        let lost = losses(&heads, &partition, &pooled, &second(&heads, 0.0));
        assert!(sum(&lost, &[0, 1, 2]).values <= 1e-9 * energies.values);
        assert!(sum(&lost, &[0, 1, 2]).keys <= 1e-9 * energies.keys);
        assert!(rows(pooled.query.as_ref().unwrap(), 1).iter().all(|&v| v == 0.0));
    }
}

#[test]
fn what_is_no_moment_is_refused() {
    let d = 6;
    let good = moment(&inputs(5, d, 40));
    let spoilt = |at: (usize, usize), value: f64| {
        let mut moment = good.clone();
        moment[at] = value;
        moment[(at.1, at.0)] = value;
        moment
    };
    let mut asymmetric = good.clone();
    asymmetric[[0, 3]] += 1.0;
    let bad = [
        -Array2::eye(d + 1),
        spoilt((1, 1), -1.0),
        spoilt((0, 1), 1e3),
        spoilt((2, 2), 1e308),
        spoilt((d, d), 0.0),
        spoilt((d, d), 4.0),
        asymmetric,
    ];
    let mut seen_late = 0;
    for rotation in ROTATIONS {
        let shape = Shape { rotation, tokens: None, biases: [true; 4], ..Shape::new(3, 4, d) };
        for (i, moment) in bad.iter().enumerate() {
            let moment = match Moment::new(moment.clone()) {
                // All but eigenvalues is seen at once.
                Err(error) => {
                    assert!(matches!(error, Error::Moment { layer: None, .. }), "{i}: {error}");
                    continue;
                }
                Ok(moment) => moment,
            };
            let heads = shape.layer().with_moment(moment).unwrap();
            seen_late += 1;
            let partition = labels(&[0, 0, 1]);
            let refused = [
                LowRankError::with_ridge(&heads, UNRIDGED.ridge).map(|_| ()),
                UNRIDGED.pool(&heads, &partition).map(|_| ()),
                ProcrustesPooler { ridge: 0.0, rounds: 2 }.pool(&heads, &partition).map(|_| ()),
            ];
            for result in refused {
                assert!(matches!(result, Err(Error::Moment { layer: None, .. })), "{i}: {result:?}");
            }
        }
        // The ridge makes up for a hair.
        LowRankError::new(&on(shape.layer(), spoilt((d, d), 1.0 + 1e-9))).unwrap();
    }
    assert_eq!(seen_late, 2 * ROTATIONS.len(), "a negative eigenvalue, and one out of range");
}

#[test]
fn what_does_not_fit_is_refused() {
    let heads = Shape::new(4, 2, 5).layer();
    let bare = Heads::new(heads.key().clone(), heads.value().clone()).unwrap();
    let (three, four) = (Partition::singletons(3).unwrap(), labels(&[0, 0, 1, 1]));
    assert!(matches!(LowRankError::new(&bare), Err(Error::NoQueries)));
    let fitness = LowRankError::new(&heads).unwrap();
    for pooler in [&LowRankPooler::default() as &dyn KvPooler, &ProcrustesPooler::default()] {
        assert!(matches!(pooler.pool(&bare, &four), Err(Error::NoQueries)));
        let error = pooler.pool(&heads, &three).unwrap_err();
        assert!(matches!(error, Error::PartitionSize { expected: 4, found: 3 }));
    }
    let error = fitness.evaluate(&three).unwrap_err();
    assert!(matches!(error, Error::PartitionSize { expected: 4, found: 3 }));
    for members in [&[4][..], &[0, 7]] {
        let head = members[members.len() - 1];
        let refused = |error| matches!(error, Error::HeadOutOfRange { head: h, n_heads: 4 } if h == head);
        assert!(refused(fitness.residuals(members).unwrap_err()));
        assert!(refused(fitness.separable().unwrap().group_error(members).unwrap_err()));
    }
}

/// Output columns may lie in memory in any order.
#[test]
fn outputs_may_lie_anyhow() {
    let heads = Shape { queries: 2, ..Shape::new(3, 4, 5) }.layer();
    let turned = with_parts(&heads, |_, _, _, output| {
        let columns = output.view().permuted_axes([1, 0, 2]).as_standard_layout().into_owned();
        *output = columns.permuted_axes([1, 0, 2]);
        assert!(!output.is_standard_layout());
    });
    let partition = labels(&[0, 1, 0]);
    let [a, b] = [heads, turned].map(|heads| {
        let pooled = LowRankPooler::default().pool(&heads, &partition).unwrap();
        (pooled, LowRankError::new(&heads).unwrap().residuals(&[0, 2]).unwrap())
    });
    assert_eq!(a, b);
}

#[test]
fn searches_run_on_it_unchanged() {
    for (heads, rotation) in [(4, Rotation::None), (5, Rotation::HalfSplit { dims: 2 }), (6, ROTATIONS[1])] {
        let shape = Shape { rotation, seed: heads as u64, ..Shape::new(heads, 4, 12) };
        let fitness = LowRankError::new(&shape.layer()).unwrap();
        let search = |optimizer: &dyn Optimizer| {
            optimizer.optimize(&fitness, &SearchSpace::arbitrary(), Run::new(3)).unwrap()
        };
        let (exact, local) = (search(&Exact::default()), search(&LocalSearch::default()));
        let all = all_partitions(heads);
        for k in 1..=heads {
            let of_k = all.iter().filter(|p| p.n_groups() == k);
            let least = of_k.map(|p| fitness.evaluate(p).unwrap()).fold(f64::INFINITY, f64::min);
            let (best, near) = (exact.error(k).unwrap(), local.error(k).unwrap());
            assert!((best - least).abs() <= 1e-12, "{k}: {best} {least}");
            assert!(near >= best - 1e-12 && near <= 1.5 * best + 1e-12, "{k}: {near} {best}");
        }
        let separable = fitness.separable().unwrap();
        let proxy = separable.pairwise_proxy().unwrap();
        for ((i, j), &distance) in proxy.indexed_iter() {
            let pair = if i == j { 0.0 } else { separable.group_error(&[i.min(j), i.max(j)]).unwrap() };
            assert_eq!(distance, 2.0 * pair);
        }
    }
}

/// What starts a search knows how errors grow with the size of groups: it is the mean of three groups of neighbours where
/// that was measured, and close for any.
#[test]
fn the_proxy_grows_with_groups() {
    let n = 9;
    let fitness = LowRankError::new(&Shape { seed: 4, ..Shape::new(n, 4, 12) }.layer()).unwrap();
    let separable = fitness.separable().unwrap();
    let proxy = separable.pairwise_proxy().unwrap();
    let pairs = |g: &[usize]| {
        let all = g.iter().flat_map(|&i| g.iter().map(move |&j| (i, j))).filter(|(i, j)| i < j);
        all.map(|(i, j)| proxy[[i, j]]).sum::<f64>()
    };
    assert_eq!(separable.proxy_scale(2), 0.5);
    for size in [3, 4] {
        let windows = [0, 3, 6].map(|first| {
            let mut members: Vec<usize> = (first..first + size).map(|i| i % n).collect();
            members.sort();
            members
        });
        let error: f64 = windows.iter().map(|g| separable.group_error(g).unwrap()).sum();
        let distance: f64 = windows.iter().map(|g| pairs(g)).sum();
        assert!((separable.proxy_scale(size) - error / distance).abs() <= 1e-12);
    }
    for bits in 1..1usize << n {
        let members: Vec<usize> = (0..n).filter(|i| bits >> i & 1 == 1).collect();
        let guess = separable.proxy_scale(members.len()) * pairs(&members);
        let error = separable.group_error(&members).unwrap();
        assert!(guess >= 0.7 * error && guess <= 1.4 * error, "{members:?}: {guess} {error}");
    }
    let costs: Vec<u64> = [1, 2, 100, 200].map(|size| separable.group_cost(size)).into();
    assert!(costs.is_sorted() && costs[0] == 1 && costs[3] >= 7 * costs[2], "{costs:?}");
}

/// Splitting a group never loses more, and the heads' order is nothing.
#[test]
fn it_obeys_the_laws_of_a_shared_fit() {
    let shape =
        Shape { rotation: Rotation::HalfSplit { dims: 2 }, biases: [true; 4], ..Shape::new(5, 4, 11) };
    let heads = shape.layer();
    let fitness = LowRankError::new(&heads).unwrap();
    let error = |l: &[usize]| fitness.evaluate(&labels(l)).unwrap();
    let all = error(&[0; 5]);
    for split in 1..16usize {
        let of: Vec<_> = (0..5).map(|i| split >> i & 1).collect();
        assert!(error(&of) <= all + 1e-12);
    }
    assert_eq!(error(&[0, 1, 2, 3, 4]), 0.0);
    let order = [3, 0, 4, 2, 1];
    let moved = with_parts(&heads, |key, value, query, output| {
        for p in [key, value, query] {
            let (weight, bias) = p.clone().into_parts();
            let bias = bias.map(|b| b.select(Axis(0), &order));
            *p = Projection::new(weight.select(Axis(0), &order), bias).unwrap();
        }
        *output = output.select(Axis(0), &order);
    });
    let moved = LowRankError::new(&moved).unwrap().evaluate(&labels(&[1, 0, 0, 1, 0])).unwrap();
    assert!((moved - error(&[0, 0, 1, 1, 0])).abs() <= 1e-12);
    // A share of the layer's energies does not know how large the weights are.
    let large = with_parts(&heads, |_, _, _, output| *output *= 1024.0);
    let large = LowRankError::new(&large).unwrap().evaluate(&labels(&[0; 5])).unwrap();
    assert!((large - all).abs() <= 1e-12);
    let energies = whole(&heads, &second(&heads, 0.01));
    assert!((fitness.energies().values / energies.values - 1.0).abs() <= 1e-9);
    assert!((fitness.energies().keys / energies.keys - 1.0).abs() <= 1e-9);
}

/// The same bits on any number of threads; the layer is large enough for the linear algebra to share out its work.
#[cfg(feature = "rayon")]
#[test]
fn threads_change_nothing() {
    let shape = Shape { rotation: Rotation::HalfSplit { dims: 32 }, ..Shape::new(6, 64, 288) };
    let heads = shape.layer();
    let partition = labels(&[0; 6]);
    let work = || -> (Pooled, Pooled, Vec<f64>) {
        let fitness = LowRankError::new(&heads).unwrap();
        let proxy = fitness.separable().unwrap().pairwise_proxy().unwrap().into_iter().copied();
        let Residuals { values, keys } = fitness.residuals(&[0, 1, 2, 3, 4, 5]).unwrap();
        let errors = proxy.chain([values, keys]).collect();
        let pooled = LowRankPooler::default().pool(&heads, &partition).unwrap();
        (pooled, ProcrustesPooler { rounds: 2, ridge: 0.0 }.pool(&heads, &partition).unwrap(), errors)
    };
    let [one, two, three] = [1, 2, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(work)
    });
    assert!(one == two && one == three);
}

/// Outputs of one layer as a whole have another number of rows than its inputs.
#[test]
fn outputs_need_not_be_as_many_as_inputs() {
    let heads = Shape::new(3, 4, 5).layer();
    let narrow = with_parts(&heads, |_, _, _, output| *output = output.slice(s![.., ..2, ..]).to_owned());
    let partition = labels(&[0, 0, 0]);
    let pooled = UNRIDGED.pool(&narrow, &partition).unwrap();
    assert_eq!(pooled.output.as_ref().map(Array3::dim), Some((3, 2, 4)));
    let lost = sum(&losses(&narrow, &partition, &pooled, &second(&narrow, 0.0)), &[0, 1, 2]);
    let found = LowRankError::with_ridge(&narrow, UNRIDGED.ridge).unwrap().residuals(&[0, 1, 2]).unwrap();
    same_loss(found, lost, rounding(&narrow, &second(&narrow, 0.0), lost));
}
