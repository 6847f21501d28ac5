//! Encoders: every token looks at the whole text, and none is predicted. That they compute what transformers computes is for
//! `tests/interop` to say.
#![cfg(feature = "runtime")]

mod made;
mod models;
mod running;

use made::{VOCABULARY, WIDTH, made};
use ndarray::{Array3, s};
use qcqa::budget::Budget;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::distil::{Distill, Effort};
use qcqa::evaluation::{evaluate, hidden_distance};
use qcqa::model::{Mask, NormKind};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::Refit;
use qcqa::pooler::MeanPooler;
use qcqa::runtime::{KvCache, Model, RuntimeError};
use qcqa::text::{Texts, WholeText, Windows};
use qcqa::{Error, HeadSource, Run};
use running::{shared_by, tokens};
use serde_json::json;

fn encoder() -> Checkpoint {
    made("bert", &json!({ "hidden_act": "gelu" }), 6)
}

fn text(n: u32) -> Windows {
    Windows::new((0..n).map(|t| (t.wrapping_mul(2_654_435_761) >> 13) % VOCABULARY as u32).collect(), 12)
        .unwrap()
}

/// The norms lie behind the sums, and what an encoder gives went through one: mean 0 and deviation 1 before weight and bias.
#[test]
fn the_last_norm_is_the_last_thing() {
    let checkpoint = encoder();
    let architecture = checkpoint.architecture();
    assert!(architecture.layers.iter().all(|spec| spec.mask == Mask::Whole));
    assert_eq!(architecture.kv_heads_at, None);
    let forward = architecture.forward.as_ref().unwrap();
    assert!(forward.head.is_none() && forward.norm.is_none());
    let [_, last] = &forward.blocks[1].sum_norms;
    let last = last.as_ref().unwrap();
    assert_eq!(last.kind, NormKind::Layer);
    let of = |name: &Option<String>| checkpoint.tensor(name.as_ref().unwrap()).unwrap();
    let (weight, bias) = (of(&last.weight), of(&last.bias));
    let states = Model::load(&checkpoint).unwrap().hidden_states(tokens(2, 9, 24).view()).unwrap();
    assert_eq!(states.dim(), (2, 9, WIDTH));
    for row in states.rows() {
        let inner: Vec<f32> = row.iter().zip(&bias).zip(&weight).map(|((x, b), w)| (x - b) / w).collect();
        let mean = inner.iter().sum::<f32>() / WIDTH as f32;
        let variance = inner.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / WIDTH as f32;
        assert!(mean.abs() < 1e-4 && (variance - 1.0).abs() < 1e-3, "{mean}, {variance}");
    }
}

/// The first token sees the last, and a window nothing of the one beside it.
#[test]
fn every_token_sees_the_whole_text() {
    let model = Model::load(&encoder()).unwrap();
    let mut text = tokens(2, 9, VOCABULARY as u32);
    let before = model.hidden_states(text.view()).unwrap();
    text[[0, 8]] = (text[[0, 8]] + 1) % VOCABULARY as u32;
    let after = model.hidden_states(text.view()).unwrap();
    let moved = |row: usize, at: usize| {
        let of = |states: &Array3<f32>| states.slice(s![row, at, ..]).to_owned();
        (&of(&after) - &of(&before)).iter().map(|d| d.abs()).fold(0.0, f32::max)
    };
    assert!((0..9).all(|at| moved(0, at) > 1e-3), "{:?}", (0..9).map(|at| moved(0, at)).collect::<Vec<_>>());
    assert!((0..9).all(|at| moved(1, at) == 0.0));
}

