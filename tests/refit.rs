//! Refits: what they gain, recomputed from the definition, and that they never lose.
#![cfg(feature = "runtime")]

mod models;
mod running;

use ndarray::{Array2, s};
use qcqa::calibration::{Calibration, Moments};
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::evaluate;
use qcqa::heads::{HeadSource, Heads, Pooled, Projection};
use qcqa::partition::Partition;
use qcqa::plan::{Pooling, Refit, SharedHeads};
use qcqa::pooler::{FirstHead, LowRankPooler, MeanPooler};
use qcqa::refit::{Refitted, apply, refit};
use qcqa::runtime::Model;
use qcqa::targets::Stock;
use qcqa::text::Windows;
use qcqa::{KvPooler, Run};
use running::{
    MakePooler, Slow, calibration_text, converted, evaluation_text, neighbours, novels, opened, runnable,
    shared_by, tokens, windows,
};
use safetensors::Dtype;
use serde_json::json;

const LOW_RANK: MakePooler = || Box::new(LowRankPooler::default());

/// A model with the moments of its own text.
fn calibrated<'a>(checkpoint: &'a Checkpoint, model: &Model, windows: &Windows) -> Calibration<'a> {
    Calibration::new(checkpoint, Moments::measure(model, windows, Run::new(0)).unwrap()).unwrap()
}

/// The layers of `groups` pooled, and refitted on the text.
fn refitted<'a>(
    source: &'a Calibration<'_>,
    model: &Model,
    groups: &[Partition],
    pooler: MakePooler,
    windows: &Windows,
    level: Refit,
) -> Refitted<'a> {
    let shared = shared_by(&models::plan(source, groups), source, pooler);
    let found = refit(shared, model, windows, level, Run::new(0)).unwrap();
    assert_eq!(found.shared.done().refit, Some(level));
    found
}

fn layers(shared: &SharedHeads<'_>) -> Vec<Pooled> {
    (0..shared.plan().layers.len()).map(|i| shared.layer(i).unwrap().1).collect()
}

/// The attention output (T, D) of a layer by its definition, f64, for inputs (T, d).
fn attention(
    checkpoint: &Checkpoint,
    heads: &Heads,
    shared: Option<(&Pooled, &Partition)>,
    x: &Array2<f64>,
) -> Array2<f64> {
    let theta = checkpoint.config().get("rope_theta").and_then(|v| v.as_f64()).unwrap();
    let (h, len) = (heads.key().head_dim(), x.nrows());
    let project = |p: &Projection, head: usize| {
        let mut y = x.dot(&p.weight().slice(s![head, .., ..]).mapv(f64::from).t());
        p.bias().into_iter().for_each(|bias| y += &bias.row(head).mapv(f64::from));
        y
    };
    let turned = |mut y: Array2<f64>| {
        for (t, f) in (0..len).flat_map(|t| (0..h / 2).map(move |f| (t, f))) {
            let angle = t as f64 * theta.powf(-2.0 * f as f64 / h as f64);
            let (a, b) = (y[[t, f]], y[[t, f + h / 2]]);
            y[[t, f]] = a * angle.cos() - b * angle.sin();
            y[[t, f + h / 2]] = b * angle.cos() + a * angle.sin();
        }
        y
    };
    let pooled = shared.map(|(pooled, _)| pooled);
    let query = pooled.and_then(|p| p.query.as_ref()).or(heads.query()).unwrap();
    let output = pooled.and_then(|p| p.output.as_ref()).map(|o| o.view()).or(heads.output()).unwrap();
    let (key, value) = pooled.map_or((heads.key(), heads.value()), |p| (&p.key, &p.value));
    let mut sum = Array2::<f64>::zeros((len, output.dim().1));
    for q in 0..query.n_heads() {
        let head = q / heads.queries_per_head();
        let row = shared.map_or(head, |(_, partition)| partition.group_of(head));
        let scores = turned(project(query, q)).dot(&turned(project(key, row)).t()) / (h as f64).sqrt();
        let (values, o) = (project(value, row), output.slice(s![q, .., ..]).mapv(f64::from));
        for t in 0..len {
            let weights: Vec<f64> = (0..=t).map(|s| scores[[t, s]].exp()).collect();
            let all: f64 = weights.iter().sum();
            for (s, w) in weights.iter().enumerate() {
                sum.row_mut(t).scaled_add(w / all, &o.dot(&values.row(s)));
            }
        }
    }
    sum
}

