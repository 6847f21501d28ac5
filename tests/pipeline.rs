//! From layers to a plan: reproducible on any number of threads, checked on the way in and out.

mod common;

use std::cell::RefCell;
use std::ops::ControlFlow;

use common::integer_layer;
use qcqa::{
    Budget, CostScale, Error, ExactAllocation, FrontPoint, Heads, LayerCosts, LayerSelection, Limits, Nsga2,
    Plan, Progress, Qcqa, Result, Run, Search, SearchSpace, UniformAllocation,
};

const NSGA2: Nsga2 = Nsga2 { population: 20, generations: 10, crossover: 0.9 };

fn layers() -> impl ExactSizeIterator<Item = Result<Heads>> {
    (0..3u8).map(|i| Ok(integer_layer(i.into(), 8, 2, 3)))
}

fn plan(qcqa: &Qcqa<'_>, fraction: f64) -> Result<Plan> {
    let fronts = qcqa.fronts(layers(), Run::new(7))?;
    qcqa.plan(&fronts, Budget::Fraction(fraction), common::source(3, 8, 2, 3), Run::new(7))
}

#[test]
fn a_plan_says_what_was_asked_and_reached() {
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation).described("qcqa-ac", "mean", None);
    let plan = plan(&qcqa, 0.7).unwrap();
    assert_eq!(plan.group_counts(), [5, 5, 5], "5 of 8 is the largest k within 0.7");
    assert_eq!((plan.budget.asked, plan.budget.reached, plan.budget.kv_heads), (0.7, 0.625, 15));
    assert_eq!(plan.seed, 7);
    let sum: f64 = plan.layers.iter().map(|l| l.error).sum();
    assert_eq!(plan.error(), sum);
    let value = serde_json::to_value(&plan).unwrap();
    assert_eq!(value["version"], 1);
    assert_eq!(value["method"]["name"], "qcqa-ac");
    assert_eq!(value["method"]["cost"], "energy-share");
    assert!(plan.layers.iter().all(|l| l.lower_bound.is_some_and(|bound| bound > 0.0 && bound <= l.error)));
}

#[test]
fn pinned_on_whole_numbers() {
    // A change here is value-breaking: say so in CHANGELOG.
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation).with_limits(Limits {
        space: SearchSpace::equal(),
        same_k: true,
        ..Limits::default()
    });
    let plan = plan(&qcqa, 0.5).unwrap();
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
    let selection = LayerSelection::default();
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &selection).with_cost(CostScale::Raw);
    let fronts = qcqa.fronts(layers(), Run::new(7)).unwrap();
    let plan = qcqa.plan(&fronts, Budget::Fraction(0.5), common::source(3, 8, 2, 3), Run::new(7)).unwrap();
    let ks = plan.group_counts();
    let grouped: Vec<_> = ks.iter().filter(|k| **k != 8).collect();
    assert!(grouped.iter().all(|k| *k == grouped[0]) && plan.kv_heads() <= 12);
    // The definition, by trying every k and every subset of layers.
    let mut least = f64::INFINITY;
    for k in 1..=8 {
        for bits in 0u32..8 {
            let ks: Vec<_> = (0..3).map(|l| if bits >> l & 1 == 1 { k } else { 8 }).collect();
            if ks.iter().sum::<usize>() <= 12 {
                least = least.min(ks.iter().zip(&fronts).map(|(&k, f)| f.error(k).unwrap()).sum());
            }
        }
    }
    assert_eq!(plan.error(), least);
}

#[test]
fn measured_costs_decide_within_the_limits() {
    // Layer 0 is said to lose nothing by sharing: it pays for the others.
    let limits = Limits { space: SearchSpace::equal(), fixed: [(2, 4)].into(), ..Limits::default() };
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &ExactAllocation).with_limits(limits.clone());
    let fronts = qcqa.fronts(layers(), Run::new(7)).unwrap();
    let price = |layer: usize, point: &FrontPoint| {
        Ok((point.partition.n_groups() > 1).then(|| layer as f64 * (8 - point.partition.n_groups()) as f64))
    };
    let costs = LayerCosts::priced(&fronts, &limits, price).unwrap();
    assert!(costs.choices(0).map(|(k, _)| k).eq([2, 4, 8]) && costs.choices(2).map(|(k, _)| k).eq([4]));
    let budget = Budget::Fraction(14.0 / 24.0);
    let with = |costs: &LayerCosts, source| qcqa.plan_with_costs(&fronts, costs, budget, source, Run::new(7));
    let plan = with(&costs, common::source(3, 8, 2, 3)).unwrap();
    assert_eq!((plan.group_counts(), plan.method.cost), (vec![2, 8, 4], CostScale::Measured));
    let value = serde_json::to_value(&plan).unwrap();
    assert_eq!(value["method"]["cost"], "measured");
    assert_eq!(serde_json::from_value::<Plan>(value).unwrap(), plan);

    // Costs of other layers, of a k that no front has, and a scale that no error has.
    let two = LayerCosts::from_table(vec![vec![Some(0.0); 8]; 2], false).unwrap();
    let error = with(&two, common::source(3, 8, 2, 3)).unwrap_err();
    assert!(matches!(error, Error::LayerCount { what: "layer costs", expected: 3, found: 2 }));
    let odd = LayerCosts::from_table(vec![vec![None, None, Some(0.0)]; 3], false).unwrap();
    let error = with(&odd, common::source(3, 8, 2, 3)).unwrap_err();
    assert!(matches!(error, Error::GroupCount { k: 3, n_heads: 8 }));
    let error = LayerCosts::new(&fronts, CostScale::Measured, &limits).unwrap_err();
    assert!(error.to_string().contains("come as a table"), "{error}");
}

