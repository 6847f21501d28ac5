//! From layers to a plan: reproducible on any number of threads, checked on the way in and out.

mod common;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use common::integer_layer;
use qcqa::allocator::{CostScale, ExactAllocation, LayerCosts, LayerSelection};
use qcqa::budget::{Budget, Limits};
use qcqa::fitness::WeightSharing;
use qcqa::front::FrontPoint;
use qcqa::heads::{Heads, InMemory};
use qcqa::model::{Architecture, ModelId};
use qcqa::optimizer::Nsga2;
use qcqa::partition::SearchSpace;
use qcqa::pipeline::{Compress, Preset, Search};
use qcqa::plan::Plan;
use qcqa::pooler::MeanPooler;
use qcqa::{Error, HeadSource, Progress, Result, Run};

const NSGA2: Nsga2 = Nsga2 { population: 20, generations: 10, crossover: 0.9 };

fn model() -> InMemory {
    common::model((0..3u8).map(|i| integer_layer(i.into(), 8, 2, 3)))
}

fn compress<'a>() -> Compress<'a> {
    Compress::custom(Search::Optimizer(Arc::new(NSGA2)), Arc::new(WeightSharing), Arc::new(MeanPooler))
}

fn plan(compress: &Compress<'_>, fraction: f64) -> Result<Plan> {
    compress.search(&model(), Run::new(7))?.plan(Budget::Fraction(fraction), Run::new(7))
}

#[test]
fn a_plan_says_what_was_asked_and_reached() {
    let plan = plan(&Compress::new(Preset::QcqaAc).optimizer(NSGA2), 0.7).unwrap();
    assert_eq!(plan.group_counts(), [5, 5, 5], "5 of 8 is the largest k within 0.7");
    assert_eq!((plan.budget.asked, plan.budget.reached, plan.budget.kv_heads), (0.7, 0.625, 15));
    assert_eq!(plan.seed, 7);
    let sum: f64 = plan.layers.iter().map(|l| l.error).sum();
    assert_eq!(plan.error(), sum);
    let value = serde_json::to_value(&plan).unwrap();
    assert_eq!(value["version"], 2);
    assert_eq!(value["method"]["name"], "qcqa-ac");
    assert_eq!(value["method"]["cost"], "energy-share");
    assert_eq!(value["method"]["search"][0]["name"], "nsga2");
    assert_eq!(value["method"]["search"][0]["population"], 20);
    assert_eq!(value["pooling"]["pooler"]["name"], "mean");
    assert!(plan.layers.iter().all(|l| l.lower_bound.is_some_and(|bound| bound > 0.0 && bound <= l.error)));
    assert_eq!(serde_json::from_value::<Plan>(value).unwrap(), plan);
}

#[test]
fn pinned_on_whole_numbers() {
    // A change here is value-breaking: say so in CHANGELOG.
    let limits = Limits { space: SearchSpace::equal(), same_k: true, ..Limits::default() };
    let plan = plan(&compress().limits(limits), 0.5).unwrap();
    let found: Vec<_> = plan.layers.iter().map(|l| (format!("{:?}", l.groups), l.error)).collect();
    assert_eq!(found, PINNED.map(|(groups, error)| (groups.to_string(), error)));
}

const PINNED: [(&str, f64); 3] = [
    ("Partition[[0, 4], [1, 3], [2, 6], [5, 7]]", 192.5),
    ("Partition[[0, 1], [2, 6], [3, 7], [4, 5]]", 238.5),
    ("Partition[[0, 2], [1, 3], [4, 5], [6, 7]]", 279.0),
];

#[test]
fn stage_two_by_raw_error_is_the_paper_to_the_letter() {
    let (compress, model) = (compress().allocator(LayerSelection::default()).cost(CostScale::Raw), model());
    let searched = compress.search(&model, Run::new(7)).unwrap();
    let (fronts, plan) = (searched.layers(), searched.plan(Budget::Fraction(0.5), Run::new(7)).unwrap());
    let ks = plan.group_counts();
    let grouped: Vec<_> = ks.iter().filter(|k| **k != 8).collect();
    assert!(grouped.iter().all(|k| *k == grouped[0]) && plan.kv_heads() <= 12);
    // The definition, by trying every k and every subset of layers.
    let mut least = f64::INFINITY;
    for k in 1..=8 {
        for bits in 0u32..8 {
            let ks: Vec<_> = (0..3).map(|l| if bits >> l & 1 == 1 { k } else { 8 }).collect();
            if ks.iter().sum::<usize>() <= 12 {
                least = least.min(ks.iter().zip(fronts).map(|(&k, f)| f.error(k).unwrap()).sum());
            }
        }
    }
    assert_eq!(plan.error(), least);
}

