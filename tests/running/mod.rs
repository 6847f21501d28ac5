//! Models that can be run, and what is known of them.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, s};
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::heads::{HeadSource, Heads, Needs, Pooled, Projection};
use qcqa::output::{Target, convert};
use qcqa::partition::Partition;
use qcqa::plan::{Plan, SharedHeads};
use qcqa::runtime::Model;
use qcqa::spec::Spec;
use qcqa::text::{Vocabulary, Windows, read_text};
use qcqa::{KvPooler, Result, Run};
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

/// Gives what it was given.
#[derive(Debug, Clone)]
pub struct Given(pub Vec<Pooled>);

impl KvPooler for Given {
    fn spec(&self) -> Spec {
        Spec::new("given")
    }
    fn needs(&self) -> Needs {
        Needs::QUERIES_AND_MOMENT
    }
    fn pool(&self, heads: &Heads, _: &Partition) -> Result<Pooled> {
        Ok(self.0[heads.layer()].clone())
    }
}

/// Makes a pooler.
pub type MakePooler = fn() -> Box<dyn KvPooler>;

/// The shared heads of a plan by this pooler, whatever the plan says.
pub fn shared_by<'a>(plan: &Plan, source: &'a dyn HeadSource, pooler: MakePooler) -> SharedHeads<'a> {
    SharedHeads::with_pooler(plan, source, pooler()).unwrap()
}

/// The model under a plan.
pub fn planned(checkpoint: &Checkpoint, shared: &SharedHeads<'_>) -> Model {
    Model::load(checkpoint).unwrap().with_shared(shared).unwrap()
}

/// Writes and opens again.
pub fn written(
    checkpoint: &Checkpoint,
    shared: &SharedHeads<'_>,
    target: &dyn Target,
) -> (TempDir, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    convert(checkpoint, shared, target, &out, WriteOptions::default(), Run::new(0)).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    (root, written)
}

/// Writes and loads.
pub fn converted(checkpoint: &Checkpoint, shared: &SharedHeads<'_>, target: &dyn Target) -> Model {
    Model::load(&written(checkpoint, shared, target).1).unwrap()
}

pub fn novels() -> Checkpoint {
    Checkpoint::open(models::novels()).unwrap()
}

/// Neighbouring heads in groups of `size`, in every layer.
pub fn neighbours(checkpoint: &Checkpoint, size: usize) -> Plan {
    let of = |heads: usize| {
        Partition::from_labels(&(0..heads).map(|head| head / size).collect::<Vec<_>>()).unwrap()
    };
    let groups: Vec<_> = checkpoint.architecture().kv_heads().into_iter().map(of).collect();
    models::plan(checkpoint, &groups)
}

/// The windows of a text, as the protocol cuts them.
pub fn windows(checkpoint: &Checkpoint, model: &Model, text: &Path) -> Windows {
    let ids = Vocabulary::open(checkpoint).unwrap().encode(&read_text(text).unwrap()).unwrap();
    Windows::new(ids, model.window()).unwrap()
}

