//! Heads shared across two layers: plans that say so, and what is lost.

mod common;

use common::{layer, model};
use qcqa::budget::Budget;
use qcqa::cross_layer::{LayerPairs, joined};
use qcqa::fitness::WeightSharingError;
use qcqa::heads::{HeadSource, Heads, InMemory};
use qcqa::partition::{Partition, SearchSpace};
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::{Below, LayerPlan, Method, Plan, Pooling, SharedHeads};
use qcqa::spec::Spec;
use qcqa::{Error, FitnessFn, Optimizer, Run};

fn source() -> InMemory {
    model([1, 2, 3].map(|seed| layer(seed, 2, 2, 5, false)))
}

fn groups(labels: &[usize]) -> LayerPlan {
    LayerPlan::new(Partition::from_labels(labels).unwrap(), 0.5)
}

fn reading(labels: &[usize], heads: &[usize]) -> LayerPlan {
    LayerPlan::new(groups(labels).groups, 0.0).with_below(Some(Below::new(heads.to_vec())))
}

fn planned(layers: Vec<LayerPlan>) -> Result<Plan, Error> {
    let method = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
    Plan::new(source().id().unwrap(), method, Pooling::new(Spec::new("mean")), layers, 1.0, 0)
}

#[test]
fn plans_come_back_and_count_heads_once() {
    let plan = planned(vec![groups(&[0, 1]), reading(&[0, 1], &[1, 2]), groups(&[0, 0])]).unwrap();
    assert_eq!((plan.group_counts(), plan.kv_heads()), (vec![3, 0, 1], 4));
    assert_eq!(plan.joint(0).unwrap().labels(), [0, 1, 1, 2]);
    assert_eq!((plan.joint(1), plan.first_below()), (None, Some(1)));
    let text = serde_json::to_string(&plan).unwrap();
    assert!(text.contains(r#""below":[1,2]"#), "{text}");
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
    // A plan without such layers is written as ever.
    let plain = planned(vec![groups(&[0, 1]), groups(&[0, 1]), groups(&[0, 0])]).unwrap();
    assert!(!serde_json::to_string(&plain).unwrap().contains("below"));
}

#[test]
fn plans_that_cannot_be_are_refused() {
    let two = || groups(&[0, 1]);
    let wrong: [(Vec<LayerPlan>, &str); 8] = [
        (vec![reading(&[0, 1], &[0, 1]), two(), two()], "layer 0 reads the one below, and there is none"),
        (
            vec![two(), reading(&[0, 1], &[0, 1]), reading(&[0, 1], &[0, 1])],
            "which has no keys and values of its own",
        ),
        (vec![two(), reading(&[0, 1], &[0, 0]), two()], "cannot be its heads [0, 0]"),
        (vec![two(), reading(&[0, 1], &[0, 3]), two()], "cannot be its heads [0, 3]"),
        (vec![two(), reading(&[0, 1], &[3, 2]), two()], "cannot be its heads [3, 2]"),
        (vec![two(), reading(&[0, 1], &[0]), two()], "its 2 groups cannot be its heads [0]"),
        (vec![two(), reading(&[0, 1], &[usize::MAX, 0]), two()], "cannot be its heads"),
        (vec![groups(&[0, 0]), reading(&[0, 0], &[2]), two()], "cannot be its heads [2]"),
    ];
    for (layers, message) in wrong {
        let error = planned(layers).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// Two layers of the same heads, in another order, share all of them for nothing when both read one input.
#[test]
fn equal_heads_of_two_layers_are_held_once() {
    let lower = layer(5, 3, 2, 6, true);
    let turned = |heads: &Heads| {
        let swapped = |p: &qcqa::heads::Projection| {
            let rows = p.augmented(0..2, |v| v);
            let order: Vec<usize> = [4, 5, 0, 1, 2, 3].to_vec();
            qcqa::heads::Projection::from_augmented(&rows.select(ndarray::Axis(0), &order), 2, true).unwrap()
        };
        Heads::new(swapped(heads.key()), swapped(heads.value())).unwrap()
    };
    let source = model([lower.clone(), turned(&lower)]);
    let joint = joined(&source.heads(0).unwrap(), &source.heads(1).unwrap(), None).unwrap();
    let fitness = WeightSharingError::new(&joint).unwrap();
    let front = qcqa::optimizer::Exact::default().optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0));
    let best = front.unwrap().get(3).unwrap().clone();
    assert!(best.error <= 1e-9 * fitness.energy().unwrap());
    let plan = Compress::new(Preset::Cla).budget(Budget::Fraction(0.5)).plan(&source, Run::new(0)).unwrap();
    assert_eq!((plan.kv_heads(), plan.first_below()), (3, Some(1)));
    let shared = SharedHeads::new(&plan, &source).unwrap();
    for i in 0..2 {
        let (heads, pooled) = shared.layer(i).unwrap();
        for head in 0..3 {
            let own = |p: &qcqa::heads::Projection, head: usize| {
                p.weight().index_axis_move(ndarray::Axis(0), head).to_owned()
            };
            assert_eq!(own(&pooled.key, shared.groups(i).group_of(head)), own(heads.key(), head));
        }
    }
}

/// The joint error is the definition over the heads of both layers.
#[test]
fn pairs_are_layers_of_the_heads_of_both() {
    let source = source();
    let pairs = LayerPairs::new(&source, true).unwrap();
    assert_eq!(pairs.lower(), [0, 1]);
    let joint = pairs.heads(1).unwrap();
    let partition = Partition::from_labels(&[0, 1, 0, 1]).unwrap();
    let found = WeightSharingError::new(&joint).unwrap().evaluate(&partition).unwrap();
    let expected = common::plain_wse(&joint, &partition);
    assert!((found - expected).abs() <= 1e-6 * expected);
    let own = source.heads(2).unwrap();
    assert_eq!(joint.key().weight().slice(ndarray::s![2.., .., ..]), own.key().weight());
    assert_eq!(pairs.predicted_share(0).unwrap(), 1.0);
}

/// Layers of other heads stay alone; where none can share, that is said.
#[test]
fn unlike_layers_do_not_share() {
    let unlike = model([layer(1, 2, 2, 6, false), layer(2, 2, 3, 6, false), layer(3, 2, 3, 6, false)]);
    assert_eq!(LayerPairs::new(&unlike, false).unwrap().lower(), [1]);
    let none = model([layer(1, 2, 2, 6, false), layer(2, 2, 3, 6, false)]);
    let error = Compress::new(Preset::Cla).plan(&none, Run::new(0)).unwrap_err().to_string();
    assert!(error.contains("sharing across layers takes layers of equal heads"), "{error}");
}
