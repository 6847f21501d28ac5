//! Trained models: methods in their order, and every reported error by its definition.
//!
//! The larger model is found by `QCQA_MODELS`, the directory that holds `novels-14m`.
#![cfg(feature = "checkpoint")]

mod common;

use std::path::{Path, PathBuf};

use common::plain_wse;
use qcqa::checkpoint::Checkpoint;
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::optimizer::{Exact, LocalSearch, Nsga2};
use qcqa::partition::SearchSpace;
use qcqa::pipeline::{Compress, Preset};
use qcqa::{FitnessFn, HeadSource, Optimizer, Run};

/// The model of that name among the shared ones; `None`, said aloud, where there are none here.
fn shared(name: &str) -> Option<PathBuf> {
    let Some(models) = std::env::var_os("QCQA_MODELS") else {
        println!("skipped: QCQA_MODELS does not say where {name} is");
        return None;
    };
    let path = Path::new(&models).join(name);
    assert!(path.is_dir(), "QCQA_MODELS is set, but {} is not there", path.display());
    Some(path)
}

fn methods_are_ordered_and_honest(model: &Path) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let rule = Compress::new(Preset::Gqa);
    let gqa = rule.search(&checkpoint, Run::new(0)).unwrap();
    for (i, gqa) in gqa.layers().iter().enumerate() {
        let heads = checkpoint.heads(i).unwrap();
        let fitness = WeightSharingError::new(&heads).unwrap();
        assert_eq!(
            fitness,
            WeightSharingError::new(checkpoint.rows(i).unwrap().as_ref()).unwrap(),
            "read in pieces"
        );
        let honest = |front: &Front| {
            for point in front.iter() {
                let expected = plain_wse(&heads, &point.partition);
                assert!(
                    (point.error - expected).abs() <= 1e-6 * expected,
                    "layer {i}: {point:?}, {expected}"
                );
            }
        };
        honest(gqa);
        let optimizers: [&dyn Optimizer; 3] = [&Nsga2::default(), &LocalSearch::default(), &Exact::default()];
        for optimizer in optimizers {
            let run = Run::new(0).fork(i as u64);
            let search = |space| optimizer.optimize(&fitness, &space, run).unwrap();
            let (arbitrary, equal) = (search(SearchSpace::arbitrary()), search(SearchSpace::equal()));
            honest(&arbitrary);
            honest(&equal);
            for k in [fitness.n_heads() / 2, fitness.n_heads() / 4] {
                let errors = [&arbitrary, &equal, gqa].map(|front| front.error(k).unwrap());
                assert!(errors.is_sorted(), "layer {i}, k = {k}, {optimizer:?}: {errors:?}");
            }
        }
    }
}

/// Exact never loses, and LocalSearch equals it on most k.
fn local_search_is_nearly_exact(model: &Path) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let (mut equal, mut all) = (0, 0);
    for i in 0..checkpoint.architecture().n_layers() {
        let fitness = WeightSharingError::new(checkpoint.rows(i).unwrap().as_ref()).unwrap();
        for space in [SearchSpace::arbitrary(), SearchSpace::equal()] {
            let optimizers: [&dyn Optimizer; 3] =
                [&Exact::default(), &LocalSearch::default(), &Nsga2::default()];
            let [exact, local, nsga2] =
                optimizers.map(|o| o.optimize(&fitness, &space, Run::new(1)).unwrap());
            for point in exact.iter() {
                let k = point.partition.n_groups();
                let tolerance = 1e-12 * fitness.energy().unwrap();
                let [local, nsga2] = [&local, &nsga2].map(|front| front.error(k).unwrap());
                assert!(point.error <= local.min(nsga2) + tolerance, "layer {i}, k = {k}");
                equal += usize::from(local <= point.error + tolerance);
                all += 1;
            }
        }
    }
    println!("LocalSearch equals Exact on {equal} of {all} k");
    assert!(10 * equal >= 9 * all, "{equal} of {all}");
}

#[test]
fn novels_1m() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/novels-1m");
    methods_are_ordered_and_honest(&model);
    local_search_is_nearly_exact(&model);
}

#[test]
fn novels_14m() {
    if let Some(model) = shared("novels-14m") {
        methods_are_ordered_and_honest(&model);
        local_search_is_nearly_exact(&model);
    }
}