/// What the source adds and what the layers below lost, against what the refitted layer adds on what it meets.
#[test]
fn the_errors_are_those_of_the_attention_output() {
    let (_root, checkpoint) = opened(&runnable("llama", Dtype::F32, 6, false));
    let model = Model::load(&checkpoint).unwrap();
    let text: Vec<u32> = (0..1024u32).map(|t| t.wrapping_mul(2_654_435_761) >> 28).collect();
    let text = Windows::new(text, 16).unwrap();
    let groups =
        [[0, 1, 0, 0, 2, 1], [0, 0, 1, 1, 0, 1]].map(|labels| Partition::from_labels(&labels).unwrap());
    let calibration = calibrated(&checkpoint, &model, &text);
    let found = refitted(&calibration, &model, &groups, LOW_RANK, &text, Refit::Full);
    let [source, merged] = [None, Some(&found.shared)].map(|shared| Slow { checkpoint: &checkpoint, shared });
    let (mut errors, mut energies) = ([0.0; 2], [0.0; 2]);
    // Layers are judged on 32 windows, spaced over all.
    for window in text.tokens().chunks(text.length()).step_by(text.count() / 32) {
        let ((_, original, wanted), (_, met, stream)) = (source.run(window), merged.run(window));
        for i in 0..2 {
            let (heads, layer) = found.shared.layer(i).unwrap();
            let adds = attention(&checkpoint, &heads, Some((&layer, &groups[i])), &met[i]);
            let after = attention(&checkpoint, &heads, None, &original[i]) + &wanted[i];
            let target = &after - &stream[i];
            let energy = |rows: &Array2<f64>| rows.mapv(|v| v * v).sum_axis(ndarray::Axis(1));
            // Every token by one over the squared length of the source's stream.
            errors[i] += (energy(&(&adds - &target)) / energy(&after)).sum();
            energies[i] += (energy(&target) / energy(&after)).sum();
        }
    }
    for (i, [before, after]) in found.errors.into_iter().enumerate() {
        approx::assert_relative_eq!(errors[i] / energies[i], after, max_relative = 1e-3);
        assert!(after < 0.9 * before, "{before} became {after}");
    }
}

/// Refits change what they say and nothing else.
#[test]
fn what_is_not_refitted_stays_bit_for_bit() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(2);
    let mut groups = vec![Partition::singletons(8).unwrap(); 4];
    groups[1] = Partition::from_labels(&[0, 0, 1, 1, 2, 2, 3, 3]).unwrap();
    let calibration = calibrated(&checkpoint, &model, &text);
    let none = layers(&shared_by(&models::plan(&calibration, &groups), &calibration, LOW_RANK));
    let [output, full] = [Refit::Output, Refit::Full]
        .map(|level| layers(&refitted(&calibration, &model, &groups, LOW_RANK, &text, level).shared));
    for i in 0..4 {
        let parts = |layer: &Pooled| (layer.query.clone(), layer.key.clone(), layer.value.clone());
        assert!(parts(&output[i]) == parts(&none[i]));
        // Above the layer that shares, all of the attention makes up for what is lost below.
        assert_eq!(i >= 1, parts(&full[i]) != parts(&none[i]), "layer {i}");
        for refitted in [&output[i], &full[i]] {
            assert_eq!(i >= 1, refitted.output != none[i].output, "layer {i}");
        }
    }
}

