//! Models whose layers read the cache of the layer below, run and written.
#![cfg(feature = "runtime")]

mod models;
mod running;

use ndarray::{Axis, s};
use qcqa::budget::Budget;
use qcqa::calibration::{Calibration, TextSource};
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{evaluate, evaluate_against};
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::optimizer::LocalSearch;
use qcqa::output::{check_plan, convert};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::{LayerPlan, Method, Plan, Pooling, Refit, SharedHeads, read_plan, write_plan};
use qcqa::pooler::LowRankPooler;
use qcqa::refit::refit;
use qcqa::runtime::{FullCache, KvCache, Model, SlidingWindow};
use qcqa::spec::Spec;
use qcqa::targets::{RemoteCode, TARGETS};
use qcqa::{KvPooler, Run};
use running::{Slow, converted, near, novels, opened, planned, runnable, tokens, windows, written};
use safetensors::Dtype;

/// A plan of the made-up model of two layers, by the joint groups of both.
fn paired(source: &dyn HeadSource, labels: &[usize], pooling: Pooling) -> Plan {
    let heads = source.architecture().layers[0].kv_heads;
    let joint = LayerPlan::new(Partition::from_labels(labels).unwrap(), 0.1);
    let method = Method::new("test", Spec::new("by hand"), Spec::new("none"), Spec::new("by hand"));
    let layers = joint.split(heads).unwrap().to_vec();
    Plan::new(source.id().unwrap(), method, pooling, layers, 1.0, 0).unwrap()
}

/// Groups within the lower layer, within the upper one, across both, and heads alone.
const LABELS: [&[usize]; 3] = [&[0, 1, 2, 0, 3, 3], &[0, 0, 1, 1, 0, 2], &[0, 1, 1, 2, 3, 4]];

#[test]
fn what_is_computed_is_what_is_defined() {
    for bias in [false, true] {
        let (_root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, 3, bias));
        let tokens = tokens(2, 12, 16);
        for labels in LABELS {
            for pooler in ["mean", "low-rank"] {
                let plan = paired(&checkpoint, labels, Pooling::new(Spec::new(pooler)));
                let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
                let model = planned(&checkpoint, &shared);
                let logits = model.logits(tokens.view()).unwrap();
                for (row, logits) in tokens.outer_iter().zip(logits.outer_iter()) {
                    let slow = Slow { checkpoint: &checkpoint, shared: Some(&shared) };
                    let expected = slow.run(&row.to_vec()).0.mapv(|v| v as f32).insert_axis(Axis(0));
                    near(&logits.to_owned().insert_axis(Axis(0)), &expected, 2e-3);
                }
                // Token by token and by pieces, from a cache that holds each shared head once.
                let mut cache = KvCache::default();
                let parts = [0..1, 1..6, 6..12]
                    .map(|part| model.extend(&mut cache, tokens.slice(s![.., part])).unwrap());
                let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
                near(&ndarray::concatenate(Axis(1), &views).unwrap(), &logits, 1e-4);
                // And through a policy, which both layers ask.
                let mut kept = KvCache::by(FullCache::default());
                let mut windowed = KvCache::by(SlidingWindow::new(2, 3));
                for part in [0..7, 7..12] {
                    let read = model.extend(&mut kept, tokens.slice(s![.., part.clone()])).unwrap();
                    near(&read, &logits.slice(s![.., part.clone(), ..]).to_owned(), 1e-4);
                    model.extend(&mut windowed, tokens.slice(s![.., part])).unwrap();
                }
                assert_eq!(kept.bytes(), cache.bytes());
                assert_eq!(windowed.bytes(), 2 * 5 * model.kv_bytes_per_token() / 2);
                assert_eq!(model.kv_heads(), [plan.kv_heads(), 0]);
                assert_eq!(cache.bytes(), 2 * 12 * model.kv_bytes_per_token());
                let head_dim = checkpoint.architecture().layers[0].head_dim;
                assert_eq!(model.kv_bytes_per_token(), plan.kv_heads() * 2 * head_dim * 4);
            }
        }
    }
}

/// What remote-code writes is read again and computes the same, with the cache of the plan.
#[test]
fn what_is_written_is_the_model() {
    for bias in [false, true] {
        let (_root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, 3, bias));
        let tokens = tokens(2, 12, 16);
        for labels in LABELS {
            let plan = paired(&checkpoint, labels, Pooling::new(Spec::new("low-rank")));
            let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
            let (model, reopened) =
                (planned(&checkpoint, &shared), converted(&checkpoint, &shared, &RemoteCode));
            near(&reopened.logits(tokens.view()).unwrap(), &model.logits(tokens.view()).unwrap(), 1e-4);
            assert_eq!(reopened.kv_heads(), model.kv_heads());
            let mut cache = KvCache::default();
            let logits = reopened.extend(&mut cache, tokens.view()).unwrap();
            near(&logits, &reopened.logits(tokens.view()).unwrap(), 1e-4);
            assert_eq!(cache.bytes(), 24 * model.kv_bytes_per_token());
            let (_out, again) = written(&checkpoint, &shared, &RemoteCode);
            assert_eq!(again.kv_bytes_per_token(), model.kv_bytes_per_token());
            // Layer by layer from its files, too.
            let by_layers = Model::open_by_layers(&again).unwrap();
            near(&by_layers.logits(tokens.view()).unwrap(), &logits, 1e-4);
            // Once is enough.
            let error = Compress::new(Preset::Gqa).plan(&again, Run::new(0)).unwrap_err().to_string();
            assert!(error.contains("layer 1 reads the keys and values of the layer below"), "{error}");
        }
    }
}

