//! What the limits of a target cost: against the plan that has none, both measured alike.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcqa::budget::Budget;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::evaluate_against;
use qcqa::output::Target;
use qcqa::pipeline::{Compress, Compressed, Preset};
use qcqa::plan::{Plan, Refit, SharedHeads};
use qcqa::runtime::Model;
use qcqa::targets::{Expanded, Stock};
use qcqa::text::{Texts, WholeText};
use qcqa::{Progress, Run};
use running::{calibration_text, novels, windows};

/// A calibration of novels-1m on so many windows.
fn calibrated(checkpoint: &Checkpoint, n: usize) -> Calibration<'_> {
    let model = Model::load(checkpoint).unwrap();
    let text = windows(checkpoint, &model, &calibration_text()).spaced(n);
    let texts = Texts::new(&[WholeText::new("novels", text)], 1000).unwrap();
    Calibration::measured(checkpoint, model, texts, Run::new(0)).unwrap()
}

fn half<'a>(preset: Preset, target: &'a dyn Target, calibration: &'a Calibration<'a>) -> Compress<'a> {
    Compress::new(preset).budget(Budget::Fraction(0.5)).target(target).calibration(calibration)
}

/// Runs it, and how often layers were searched.
fn run<'a>(compress: &Compress<'a>, checkpoint: &'a Checkpoint) -> (Compressed<'a>, usize) {
    let searches = AtomicUsize::new(0);
    let watch = |progress: &Progress<'_>| {
        searches.fetch_add(usize::from(progress.stage == "layers" && progress.done == 0), Ordering::Relaxed);
        ControlFlow::Continue(())
    };
    let compressed = compress.run(checkpoint, Run::new(0).with_observer(&watch)).unwrap();
    (compressed, searches.into_inner())
}

/// Loss and KL of a plan before any refit, on the windows that validate.
fn measured(plan: &Plan, calibration: &Calibration<'_>) -> [f64; 2] {
    let mut plan = plan.clone();
    plan.pooling = plan.pooling.with_refit(None);
    let shared = SharedHeads::new(&plan, calibration).unwrap();
    let (model, texts) = calibration.text().unwrap();
    let under = model.with_shared(&shared).unwrap();
    let (_, after) = evaluate_against(model, &[&under], texts.validation().unwrap(), Run::new(0)).unwrap();
    [after[0].loss, after[0].divergence.unwrap().kl]
}

#[track_caller]
fn near(found: [f64; 2], expected: [f64; 2]) {
    assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-7), "{found:?}, {expected:?}");
}

#[test]
fn what_one_k_and_one_size_cost() {
    let checkpoint = novels();
    let calibration = calibrated(&checkpoint, 32);
    let compress = half(Preset::LowRank, &Stock, &calibration).refit(Some(Refit::Output)).weighing_limits();
    let (compressed, searches) = run(&compress, &checkpoint);
    assert_eq!(searches, 2, "groups of any size are another space");
    let cost = compressed.limit_cost.as_ref().unwrap();
    assert!(cost.kl() > 0.0 && cost.loss() > 0.0, "{} and {}", cost.kl(), cost.loss());
    // Like against like, whatever was kept afterwards.
    assert_eq!([cost.without.name(), cost.within.name()], ["closed form"; 2]);
    assert_eq!(cost.within, compressed.stages[1]);
    near([cost.without.loss(), cost.without.kl()], measured(&cost.plan, &calibration));
    near([cost.within.loss(), cost.within.kl()], measured(compressed.plan(), &calibration));
    assert_eq!(cost.loss(), cost.within.loss() - cost.without.loss());
    // The plan that would have been made without the target.
    let free = half(Preset::LowRank, &Expanded, &calibration).refit(None);
    assert_eq!(cost.plan, free.plan(&calibration, Run::new(0)).unwrap());
    assert!(cost.plan.kv_heads() <= 16 && compressed.plan().group_counts() == [4; 4]);
}

#[test]
fn what_is_searched_alike_is_searched_once() {
    let checkpoint = novels();
    let calibration = calibrated(&checkpoint, 8);
    // Of equal groups stock takes no more than the choice of k by layer.
    let compress = half(Preset::QcqaEc, &Stock, &calibration).by_sensitivity();
    let (compressed, searches) = run(&compress.clone().weighing_limits(), &checkpoint);
    let cost = compressed.limit_cost.as_ref().unwrap();
    assert_eq!(searches, 1);
    let free = half(Preset::QcqaEc, &Expanded, &calibration).by_sensitivity();
    assert_eq!(cost.plan, free.plan(&calibration, Run::new(0)).unwrap());
    assert_ne!(cost.plan.group_counts(), [4; 4]);
    near([cost.without.loss(), cost.without.kl()], measured(&cost.plan, &calibration));

    // One k for all is what this method takes anyhow.
    let uniform = half(Preset::QcqaEc, &Stock, &calibration).weighing_limits();
    let cost = run(&uniform, &checkpoint).0.limit_cost.unwrap();
    assert_eq!((cost.kl(), cost.loss(), cost.plan.group_counts()), (0.0, 0.0, vec![4; 4]));
    // Unasked, without limits, and without windows that fit nothing there is nothing to say.
    assert!(run(&compress, &checkpoint).0.limit_cost.is_none());
    assert!(run(&free.weighing_limits(), &checkpoint).0.limit_cost.is_none());
    let single = calibrated(&checkpoint, 1);
    let compress = half(Preset::QcqaEc, &Stock, &single).weighing_limits();
    assert!(run(&compress, &checkpoint).0.limit_cost.is_none());
}
