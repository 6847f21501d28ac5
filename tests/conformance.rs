//! Every plugin of this crate keeps the contracts that any plugin must keep; and the contracts find those that do not.
#![cfg(feature = "testing")]

use qcqa::allocator::{ALLOCATORS, LayerCosts};
use qcqa::fitness::FITNESS;
use qcqa::front::Front;
use qcqa::grouping::GROUPINGS;
use qcqa::heads::{Heads, InMemory, Pooled, Projection};
use qcqa::optimizer::OPTIMIZERS;
use qcqa::partition::{Partition, SearchSpace};
use qcqa::pooler::{MeanPooler, POOLERS};
use qcqa::spec::Spec;
use qcqa::testing::{
    check_allocator, check_fitness, check_grouping, check_optimizer, check_pooler, check_source, heads, layer,
};
use qcqa::{Allocator, FitnessFn, Grouping, HeadSource, KvPooler, Optimizer, Result, Run};

#[test]
fn ours_keep_the_contracts() {
    for name in OPTIMIZERS.names() {
        check_optimizer(OPTIMIZERS.by_name(name).unwrap().as_ref()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for name in GROUPINGS.names() {
        check_grouping(GROUPINGS.by_name(name).unwrap().as_ref()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for name in ALLOCATORS.names() {
        check_allocator(ALLOCATORS.by_name(name).unwrap().as_ref()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    for name in POOLERS.names() {
        check_pooler(POOLERS.by_name(name).unwrap().as_ref()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let source = InMemory::new(vec![heads(6, 4, 10, true).unwrap()]).unwrap().with_calibration("sha256:some");
    check_source(&source).unwrap();
    for name in FITNESS.names() {
        let fitness = FITNESS.by_name(name).unwrap().of(&source, 0).unwrap();
        check_fitness(fitness.as_ref()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// A spec makes again what it is the spec of.
#[test]
fn specs_come_back() {
    macro_rules! every {
        ($($registry:expr),*) => {$(
            for name in $registry.names() {
                let spec = $registry.by_name(name).unwrap().spec();
                assert_eq!($registry.make(&spec).unwrap().spec(), spec, "{name}");
                let json = serde_json::to_string(&spec).unwrap();
                assert_eq!(serde_json::from_str::<Spec>(&json).unwrap(), spec, "{json}");
                let error = $registry.make(&spec.with("colour", "red")).unwrap_err().to_string();
                assert!(error.contains("no setting \"colour\""), "{error}");
            }
            assert!($registry.by_name("nobody").unwrap_err().to_string().contains("known are"));
        )*};
    }
    every!(OPTIMIZERS, GROUPINGS, ALLOCATORS, POOLERS, FITNESS);
}

/// Breaks one rule of every contract.
#[derive(Debug)]
struct Wrong;

impl Wrong {
    fn named() -> Spec {
        Spec::new("wrong")
    }
}

impl Optimizer for Wrong {
    fn spec(&self) -> Spec {
        Self::named()
    }
    /// Knows MHA alone.
    fn optimize(&self, fitness: &dyn FitnessFn, _: &SearchSpace, _: Run<'_>) -> Result<Front> {
        Front::new(fitness)
    }
}

impl Grouping for Wrong {
    fn spec(&self) -> Spec {
        Self::named()
    }
    /// One group more.
    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>> {
        Partition::from_labels(&(0..heads.n_heads()).map(|i| i % (k + 1)).collect::<Vec<_>>()).map(Some)
    }
}

impl Allocator for Wrong {
    fn spec(&self) -> Spec {
        Self::named()
    }
    /// Everything, whatever the budget.
    fn allocate(&self, costs: &LayerCosts, _: usize, _: Run<'_>) -> Result<Vec<usize>> {
        Ok((0..costs.n_layers()).filter_map(|l| costs.choices(l).last()).map(|(k, _)| k).collect())
    }
}

impl KvPooler for Wrong {
    fn spec(&self) -> Spec {
        Self::named()
    }
    /// Changes heads that are alone.
    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        let Pooled { key, value, .. } = MeanPooler.pool(heads, partition)?;
        let (weight, bias) = key.into_parts();
        Ok(Pooled::new(Projection::new(weight * 0.5, bias)?, value))
    }
}

impl FitnessFn for Wrong {
    fn n_heads(&self) -> usize {
        4
    }
    /// Loses something without sharing.
    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        Ok(partition.n_groups() as f64)
    }
}

/// Layers that all say that they are the first.
#[derive(Debug)]
struct Confused(InMemory);

impl HeadSource for Confused {
    fn architecture(&self) -> &qcqa::model::Architecture {
        self.0.architecture()
    }
    fn id(&self) -> Result<qcqa::model::ModelId> {
        self.0.id()
    }
    fn heads(&self, layer: usize) -> Result<Heads> {
        Ok(self.0.heads(layer)?.with_layer(0))
    }
}

#[test]
fn the_contracts_find_what_is_wrong() {
    let says = |verdict: Result<(), String>, words: &str| {
        let sentence = verdict.unwrap_err();
        assert!(sentence.contains(words), "{sentence}");
    };
    says(check_optimizer(&Wrong), "no partition of 2 heads into 1");
    says(check_grouping(&Wrong), "impossible, but were not refused");
    says(check_allocator(&Wrong), "heads of");
    says(check_pooler(&Wrong), "alone in its group");
    says(check_fitness(&Wrong), "without sharing");
    let layers = vec![layer(0, 4, 2, 3, false).unwrap(), layer(1, 4, 2, 3, false).unwrap()];
    says(check_source(&Confused(InMemory::new(layers).unwrap())), "layer 1 says that it is layer 0");
}
