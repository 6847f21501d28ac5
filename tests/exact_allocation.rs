//! ExactAllocation against every choice there is, and key-norm groups by hand.

use std::ops::ControlFlow;

use ndarray::Array3;
use proptest::prelude::*;
use qcqa::allocator::{ExactAllocation, LayerCosts, PairCosts};
use qcqa::grouping::KeyNorm;
use qcqa::heads::{Heads, Projection};
use qcqa::partition::Partition;
use qcqa::{Allocator, Error, Grouping, Progress, Run, ndarray};

/// Small whole numbers, so that ties are frequent and sums exact.
fn tables() -> impl Strategy<Value = (Vec<Vec<Option<f64>>>, bool)> {
    let cost = prop_oneof![1 => Just(None), 3 => (0u8..5).prop_map(|c| Some(f64::from(c)))];
    let layer = prop::collection::vec(cost, 4)
        .prop_filter("a layer needs a choice", |l| l.iter().any(Option::is_some));
    (prop::collection::vec(layer, 1..5), any::<bool>())
}

fn all_choices(costs: &LayerCosts) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    for layer in 0..costs.n_layers() {
        all = all
            .iter()
            .flat_map(|ks: &Vec<usize>| {
                costs.choices(layer).map(move |(k, _)| [ks.as_slice(), &[k]].concat())
            })
            .collect();
    }
    all.retain(|ks| !costs.same_k() || ks.iter().all(|k| *k == ks[0]));
    all
}

/// Every way to leave layers alone or let two share: layer, whether it shares with the next, k; with the cost.
type Ways = Vec<(Vec<(usize, bool, usize)>, f64)>;

fn all_ways(costs: &LayerCosts, pairs: &[Vec<Option<f64>>], layer: usize) -> Ways {
    if layer == costs.n_layers() {
        return vec![(Vec::new(), 0.0)];
    }
    let mut ways = Vec::new();
    let mut begin = |paired: bool, k: usize, cost: f64| {
        for (rest, more) in all_ways(costs, pairs, layer + 1 + usize::from(paired)) {
            ways.push(([&[(layer, paired, k)][..], &rest].concat(), cost + more));
        }
    };
    costs.choices(layer).for_each(|(k, cost)| begin(false, k, cost));
    if layer + 1 < costs.n_layers() {
        let both = pairs.get(layer).into_iter().flatten().enumerate();
        both.filter_map(|(i, cost)| Some((i + 1, (*cost)?))).for_each(|(k, cost)| begin(true, k, cost));
    }
    ways
}

proptest! {
    /// Which layers share with one another, and how many heads each keeps, is the best of all ways.
    #[test]
    fn layers_that_share_are_allocated_by_brute_force(
        (table, _) in tables(),
        pairs in prop::collection::vec(
            prop::collection::vec(prop_oneof![1 => Just(None), 2 => (0u8..7).prop_map(|c| Some(f64::from(c)))], 0..6),
            0..5,
        ),
    ) {
        let costs = LayerCosts::from_table(table, false).unwrap();
        let of_pairs = PairCosts::from_table(pairs.clone()).unwrap();
        let heads = |way: &[(usize, bool, usize)]| way.iter().map(|(.., k)| k).sum::<usize>();
        let mut ways = all_ways(&costs, &pairs, 0);
        ways.sort_by(|(a, x), (b, y)| x.total_cmp(y).then(heads(a).cmp(&heads(b))).then(a.cmp(b)));
        for budget in 0..=4 * costs.n_layers() + 1 {
            let best = ways.iter().find(|(way, _)| heads(way) <= budget);
            match ExactAllocation.with_pairs(&costs, &of_pairs, budget, Run::new(0)) {
                Ok(found) => {
                    let found: Vec<_> = found.iter().map(|span| (span.layer, span.paired, span.k)).collect();
                    prop_assert_eq!(Some(&found), best.map(|(way, _)| way));
                }
                Err(Error::BudgetUnreachable { asked, .. }) => prop_assert!(best.is_none() && asked == budget),
                Err(other) => prop_assert!(false, "{other}"),
            }
        }
    }

    #[test]
    fn exact_allocation_is_brute_force((table, same_k) in tables()) {
        let costs = LayerCosts::from_table(table, same_k).unwrap();
        let mut choices = all_choices(&costs);
        // Least cost, then fewest KV heads, then lexicographic.
        let total = |ks: &Vec<usize>| ks.iter().sum::<usize>();
        choices.sort_by(|a, b| {
            let cost = |ks: &[usize]| costs.total(ks).unwrap();
            cost(a).total_cmp(&cost(b)).then(total(a).cmp(&total(b))).then(a.cmp(b))
        });
        let all = ExactAllocation.all_budgets(&costs, Run::new(0)).unwrap();
        for budget in 0..=4 * costs.n_layers() + 1 {
            let best = choices.iter().find(|ks| total(ks) <= budget);
            match ExactAllocation.allocate(&costs, budget, Run::new(0)) {
                Ok(found) => prop_assert_eq!(Some(&found), best),
                Err(Error::BudgetUnreachable { asked, .. }) => prop_assert!(best.is_none() && asked == budget),
                Err(other) => prop_assert!(false, "{other}"),
            }
            let exactly = choices.iter().find(|ks| total(ks) == budget);
            prop_assert_eq!(all.choice(budget), exactly.cloned());
            prop_assert_eq!(all.cost(budget), exactly.map(|ks| costs.total(ks).unwrap()));
        }
    }
}

