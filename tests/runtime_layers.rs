//! A model whose layers are unlike one another, described by a family of this test: loaded, run, evaluated, shared. And models
//! of which one layer is in memory at a time.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::collections::BTreeMap;

use approx::assert_relative_eq;
use ndarray::{Array2, Array3, Axis, concatenate, s};
use qcqa::Run;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::{Checkpoint, Config, Family, TensorIndex};
use qcqa::distil::{Distill, Effort};
use qcqa::evaluation::{evaluate, evaluate_against, evaluate_through_cache};
use qcqa::files::FileError;
use qcqa::model::{
    Architecture, AttentionSpec, Axis as Along, Block, Forward, Linear, Mask, Mlp, Norm, Rotary, Rotation,
    Stored, StoredHeads,
};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::SharedHeads;
use qcqa::runtime::{KvCache, Model};
use qcqa::text::{Texts, WholeText, Windows};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use running::{Slow, calibration_text, near, novels, opened, runnable, tokens, windows};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

const QUERY_HEADS: usize = 6;
const HIDDEN: usize = 24;
const VOCABULARY: usize = 16;

/// Fewer KV heads from layer to layer, heads of 2 and 4 dimensions, one layer without positions and with a window.
#[derive(Debug)]
struct Tapered;

impl Tapered {
    const KV_HEADS: [usize; 3] = [6, 3, 1];
    const HEAD_DIM: [usize; 3] = [4, 2, 4];

    fn layer(i: usize) -> AttentionSpec {
        let (kv_heads, h) = (Self::KV_HEADS[i], Self::HEAD_DIM[i]);
        let part = |name: &str, axis, heads| {
            Stored::split(format!("model.layers.{i}.self_attn.{name}_proj.weight"), axis, heads, h)
        };
        let stored = StoredHeads::new(
            part("q", Along::Rows, QUERY_HEADS),
            part("k", Along::Rows, kv_heads),
            part("v", Along::Rows, kv_heads),
            part("o", Along::Columns, QUERY_HEADS),
        );
        let spec = AttentionSpec::new(QUERY_HEADS, kv_heads, h).with_stored(stored);
        match i {
            1 => spec.with_mask(Mask::Sliding { window: 3 }),
            _ => spec.with_rotary(Rotary::from_theta(Rotation::HalfSplit { dims: h }, 500.0)),
        }
    }
}

impl Family for Tapered {
    fn model_types(&self) -> &'static [&'static str] {
        &["tapered"]
    }

    fn describe(&self, config: &Config, _: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let linear =
            |i: usize, part: &str| Linear::new(format!("model.layers.{i}.mlp.{part}_proj.weight"), None);
        let norm = |name: String| Norm::new(name, 1e-5);
        let block = |i: usize| {
            let mlp = Mlp::new(linear(i, "gate"), linear(i, "up"), linear(i, "down"));
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            Block::new(norm(name("input_layernorm")), norm(name("post_attention_layernorm")), mlp)
        };
        let (blocks, last) = ((0..3).map(block).collect(), norm("model.norm.weight".into()));
        let embedding = "model.embed_tokens.weight";
        let forward = Forward::new(VOCABULARY, 32, embedding, blocks, Some(last), Some("lm_head.weight"));
        let layers = (0..3).map(Self::layer).collect();
        Ok(Architecture::new(config.model_type()?, HIDDEN, layers).with_forward(Ok(forward)))
    }
}

