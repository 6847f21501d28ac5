//! The weight-sharing error against its plain definition, and the laws it obeys.

mod common;

use approx::assert_relative_eq;
use common::{integer_layer, layer, plain_wse};
use ndarray::{Array2, Array3, Axis, s};
use proptest::prelude::*;
use qcqa::fitness::WeightSharingError;
use qcqa::heads::{HeadRows, Heads, Projection};
use qcqa::partition::Partition;
use qcqa::{Error, FitnessFn};

fn wse(heads: &Heads, partition: &Partition) -> f64 {
    WeightSharingError::new(heads).unwrap().evaluate(partition).unwrap()
}

/// The layer with its heads in another order.
fn reordered(heads: &Heads, order: &[usize]) -> Heads {
    let select = |p: &Projection| {
        Projection::new(p.weight().select(Axis(0), order), p.bias().map(|b| b.select(Axis(0), order)))
            .unwrap()
    };
    Heads::new(select(heads.key()), select(heads.value())).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_equals_the_plain_definition(
        seed: u64, labels in prop::collection::vec(0usize..5, 2..12), h in 1usize..6, d in 1usize..700, bias: bool,
    ) {
        let heads = layer(seed, labels.len(), h, d, bias);
        let partition = Partition::from_labels(&labels).unwrap();
        let expected = plain_wse(&heads, &partition);
        prop_assert!((wse(&heads, &partition) - expected).abs() <= 1e-6 * expected);
    }

    #[test]
    fn close_heads_lose_no_digits(seed: u64, labels in prop::collection::vec(0usize..3, 2..10), apart in -4i32..=0) {
        // All heads are one head plus noise 10^apart times its size: down to 1e-4, where f32 sums know nothing.
        let (h, d) = (4, 300);
        let one = layer(seed, 1, h, d, false);
        let noise = layer(!seed, labels.len(), h, d, false);
        let near = |one: &Projection, noise: &Projection| {
            Projection::new(&one.weight() + &(&noise.weight() * 10f32.powi(apart)), None).unwrap()
        };
        let heads = Heads::new(near(one.key(), noise.key()), near(one.value(), noise.value())).unwrap();
        let partition = Partition::from_labels(&labels).unwrap();
        let expected = plain_wse(&heads, &partition);
        prop_assert!((wse(&heads, &partition) - expected).abs() <= 1e-6 * expected);
    }

    #[test]
    fn any_number_of_heads_is_summed_up(seed: u64, n in prop::sample::select(vec![1, 2, 3, 5, 8, 33, 63, 64, 65, 70]), k in 1usize..9) {
        let heads = layer(seed, n, 1, 3, false);
        let labels: Vec<_> = (0..n).map(|head| (head * head + head / 3) % k).collect();
        let partition = Partition::from_labels(&labels).unwrap();
        let expected = plain_wse(&heads, &partition);
        prop_assert!((wse(&heads, &partition) - expected).abs() <= 1e-5 * expected);
    }

    #[test]
    fn splitting_a_group_never_raises_it(seed: u64, labels in prop::collection::vec(0usize..4, 2..12), coins: u16) {
        let heads = layer(seed, labels.len(), 2, 9, false);
        let coarse = Partition::from_labels(&labels).unwrap();
        let split: Vec<_> = labels.iter().enumerate().map(|(i, &l)| if l == 0 && coins >> i & 1 == 1 { 9 } else { l }).collect();
        let fine = Partition::from_labels(&split).unwrap();
        prop_assert!(wse(&heads, &fine) <= wse(&heads, &coarse) * (1.0 + 1e-12));
    }

    #[test]
    fn permuting_heads_with_the_partition_changes_nothing(
        seed: u64, (labels, order) in (2usize..10).prop_flat_map(|n| (
            prop::collection::vec(0usize..4, n), Just((0..n).collect::<Vec<_>>()).prop_shuffle(),
        )),
    ) {
        let heads = layer(seed, labels.len(), 3, 20, true);
        let moved: Vec<_> = order.iter().map(|&i| labels[i]).collect();
        let here = wse(&heads, &Partition::from_labels(&labels).unwrap());
        let there = wse(&reordered(&heads, &order), &Partition::from_labels(&moved).unwrap());
        prop_assert!((here - there).abs() <= 1e-6 * here);
    }
}

#[test]
fn it_is_zero_without_sharing_and_largest_with_one_group() {
    let heads = layer(1, 6, 4, 10, true);
    let fitness = WeightSharingError::new(&heads).unwrap();
    assert_eq!(fitness.evaluate(&Partition::singletons(6).unwrap()).unwrap(), 0.0);
    let most = fitness.evaluate(&Partition::one_group(6).unwrap()).unwrap();
    let all = common::all_partitions(6);
    assert!(all.iter().all(|p| fitness.evaluate(p).unwrap() <= most * (1.0 + 1e-12)));
}