/// Heads that are one head lose nothing, and there is nothing to refit: the logits stay.
#[test]
fn equal_heads_are_refitted_to_themselves() {
    let mut model = runnable("llama", Dtype::F32, 6, true);
    for part in ["k", "v"] {
        for kind in ["weight", "bias"] {
            let bytes = &mut model.tensor(&format!("model.layers.0.self_attn.{part}_proj.{kind}")).bytes;
            let head = bytes.len() / 6;
            bytes.copy_within(head..2 * head, 4 * head);
        }
    }
    let (_root, checkpoint) = opened(&model);
    let source = Model::load(&checkpoint).unwrap();
    let text = Windows::new(tokens(1, 256, 16).into_raw_vec_and_offset().0, 16).unwrap();
    let groups =
        [[0, 1, 2, 3, 1, 4], [0, 1, 2, 3, 4, 5]].map(|labels| Partition::from_labels(&labels).unwrap());
    let calibration = calibrated(&checkpoint, &source, &text);
    let found = refitted(&calibration, &source, &groups, LOW_RANK, &text, Refit::Full);
    assert!(found.errors.iter().flatten().all(|&error| error < 1e-6), "{:?}", found.errors);
    let merged = source.with_shared(&found.shared).unwrap();
    let rows = tokens(2, 12, 16);
    running::near(&source.logits(rows.view()).unwrap(), &merged.logits(rows.view()).unwrap(), 2e-4);
}

/// Attention that is one token's to f32 leaves no weight to any score.
#[test]
fn sharp_attention_is_refitted() {
    let mut model = runnable("llama", Dtype::F32, 6, false);
    for i in 0..2 {
        let tensor = model.tensor(&format!("model.layers.{i}.self_attn.q_proj.weight"));
        let numbers = tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) * 60.0);
        tensor.bytes = models::encode(Dtype::F32, &numbers.collect::<Vec<_>>());
    }
    let (_root, checkpoint) = opened(&model);
    let source = Model::load(&checkpoint).unwrap();
    let text = Windows::new(tokens(1, 256, 16).into_raw_vec_and_offset().0, 16).unwrap();
    let groups = vec![Partition::from_labels(&[0, 0, 1, 1, 2, 2]).unwrap(); 2];
    let calibration = calibrated(&checkpoint, &source, &text);
    let found = refitted(&calibration, &source, &groups, LOW_RANK, &text, Refit::Full);
    assert!(found.errors.iter().all(|[before, after]| after < before), "{:?}", found.errors);
}

#[test]
fn more_refitting_reads_better_and_no_layer_gets_worse() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(16);
    let others = windows(&checkpoint, &model, &evaluation_text()).first(16);
    let groups: Vec<Partition> = neighbours(&checkpoint, 2).groups().cloned().collect();
    let calibration = calibrated(&checkpoint, &model, &text);
    let none = shared_by(&models::plan(&calibration, &groups), &calibration, LOW_RANK);
    let loss = |shared: &SharedHeads<'_>| {
        evaluate(&model.with_shared(shared).unwrap(), &others, Run::new(0)).unwrap().loss
    };
    let mut last = loss(&none);
    for level in [Refit::Output, Refit::Full] {
        let found = refitted(&calibration, &model, &groups, LOW_RANK, &text, level);
        assert!(found.errors.iter().all(|[before, after]| after <= before), "{:?}", found.errors);
        let loss = loss(&found.shared);
        assert!(loss < last - 0.02, "{level:?}: {loss} after {last}");
        last = loss;
    }
}

/// A plan that says how its heads are made is obeyed: by name, under its calibration, with its refit or not at all.
#[test]
fn a_plan_is_applied_as_it_says() {
    let (checkpoint, run) = (novels(), Run::new(0));
    let text = Calibration::from_text(&checkpoint, &calibration_text(), 2, run).unwrap();
    let (model, texts) = text.text().unwrap();
    let groups: Vec<Partition> = neighbours(&checkpoint, 2).groups().cloned().collect();
    let pooling = |refit| {
        let pooling = Pooling::new(LowRankPooler::default().spec()).with_calibration(text.calibration());
        models::pooled_plan(&checkpoint, &groups, pooling.with_refit(refit))
    };
    for level in [None, Some(Refit::Output), Some(Refit::Full)] {
        let plan = pooling(level);
        let applied = apply(&plan, &text, run).unwrap();
        assert_eq!((applied.done(), applied.record()), (&plan.pooling, plan.clone()));
        let expected = match level {
            None => layers(&shared_by(&plan, &text, LOW_RANK)),
            Some(level) => layers(&refitted(&text, model, &groups, LOW_RANK, texts.fit(), level).shared),
        };
        assert_eq!(layers(&applied), expected);
    }
    let moments = Calibration::new(&checkpoint, text.moments().clone()).unwrap();
    assert_eq!(layers(&apply(&pooling(None), &moments, run).unwrap()).len(), 4);
    let error = qcqa::Error::from(apply(&pooling(Some(Refit::Full)), &moments, run).unwrap_err());
    assert!(matches!(error, qcqa::Error::PlanRefit { refit: "full" }), "{error}");
    let other = Calibration::from_text(&checkpoint, &calibration_text(), 1, run).unwrap();
    let error = qcqa::Error::from(apply(&pooling(None), &other, run).unwrap_err());
    assert!(matches!(error, qcqa::Error::PlanCalibration { .. }), "{error}");
}

