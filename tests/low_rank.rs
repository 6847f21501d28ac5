//! Low-rank sharing against its plain definition, what it must find and keep, and what it refuses.
#![cfg(feature = "linalg")]

mod common;

use common::attention::{
    Shape, divided, from_first, inputs, losses, map, read_side, rounding, rows, same_loss, second, sum,
    whole, with_parts,
};
use ndarray::{Array1, Array2, Array3, Axis, arr2, s};
use proptest::prelude::*;
use qcqa::fitness::{LowRankError, Residuals};
use qcqa::heads::{Heads, Moment, Pooled, Projection};
use qcqa::model::Rotation;
use qcqa::partition::Partition;
use qcqa::pooler::{LowRankPooler, MeanPooler, ProcrustesPooler};
use qcqa::spec::Spec;
use qcqa::{FitnessFn, KvPooler};

const UNRIDGED: LowRankPooler = LowRankPooler { ridge: 0.0 };

fn one_group(heads: &Heads) -> Partition {
    Partition::one_group(heads.n_heads()).unwrap()
}

/// What a pooler loses of the whole layer, by definition.
fn lost(heads: &Heads, partition: &Partition, pooler: &dyn KvPooler, c: &Array2<f64>) -> Residuals {
    let all: Vec<_> = (0..heads.n_heads()).collect();
    sum(&losses(heads, partition, &pooler.pool(heads, partition).unwrap(), c), &all)
}