#[test]
fn weights_scale_layers() {
    let table = vec![vec![Some(4.0), Some(0.0)], vec![Some(3.0), Some(0.0)]];
    let costs = LayerCosts::from_table(table, false).unwrap();
    assert_eq!(ExactAllocation.allocate(&costs, 3, Run::new(0)).unwrap(), [2, 1]);
    let weighted = costs.clone().weighted(&[1.0, 2.0]).unwrap();
    assert_eq!(ExactAllocation.allocate(&weighted, 3, Run::new(0)).unwrap(), [1, 2]);
    assert!(matches!(costs.clone().weighted(&[1.0]), Err(Error::LayerCount { .. })));
    assert!(matches!(costs.weighted(&[1.0, f64::NAN]), Err(Error::Setting { .. })));
}

#[test]
fn observers_stop_the_allocation() {
    let costs = LayerCosts::from_table(vec![vec![Some(1.0)]; 2], false).unwrap();
    let stop = |_: &Progress<'_>| ControlFlow::Break(());
    let stopped = ExactAllocation.allocate(&costs, 2, Run::new(0).with_observer(&stop));
    assert!(matches!(stopped, Err(Error::Cancelled)));
}

#[test]
fn key_norms_share_out_the_heads() {
    let sizes = |norms: &[f64], k| KeyNorm::partition(norms, k).unwrap().sizes();
    // Runs of two weigh 2, 2, 4: shares of six heads 1.5, 1.5, 3; the spare head goes to the earlier remainder.
    assert_eq!(sizes(&[1.0, 1.0, 1.0, 1.0, 2.0, 2.0], 3), [2, 1, 3]);
    assert_eq!(sizes(&[1.0; 8], 4), [2, 2, 2, 2]);
    assert_eq!(sizes(&[0.0; 6], 2), [3, 3]);
    // Runs 0..1, 1..3, 3..5 weigh 1, 2, 2 of five heads.
    assert_eq!(sizes(&[1.0; 5], 3), [1, 2, 2]);
    // A run without weight still keeps a head, out of the largest group.
    assert_eq!(sizes(&[0.0, 0.0, 1.0, 1.0], 2), [1, 3]);
    assert_eq!(KeyNorm::partition(&[3.0, 1.0, 2.0], 3).unwrap(), Partition::singletons(3).unwrap());
    assert!(matches!(KeyNorm::partition(&[1.0; 3], 4), Err(Error::GroupCount { .. })));
    assert!(matches!(KeyNorm::partition(&[1.0; 3], 0), Err(Error::GroupCount { .. })));
    assert!(KeyNorm::partition(&[1.0, f64::NAN], 1).is_err());
}

#[test]
fn key_norm_reads_keys_alone() {
    // Key heads of norm 1, 1, 3, 3; values would say otherwise.
    let key = Array3::from_shape_fn((4, 1, 1), |(i, ..)| if i < 2 { -1.0 } else { 3.0 });
    let value = Array3::from_shape_fn((4, 1, 1), |(i, ..)| if i < 2 { 100.0 } else { 1.0 });
    let projection = |weight| Projection::new(weight, None).unwrap();
    let heads = Heads::new(projection(key), projection(value)).unwrap();
    let partition = KeyNorm.group(&heads, 2).unwrap().unwrap();
    assert_eq!(partition.groups(), [vec![0], vec![1, 2, 3]]);
}