#[test]
#[cfg(feature = "rayon")]
fn the_same_seed_gives_the_same_plan_on_any_number_of_threads() {
    // Gaussian weights, large enough for several tasks: here the order of a sum shows.
    let plan = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation);
            let layers = (0..3u8).map(|i| Ok(common::layer(i.into(), 8, 40, 900, false)));
            let fronts = qcqa.fronts(layers, Run::new(7)).unwrap();
            let source = common::source(3, 8, 40, 900);
            qcqa.plan(&fronts, Budget::Fraction(0.5), source, Run::new(7)).unwrap()
        })
    };
    let alone = plan(1);
    for threads in [2, 3, 8] {
        assert_eq!(plan(threads), alone, "{threads} threads");
    }
}

#[test]
fn a_layers_front_does_not_depend_on_the_layers_before_it() {
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation);
    let all = qcqa.fronts(layers(), Run::new(7)).unwrap();
    let changed = (0..3u8).map(|i| Ok(integer_layer(if i < 2 { 99 } else { i.into() }, 8, 2, 3)));
    assert_eq!(qcqa.fronts(changed, Run::new(7)).unwrap()[2], all[2]);
}

#[test]
fn the_observer_is_told_and_can_stop() {
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation);
    let seen = RefCell::new(Vec::new());
    let watch = |progress: &Progress<'_>| {
        if progress.stage == "layers" {
            seen.borrow_mut().push((progress.done, progress.total));
        }
        if progress.done == 2 && progress.stage == "layers" {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let stopped = qcqa.fronts(layers(), Run::new(7).with_observer(&watch));
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert_eq!(seen.into_inner(), [(0, 3), (1, 3), (2, 3)]);
}

#[test]
fn a_broken_layer_stops_it_and_a_wrong_source_is_noticed() {
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation);
    let broken = (0..3u8).map(|i| {
        if i == 1 { Err(Error::plugin("unreadable")) } else { Ok(integer_layer(i.into(), 8, 2, 3)) }
    });
    assert_eq!(qcqa.fronts(broken, Run::new(7)).unwrap_err().to_string(), "unreadable");
    let fronts = qcqa.fronts(layers(), Run::new(7)).unwrap();
    let plan = |source| qcqa.plan(&fronts, Budget::Fraction(0.5), source, Run::new(7));
    assert!(matches!(plan(common::source(2, 8, 2, 3)), Err(Error::LayerCount { expected: 2, found: 3, .. })));
    assert!(matches!(plan(common::source(3, 4, 2, 3)), Err(Error::PlanInconsistent(_))));
    assert!(matches!(
        qcqa.plan(&fronts, Budget::Fraction(0.01), common::source(3, 8, 2, 3), Run::new(7)),
        Err(Error::BudgetUnreachable { .. })
    ));
}

#[test]
fn plans_that_contradict_themselves_are_refused() {
    let qcqa = Qcqa::new(Search::Optimizer(&NSGA2), &UniformAllocation);
    let good = serde_json::to_value(plan(&qcqa, 0.5).unwrap()).unwrap();
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
    says(&|v| v["version"] = 2.into(), "version 2");
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
    says(
        &|v| {
            v["layers"].as_array_mut().unwrap().pop();
        },
        "2 layers",
    );
    says(&|v| v["source"]["kv_heads"] = 0.into(), "0 KV heads");
    // A refit runs on the text that the plan was made with; what files say is shown escaped and short.
    let fingerprint = format!("sha256:{}", "0f".repeat(32));
    let refit = |v: &mut serde_json::Value, name: &str| {
        v["calibration"] = fingerprint.clone().into();
        v["method"]["refit"] = name.into();
    };
    for known in ["none", "output", "full"] {
        assert_eq!(check(&|v| refit(v, known)), Ok(()));
    }
    says(&|v| refit(v, "foo"), "no refit \"foo\"; known are none, output, full");
    says(&|v| v["method"]["refit"] = "output".into(), "names no calibration");
    assert_eq!(check(&|v| v["method"]["refit"] = "none".into()), Ok(()));
    for wrong in ["\u{1b}[31mred", "sha256:00", &fingerprint.to_uppercase(), &fingerprint[7..]] {
        says(&|v| v["calibration"] = wrong.into(), "64 hex digits");
    }
    let long = check(&|v| v["calibration"] = format!("\u{1b}{}", "x".repeat(9000)).into()).unwrap_err();
    assert!(long.len() < 300 && long.contains("\\u{1b}") && !long.contains('\u{1b}'), "{long}");
}