/// What config.json says of layers below is held against the layers.
#[test]
fn configurations_that_cannot_be_are_refused() {
    let (_root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, 3, true));
    let plan = paired(&checkpoint, LABELS[0], Pooling::new(Spec::new("mean")));
    let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
    let (_out, again) = written(&checkpoint, &shared, &RemoteCode);
    let below = again.config().get("qcqa_below").unwrap().clone();
    let wrong = [
        serde_json::json!([[0], null]),
        serde_json::json!([null, [0, 9]]),
        serde_json::json!([null, [0]]),
        serde_json::json!([null]),
        serde_json::json!("two"),
        serde_json::json!([null, [-1, 0]]),
    ];
    for value in wrong {
        models::configured(again.path(), |config| config["qcqa_below"] = value.clone());
        let error = Checkpoint::open(again.path()).unwrap_err().to_string();
        assert!(error.contains("qcqa_below"), "{value}: {error}");
    }
    models::configured(again.path(), |config| config["qcqa_below"] = below);
    assert!(Checkpoint::open(again.path()).is_ok());
}

#[test]
fn all_others_refuse_by_name() {
    let (root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, 3, true));
    let plan = paired(&checkpoint, LABELS[0], Pooling::new(Spec::new("low-rank")));
    for target in TARGETS.iter().filter(|target| target.name() != "remote-code") {
        let error = check_plan(&checkpoint, &plan, *target).unwrap_err().to_string();
        assert!(error.contains(target.name()), "{error}");
        let mut source = std::error::Error::source(&check_plan(&checkpoint, &plan, *target).unwrap_err())
            .map(ToString::to_string)
            .unwrap_or_default();
        source += &error;
        assert!(source.contains("only where both layers have one input"), "{source}");
        let compress = Compress::new(Preset::Cla).target(*target);
        let error = compress.plan(&checkpoint, Run::new(0)).unwrap_err().to_string();
        assert!(error.contains(target.name()) && error.contains("remote-code"), "{error}");
    }
    let model = Model::load(&checkpoint).unwrap();
    let windows = qcqa::text::Windows::new((0..64).map(|t| t * t % 16).collect(), 8).unwrap();
    let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
    let error = refit(shared.clone(), &model, &windows, Refit::Output, Run::new(0)).unwrap_err().to_string();
    assert!(error.contains("a refit takes layers with keys and values of their own"), "{error}");
    // A plan as a file, and the same heads from it.
    let file = root.path().join("plan.json");
    write_plan(&file, &plan, WriteOptions::default()).unwrap();
    assert_eq!(read_plan(&file).unwrap(), plan);
}

/// Under a text: predicted heads of the upper layer, costs measured, the budget kept, and what is written evaluates alike.
#[test]
fn a_trained_model_shares_across_layers() {
    let checkpoint = novels();
    let texts = [TextSource::file(running::calibration_text())];
    let calibration = Calibration::from_texts(&checkpoint, &texts, 8, Run::new(0)).unwrap();
    // Without the moments of neighbouring layers nothing is predicted.
    let few = LocalSearch { rounds: 0, evaluations: 200 };
    let compress = Compress::new(Preset::ClaLowRank).optimizer(few).budget(Budget::Fraction(0.5));
    let error = compress.plan(&calibration, Run::new(0)).unwrap_err().to_string();
    assert!(error.contains("predicting the inputs"), "{error}");
    let calibration = calibration.with_cross_moments(Run::new(0)).unwrap();
    let compress = compress.calibration(&calibration).target(&RemoteCode);
    let compressed = compress.run(&checkpoint, Run::new(0)).unwrap();
    assert!(compressed.plan().kv_heads() <= 16);
    assert_eq!(compressed.plan().method.fitness.name(), "low-rank");

    // The two lowest layers together whatever that costs, and the others as they are.
    let joint = LayerPlan::new(
        Partition::from_labels(&[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]).unwrap(),
        0.0,
    );
    let alone = LayerPlan::new(Partition::singletons(8).unwrap(), 0.0);
    let layers = joint.split(8).unwrap().into_iter().chain([alone.clone(), alone]).collect();
    let method = Method::new("test", Spec::new("by hand"), Spec::new("none"), Spec::new("by hand"));
    let pooling = Pooling::new(LowRankPooler::default().spec()).with_calibration(calibration.calibration());
    let plan = Plan::new(checkpoint.id().unwrap(), method, pooling, layers, 1.0, 0).unwrap();
    let shared = SharedHeads::new(&plan, &calibration).unwrap();
    let source = Model::load(&checkpoint).unwrap();
    let read = windows(&checkpoint, &source, &running::evaluation_text()).spaced(4);
    let model = source.with_shared(&shared).unwrap();
    // As heads are they predict nothing of the inputs.
    let weights_only =
        SharedHeads::with_pooler(&plan, &checkpoint, Box::new(LowRankPooler::default())).unwrap();
    let blind = source.with_shared(&weights_only).unwrap();
    let (_, after) = evaluate_against(&source, &[&model, &blind], &read, Run::new(0)).unwrap();
    let kl = |i: usize| after[i].divergence.unwrap().kl;
    assert!(kl(0) < kl(1), "{} {}", kl(0), kl(1));
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    convert(&checkpoint, &shared, &RemoteCode, &out, WriteOptions::default(), Run::new(0)).unwrap();
    let reopened = Model::load(&Checkpoint::open(&out).unwrap()).unwrap();
    let again = evaluate(&reopened, &read, Run::new(0)).unwrap();
    assert!((again.loss - after[0].loss).abs() < 1e-4, "{} {}", again.loss, after[0].loss);
}
