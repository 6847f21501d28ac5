//! A downstream crate's plugin of each trait, mixed with ours and used through `dyn`.

mod common;

use std::sync::Arc;

use common::layer;
use ndarray::Array3;
use qcqa::allocator::{CostScale, LayerCosts, LayerSelection, UniformAllocation};
use qcqa::budget::Budget;
use qcqa::fitness::{FitnessKind, SeparableFitness, WeightSharing};
use qcqa::front::Front;
use qcqa::grouping::UniformGqa;
use qcqa::heads::{Heads, InMemory, Needs, Pooled, Projection};
use qcqa::optimizer::Nsga2;
use qcqa::partition::{Partition, SearchSpace};
use qcqa::pipeline::{Compress, Search};
use qcqa::plan::{Plan, SharedHeads};
use qcqa::pooler::{FirstHead, MeanPooler};
use qcqa::spec::Spec;
use qcqa::{Allocator, Error, FitnessFn, Grouping, HeadSource, KvPooler, Optimizer, Result, Run};

/// Every k-th head together.
#[derive(Debug)]
struct Strided;

impl Grouping for Strided {
    fn spec(&self) -> Spec {
        Spec::new("strided")
    }
    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>> {
        if heads.n_heads() % k != 0 {
            return Ok(None);
        }
        Partition::from_labels(&(0..heads.n_heads()).map(|i| i % k).collect::<Vec<_>>()).map(Some)
    }
}

/// The largest group counts: not separable, without an energy.
#[derive(Debug)]
struct LargestGroup(usize);

impl FitnessFn for LargestGroup {
    fn n_heads(&self) -> usize {
        self.0
    }
    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        Ok((partition.sizes().into_iter().max().unwrap_or(0) - 1) as f64)
    }
}

/// A separable fitness without pairwise form: the norms' range in each group.
#[derive(Debug)]
struct NormRange(Vec<f64>);

impl FitnessFn for NormRange {
    fn n_heads(&self) -> usize {
        self.0.len()
    }
    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        partition.groups().iter().map(|g| self.group_error(g)).sum()
    }
    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for NormRange {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        let norms = || members.iter().map(|&i| self.0[i]);
        Ok(norms().fold(f64::MIN, f64::max) - norms().fold(f64::MAX, f64::min))
    }
}

/// Offers a single partition.
#[derive(Debug)]
struct OnlyMqa;

impl Optimizer for OnlyMqa {
    fn spec(&self) -> Spec {
        Spec::new("only-mqa")
    }
    fn optimize(&self, fitness: &dyn FitnessFn, _: &SearchSpace, run: Run<'_>) -> Result<Front> {
        run.step("only mqa", 0, 1)?;
        let mut front = Front::new(fitness)?;
        let one = Partition::one_group(fitness.n_heads())?;
        front.offer(&one, fitness.evaluate(&one)?)?;
        Ok(front)
    }
}

/// Forgets everything.
#[derive(Debug)]
struct Zero;

impl KvPooler for Zero {
    fn spec(&self) -> Spec {
        Spec::new("zero")
    }
    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        let (_, h, d) = heads.key().weight().dim();
        let zero = || Projection::new(Array3::zeros((partition.n_groups(), h, d)), None);
        Ok(Pooled::new(zero()?, zero()?))
    }
}

/// Shares only in the last layer.
#[derive(Debug)]
struct LastLayer;

impl Allocator for LastLayer {
    fn spec(&self) -> Spec {
        Spec::new("last-layer")
    }
    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, _: Run<'_>) -> Result<Vec<usize>> {
        let last = costs.n_layers() - 1;
        let mut ks: Vec<_> = (0..=last).map(|l| costs.n_heads(l)).collect();
        let rest: usize = ks[..last].iter().sum();
        let fits = costs.choices(last).map(|(k, _)| k).filter(|k| rest + k <= kv_heads).max();
        ks[last] = fits.ok_or(Error::BudgetUnreachable { asked: kv_heads, reachable: costs.reachable() })?;
        Ok(ks)
    }
}