#[test]
fn the_energy_is_the_sum_of_squares_and_groups_add_up() {
    let heads = integer_layer(3, 7, 4, 11);
    let fitness = WeightSharingError::new(&heads).unwrap();
    let squares = |p: &Projection| p.weight().iter().map(|&x| f64::from(x * x)).sum::<f64>();
    assert_eq!(fitness.energy(), Some(squares(heads.key()) + squares(heads.value())));
    let separable = fitness.separable().unwrap();
    let partition = Partition::from_labels(&[0, 1, 0, 2, 1, 1, 0]).unwrap();
    let sum: f64 = partition.groups().iter().map(|g| separable.group_error(g).unwrap()).sum();
    assert_relative_eq!(fitness.evaluate(&partition).unwrap(), sum, max_relative = 1e-14);
    assert_eq!(separable.group_error(&[4]).unwrap(), 0.0);
    assert!(matches!(separable.group_error(&[7]), Err(Error::HeadOutOfRange { head: 7, n_heads: 7 })));
}

#[test]
fn rows_read_in_pieces_are_the_rows() {
    let heads = layer(5, 3, 2, 7, true);
    let whole: Vec<f32> = [heads.key(), heads.value()]
        .iter()
        .map(|p| p.weight().index_axis_move(Axis(0), 1).iter().copied().collect::<Vec<_>>())
        .chain([heads.key(), heads.value()].iter().map(|p| p.bias().unwrap().row(1).to_vec()))
        .collect::<Vec<_>>()
        .concat();
    assert_eq!(heads.row_len(), whole.len());
    for start in 0..whole.len() {
        for end in start..=whole.len() {
            let mut piece = vec![f32::NAN; end - start];
            heads.read(1, start, &mut piece);
            assert_eq!(piece, whole[start..end], "{start}..{end}");
        }
    }
}

#[test]
fn hostile_weights_and_shapes_are_refused() {
    let zeros = || Projection::new(Array3::zeros((3, 2, 4)), None).unwrap();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weight = Array3::zeros((3, 2, 4));
        weight[[2, 1, 3]] = bad;
        let broken = Projection::new(weight, None).unwrap();
        assert!(matches!(Heads::new(zeros(), broken), Err(Error::NotFinite { .. })));
    }
    let huge = Projection::new(Array3::from_elem((3, 2, 4), 1e30), None).unwrap();
    let heads = Heads::new(huge, zeros()).unwrap();
    assert!(matches!(WeightSharingError::new(&heads), Err(Error::OutOfRange { .. })), "squares overflow");
    assert!(matches!(Projection::new(Array3::zeros((3, 0, 4)), None), Err(Error::Shape { .. })));
    assert!(matches!(
        Projection::new(Array3::zeros((3, 2, 4)), Some(Array2::zeros((2, 3)))),
        Err(Error::Shape { .. })
    ));
    let other = Projection::new(Array3::zeros((3, 2, 5)), None).unwrap();
    assert!(matches!(Heads::new(zeros(), other), Err(Error::Shape { .. })));
    let query = |n| Projection::new(Array3::zeros((n, 2, 4)), None).unwrap();
    let layer = || Heads::new(zeros(), zeros()).unwrap();
    assert!(matches!(
        layer().with_queries(query(4), Array3::zeros((4, 4, 2))),
        Err(Error::QueryHeads { .. })
    ));
    assert!(matches!(layer().with_queries(query(6), Array3::zeros((6, 2, 4))), Err(Error::Shape { .. })));
    assert_eq!(layer().with_queries(query(6), Array3::zeros((6, 4, 2))).unwrap().queries_per_head(), 2);
    assert!(layer().with_rotation(qcqa::model::Rotation::HalfSplit { dims: 4 }).is_err());
    let asymmetric = ndarray::arr2(&[[0.0, 1.0], [2.0, 0.0]]);
    assert!(WeightSharingError::from_distances(asymmetric, 1.0).is_err());
    let fitness = WeightSharingError::new(&layer()).unwrap();
    let other = Partition::singletons(4).unwrap();
    assert!(matches!(fitness.evaluate(&other), Err(Error::PartitionSize { expected: 3, found: 4 })));
}

#[test]
fn a_projection_keeps_its_values_whatever_its_memory_order() {
    let weight = Array3::from_shape_fn((4, 2, 3), |(i, j, k)| (100 * i + 10 * j + k) as f32);
    let view = weight.slice(s![..;-1, .., ..]).reversed_axes().to_owned().reversed_axes();
    let projection = Projection::new(view.clone(), None).unwrap();
    assert_eq!(projection.weight(), view);
    assert!(projection.weight().is_standard_layout());
}