/// The mean of what a merged layer puts out more than the source, for each output.
fn mean_error(heads: &Heads, partition: &Partition, pooled: &Pooled, c: &Array2<f64>) -> Array1<f64> {
    let (mean, r) = (c.column(c.ncols() - 1).to_owned(), heads.queries_per_head());
    let (_, output) = read_side(heads, pooled);
    let bias = pooled.output_bias.as_ref().unwrap().mapv(f64::from);
    let mut error = bias - heads.output_bias().unwrap().mapv(f64::from);
    for (q, (old, new)) in heads.output().unwrap().outer_iter().zip(output.outer_iter()).enumerate() {
        error = error - old.mapv(f64::from).dot(&rows(heads.value(), q / r).dot(&mean));
        error = error + new.dot(&rows(&pooled.value, partition.group_of(q / r)).dot(&mean));
    }
    error
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// The residuals are what the pooled tensors lose, and the fitness is the sum of their shares.
    #[test]
    fn residuals_are_what_the_pooled_layer_loses((shape, partition) in divided(), ridged: bool) {
        let heads = shape.layer();
        let pooler = if ridged { LowRankPooler::default() } else { UNRIDGED };
        let (fitness, c) = (LowRankError::with_ridge(&heads, pooler.ridge).unwrap(), second(&heads, pooler.ridge));
        let pooled = pooler.pool(&heads, &partition).unwrap();
        pooled.check(&heads, &partition).unwrap();
        let lost = losses(&heads, &partition, &pooled, &c);
        let energies = whole(&heads, &c);
        same_loss(fitness.energies(), energies, rounding(&heads, &c, Residuals::default()));
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let mut shares = 0.0;
        for members in partition.groups() {
            let (found, expected) = (fitness.residuals(&members).unwrap(), sum(&lost, &members));
            same_loss(found, expected, rounding(&heads, &c, expected));
            let Residuals { values, keys } = fitness.energies();
            shares += share(found.values, values) + share(found.keys, keys);
        }
        let error = fitness.evaluate(&partition).unwrap();
        prop_assert!((error - shares).abs() <= 1e-12);
        prop_assert!((0.0..=fitness.energy().unwrap() + 1e-9).contains(&error));
        if heads.output_bias().is_some() {
            let scale = rounding(&heads, &c, Residuals { values: 0.0, keys: 0.0 }).values.sqrt();
            let error = mean_error(&heads, &partition, &pooled, &c);
            prop_assert!(error.iter().all(|e| e.abs() <= 10.0 * scale), "{error} is more than {scale}");
        }
    }

    /// Heads that stay alone, their queries and outputs are copied bit for bit; there are biases where there were.
    #[test]
    fn heads_alone_are_copied((shape, partition) in divided()) {
        let (heads, r) = (shape.layer(), shape.queries);
        let (all, alone) = (Partition::singletons(shape.heads).unwrap(), |p: &Partition, head| p.sizes()[p.group_of(head)] == 1);
        for partition in [partition, all] {
            for pooler in [&LowRankPooler::default() as &dyn KvPooler, &ProcrustesPooler::default()] {
                let pooled = pooler.pool(&heads, &partition).unwrap();
                let (query, output) = (pooled.query.as_ref().unwrap(), pooled.output.as_ref().unwrap());
                let pairs = [(heads.query().unwrap(), query), (heads.key(), &pooled.key), (heads.value(), &pooled.value)];
                prop_assert!(pairs.iter().all(|(old, new)| old.bias().is_some() == new.bias().is_some()));
                for head in (0..shape.heads).filter(|&head| alone(&partition, head)) {
                    let g = partition.group_of(head);
                    prop_assert_eq!(rows(heads.key(), head), rows(&pooled.key, g));
                    prop_assert_eq!(rows(heads.value(), head), rows(&pooled.value, g));
                    for q in head * r..(head + 1) * r {
                        prop_assert_eq!(rows(heads.query().unwrap(), q), rows(query, q));
                        prop_assert!(heads.output().unwrap().slice(s![q, .., ..]) == output.slice(s![q, .., ..]));
                    }
                }
                prop_assert_eq!(heads.output_bias().is_some(), pooled.output_bias.is_some());
                if partition.n_groups() == shape.heads {
                    prop_assert_eq!(pooled.output_bias.as_ref().map(|b| b.view()), heads.output_bias());
                }
            }
        }
    }

    /// Nothing that shares the same heads loses less: not mean pooling, not orthogonal turns, not the weights alone.
    #[test]
    fn no_other_pooler_loses_less((shape, partition) in divided(), ridge in prop::sample::select(vec![0.0, 0.1])) {
        let heads = shape.layer();
        let c = second(&heads, ridge);
        let best = lost(&heads, &partition, &LowRankPooler { ridge }, &c);
        let white = Shape { tokens: None, ..shape }.layer();
        let weights_only = WeightsOnly(white);
        let procrustes = ProcrustesPooler { ridge, ..ProcrustesPooler::default() };
        for other in [&procrustes as &dyn KvPooler, &MeanPooler, &weights_only] {
            let (loss, rounding) = (lost(&heads, &partition, other, &c), rounding(&heads, &c, best));
            prop_assert!(best.values <= loss.values + rounding.values, "{:?}: {:?} {:?}", other, best, loss);
            prop_assert!(best.keys <= loss.keys + rounding.keys, "{:?}: {:?} {:?}", other, best, loss);
        }
    }

    /// Shared values, and shared keys at each rotated frequency, are as large as those of the group's heads.
    #[test]
    fn shared_rows_keep_their_size((shape, partition) in divided()) {
        let heads = shape.layer();
        let pooled = LowRankPooler::default().pool(&heads, &partition).unwrap();
        let square = |rows: Array2<f64>| rows.mapv(|v| v * v).sum();
        for (g, members) in partition.groups().iter().enumerate() {
            let mean = |p: &Projection, pick: &dyn Fn(Array2<f64>) -> Array2<f64>| {
                members.iter().map(|&head| square(pick(rows(p, head)))).sum::<f64>() / members.len() as f64
            };
            let near = |found: f64, expected: f64| (found - expected).abs() <= 1e-5 * expected;
            prop_assert!(near(square(rows(&pooled.value, g)), mean(heads.value(), &|r| r)));
            for (a, b) in heads.rotation().pairs() {
                let pick = |r: Array2<f64>| r.select(Axis(0), &[a, b]);
                prop_assert!(near(square(pick(rows(&pooled.key, g))), mean(heads.key(), &pick)));
            }
        }
    }

    /// A bias is one more input that is always 1.
    #[test]
    fn a_bias_is_an_input((shape, partition) in divided()) {
        let heads = Shape { biases: [true, true, true, false], ..shape.clone() }.layer();
        let Some(c) = heads.moment() else { return Ok(()) };
        // The constant stands twice among the inputs: as a weight's and as a bias's, which is not there.
        let wide = |p: &Projection| {
            let all: Vec<_> = (0..p.n_heads()).map(|i| rows(p, i).mapv(|v| v as f32)).collect();
            let all: Vec<_> = all.iter().map(|rows| rows.view()).collect();
            Projection::new(ndarray::stack(Axis(0), &all).unwrap(), None).unwrap()
        };
        let (d, twice) = (shape.inputs, |i: usize| i.min(shape.inputs));
        let c = Array2::from_shape_fn((d + 2, d + 2), |(i, j)| c.matrix()[[twice(i), twice(j)]]);
        let output = heads.output().unwrap().to_owned();
        let inputs = Heads::new(wide(heads.key()), wide(heads.value())).unwrap();
        let inputs = inputs.with_queries(wide(heads.query().unwrap()), output).unwrap();
        let inputs = inputs.with_rotation(shape.rotation).unwrap().with_moment(Moment::new(c).unwrap()).unwrap();
        let [a, b] = [&heads, &inputs].map(|heads| LowRankError::with_ridge(heads, UNRIDGED.ridge).unwrap());
        let Residuals { values, keys } = a.energies();
        for members in partition.groups() {
            let (a, b) = (a.residuals(&members).unwrap(), b.residuals(&members).unwrap());
            prop_assert!((a.values - b.values).abs() <= 1e-10 * values);
            // Where a single token was seen there is no covariance, but rounding.
            prop_assert!((a.keys - b.keys).abs() <= 1e-10 * keys + 1e-12 * whole(&heads, &Array2::eye(d + 1)).keys);
        }
    }
}

