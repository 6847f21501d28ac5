//! Fronts, costs and allocators against enumeration.

mod common;

use std::collections::BTreeMap;

use common::layer;
use proptest::prelude::*;
use qcqa::allocator::{CostScale, LayerCosts, LayerSelection, UniformAllocation};
use qcqa::budget::Limits;
use qcqa::fitness::WeightSharingError;
use qcqa::front::{Front, dominates};
use qcqa::optimizer::Nsga2;
use qcqa::partition::SearchSpace;
use qcqa::{Allocator, Error, Optimizer, Run};

/// Up to four layers of four heads; k = H always there and free, like a front.
fn tables() -> impl Strategy<Value = Vec<Vec<Option<f64>>>> {
    let layer = prop::collection::vec(prop::option::weighted(0.8, 0.0f64..9.0), 3);
    let layer = layer.prop_map(|mut costs| {
        costs.push(Some(0.0));
        costs
    });
    prop::collection::vec(layer, 1..5)
}

/// Every choice of a k for every layer.
fn choices(costs: &LayerCosts) -> Vec<Vec<usize>> {
    (0..costs.n_layers()).fold(vec![vec![]], |found, layer| {
        let extend = |ks: &Vec<usize>| {
            let ks = ks.clone();
            costs.choices(layer).map(move |(k, _)| [ks.clone(), vec![k]].concat()).collect::<Vec<_>>()
        };
        found.iter().flat_map(extend).collect()
    })
}

proptest! {
    #[test]
    fn uniform_takes_the_largest_k_that_all_layers_have(table in tables(), budget in 1usize..20) {
        let costs = LayerCosts::from_table(table, false).unwrap();
        let best = choices(&costs)
            .into_iter()
            .filter(|ks| ks.iter().all(|k| *k == ks[0]) && ks.iter().sum::<usize>() <= budget)
            .max();
        match UniformAllocation.allocate(&costs, budget, Run::new(0)) {
            // A layer that can only be MHA stays it while the others share.
            Ok(ks) if best.is_none() || (0..ks.len()).any(|l| costs.choices(l).count() == 1) => {
                prop_assert!(ks.iter().sum::<usize>() <= budget && costs.total(&ks).is_some());
            }
            Ok(ks) => prop_assert_eq!(Some(ks), best),
            Err(error) => {
                let unreachable = matches!(error, Error::BudgetUnreachable { .. });
                prop_assert!(unreachable, "{}", error);
                prop_assert!(best.is_none());
            }
        }
    }

    #[test]
    fn selection_finds_the_cheapest_bits(table in tables(), budget in 1usize..20) {
        let costs = LayerCosts::from_table(table, false).unwrap();
        // The definition: one k for all grouped layers, the others MHA.
        let cheapest = choices(&costs)
            .into_iter()
            .filter(|ks| {
                let mut grouped = ks.iter().filter(|k| **k != 4);
                let first = grouped.next();
                grouped.all(|k| Some(k) == first) && ks.iter().sum::<usize>() <= budget
            })
            .filter_map(|ks| costs.total(&ks))
            .min_by(f64::total_cmp);
        let short = LayerSelection { population: 10, generations: 5, crossover: 0.9 };
        match short.allocate(&costs, budget, Run::new(1)) {
            Ok(ks) => {
                prop_assert!(ks.iter().sum::<usize>() <= budget);
                prop_assert!((costs.total(&ks).unwrap() - cheapest.unwrap()).abs() < 1e-12);
            }
            Err(error) => {
                let unreachable = matches!(error, Error::BudgetUnreachable { .. });
                prop_assert!(unreachable, "{}", error);
                prop_assert_eq!(cheapest, None);
            }
        }
    }

    #[test]
    fn reachable_totals_are_all_totals(table in tables(), same_k: bool) {
        let costs = LayerCosts::from_table(table, same_k).unwrap();
        let mut totals: Vec<usize> = choices(&costs)
            .iter()
            .filter(|ks| !same_k || ks.iter().all(|k| *k == ks[0]))
            .map(|ks| ks.iter().sum())
            .collect();
        totals.sort_unstable();
        totals.dedup();
        prop_assert_eq!(costs.reachable(), totals);
    }

    #[test]
    fn pareto_and_hypervolume_agree_with_their_definitions(seed: u64) {
        let heads = layer(seed, 7, 2, 4, false);
        let fitness = WeightSharingError::new(&heads).unwrap();
        let short = Nsga2 { population: 4, generations: 1, crossover: 0.5 };
        let front = short.optimize(&fitness, &SearchSpace::arbitrary(), Run::new(seed)).unwrap();
        let points: Vec<_> = front.iter().map(|p| [p.partition.n_groups() as f64 / 7.0, p.error]).collect();
        let best: Vec<_> = points.iter().filter(|a| !points.iter().any(|b| dominates(*b, **a))).copied().collect();
        let pareto: Vec<_> = front.pareto().iter().map(|p| [p.partition.n_groups() as f64 / 7.0, p.error]).collect();
        prop_assert_eq!(pareto, best);
        // The area, strip by strip between neighbouring k.
        let reference = [1.0 + 1.0 / 7.0, 1.01 * front.error(1).unwrap()];
        let strips = (1..=7).map(|k| {
            let least = (1..=k).filter_map(|k| front.error(k)).fold(reference[1], f64::min);
            (reference[1] - least) / 7.0
        });
        let expected = strips.sum::<f64>() / (reference[0] * reference[1]);
        prop_assert!((front.hypervolume(reference) - expected).abs() < 1e-12);
    }
}

