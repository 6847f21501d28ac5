//! The crate on a published model, SmolLM2-135M-Instruct, where QCQA_SMOLLM2 names its directory: what is claimed of toys is
//! claimed of it, too.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::path::PathBuf;

use qcqa::Run;
use qcqa::budget::Budget;
use qcqa::calibration::{Calibration, TextSource};
use qcqa::checkpoint::Checkpoint;
use qcqa::distil::{Distill, Effort};
use qcqa::evaluation::{evaluate, evaluate_against};
use qcqa::files::WriteOptions;
use qcqa::pipeline::{Compress, Preset};
use qcqa::runtime::Model;
use qcqa::targets::Stock;
use running::{calibration_text, evaluation_text, windows};

/// The mean loss of the first two windows of the evaluation text in the tree, f32: transformers 5.24.0, torch 2.15.0.
const LOSS_IN_TRANSFORMERS: f64 = 5.262964654;

/// Its directory; `None`, said aloud, where it is not at hand.
fn smollm2() -> Option<PathBuf> {
    let directory = std::env::var_os("QCQA_SMOLLM2").map(PathBuf::from);
    if directory.is_none() {
        println!("skipped: QCQA_SMOLLM2 is not set, so SmolLM2 is not at hand");
    }
    directory
}

#[test]
fn it_reads_a_text_as_transformers_does() {
    let Some(directory) = smollm2() else { return };
    let checkpoint = Checkpoint::open(directory).unwrap();
    let held = Model::load(&checkpoint).unwrap();
    let windows = windows(&checkpoint, &held, &evaluation_text()).first(2);
    let found = evaluate(&held, &windows, Run::new(0)).unwrap().loss;
    assert!((found - LOSS_IN_TRANSFORMERS).abs() < 1e-4, "{found}");
    let read = Model::open_by_layers(&checkpoint).unwrap();
    assert_eq!(evaluate(&read, &windows, Run::new(0)).unwrap().loss, found);
}

/// A third of its cache, in the form that every runtime loads; what is printed holds on text that fitted nothing.
#[test]
fn its_stages_go_down_and_hold_on_other_text() {
    let Some(directory) = smollm2() else { return };
    let (checkpoint, run) = (Checkpoint::open(directory).unwrap(), Run::new(0));
    let texts = [TextSource::file(calibration_text())];
    let calibration = Calibration::from_texts(&checkpoint, &texts, 32, run).unwrap();
    let compress = Compress::new(Preset::LowRank).budget(Budget::Heads(30)).target(&Stock);
    let compress = compress.calibration(&calibration).distil(Distill::new(Effort::Tokens(8 * 1024)));
    let compressed = compress.run(&checkpoint, run).unwrap();
    let stages: Vec<_> = compressed.stages.iter().map(|stage| (stage.name(), stage.kl())).collect();
    println!("{stages:?}");
    let names: Vec<&str> = stages.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["weights only", "closed form", "full refit", "distilled"]);
    assert!(stages.is_sorted_by(|(_, before), (_, after)| after < before), "{stages:?}");
    assert!(stages[2].1 < 0.5 * stages[1].1, "the refit is what holds with few tokens: {stages:?}");

    // What is written is what was measured, in as many heads as were asked for.
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    compressed.write(&out, WriteOptions::default(), run).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    let (source, model) = (Model::load(&checkpoint).unwrap(), Model::load(&written).unwrap());
    assert_eq!(model.kv_heads(), [1; 30]);
    let text = windows(&checkpoint, &source, &evaluation_text()).spaced(4);
    let (_, after) = evaluate_against(&source, &[&model], &text, run).unwrap();
    let (printed, held_out) = (stages[3].1, after[0].divergence.unwrap().kl);
    println!("printed {printed}, on text of the same kind that nothing read {held_out}");
    assert!((held_out / printed).ln().abs() < 1.5f64.ln(), "{printed}, {held_out}");
}
