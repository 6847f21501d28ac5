//! Models that can be run, and what is known of them.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, s};
use qcqa::checkpoint::{Checkpoint, Target, WriteOptions, convert};
use qcqa::runtime::{Model, Vocabulary, Windows, read_text};
use qcqa::{KvPooler, Partition, Plan, Run};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use crate::models;

/// The made-up model of `models` with all that a forward pass needs: norms, a gated MLP, an output embedding.
pub fn runnable(model_type: &str, dtype: Dtype, kv_heads: usize, bias: bool) -> models::Model {
    let mut model = models::Model::new(model_type, dtype, kv_heads, bias)
        .set("vocab_size", json!(16))
        .set("hidden_act", json!("silu"))
        .set("max_position_embeddings", json!(32))
        .set("tie_word_embeddings", json!(false));
    let rng = &mut ChaCha8Rng::seed_from_u64(11);
    let mut add = |name: String, shape: &[usize]| {
        model.tensors.insert(name, models::Tensor::random(dtype, shape, 1.0, rng));
    };
    for i in 0..2 {
        add(format!("model.layers.{i}.input_layernorm.weight"), &[24]);
        add(format!("model.layers.{i}.post_attention_layernorm.weight"), &[24]);
        add(format!("model.layers.{i}.mlp.gate_proj.weight"), &[5, 24]);
        add(format!("model.layers.{i}.mlp.down_proj.weight"), &[24, 5]);
    }
    add("model.norm.weight".into(), &[24]);
    add("lm_head.weight".into(), &[16, 24]);
    model
}

/// Writes a model to a directory of its own and opens it.
pub fn opened(model: &models::Model) -> (TempDir, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    model.write(&root.path().join("in"));
    let checkpoint = Checkpoint::open(root.path().join("in")).unwrap();
    (root, checkpoint)
}

/// Converts and loads.
pub fn converted(checkpoint: &Checkpoint, plan: &Plan, pooler: &dyn KvPooler, target: &dyn Target) -> Model {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    convert(checkpoint, plan, pooler, target, &out, WriteOptions::default(), Run::new(0)).unwrap();
    Model::load(&Checkpoint::open(&out).unwrap()).unwrap()
}

pub fn novels() -> Checkpoint {
    Checkpoint::open(models::novels()).unwrap()
}

/// Neighbouring heads in groups of `size`, in every layer.
pub fn neighbours(checkpoint: &Checkpoint, size: usize) -> Plan {
    let labels: Vec<_> = (0..checkpoint.config().kv_heads).map(|head| head / size).collect();
    let partition = Partition::from_labels(&labels).unwrap();
    models::plan(checkpoint, &vec![partition; checkpoint.config().n_layers])
}

/// The windows of a text, as the protocol cuts them.
pub fn windows(checkpoint: &Checkpoint, model: &Model, text: &Path) -> Windows {
    let ids = Vocabulary::open(checkpoint).unwrap().encode(&read_text(text).unwrap()).unwrap();
    Windows::new(ids, model.window()).unwrap()
}

pub fn evaluation_text() -> PathBuf {
    models::novels().join("evaluation.txt")
}

pub fn calibration_text() -> PathBuf {
    models::novels().join("calibration.txt")
}

/// B rows of T tokens below `vocabulary`, all over the place.
pub fn tokens(rows: usize, len: usize, vocabulary: u32) -> Array2<u32> {
    Array2::from_shape_fn((rows, len), |(b, t)| (b * 7 + t * t * 3 + t * 5) as u32 % vocabulary)
}

#[track_caller]
pub fn near(a: &Array3<f32>, b: &Array3<f32>, tolerance: f32) {
    assert_eq!(a.dim(), b.dim());
    let worst = (a - b).iter().fold(0.0f32, |worst, d| worst.max(d.abs()));
    assert!(worst <= tolerance, "logits differ by {worst}, more than {tolerance}");
}

/// The forward pass by its definition, f64, one row of tokens, for `kv(layer, head)` shared as the plan says: the
/// attention of each layer works on all heads, with each group's keys and values copied back.
pub struct Slow<'a> {
    pub checkpoint: &'a Checkpoint,
    pub plan: Option<(&'a Plan, &'a dyn KvPooler)>,
}