fn fronts(layers: usize, space: SearchSpace) -> Vec<Front> {
    (0..layers)
        .map(|i| {
            let fitness = WeightSharingError::new(&layer(i as u64, 4, 2, 5, false)).unwrap();
            Nsga2::default().optimize(&fitness, &space, Run::new(0)).unwrap()
        })
        .collect()
}

#[test]
fn costs_are_scaled_in_one_place() {
    let fronts = fronts(2, SearchSpace::arbitrary());
    let raw = LayerCosts::new(&fronts, CostScale::Raw, &Limits::default()).unwrap();
    let share = LayerCosts::new(&fronts, CostScale::EnergyShare, &Limits::default()).unwrap();
    for (i, front) in fronts.iter().enumerate() {
        for k in 1..=4 {
            assert_eq!(raw.get(i, k), front.error(k));
            assert_eq!(share.get(i, k), front.error(k).map(|e| e / front.energy().unwrap()));
        }
    }
}

#[test]
fn limits_forbid_what_they_say() {
    let arbitrary = fronts(3, SearchSpace::arbitrary());
    let fronts = fronts(3, SearchSpace::equal());
    let equal = Limits { space: SearchSpace::equal(), ..Limits::default() };
    let costs = LayerCosts::new(&arbitrary, CostScale::Raw, &equal).unwrap();
    assert_eq!(costs.get(0, 3), None, "3 does not divide 4");
    assert!(costs.get(0, 1).is_some() && costs.get(0, 4).is_some());

    let fixed = Limits { fixed: BTreeMap::from([(0, 4)]), ..Limits::default() };
    let costs = LayerCosts::new(&fronts, CostScale::Raw, &fixed).unwrap();
    assert_eq!(costs.choices(0).map(|(k, _)| k).collect::<Vec<_>>(), [4]);
    assert_eq!(UniformAllocation.allocate(&costs, 8, Run::new(0)).unwrap(), [4, 2, 2]);
    assert_eq!(LayerSelection::default().allocate(&costs, 8, Run::new(0)).unwrap()[0], 4);

    let nowhere = Limits { fixed: BTreeMap::from([(3, 4)]), ..Limits::default() };
    assert!(matches!(
        LayerCosts::new(&fronts, CostScale::Raw, &nowhere),
        Err(Error::NoLayer { layer: 3, layers: 3 })
    ));
    let same = Limits { same_k: true, ..equal };
    let costs = LayerCosts::new(&fronts, CostScale::Raw, &same).unwrap();
    for allocator in [&UniformAllocation as &dyn Allocator, &LayerSelection::default()] {
        let Err(Error::BudgetUnreachable { asked, reachable }) = allocator.allocate(&costs, 2, Run::new(0))
        else {
            panic!("{allocator:?}")
        };
        assert_eq!((asked, reachable.as_slice()), (2, &[3, 6, 12][..]));
    }
    assert_eq!(LayerSelection::default().allocate(&costs, 7, Run::new(0)).unwrap(), [2, 2, 2]);
}

#[test]
fn hostile_tables_are_refused() {
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        let table = vec![vec![Some(bad), Some(0.0)]];
        assert!(matches!(LayerCosts::from_table(table, false), Err(Error::InvalidFitness { k: 1, .. })));
    }
    assert!(LayerCosts::from_table(vec![], false).is_err());
    assert!(LayerCosts::from_table(vec![vec![None, None]], false).is_err());
}
