//! Refits: what they gain, recomputed from the definition, and that they never lose.
#![cfg(feature = "runtime")]

mod models;
mod running;

use ndarray::{Array2, s};
use qcqa::checkpoint::{Checkpoint, Stock, WriteOptions, convert_with};
use qcqa::runtime::{Model, Moments, Refit, Refitted, Windows, evaluate, refit};
use qcqa::{FirstHead, Heads, KvPooler, LowRankPooler, MeanPooler, Partition, Pooled, Projection, Run};
use running::{
    Slow, calibration_text, evaluation_text, neighbours, novels, opened, runnable, tokens, windows,
};
use safetensors::Dtype;
use serde_json::json;

/// What `run` gives when the layers of `groups` are pooled under the text's own moments and refitted on it.
fn refitted(
    checkpoint: &Checkpoint,
    model: &Model,
    groups: &[Partition],
    pooler: &dyn KvPooler,
    windows: &Windows,
    level: Refit,
) -> Refitted {
    let moments = Moments::measure(model, windows, Run::new(0)).unwrap();
    let heads = |i: usize| Ok(checkpoint.layer(i)?);
    let pool = |i: usize, heads: &Heads| pooler.pool(&moments.attach(i, heads.clone())?, &groups[i]);
    let groups: Vec<&Partition> = groups.iter().collect();
    refit(model, &groups, &heads, &pool, windows, level, Run::new(0)).unwrap()
}

fn with_layers(checkpoint: &Checkpoint, model: &Model, groups: &[Partition], layers: &[Pooled]) -> Model {
    layers.iter().zip(groups).enumerate().fold(model.clone(), |model, (i, (layer, groups))| {
        model.with_pooled(i, &checkpoint.layer(i).unwrap(), groups, layer.clone()).unwrap()
    })
}