/// What the weights alone make of a layer.
#[derive(Debug)]
struct WeightsOnly(Heads);

impl KvPooler for WeightsOnly {
    fn spec(&self) -> Spec {
        Spec::new("weights-only")
    }

    fn pool(&self, _: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        UNRIDGED.pool(&self.0, partition)
    }
}

/// All kinds of rotation of heads of 4, with the layer's queries and biases.
fn kinds() -> impl Iterator<Item = Shape> {
    let rotations = [
        Rotation::None,
        Rotation::HalfSplit { dims: 4 },
        Rotation::Interleaved { dims: 4 },
        Rotation::HalfSplit { dims: 2 },
        Rotation::Interleaved { dims: 2 },
    ];
    let kind = |(i, rotation)| {
        let biases = [i % 2 == 0, i != 1, i < 3, i > 2];
        let tokens = (i != 3).then_some(50);
        Shape { seed: i as u64, queries: 1 + i % 2, rotation, biases, tokens, ..Shape::new(4, 4, 9) }
    };
    rotations.into_iter().enumerate().map(kind)
}

/// The residuals of one group of all heads, as found and as lost, in shares of the energies; values, then keys.
fn shares(heads: &Heads, pooler: &dyn KvPooler) -> [f64; 2] {
    let c = second(heads, 0.0);
    let (lost, whole) = (lost(heads, &one_group(heads), pooler, &c), whole(heads, &c));
    [lost.values / whole.values, lost.keys / whole.keys]
}

fn found(heads: &Heads) -> [f64; 2] {
    let fitness = LowRankError::with_ridge(heads, UNRIDGED.ridge).unwrap();
    let all: Vec<_> = (0..heads.n_heads()).collect();
    let (lost, whole) = (fitness.residuals(&all).unwrap(), fitness.energies());
    [lost.values / whole.values, lost.keys / whole.keys]
}

#[test]
fn equal_heads_merge_without_loss() {
    for shape in kinds() {
        let heads = with_parts(&shape.layer(), |key, value, _, _| {
            from_first(key, |_, rows| rows.clone());
            from_first(value, |_, rows| rows.clone());
        });
        for share in found(&heads).into_iter().chain(shares(&heads, &UNRIDGED)) {
            assert!(share <= 1e-9, "{shape:?}: {share}");
        }
    }
}

/// Heads that differ by what attention does not see are found to be one head.
#[test]
fn hidden_turns_are_found() {
    for shape in kinds() {
        let (rotation, dims) = (shape.rotation, shape.rotation.dims());
        // A phase and a gain for each frequency, and any map of the rest.
        let turned = |rotation: Rotation| {
            with_parts(&shape.layer(), |key, value, _, _| {
                from_first(value, |head, rows| map(head as u64, 4).dot(rows));
                from_first(key, |head, rows| {
                    let mut new = rows.clone();
                    for (f, (a, b)) in rotation.pairs().enumerate() {
                        let (gain, phase) = (0.5 + head as f64, (1 + 3 * head + 5 * f) as f64);
                        let turn = arr2(&[[phase.cos(), -phase.sin()], [phase.sin(), phase.cos()]]) * gain;
                        let pair = turn.dot(&rows.select(Axis(0), &[a, b]));
                        new.row_mut(a).assign(&pair.row(0));
                        new.row_mut(b).assign(&pair.row(1));
                    }
                    let rest = map(!(head as u64), 4 - dims).dot(&rows.slice(s![dims.., ..]));
                    new.slice_mut(s![dims.., ..]).assign(&rest);
                    new
                });
            })
        };
        let heads = turned(rotation);
        for share in found(&heads).into_iter().chain(shares(&heads, &UNRIDGED)) {
            assert!(share <= 1e-9, "{shape:?}: {share}");
        }
        // Phases of the other pairing are no freedom.
        if rotation == (Rotation::HalfSplit { dims: 4 }) {
            let others = found(&turned(Rotation::Interleaved { dims: 4 }))[1];
            assert!(others > 0.01, "{others}");
        }
        assert!(shares(&heads, &MeanPooler).iter().all(|&share| share > 0.05));
    }
}