impl Slow<'_> {
    fn tensor(&self, name: &str) -> Array2<f64> {
        let t = self.checkpoint.tensor(name).unwrap().mapv(f64::from);
        let (rows, columns) = (t.shape()[0], t.len() / t.shape()[0]);
        t.into_shape_with_order((rows, columns)).unwrap()
    }

    fn norm(&self, x: &Array2<f64>, name: &str) -> Array2<f64> {
        let (weight, mut x) = (self.tensor(name), x.clone());
        for mut row in x.rows_mut() {
            let scale = (row.mapv(|v| v * v).mean().unwrap() + 1e-5).sqrt();
            for (v, w) in row.iter_mut().zip(&weight) {
                *v = *v / scale * w;
            }
        }
        x
    }

    /// Logits (T, V), each layer's attention input (T, d), and the residual stream (T, d) that it is the norm of.
    pub fn run(&self, tokens: &[u32]) -> (Array2<f64>, Vec<Array2<f64>>, Vec<Array2<f64>>) {
        let config = self.checkpoint.config();
        let (h, len) = (config.head_dim, tokens.len());
        let embedding = self.tensor("model.embed_tokens.weight");
        let mut x = Array2::from_shape_fn((len, config.hidden), |(t, i)| embedding[[tokens[t] as usize, i]]);
        let (mut inputs, mut streams) = (Vec::new(), Vec::new());
        for i in 0..config.n_layers {
            let n = self.norm(&x, &format!("model.layers.{i}.input_layernorm.weight"));
            inputs.push(n.clone());
            streams.push(x.clone());
            let heads = self.checkpoint.layer(i).unwrap();
            let pooled = self.plan.map(|(plan, p)| p.pool(&heads, &plan.layers[i].groups).unwrap());
            let project = |p: &qcqa::Projection, head: usize| {
                let weight = p.weight().slice(s![head, .., ..]).mapv(f64::from);
                let mut y = n.dot(&weight.t());
                if let Some(bias) = p.bias() {
                    y += &bias.row(head).mapv(f64::from);
                }
                y
            };
            let turn = |mut y: Array2<f64>| {
                for t in 0..len {
                    for f in 0..h / 2 {
                        let angle = t as f64 * config.rope_theta.powf(-2.0 * f as f64 / h as f64);
                        let (a, b) = (y[[t, f]], y[[t, f + h / 2]]);
                        y[[t, f]] = a * angle.cos() - b * angle.sin();
                        y[[t, f + h / 2]] = b * angle.cos() + a * angle.sin();
                    }
                }
                y
            };
            let mut attended = x.clone();
            for q in 0..config.query_heads {
                let head = q / config.queries_per_head();
                let (keys, values, row) = match (&pooled, self.plan) {
                    (Some(p), Some((plan, _))) => (&p.key, &p.value, plan.layers[i].groups.group_of(head)),
                    _ => (heads.key(), heads.value(), head),
                };
                let query = pooled.as_ref().and_then(|p| p.query.as_ref()).or(heads.query()).unwrap();
                let output = pooled.as_ref().and_then(|p| p.output.as_ref()).map(|o| o.view());
                let output = output.or(heads.output()).unwrap();
                let scores = turn(project(query, q)).dot(&turn(project(keys, row)).t()) / (h as f64).sqrt();
                let values = project(values, row);
                let output = output.slice(s![q, .., ..]).mapv(f64::from);
                for t in 0..len {
                    let weights: Vec<f64> = (0..=t).map(|s| scores[[t, s]].exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for (s, w) in weights.iter().enumerate() {
                        let read = output.dot(&values.row(s)) * (w / sum);
                        attended.row_mut(t).zip_mut_with(&read, |a, r| *a += r);
                    }
                }
            }
            let n = self.norm(&attended, &format!("model.layers.{i}.post_attention_layernorm.weight"));
            let mlp = |part: &str| self.tensor(&format!("model.layers.{i}.mlp.{part}_proj.weight"));
            let gate = n.dot(&mlp("gate").t()).mapv(|g| g / (1.0 + (-g).exp()));
            x = attended + (gate * n.dot(&mlp("up").t())).dot(&mlp("down").t());
        }
        let head = if config.tie_word_embeddings { embedding } else { self.tensor("lm_head.weight") };
        (self.norm(&x, "model.norm.weight").dot(&head.t()), inputs, streams)
    }
}