/// The attention output (T, D) of a layer by its definition, f64, for inputs (T, d).
fn attention(
    checkpoint: &Checkpoint,
    heads: &Heads,
    shared: Option<(&Pooled, &Partition)>,
    x: &Array2<f64>,
) -> Array2<f64> {
    let config = checkpoint.config();
    let (h, len) = (config.head_dim, x.nrows());
    let project = |p: &Projection, head: usize| {
        let mut y = x.dot(&p.weight().slice(s![head, .., ..]).mapv(f64::from).t());
        p.bias().into_iter().for_each(|bias| y += &bias.row(head).mapv(f64::from));
        y
    };
    let turned = |mut y: Array2<f64>| {
        for (t, f) in (0..len).flat_map(|t| (0..h / 2).map(move |f| (t, f))) {
            let angle = t as f64 * config.rope_theta.powf(-2.0 * f as f64 / h as f64);
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

/// The refitted layers by the heads that they were made of.
#[derive(Debug)]
struct Made<'a>(&'a Checkpoint, &'a [Pooled]);

impl KvPooler for Made<'_> {
    fn pool(&self, heads: &Heads, _: &Partition) -> qcqa::Result<Pooled> {
        let of = |&i: &usize| self.0.layer(i).unwrap().key() == heads.key();
        Ok(self.1[(0..self.1.len()).find(of).unwrap()].clone())
    }
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
    let found = refitted(&checkpoint, &model, &groups, &LowRankPooler::default(), &text, Refit::Full);
    let plan = models::plan(&checkpoint, &groups);
    let made = Made(&checkpoint, &found.layers);
    let [source, merged] =
        [None, Some((&plan, &made as &dyn KvPooler))].map(|plan| Slow { checkpoint: &checkpoint, plan });
    let (mut errors, mut energies) = ([0.0; 2], [0.0; 2]);
    for window in text.tokens().chunks(text.length()) {
        let ((_, original, wanted), (_, met, stream)) = (source.run(window), merged.run(window));
        for (i, layer) in found.layers.iter().enumerate() {
            let heads = checkpoint.layer(i).unwrap();
            let adds = attention(&checkpoint, &heads, Some((layer, &groups[i])), &met[i]);
            let target = attention(&checkpoint, &heads, None, &original[i]) + &wanted[i] - &stream[i];
            errors[i] += (&adds - &target).mapv(|v| v * v).sum();
            energies[i] += target.mapv(|v| v * v).sum();
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
    let [none, output, full] = [Refit::None, Refit::Output, Refit::Full]
        .map(|level| refitted(&checkpoint, &model, &groups, &LowRankPooler::default(), &text, level).layers);
    for i in 0..4 {
        let parts = |layer: &Pooled| (layer.query.clone(), layer.key.clone(), layer.value.clone());
        assert!(parts(&output[i]) == parts(&none[i]));
        // Above the layer that shares, the output makes up for what is lost below.
        assert_eq!(i == 1, parts(&full[i]) != parts(&none[i]), "layer {i}");
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
    let found = refitted(&checkpoint, &source, &groups, &LowRankPooler::default(), &text, Refit::Full);
    assert!(found.errors.iter().flatten().all(|&error| error < 1e-6), "{:?}", found.errors);
    let merged = with_layers(&checkpoint, &source, &groups, &found.layers);
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
    let found = refitted(&checkpoint, &source, &groups, &LowRankPooler::default(), &text, Refit::Full);
    assert!(found.errors.iter().all(|[before, after]| after < before), "{:?}", found.errors);
}

#[test]
fn more_refitting_reads_better_and_no_layer_gets_worse() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(16);
    let others = windows(&checkpoint, &model, &evaluation_text()).first(16);
    let groups: Vec<Partition> = neighbours(&checkpoint, 2).layers.into_iter().map(|l| l.groups).collect();
    let mut last = f64::INFINITY;
    for level in [Refit::None, Refit::Output, Refit::Full] {
        let found = refitted(&checkpoint, &model, &groups, &LowRankPooler::default(), &text, level);
        assert!(found.errors.iter().all(|[before, after]| after <= before), "{:?}", found.errors);
        let merged = with_layers(&checkpoint, &model, &groups, &found.layers);
        let loss = evaluate(&merged, &others, Run::new(0)).unwrap().loss;
        assert!(loss < last - 0.02, "{level:?}: {loss} after {last}");
        last = loss;
    }
}

#[test]
fn the_same_on_any_number_of_threads() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(4);
    let groups = vec![Partition::from_labels(&[0, 1, 0, 2, 2, 1, 2, 3]).unwrap(); 4];
    let run = || refitted(&checkpoint, &model, &groups, &MeanPooler, &text, Refit::Full).layers;
    let threads = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    assert_eq!(threads(1).install(run), threads(3).install(run));
}

#[test]
fn a_model_that_shares_nothing_stays_as_it_is() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(2);
    let groups = vec![Partition::singletons(8).unwrap(); 4];
    let found = refitted(&checkpoint, &model, &groups, &LowRankPooler::default(), &text, Refit::Full);
    for (i, layer) in found.layers.iter().enumerate() {
        let heads = checkpoint.layer(i).unwrap();
        assert_eq!((&layer.key, &layer.value), (heads.key(), heads.value()));
        assert_eq!(layer.output.as_ref().unwrap().view(), heads.output().unwrap());
        assert_eq!(found.errors[i], [0.0, 0.0]);
    }
}

/// Biases everywhere, two query heads a KV head, groups of any size, and a start that is far off.
#[test]
fn biases_and_grouped_queries_are_refitted_too() {
    let model = runnable("llama", Dtype::F32, 6, true).set("attention_bias", json!(true));
    let (root, checkpoint) = opened(&model);
    let source = Model::load(&checkpoint).unwrap();
    let tokens_of = tokens(1, 256, 16).into_raw_vec_and_offset().0;
    let text = Windows::new(tokens_of, 16).unwrap();
    let groups =
        [[0, 1, 0, 0, 2, 1], [0, 0, 0, 0, 0, 0]].map(|labels| Partition::from_labels(&labels).unwrap());
    for pooler in [&FirstHead as &dyn KvPooler, &LowRankPooler::default()] {
        let found = refitted(&checkpoint, &source, &groups, pooler, &text, Refit::Full);
        for [before, after] in &found.errors {
            assert!(after < before, "{:?}", found.errors);
        }
        let merged = with_layers(&checkpoint, &source, &groups, &found.layers);
        // A group of one head keeps its key and value, bit for bit.
        let heads = checkpoint.layer(0).unwrap();
        let alone = |p: &Projection, head: usize| p.weight().slice(s![head, .., ..]).to_owned();
        assert_eq!(alone(&found.layers[0].key, 2), alone(heads.key(), 4));
        assert_eq!(alone(&found.layers[0].value, 2), alone(heads.value(), 4));
        assert_eq!(found.layers[0].output_bias.is_some(), heads.output_bias().is_some());
        // What is written computes the same.
        let equal = [[0, 0, 1, 1, 2, 2]; 2].map(|labels| Partition::from_labels(&labels).unwrap());
        let found = refitted(&checkpoint, &source, &equal, pooler, &text, Refit::Full);
        let plan = models::plan(&checkpoint, &equal);
        let out = root.path().join(format!("{pooler:?}").replace(' ', ""));
        let pool = |i: usize, _: &Heads| Ok(found.layers[i].clone());
        convert_with(&checkpoint, &plan, &pool, &Stock, &out, WriteOptions::default(), Run::new(0)).unwrap();
        let written = Model::load(&Checkpoint::open(&out).unwrap()).unwrap();
        let planned = Model::planned_with(&checkpoint, &plan, &pool).unwrap();
        let rows = tokens(2, 12, 16);
        running::near(&written.logits(rows.view()).unwrap(), &planned.logits(rows.view()).unwrap(), 1e-4);
        assert_eq!(merged.kv_heads(), [3, 1]);
    }
}

#[test]
fn partitions_that_do_not_fit_are_refused() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(1);
    let heads = |i: usize| Ok(checkpoint.layer(i)?);
    let one = Partition::singletons(8).unwrap();
    let pool = |_: usize, heads: &Heads| MeanPooler.pool(heads, &one);
    let run = Run::new(0);
    let error = refit(&model, &[&one], &heads, &pool, &text, Refit::Full, run).unwrap_err().to_string();
    models::says(&error, &["partitions", "4", "1"]);
}
