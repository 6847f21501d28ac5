//! The crate on a published model, SmolLM2-135M-Instruct, where QCQA_SMOLLM2 names its directory: what is claimed of toys is
//! claimed of it, too.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::path::{Path, PathBuf};

use qcqa::Run;
use qcqa::budget::Budget;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{evaluate, evaluate_against};
use qcqa::files::WriteOptions;
use qcqa::pipeline::{Compress, Preset};
use qcqa::runtime::Model;
use qcqa::targets::Stock;
use qcqa::text::{Texts, WholeText, Windows};
use running::{calibration_text, evaluation_text, windows};

/// The mean loss of the first two windows of the evaluation text in the tree, f32: transformers 5.24.0, torch 2.15.0.
const LOSS_IN_TRANSFORMERS: f64 = 5.262964654;

/// Tokens of a short window.
const LENGTH: usize = 128;

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

/// A third of its cache, in the form that every runtime loads, of a text of a few thousand tokens in short windows.
#[test]
fn its_best_stage_is_kept_written_and_holds_on_other_text() {
    let Some(directory) = smollm2() else { return };
    let (checkpoint, run) = (Checkpoint::open(directory).unwrap(), Run::new(0));
    let source = Model::load(&checkpoint).unwrap();
    let short = |path: &Path, n: usize| {
        let text = windows(&checkpoint, &source, path).spaced(n);
        let starts = text.tokens().chunks(text.length()).flat_map(|window| window[..LENGTH].to_vec());
        Windows::new(starts.collect(), LENGTH).unwrap()
    };
    let texts = Texts::new(&[WholeText::new("text", short(&calibration_text(), 8))], 8).unwrap();
    let calibration = Calibration::measured(&checkpoint, source.clone(), texts, run).unwrap();
    let compress = Compress::new(Preset::LowRank).budget(Budget::Heads(30)).target(&Stock);
    let compress = compress.calibration(&calibration);
    let compressed = compress.run(&checkpoint, run).unwrap();
    let stages: Vec<_> = compressed.stages.iter().map(|stage| (stage.name(), stage.kl())).collect();
    println!("{stages:?}");
    let names: Vec<&str> = stages.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["weights only", "closed form", "full refit"]);
    let least = stages.iter().map(|(_, kl)| *kl).fold(f64::INFINITY, f64::min);
    let kept = compressed.stages.iter().find(|stage| stage.kept).unwrap();
    assert_eq!(kept.kl(), least);
    assert!(least < 0.9 * stages[1].1, "more than the closed form is to be had: {stages:?}");

    // What is written is what was measured, in as many heads as were asked for; other text of the kind is not far from it.
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    compressed.write(&out, WriteOptions::default(), run).unwrap();
    let model = Model::load(&Checkpoint::open(&out).unwrap()).unwrap();
    assert_eq!(model.kv_heads(), [1; 30]);
    let kl = |windows: &Windows| {
        let (_, after) = evaluate_against(&source, &[&model], windows, run).unwrap();
        after[0].divergence.unwrap().kl
    };
    let (_, texts) = calibration.text().unwrap();
    let (measured, held_out) = (kl(texts.validation().unwrap()), kl(&short(&evaluation_text(), 8)));
    println!("printed {least}, measured {measured}, on other text {held_out}");
    assert!((measured / least - 1.0).abs() < 0.01, "{measured}, {least}");
    assert!((held_out / least).ln().abs() < 2f64.ln(), "{least}, {held_out}");
}