#[test]
fn measured_costs_decide_within_the_limits() {
    // Layer 0 is said to lose nothing by sharing: it pays for the others.
    let limits = Limits { space: SearchSpace::equal(), fixed: [(2, 4)].into(), ..Limits::default() };
    let (compress, model) = (compress().allocator(ExactAllocation).limits(limits.clone()), model());
    let searched = compress.search(&model, Run::new(7)).unwrap();
    let fronts = searched.layers();
    let price = |layer: usize, point: &FrontPoint| {
        Ok((point.partition.n_groups() > 1).then(|| layer as f64 * (8 - point.partition.n_groups()) as f64))
    };
    let costs = LayerCosts::priced(fronts, &limits, price).unwrap();
    assert!(costs.choices(0).map(|(k, _)| k).eq([2, 4, 8]) && costs.choices(2).map(|(k, _)| k).eq([4]));
    let with =
        |costs: &LayerCosts| searched.plan_with_costs(costs, Budget::Fraction(14.0 / 24.0), Run::new(7));
    let plan = with(&costs).unwrap();
    assert_eq!((plan.group_counts(), plan.method.cost), (vec![2, 8, 4], CostScale::Measured));
    assert_eq!(plan.method.fixed, limits.fixed);
    let value = serde_json::to_value(&plan).unwrap();
    assert_eq!(value["method"]["cost"], "measured");
    assert_eq!(serde_json::from_value::<Plan>(value).unwrap(), plan);

    // Costs of other layers, of a k that no front has, and a scale that no error has.
    let two = LayerCosts::from_table(vec![vec![Some(0.0); 8]; 2], false).unwrap();
    let error = with(&two).unwrap_err();
    assert!(matches!(error, Error::LayerCount { what: "layer costs", expected: 3, found: 2 }));
    let odd = LayerCosts::from_table(vec![vec![None, None, Some(0.0)]; 3], false).unwrap();
    assert!(matches!(with(&odd).unwrap_err(), Error::GroupCount { k: 3, n_heads: 8 }));
    let error = LayerCosts::new(fronts, CostScale::Measured, &limits).unwrap_err();
    assert!(error.to_string().contains("come as a table"), "{error}");
    let outside = Limits { fixed: [(3, 4)].into(), ..Limits::default() };
    let error = LayerCosts::new(fronts, CostScale::Raw, &outside).unwrap_err();
    assert!(matches!(error, Error::NoLayer { layer: 3, layers: 3 }));
}

#[test]
#[cfg(feature = "rayon")]
fn the_same_seed_gives_the_same_plan_on_any_number_of_threads() {
    // Gaussian weights, large enough for several tasks: here the order of a sum shows.
    let plan = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let model = common::model((0..3u8).map(|i| common::layer(i.into(), 8, 40, 900, false)));
            compress().plan(&model, Run::new(7)).unwrap()
        })
    };
    let alone = plan(1);
    for threads in [2, 3, 8] {
        assert_eq!(plan(threads), alone, "{threads} threads");
    }
}

#[test]
fn a_layers_front_does_not_depend_on_the_layers_before_it() {
    let fronts = |model: &InMemory| compress().search(model, Run::new(7)).unwrap().layers().to_vec();
    let changed = (0..3u8).map(|i| integer_layer(if i < 2 { 99 } else { i.into() }, 8, 2, 3));
    assert_eq!(fronts(&common::model(changed))[2], fronts(&model())[2]);
}

/// Layers of different numbers of heads are searched and planned side by side.
#[test]
fn layers_may_differ_in_heads() {
    let model = common::model([8, 4, 6].map(|heads| integer_layer(heads as u64, heads, 2, 3)));
    let compress = Compress::new(Preset::QcqaAc).optimizer(NSGA2).allocator(ExactAllocation);
    let plan = compress.plan(&model, Run::new(1)).unwrap();
    assert!(plan.kv_heads() <= 9 && plan.layers.iter().map(|l| l.groups.n_heads()).eq([8, 4, 6]));
    let value = serde_json::to_value(&plan).unwrap();
    assert_eq!(value["source"]["kv_heads"], serde_json::json!([8, 4, 6]));
    assert_eq!(value["source"]["head_dim"], 2);
    assert_eq!(serde_json::from_value::<Plan>(value).unwrap(), plan);
}