fn model() -> InMemory {
    common::model((0..3u8).map(|i| layer(i.into(), 6, 2, 5, false)))
}

fn compress<'a>(search: Search) -> Compress<'a> {
    Compress::custom(search, Arc::new(WeightSharing), Arc::new(MeanPooler)).budget(Budget::Heads(14))
}

#[test]
fn every_search_meets_every_allocator() {
    let optimizers: [Arc<dyn Optimizer>; 2] = [Arc::new(Nsga2::default()), Arc::new(OnlyMqa)];
    let groupings: [Arc<dyn Grouping>; 2] = [Arc::new(UniformGqa), Arc::new(Strided)];
    let allocators: [Arc<dyn Allocator>; 3] =
        [Arc::new(UniformAllocation), Arc::new(LayerSelection::default()), Arc::new(LastLayer)];
    let (model, searches) = (model(), optimizers.map(Search::Optimizer));
    for search in searches.into_iter().chain(groupings.map(Search::Grouping)) {
        for allocator in &allocators {
            let compress = compress(search.clone()).allocator(Arc::clone(allocator));
            let plan = compress.plan(&model, Run::new(1)).unwrap();
            assert!(plan.kv_heads() <= 14);
            assert_eq!(plan.budget.kv_heads, plan.kv_heads());
            assert_eq!(plan.method.search, [search.spec()]);
            assert_eq!(plan.method.allocation, allocator.spec());
            // What a plan records is what the weights say.
            for (i, layer) in plan.layers.iter().enumerate() {
                let expected = common::plain_wse(&model.heads(i).unwrap(), &layer.groups);
                assert!((layer.error - expected).abs() <= 1e-6 * expected);
            }
            let json = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        }
    }
}

/// Makes [`LargestGroup`] of every layer.
#[derive(Debug)]
struct LargestGroups;

impl FitnessKind for LargestGroups {
    fn spec(&self) -> Spec {
        Spec::new("largest group")
    }
    fn of(&self, source: &dyn HeadSource, layer: usize) -> Result<Box<dyn FitnessFn>> {
        Ok(Box::new(LargestGroup(source.heads(layer)?.n_heads())))
    }
    fn needs(&self) -> Needs {
        Needs::NOTHING
    }
}

#[test]
fn a_fitness_of_ones_own_drives_the_search() {
    let (model, search) = (model(), Search::Optimizer(Arc::new(Nsga2::default())));
    let compress = compress(search).fitness(LargestGroups).budget(Budget::Fraction(0.5));
    let searched = compress.search(&model, Run::new(1));
    // It has no energy to take a share of, and says what to do about it.
    let searched = searched.unwrap();
    assert!(searched.layers().iter().all(|f| f.error(2) == Some(2.0) && f.error(3) == Some(1.0)));
    let share = searched.plan(Budget::Fraction(0.5), Run::new(1));
    assert!(matches!(share, Err(Error::NoEnergy { layer: 0 })));
    let plan = compress.clone().cost(CostScale::Raw).plan(&model, Run::new(1)).unwrap();
    assert_eq!(plan.group_counts(), [3, 3, 3]);
    assert_eq!(plan.method.fitness.name(), "largest group");
}

/// A plan that names a pooler of somebody else's is obeyed with that one, and refused without.
#[test]
fn a_pooler_of_ones_own_is_named_and_asked_for() {
    let (model, search) = (model(), Search::Grouping(Arc::new(UniformGqa)));
    let plan = compress(search).pooler(Zero).plan(&model, Run::new(1)).unwrap();
    assert_eq!(plan.pooling.pooler.name(), "zero");
    let refused = SharedHeads::new(&plan, &model).unwrap_err().to_string();
    assert!(refused.contains("no pooler \"zero\"") && refused.contains("mean"), "{refused}");
    let shared = SharedHeads::with_pooler(&plan, &model, Box::new(Zero)).unwrap();
    assert_eq!(shared.record(), plan);
    let (_, pooled) = shared.layer(0).unwrap();
    assert!(pooled.key.weight().iter().all(|&v| v == 0.0));
    // Another one in its place is recorded.
    let other = SharedHeads::with_pooler(&plan, &model, Box::new(MeanPooler)).unwrap();
    assert_eq!(other.record().pooling.pooler, MeanPooler.spec());
    assert_eq!(other.plan(), &plan);
    assert!(matches!(other.layer(3), Err(Error::NoLayer { layer: 3, layers: 3 })));
    let stranger = common::model([layer(9, 6, 2, 5, false)]);
    assert!(matches!(
        SharedHeads::with_pooler(&plan, &stranger, Box::new(Zero)),
        Err(Error::PlanSource { field: "number of layers", .. })
    ));
}