fn tapered() -> Checkpoint {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![VOCABULARY, HIDDEN]),
        ("lm_head.weight".to_string(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_string(), vec![HIDDEN]),
    ];
    for i in 0..3 {
        let (kv_rows, rows) =
            (Tapered::KV_HEADS[i] * Tapered::HEAD_DIM[i], QUERY_HEADS * Tapered::HEAD_DIM[i]);
        for (part, shape) in [
            ("self_attn.q_proj", vec![rows, HIDDEN]),
            ("self_attn.k_proj", vec![kv_rows, HIDDEN]),
            ("self_attn.v_proj", vec![kv_rows, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, rows]),
            ("mlp.gate_proj", vec![5, HIDDEN]),
            ("mlp.up_proj", vec![5, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, 5]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            shapes.push((format!("model.layers.{i}.{part}.weight"), shape));
        }
    }
    let rng = &mut ChaCha8Rng::seed_from_u64(3);
    let tensors: BTreeMap<String, models::Tensor> = shapes
        .into_iter()
        .map(|(name, shape)| (name, models::Tensor::random(Dtype::F32, &shape, 0.8, rng)))
        .collect();
    let views =
        tensors.iter().map(|(n, t)| (n, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    let weights = safetensors::serialize(views, None).unwrap();
    let config = json!({"model_type": "tapered", "rope_theta": 500.0}).to_string();
    Checkpoint::from_bytes(config.as_bytes(), weights, &[&Tapered]).unwrap()
}

fn slow_logits(slow: &Slow<'_>, tokens: &Array2<u32>) -> Array3<f32> {
    let rows: Vec<_> =
        tokens.rows().into_iter().map(|r| slow.run(&r.to_vec()).0.mapv(|v| v as f32)).collect();
    ndarray::stack(Axis(0), &rows.iter().map(|r| r.view()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn every_layer_is_computed_as_it_is_described() {
    let checkpoint = tapered();
    let source = Model::load(&checkpoint).unwrap();
    assert_eq!(source.kv_heads(), [6, 3, 1]);
    let tokens = tokens(2, 12, VOCABULARY as u32);
    let slow = Slow { checkpoint: &checkpoint, shared: None };
    near(&source.logits(tokens.view()).unwrap(), &slow_logits(&slow, &tokens), 1e-4);

    let groups: [&[usize]; 3] = [&[0, 1, 0, 0, 2, 1], &[0, 0, 1], &[0]];
    let plan = models::plan(&checkpoint, &groups.map(|labels| Partition::from_labels(labels).unwrap()));
    let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
    let planned = source.with_shared(&shared).unwrap();
    assert_eq!(planned.kv_heads(), [3, 2, 1]);
    let slow = Slow { shared: Some(&shared), ..slow };
    near(&planned.logits(tokens.view()).unwrap(), &slow_logits(&slow, &tokens), 1e-4);
}

/// Keys and values in f32: 6 heads of 4, 3 of 2, 1 of 4.
#[test]
fn the_cache_is_as_large_as_its_layers() {
    let model = Model::load(&tapered()).unwrap();
    assert_eq!(model.kv_bytes_per_token(), 2 * (6 * 4 + 3 * 2 + 4) * 4);
    let tokens = tokens(2, 12, VOCABULARY as u32);
    let mut cache = KvCache::default();
    let parts = [(0, 5), (5, 6), (6, 12)]
        .map(|(from, to)| model.extend(&mut cache, tokens.slice(s![.., from..to])).unwrap());
    assert_eq!(cache.bytes(), 2 * 12 * model.kv_bytes_per_token());
    let parts: Vec<_> = parts.iter().map(|part| part.view()).collect();
    near(&model.logits(tokens.view()).unwrap(), &concatenate(Axis(1), &parts).unwrap(), 1e-4);
}

#[test]
fn it_is_evaluated_like_any_other() {
    let checkpoint = tapered();
    let source = Model::load(&checkpoint).unwrap();
    let groups = [6, 3, 1].map(|n| Partition::one_group(n).unwrap());
    let plan = models::plan(&checkpoint, &groups);
    let planned = source.with_shared(&SharedHeads::new(&plan, &checkpoint).unwrap()).unwrap();
    let windows = Windows::new((0..60u32).map(|t| t * t % 13 + t % 3).collect(), 20).unwrap();
    let (before, after) = evaluate_against(&source, &[&planned], &windows, Run::new(0)).unwrap();
    assert!(after[0].divergence.is_some_and(|d| d.kl > 1e-3));
    assert_eq!(after[0].kv_bytes_per_token, 2 * (4 + 2 + 4) * 4);
    for (model, whole) in [(&source, &before), (&planned, &after[0])] {
        assert_eq!(evaluate(model, &windows, Run::new(0)).unwrap().loss, whole.loss);
        for chunk in [1, 7, 20] {
            let found = evaluate_through_cache(model, &windows, chunk, Run::new(0)).unwrap();
            assert_relative_eq!(found.loss, whole.loss, epsilon = 1e-5);
        }
    }
}

/// Numbers of a layer: key, value, query and output weights.
fn weights_of(shared: &SharedHeads<'_>, layer: usize) -> Vec<f32> {
    let (_, pooled) = shared.layer(layer).unwrap();
    let projections = [Some(&pooled.key), Some(&pooled.value), pooled.query.as_ref()];
    let projections = projections.into_iter().flatten().flat_map(|p| p.weight().to_owned());
    projections.chain(pooled.output.iter().flatten().copied()).collect()
}

#[test]
fn a_model_read_layer_by_layer_is_the_model_that_is_held() {
    let checkpoint = novels();
    let [held, read] = [Model::load(&checkpoint).unwrap(), Model::open_by_layers(&checkpoint).unwrap()];
    let tokens = tokens(3, 40, 1000);
    assert_eq!(held.logits(tokens.view()).unwrap(), read.logits(tokens.view()).unwrap());
    assert_eq!((held.kv_heads(), held.vocabulary()), (read.kv_heads(), read.vocabulary()));

    // The whole road: moments, what layers pay, closed form, refit, distillation, and what is measured on the way.
    let text = windows(&checkpoint, &held, &calibration_text()).first(24);
    let text = Windows::new(text.tokens()[..24 * 64].to_vec(), 64).unwrap();
    let texts = Texts::new(&[WholeText::new("text", text)], 24).unwrap();
    let made = [held, read].map(|model| {
        let run = Run::new(0);
        let calibration = Calibration::measured(&checkpoint, model, texts.clone(), run).unwrap();
        let compress = Compress::new(Preset::LowRank).calibration(&calibration);
        let compress = compress.distil(Distill::new(Effort::Tokens(512))).by_sensitivity();
        let compressed = compress.run(&checkpoint, run).unwrap();
        let weights: Vec<Vec<f32>> = (0..4).map(|layer| weights_of(&compressed.shared, layer)).collect();
        let stages: Vec<f64> = compressed.stages.iter().map(|stage| stage.kl()).collect();
        (calibration.moments().clone(), compressed.plan().clone(), stages, weights)
    });
    assert_eq!(made[0], made[1]);
    assert!(made[0].2.len() >= 3, "{:?}", made[0].2);
}

#[test]
fn what_a_stored_layer_lacks_is_told_when_the_model_is_opened() {
    for (tensor, shape) in [("mlp.down_proj.weight", vec![24, 6]), ("input_layernorm.weight", vec![23])] {
        let name = format!("model.layers.1.{tensor}");
        let mut model = runnable("llama", Dtype::BF16, 3, false);
        model.tensors.insert(
            name.clone(),
            models::Tensor::random(Dtype::BF16, &shape, 1.0, &mut ChaCha8Rng::seed_from_u64(1)),
        );
        let (_root, checkpoint) = opened(&model);
        let error = Model::open_by_layers(&checkpoint).unwrap_err().to_string();
        assert!(error.contains(&name) && error.contains(&format!("{shape:?}")), "{error}");
        assert_eq!(error, Model::load(&checkpoint).unwrap_err().to_string());
    }
}