#[test]
fn the_observer_is_told_and_can_stop() {
    let seen = Mutex::new(Vec::new());
    let watch = |progress: &Progress<'_>| {
        if progress.stage == "layers" {
            seen.lock().unwrap().push((progress.done, progress.total));
        }
        if progress.done == 2 && progress.stage == "layers" {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let (compress, model) = (compress(), model());
    let stopped = compress.search(&model, Run::new(7).with_observer(&watch));
    assert!(matches!(stopped, Err(Error::Cancelled)));
    drop(stopped);
    assert_eq!(seen.into_inner().unwrap(), [(0, 3), (1, 3), (2, 3)]);
}

/// A model of which one layer cannot be read.
#[derive(Debug)]
struct Broken(InMemory);

impl HeadSource for Broken {
    fn architecture(&self) -> &Architecture {
        self.0.architecture()
    }

    fn id(&self) -> Result<ModelId> {
        self.0.id()
    }

    fn heads(&self, layer: usize) -> Result<Heads> {
        if layer == 1 { Err(Error::plugin("unreadable")) } else { self.0.heads(layer) }
    }
}

#[test]
fn a_broken_layer_stops_it() {
    let error = compress().plan(&Broken(model()), Run::new(7)).unwrap_err();
    assert_eq!(error.to_string(), "unreadable");
    assert!(matches!(plan(&compress(), 0.01), Err(Error::BudgetUnreachable { .. })));
}

#[test]
fn plans_that_contradict_themselves_are_refused() {
    let good = serde_json::to_value(plan(&compress(), 0.5).unwrap()).unwrap();
    let check = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = good.clone();
        change(&mut value);
        serde_json::from_value::<Plan>(value)
            .map_err(|e| e.to_string())
            .and_then(|p| p.check().map_err(|e| e.to_string()))
    };
    assert_eq!(check(&|_| ()), Ok(()));
    let says = |change: &dyn Fn(&mut serde_json::Value), words: &str| {
        let error = check(change).unwrap_err();
        assert!(error.contains(words), "{error}");
    };
    says(&|v| v["version"] = 3.into(), "version 3");
    says(
        &|v| v["layers"][0]["groups"] = serde_json::json!([[0, 1, 2], [3, 4, 5, 6]]),
        "layer 0 groups 7 heads",
    );
    says(
        &|v| v["layers"][0]["groups"] = serde_json::json!([[0, 1, 2, 2], [3, 4, 5, 6]]),
        "head 2 is in more than one group",
    );
    says(
        &|v| v["layers"][0]["groups"] = serde_json::json!([[0, 1, 2], [3, 4, 5, 6, 8]]),
        "head 8 does not exist",
    );
    says(&|v| v["layers"][0]["error"] = (-1.0).into(), "layer 0 has the error");
    says(&|v| v["budget"]["kv_heads"] = 3.into(), "its budget says 3");
    says(&|v| v["extra"] = 1.into(), "extra");
    says(&|v| v["method"]["colour"] = 1.into(), "colour");
    says(&|v| v["pooling"]["colour"] = 1.into(), "colour");
    says(
        &|v| {
            v["layers"].as_array_mut().unwrap().pop();
        },
        "2 layers",
    );
    says(&|v| v["source"]["kv_heads"] = 0.into(), "0 KV heads");
    says(&|v| v["source"]["kv_heads"] = serde_json::json!([8, 8]), "not one number of heads for each");
    says(&|v| v["source"]["layers"] = (1u64 << 40).into(), "layers");
    // A refit runs on the text that the plan was made with; what files say is shown escaped and short.
    let fingerprint = format!("sha256:{}", "0f".repeat(32));
    let refit = |v: &mut serde_json::Value, name: &str| {
        v["pooling"]["calibration"] = fingerprint.clone().into();
        v["pooling"]["refit"] = name.into();
    };
    for known in ["output", "full"] {
        assert_eq!(check(&|v| refit(v, known)), Ok(()));
    }
    says(&|v| refit(v, "foo"), "foo");
    says(&|v| v["pooling"]["refit"] = "output".into(), "names no calibration");
    for room in ["method", "pooling"] {
        for wrong in ["\u{1b}[31mred", "sha256:00", &fingerprint.to_uppercase(), &fingerprint[7..]] {
            says(&|v| v[room]["calibration"] = wrong.into(), "64 hex digits");
        }
    }
    let long =
        check(&|v| v["method"]["calibration"] = format!("\u{1b}{}", "x".repeat(9000)).into()).unwrap_err();
    assert!(long.len() < 300 && long.contains("\\u{1b}") && !long.contains('\u{1b}'), "{long}");
}
