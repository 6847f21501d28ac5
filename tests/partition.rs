//! Partitions are canonical, cover each head once, and cannot be built wrong.

mod common;

use proptest::prelude::*;
use qcqa::Error;
use qcqa::budget::Budget;
use qcqa::partition::{Cardinality, Partition, SearchSpace};

proptest! {
    #[test]
    fn every_road_leads_to_the_canonical_form(labels in prop::collection::vec(0usize..9, 1..40)) {
        let partition = Partition::from_labels(&labels).unwrap();
        let groups = partition.groups();
        // Each head once; groups ordered by smallest head, members ascending.
        let mut heads: Vec<_> = groups.concat();
        heads.sort_unstable();
        prop_assert_eq!(heads, (0..labels.len()).collect::<Vec<_>>());
        prop_assert!(groups.iter().all(|g| g.is_sorted()));
        prop_assert!(groups.is_sorted_by_key(|g| g[0]));
        prop_assert_eq!(partition.n_groups(), groups.len());
        prop_assert_eq!(partition.sizes(), groups.iter().map(Vec::len).collect::<Vec<_>>());
        // Same label, same group.
        for i in 0..labels.len() {
            for j in 0..i {
                prop_assert_eq!(labels[i] == labels[j], partition.group_of(i) == partition.group_of(j));
            }
        }
        // Relabelled, regrouped and reparsed it is the same value.
        let relabelled: Vec<_> = labels.iter().map(|l| 1000 - 7 * l).collect();
        prop_assert_eq!(&Partition::from_labels(&relabelled).unwrap(), &partition);
        let reversed: Vec<_> = groups.iter().rev().map(|g| g.iter().rev().copied().collect::<Vec<_>>()).collect();
        prop_assert_eq!(&Partition::from_groups(labels.len(), &reversed).unwrap(), &partition);
        let json = serde_json::to_string(&partition).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Partition>(&json).unwrap(), &partition);
    }

    #[test]
    fn parsers_refuse_what_is_no_partition(groups in prop::collection::vec(prop::collection::vec(0usize..6, 0..4), 0..5)) {
        let n: usize = groups.iter().map(Vec::len).sum();
        let mut heads = groups.concat();
        heads.sort_unstable();
        let legal = n > 0 && heads == (0..n).collect::<Vec<_>>() && groups.iter().all(|g| !g.is_empty());
        let json = serde_json::to_string(&groups).unwrap();
        prop_assert_eq!(serde_json::from_str::<Partition>(&json).is_ok(), legal);
    }
}

#[test]
fn each_rule_has_its_error() {
    let from = |groups: &[Vec<usize>]| Partition::from_groups(4, groups);
    assert!(matches!(from(&[vec![0, 1], vec![2]]), Err(Error::HeadMissing { head: 3, n_heads: 4 })));
    assert!(matches!(from(&[vec![0, 1], vec![1, 2, 3]]), Err(Error::HeadTwice { head: 1 })));
    assert!(matches!(from(&[vec![0, 1, 2, 3], vec![]]), Err(Error::EmptyGroup { group: 1 })));
    assert!(matches!(from(&[vec![0, 1, 2, 4]]), Err(Error::HeadOutOfRange { head: 4, n_heads: 4 })));
    assert!(matches!(Partition::singletons(0), Err(Error::HeadCount { n_heads: 0, .. })));
    assert!(matches!(Partition::singletons(Partition::MAX_HEADS + 1), Err(Error::HeadCount { .. })));
}

#[test]
fn the_space_names_the_group_counts_it_holds() {
    let counts = |space: SearchSpace| space.group_counts(12).unwrap();
    assert_eq!(counts(SearchSpace::equal()), [1, 2, 3, 4, 6, 12]);
    assert_eq!(counts(SearchSpace { max_groups: Some(3), ..SearchSpace::arbitrary() }), [1, 2, 3, 12]);
    assert_eq!(counts(SearchSpace { max_group_size: Some(3), ..SearchSpace::equal() }), [4, 6, 12]);
    assert!(SearchSpace { max_groups: Some(0), ..SearchSpace::equal() }.group_counts(12).is_err());
}

#[test]
fn group_counts_and_admission_agree_with_enumeration() {
    for cardinality in [Cardinality::Arbitrary, Cardinality::Equal] {
        for max_groups in [None, Some(2), Some(4)] {
            let limits =
                [(None, None), (Some(1), None), (Some(2), None), (Some(4), Some(150)), (None, Some(134))];
            for (max_group_size, max_filled) in limits {
                let space = SearchSpace { cardinality, max_groups, max_group_size, max_filled };
                let mut ks: Vec<_> = common::all_partitions(6)
                    .iter()
                    .filter(|p| {
                        let sizes = p.sizes();
                        let fits = (cardinality == Cardinality::Arbitrary
                            || sizes.iter().all(|&s| s == sizes[0]))
                            && max_groups.is_none_or(|m| sizes.len() <= m)
                            && max_group_size.is_none_or(|m| sizes.iter().all(|&s| s <= m))
                            && max_filled.is_none_or(|percent| {
                                let filled = sizes.len() * sizes.iter().max().unwrap();
                                100 * filled <= 6 * percent || filled < 6 + sizes.len()
                            });
                        assert_eq!(space.admits(p), fits || sizes.len() == 6, "{space:?} {p:?}");
                        fits || sizes.len() == 6
                    })
                    .map(Partition::n_groups)
                    .collect();
                ks.sort_unstable();
                ks.dedup();
                assert_eq!(space.group_counts(6).unwrap(), ks, "{space:?}");
            }
        }
    }
}

#[test]
fn budgets_are_upper_bounds_and_hostile_ones_are_refused() {
    let heads = |budget: Budget| budget.kv_heads(&[8; 4]);
    assert_eq!(heads(Budget::Fraction(0.5)).unwrap(), 16);
    assert_eq!(heads(Budget::Fraction(0.49)).unwrap(), 15);
    assert_eq!(heads(Budget::Fraction(1.0)).unwrap(), 32);
    assert_eq!(Budget::Fraction(0.29).kv_heads(&[10; 10]).unwrap(), 29);
    assert_eq!(heads(Budget::Heads(5)).unwrap(), 5);
    for bad in [0.0, -0.5, 1.01, f64::NAN, f64::INFINITY] {
        assert!(matches!(heads(Budget::Fraction(bad)), Err(Error::BudgetRange(_))), "{bad}");
    }
    assert!(matches!(heads(Budget::Heads(0)), Err(Error::BudgetRange(_))));
    assert!(matches!(heads(Budget::Heads(33)), Err(Error::BudgetRange(_))));
    let Err(Error::BudgetUnreachable { asked: 3, reachable }) = heads(Budget::Fraction(0.1)) else {
        panic!()
    };
    assert_eq!(reachable, [4, 8, 12, 16, 20, 24, 28, 32]);
}