/// Windows of novels-1m that are short: some to train on, some to validate.
pub fn short_texts(checkpoint: &Checkpoint, model: &Model) -> (Windows, Windows) {
    let all = windows(checkpoint, model, &calibration_text());
    let part = |first: usize, n: usize| {
        Windows::new(all.tokens()[first * 64..(first + n) * 64].to_vec(), 64).unwrap()
    };
    (part(0, 24), part(64, 4))
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

/// The forward pass by its definition, f64, one row of tokens, for heads as they are or shared: the attention of each layer
/// works on all heads, with each group's keys and values copied back.
#[derive(Clone, Copy)]
pub struct Slow<'a> {
    pub checkpoint: &'a Checkpoint,
    pub shared: Option<&'a SharedHeads<'a>>,
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
        let (config, model) = (self.checkpoint.config(), self.checkpoint.architecture());
        let (theta, len) = (config.get("rope_theta").and_then(|v| v.as_f64()).unwrap(), tokens.len());
        let embedding = self.tensor("model.embed_tokens.weight");
        let mut x = Array2::from_shape_fn((len, model.hidden), |(t, i)| embedding[[tokens[t] as usize, i]]);
        let (mut inputs, mut streams) = (Vec::new(), Vec::new());
        for (i, spec) in model.layers.iter().enumerate() {
            let h = spec.head_dim;
            let n = self.norm(&x, &format!("model.layers.{i}.input_layernorm.weight"));
            inputs.push(n.clone());
            streams.push(x.clone());
            let heads = self.checkpoint.heads(i).unwrap();
            let pooled = self.shared.map(|shared| shared.layer(i).unwrap().1);
            // Where a layer reads the one below, its keys and values are functions of that one's input.
            let below = self.shared.is_some_and(|shared| shared.plan().layers[i].below.is_some());
            let read = if below { inputs[i - 1].clone() } else { n.clone() };
            let of = |x: &Array2<f64>, p: &Projection, head: usize| {
                let weight = p.weight().slice(s![head, .., ..]).mapv(f64::from);
                let mut y = x.dot(&weight.t());
                if let Some(bias) = p.bias() {
                    y += &bias.row(head).mapv(f64::from);
                }
                y
            };
            let turn = |mut y: Array2<f64>| {
                for t in 0..if spec.rotary.is_some() { len } else { 0 } {
                    for f in 0..h / 2 {
                        let angle = t as f64 * theta.powf(-2.0 * f as f64 / h as f64);
                        let (a, b) = (y[[t, f]], y[[t, f + h / 2]]);
                        y[[t, f]] = a * angle.cos() - b * angle.sin();
                        y[[t, f + h / 2]] = b * angle.cos() + a * angle.sin();
                    }
                }
                y
            };
            let mut attended = x.clone();
            for q in 0..spec.query_heads {
                let head = q / spec.queries_per_head();
                let (keys, values, row) = match (&pooled, self.shared) {
                    (Some(p), Some(shared)) => (&p.key, &p.value, shared.groups(i).group_of(head)),
                    _ => (heads.key(), heads.value(), head),
                };
                let query = pooled.as_ref().and_then(|p| p.query.as_ref()).or(heads.query()).unwrap();
                let output = pooled.as_ref().and_then(|p| p.output.as_ref()).map(|o| o.view());
                let output = output.or(heads.output()).unwrap();
                let scores = turn(of(&n, query, q)).dot(&turn(of(&read, keys, row)).t()) / (h as f64).sqrt();
                let values = of(&read, values, row);
                let output = output.slice(s![q, .., ..]).mapv(f64::from);
                for t in 0..len {
                    let seen = (t + 1).saturating_sub(spec.mask.reach())..=t;
                    let sum: f64 = seen.clone().map(|s| scores[[t, s]].exp()).sum();
                    for s in seen {
                        let read = output.dot(&values.row(s)) * (scores[[t, s]].exp() / sum);
                        attended.row_mut(t).zip_mut_with(&read, |a, r| *a += r);
                    }
                }
            }
            let n = self.norm(&attended, &format!("model.layers.{i}.post_attention_layernorm.weight"));
            let mlp = |part: &str| self.tensor(&format!("model.layers.{i}.mlp.{part}_proj.weight"));
            let gate = n.dot(&mlp("gate").t()).mapv(|g| g / (1.0 + (-g).exp()));
            x = attended + (gate * n.dot(&mlp("up").t())).dot(&mlp("down").t());
        }
        let head = if model.tied_embeddings { embedding } else { self.tensor("lm_head.weight") };
        (self.norm(&x, "model.norm.weight").dot(&head.t()), inputs, streams)
    }
}

/// The made-up model with so many key/value heads, and windows of its tokens.
pub fn ready(kv_heads: usize) -> (TempDir, Checkpoint, Model, Windows) {
    let (root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, kv_heads, true));
    let model = Model::load(&checkpoint).unwrap();
    let tokens = (0..50u32).map(|t| t * t % 11 + t % 5).collect();
    (root, checkpoint, model, Windows::new(tokens, 8).unwrap())
}