#[test]
fn a_separable_fitness_of_ones_own_is_found_behind_dyn() {
    let fitness: Box<dyn FitnessFn> = Box::new(NormRange(vec![1.0, 5.0, 1.1, 5.2]));
    let front = Nsga2::default().optimize(fitness.as_ref(), &SearchSpace::arbitrary(), Run::new(0)).unwrap();
    assert_eq!(front.get(2).unwrap().partition.groups(), [[0, 2], [1, 3]]);
    let separable = fitness.separable().unwrap();
    assert!(separable.pairwise().is_none() && separable.pairwise_proxy().is_none());
}

#[test]
fn poolers_are_told_apart_by_what_they_make() {
    let heads = layer(4, 4, 2, 3, true);
    let partition = Partition::from_labels(&[0, 1, 0, 1]).unwrap();
    let mean = MeanPooler.pool(&heads, &partition).unwrap();
    let first = FirstHead.pool(&heads, &partition).unwrap();
    let (k, bias) = (heads.key().weight(), heads.key().bias().unwrap());
    for ((g, r, c), &pooled) in mean.key.weight().indexed_iter() {
        let expected = (f64::from(k[[g, r, c]]) + f64::from(k[[g + 2, r, c]])) / 2.0;
        assert_eq!(pooled, expected as f32);
        assert_eq!(first.key.weight()[[g, r, c]], k[[g, r, c]]);
    }
    let expected = (f64::from(bias[[1, 0]]) + f64::from(bias[[3, 0]])) / 2.0;
    assert_eq!(mean.key.bias().unwrap()[[1, 0]], expected as f32);
    for pooler in [&MeanPooler as &dyn KvPooler, &FirstHead] {
        let pooled = pooler.pool(&heads, &partition).unwrap();
        pooled.check(&heads, &partition).unwrap();
        assert!(pooled.query.is_none() && pooled.output.is_none());
        assert!(pooler.pool(&heads, &Partition::singletons(3).unwrap()).is_err());
        let alone = pooler.pool(&heads, &Partition::singletons(4).unwrap()).unwrap();
        assert_eq!((&alone.key, &alone.value), (heads.key(), heads.value()));
    }
    // A pooler that drops the bias does not pass.
    let zero = Zero.pool(&heads, &partition).unwrap();
    assert!(matches!(zero.check(&heads, &partition), Err(Error::Shape { .. })));
    let three = Partition::from_labels(&[0, 1, 2, 0]).unwrap();
    assert!(matches!(mean.check(&heads, &three), Err(Error::Shape { .. })));
    let others = Partition::from_labels(&[0, 1, 0]).unwrap();
    assert!(matches!(mean.check(&heads, &others), Err(Error::PartitionSize { expected: 4, found: 3 })));
}

#[test]
fn a_plugins_own_error_comes_through() {
    #[derive(Debug)]
    struct Failing;
    impl Grouping for Failing {
        fn spec(&self) -> Spec {
            Spec::new("failing")
        }
        fn group(&self, _: &Heads, _: usize) -> Result<Option<Partition>> {
            Err(Error::plugin("the moon is in the wrong phase"))
        }
    }
    let search = Search::Grouping(Arc::new(Failing));
    let error = compress(search).plan(&model(), Run::new(0)).unwrap_err();
    assert_eq!(error.to_string(), "the moon is in the wrong phase");
}