/// Orthogonal turns and phases alone are found by Procrustes too.
#[test]
fn procrustes_finds_turns_that_keep_lengths() {
    let plane = |angle: f64, (a, b): (usize, usize)| {
        let mut turn = Array2::<f64>::eye(4);
        turn.slice_mut(s![a..=b; b - a, a..=b; b - a])
            .assign(&arr2(&[[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]));
        turn
    };
    for shape in kinds() {
        let heads = with_parts(&shape.layer(), |key, value, _, _| {
            from_first(value, |head, rows| plane(head as f64, (0, 1)).dot(&plane(2.0, (1, 3))).dot(rows));
            from_first(key, |head, rows| {
                let pairs = shape.rotation.pairs().chain((shape.rotation.dims() == 2).then_some((2, 3)));
                let turns = pairs.map(|pair| plane(1.0 + head as f64, pair));
                turns.fold(rows.clone(), |rows, turn| turn.dot(&rows))
            });
        });
        for share in shares(&heads, &ProcrustesPooler { rounds: 50, ridge: 0.0 }) {
            assert!(share <= 1e-9, "{shape:?}: {share}");
        }
    }
}

/// Errors of scores and outputs over the tokens themselves, each pair of tokens at eight distances.
#[test]
fn the_losses_are_those_of_scores_and_outputs() {
    for biases in [[true, true, true, false], [false, false, true, true]] {
        let rotation = Rotation::HalfSplit { dims: 2 };
        let shape = Shape { rotation, biases, queries: 2, tokens: Some(12), ..Shape::new(3, 3, 4) };
        let (heads, partition) = (shape.layer(), Partition::from_labels(&[0, 1, 0]).unwrap());
        let pooled = UNRIDGED.pool(&heads, &partition).unwrap();
        let (query, output) = read_side(&heads, &pooled);
        let x = ndarray::concatenate![Axis(1), inputs(shape.seed, 4, 12), Array2::ones((12, 1))];
        let turn = |y: Array2<f64>, angle: f64| {
            let (a, b) = (y.column(0).to_owned(), y.column(1).to_owned());
            let mut y = y;
            y.column_mut(0).assign(&(&a * angle.cos() - &b * angle.sin()));
            y.column_mut(1).assign(&(&b * angle.cos() + &a * angle.sin()));
            y
        };
        let mut lost = Residuals::default();
        for q in [0, 1, 4, 5] {
            let (head, group) = (q / 2, partition.group_of(q / 2));
            let read = |p: &Projection, i: usize| x.dot(&rows(p, i).t());
            let of = |o: &Array3<f64>| o.slice(s![q, .., ..]).to_owned();
            let old = read(heads.value(), head).dot(&of(&heads.output().unwrap().mapv(f64::from)).t());
            let mut error = old - read(&pooled.value, group).dot(&of(&output).t());
            if biases[3] {
                // The mean is what the output bias gives back.
                error = &error - &error.mean_axis(Axis(0)).unwrap();
            }
            lost.values += error.mapv(|e| e * e).sum() / 12.0;
            let eighths = (0..8).map(|i| f64::from(i) * std::f64::consts::FRAC_PI_4);
            for angle in eighths {
                let scores = |query, key: Array2<f64>| turn(query, angle).dot(&key.t());
                let old = scores(read(heads.query().unwrap(), q), read(heads.key(), head));
                let new = scores(read(query, q), read(&pooled.key, group));
                let mut error = old - new;
                // What is the same for all keys cancels in the softmax, but only of the part that nothing rotates.
                let last = |p: &Projection, i: usize| read(p, i).slice(s![.., 2..]).to_owned();
                let unrotated = last(heads.query().unwrap(), q).dot(&last(heads.key(), head).t())
                    - last(query, q).dot(&last(&pooled.key, group).t());
                error = error - unrotated.mean_axis(Axis(1)).unwrap().insert_axis(Axis(1));
                lost.keys += error.mapv(|e| e * e).sum() / (8.0 * 144.0);
            }
        }
        let residuals = LowRankError::with_ridge(&heads, UNRIDGED.ridge).unwrap().residuals(&[0, 2]).unwrap();
        same_loss(residuals, lost, rounding(&heads, &second(&heads, 0.0), lost));
    }
}