#[test]
fn the_same_on_any_number_of_threads() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(4);
    let groups = vec![Partition::from_labels(&[0, 1, 0, 2, 2, 1, 2, 3]).unwrap(); 4];
    let calibration = calibrated(&checkpoint, &model, &text);
    let mean: MakePooler = || Box::new(MeanPooler);
    let run = || layers(&refitted(&calibration, &model, &groups, mean, &text, Refit::Full).shared);
    let threads = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    assert_eq!(threads(1).install(run), threads(3).install(run));
}

#[test]
fn a_model_that_shares_nothing_stays_as_it_is() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(2);
    let groups = vec![Partition::singletons(8).unwrap(); 4];
    let calibration = calibrated(&checkpoint, &model, &text);
    let found = refitted(&calibration, &model, &groups, LOW_RANK, &text, Refit::Full);
    for i in 0..4 {
        let (heads, layer) = found.shared.layer(i).unwrap();
        assert_eq!((&layer.key, &layer.value), (heads.key(), heads.value()));
        assert_eq!(layer.output.as_ref().unwrap().view(), heads.output().unwrap());
        assert_eq!(found.errors[i], [0.0, 0.0]);
    }
}

/// Biases everywhere, two query heads a KV head, groups of any size, and a start that is far off.
#[test]
fn biases_and_grouped_queries_are_refitted_too() {
    let model = runnable("llama", Dtype::F32, 6, true).set("attention_bias", json!(true));
    let (_root, checkpoint) = opened(&model);
    let source = Model::load(&checkpoint).unwrap();
    let tokens_of = tokens(1, 256, 16).into_raw_vec_and_offset().0;
    let text = Windows::new(tokens_of, 16).unwrap();
    let groups =
        [[0, 1, 0, 0, 2, 1], [0, 0, 0, 0, 0, 0]].map(|labels| Partition::from_labels(&labels).unwrap());
    let calibration = calibrated(&checkpoint, &source, &text);
    let first: MakePooler = || Box::new(FirstHead);
    for pooler in [first, LOW_RANK] {
        let found = refitted(&calibration, &source, &groups, pooler, &text, Refit::Full);
        for [before, after] in &found.errors {
            assert!(after < before, "{:?}", found.errors);
        }
        let merged = source.with_shared(&found.shared).unwrap();
        let (heads, layer) = found.shared.layer(0).unwrap();
        assert_eq!(layer.output_bias.is_some(), heads.output_bias().is_some());
        // What is written computes the same.
        let equal = [[0, 0, 1, 1, 2, 2]; 2].map(|labels| Partition::from_labels(&labels).unwrap());
        let shared = refitted(&calibration, &source, &equal, pooler, &text, Refit::Full).shared;
        let written = converted(&checkpoint, &shared, &Stock);
        let planned = source.with_shared(&shared).unwrap();
        let rows = tokens(2, 12, 16);
        running::near(&written.logits(rows.view()).unwrap(), &planned.logits(rows.view()).unwrap(), 1e-4);
        assert_eq!(merged.kv_heads(), [3, 1]);
    }
}

#[test]
fn shared_heads_of_another_model_are_refused() {
    let (checkpoint, (_root, other)) = (novels(), opened(&runnable("llama", Dtype::F32, 6, false)));
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(1);
    let plan = neighbours(&other, 2);
    let shared = SharedHeads::new(&plan, &other).unwrap();
    let error = refit(shared, &model, &text, Refit::Full, Run::new(0)).unwrap_err().to_string();
    models::says(&error, &["another model", "number of layers", "4", "2"]);
    let mut short = plan;
    short.layers.truncate(1);
    models::says(&SharedHeads::new(&short, &other).unwrap_err().to_string(), &["groups for 1 layers", "2"]);
}