/// What is said of hidden states is what their definition says, and nothing is apart from itself.
#[test]
fn distances_are_those_of_the_states() {
    let checkpoint = encoder();
    let source = Model::load(&checkpoint).unwrap();
    let pairs = Partition::from_labels(&[0, 0, 1, 1, 2, 2]).unwrap();
    let plan = models::plan(&checkpoint, &[pairs.clone(), pairs]);
    let mean = shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
    let (model, windows) = (source.with_shared(&mean).unwrap(), text(60));
    let found = hidden_distance(&source, &model, &windows, Run::new(0)).unwrap();
    let (mut off, mut energy, mut cosines, mut n) = (0.0, 0.0, 0.0, 0);
    for window in windows.tokens().chunks(windows.length()) {
        let window = ndarray::ArrayView2::from_shape((1, window.len()), window).unwrap();
        let [a, b] = [&source, &model].map(|model| model.hidden_states(window).unwrap().mapv(f64::from));
        for (a, b) in a.rows().into_iter().zip(b.rows()) {
            off += (&a - &b).mapv(|d| d * d).sum();
            energy += a.dot(&a);
            cosines += a.dot(&b) / (a.dot(&a) * b.dot(&b)).sqrt();
            n += 1;
        }
    }
    assert_eq!((found.tokens, found.windows), (n, 5));
    assert!((found.error - off / energy).abs() < 1e-9 && found.error > 1e-3, "{found:?}");
    assert!((found.cosine - cosines / n as f64).abs() < 1e-9, "{found:?}");
    let same = hidden_distance(&source, &source, &windows, Run::new(0)).unwrap();
    assert_eq!(same.error, 0.0);
}

/// A calibrated encoder: all windows fit, as there is no loss to choose by, and what low-rank sharing and its refit leave is nearer to
/// the source than means.
#[test]
fn a_calibrated_encoder_is_nearer_to_its_source() {
    let checkpoint = encoder();
    let model = Model::load(&checkpoint).unwrap();
    let texts = Texts::new(&[WholeText::new("text", text(12 * 64))], 64).unwrap();
    assert!(texts.validation().is_some());
    let calibration = Calibration::measured(&checkpoint, model.clone(), texts, Run::new(0)).unwrap();
    let (_, texts) = calibration.text().unwrap();
    assert_eq!((texts.validation(), texts.fit().count(), texts.each()[0].fit().count()), (None, 64, 64));
    let unseen = text(12 * 90);
    let distance = |compress: Compress<'_>| {
        let compressed = compress.budget(Budget::Fraction(0.5)).run(&checkpoint, Run::new(0)).unwrap();
        assert!(compressed.stages.is_empty() && compressed.effects.is_empty());
        let shared = model.with_shared(&compressed.shared).unwrap();
        hidden_distance(&model, &shared, &unseen, Run::new(0)).unwrap().error
    };
    let means = distance(Compress::new(Preset::Gqa));
    let closed = distance(Compress::new(Preset::LowRank).calibration(&calibration).refit(None));
    let fitted =
        distance(Compress::new(Preset::LowRank).calibration(&calibration).refit(Some(Refit::Output)));
    assert!(fitted < closed && closed < means, "{means}, {closed}, {fitted}");
}

/// Everything that would need a prediction says that there is none.
#[test]
fn there_is_no_prediction() {
    let checkpoint = encoder();
    let model = Model::load(&checkpoint).unwrap();
    assert!(!model.predicts());
    let none = |error: RuntimeError| assert!(matches!(error, RuntimeError::NoPredictions), "{error}");
    none(model.logits(tokens(1, 4, 24).view()).unwrap_err());
    none(model.extend(&mut KvCache::default(), tokens(1, 4, 24).view()).unwrap_err());
    none(evaluate(&model, &text(60), Run::new(0)).unwrap_err());
    let texts = Texts::new(&[WholeText::new("text", text(12 * 20))], 20).unwrap();
    let calibration = Calibration::measured(&checkpoint, model, texts, Run::new(0)).unwrap();
    let compress = Compress::new(Preset::LowRank).calibration(&calibration);
    let error = compress.distil(Distill::new(Effort::Tokens(64))).run(&checkpoint, Run::new(0)).unwrap_err();
    assert!(
        matches!(&error, Error::Plugin(_)) && error.to_string().contains("predicts no next token"),
        "{error}"
    );
}
