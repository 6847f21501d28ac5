//! The forward pass against transformers, against its definition, and its forms against one another.
#![cfg(feature = "runtime")]

mod models;
mod running;

use ndarray::{Array2, Array3, ArrayD, Axis, s};
use qcqa::KvPooler;
use qcqa::checkpoint::Checkpoint;
use qcqa::heads::{Heads, Pooled, Projection};
use qcqa::partition::Partition;
use qcqa::plan::SharedHeads;
use qcqa::pooler::{FirstHead, MeanPooler};
use qcqa::runtime::{KvCache, Model, RuntimeError};
use qcqa::spec::Spec;
use qcqa::targets::{Expanded, Stock};
use running::{
    MakePooler, Slow, converted, near, neighbours, novels, opened, planned, runnable, shared_by, tokens,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

/// Logits that transformers computed (tests/data/reference_logits.py).
struct Reference {
    bytes: Vec<u8>,
}

impl Reference {
    fn read() -> Self {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference_logits.safetensors");
        Self { bytes: std::fs::read(path).unwrap() }
    }

    fn numbers<T>(&self, name: &str, decode: fn([u8; 4]) -> T) -> ArrayD<T> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let numbers = tensor.data().chunks_exact(4).map(|b| decode(b.try_into().unwrap()));
        ArrayD::from_shape_vec(tensor.shape(), numbers.collect()).unwrap()
    }

    /// Checks the logits of a model.
    fn check(&self, name: &str, model: &Model) {
        let ids = self.numbers("ids", u32::from_le_bytes).into_dimensionality().unwrap();
        let rows: Vec<usize> = self.numbers("rows", u32::from_le_bytes).iter().map(|&r| r as usize).collect();
        let logits = model.logits(ids.view()).unwrap().select(Axis(1), &rows);
        near(&logits, &self.numbers(name, f32::from_le_bytes).into_dimensionality().unwrap(), 1e-4);
    }
}

#[test]
fn logits_are_those_of_transformers() {
    let (checkpoint, reference) = (novels(), Reference::read());
    reference.check("source", &Model::load(&checkpoint).unwrap());
    let plan = neighbours(&checkpoint, 2);
    let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
    let planned = planned(&checkpoint, &shared);
    for (name, model) in [
        ("stock", converted(&checkpoint, &shared, &Stock)),
        ("expanded", converted(&checkpoint, &shared, &Expanded)),
        ("stock", planned.clone()),
        ("expanded", planned),
    ] {
        reference.check(name, &model);
    }
}

/// Changes queries and outputs too, so that nothing of what a pooler returns is left out.
#[derive(Debug)]
struct Scaling;

impl KvPooler for Scaling {
    fn spec(&self) -> Spec {
        Spec::new("scaling")
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        let pooled = MeanPooler.pool(heads, partition)?;
        let by_head = |(head, _, _): (usize, usize, usize)| 0.5 + head as f32 / 4.0;
        let (mut query, bias) = heads.query().unwrap().clone().into_parts();
        query.indexed_iter_mut().for_each(|(at, w)| *w *= by_head(at));
        let mut output: Array3<f32> = heads.output().unwrap().to_owned();
        output.indexed_iter_mut().for_each(|(at, w)| *w *= by_head(at));
        Ok(pooled.with_queries(Projection::new(query, bias)?, output))
    }
}

fn slow_logits(slow: &Slow<'_>, tokens: &Array2<u32>) -> Array3<f32> {
    let rows: Vec<_> =
        tokens.rows().into_iter().map(|r| slow.run(&r.to_vec()).0.mapv(|v| v as f32)).collect();
    let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
    ndarray::stack(Axis(0), &views).unwrap()
}

/// Biases, GQA input, unequal groups, k per layer, changed queries: all against the definition.
#[test]
fn every_partition_is_computed_as_defined() {
    for (kv_heads, bias) in [(6, false), (6, true), (3, true), (2, false)] {
        let model_type = if bias { "qwen2" } else { "llama" };
        let (_root, checkpoint) = opened(&runnable(model_type, Dtype::F32, kv_heads, bias));
        let tokens = tokens(3, 11, 16);
        let source = Model::load(&checkpoint).unwrap();
        let slow = Slow { checkpoint: &checkpoint, shared: None };
        near(&source.logits(tokens.view()).unwrap(), &slow_logits(&slow, &tokens), 1e-4);

        let labels: [&[usize]; 4] = match kv_heads {
            6 => [&[0, 1, 0, 0, 2, 1], &[0, 1, 1, 0, 0, 1], &[0; 6], &[0, 1, 2, 0, 3, 4]],
            3 => [&[0, 1, 0], &[0, 1, 1], &[0; 3], &[0, 0, 1]],
            _ => [&[0, 0], &[0, 1], &[0, 0], &[0, 0]],
        };
        let labels = labels.map(|l| Partition::from_labels(l).unwrap());
        for layers in labels.chunks(2) {
            let plan = models::plan(&checkpoint, layers);
            let poolers: [MakePooler; 3] =
                [|| Box::new(MeanPooler), || Box::new(FirstHead), || Box::new(Scaling)];
            for pooler in poolers {
                let shared = shared_by(&plan, &checkpoint, pooler);
                let planned = source.with_shared(&shared).unwrap();
                assert_eq!(planned.kv_heads(), plan.group_counts());
                let slow = Slow { shared: Some(&shared), ..slow };
                near(&planned.logits(tokens.view()).unwrap(), &slow_logits(&slow, &tokens), 1e-4);
            }
        }
    }
}

#[test]
fn planned_and_written_models_agree() {
    for (dtype, kv_heads, bias) in [(Dtype::BF16, 6, true), (Dtype::F16, 3, false)] {
        let (_root, checkpoint) = opened(&runnable("qwen2", dtype, kv_heads, bias));
        let tokens = tokens(2, 9, 16);
        let logits = |model: &Model| model.logits(tokens.view()).unwrap();
        let labels: Vec<_> = (0..kv_heads).map(|i| [0, 1, 0, 1, 0, 0][i]).collect();
        let unequal = vec![Partition::from_labels(&labels).unwrap(), Partition::one_group(kv_heads).unwrap()];
        let unequal = models::plan(&checkpoint, &unequal);
        let poolers: [MakePooler; 2] = [|| Box::new(MeanPooler), || Box::new(Scaling)];
        for pooler in poolers {
            let shared = shared_by(&unequal, &checkpoint, pooler);
            let directly = logits(&planned(&checkpoint, &shared));
            near(&directly, &logits(&converted(&checkpoint, &shared, &Expanded)), 1e-4);
            let shared = shared_by(&neighbours(&checkpoint, 3), &checkpoint, pooler);
            let directly = logits(&planned(&checkpoint, &shared));
            near(&directly, &logits(&converted(&checkpoint, &shared, &Stock)), 1e-4);
            near(&directly, &logits(&converted(&checkpoint, &shared, &Expanded)), 1e-4);
        }
    }
}

#[test]
fn no_sharing_changes_nothing() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let shared = SharedHeads::new(&neighbours(&checkpoint, 1), &checkpoint).unwrap();
    let planned = source.with_shared(&shared).unwrap();
    let tokens = tokens(2, 20, 1024);
    assert_eq!(source.logits(tokens.view()).unwrap(), planned.logits(tokens.view()).unwrap());
    assert_eq!(source.kv_bytes_per_token(), planned.kv_bytes_per_token());
}

/// Token by token with a cache, or all at once; the cache is as large as the plan says.
#[test]
fn the_cache_holds_the_groups_alone() {
    let (_root, checkpoint) = opened(&runnable("llama", Dtype::F32, 6, false));
    let layers = [[0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]].map(|l| Partition::from_labels(&l).unwrap());
    let plan = models::plan(&checkpoint, &layers);
    let model = planned(&checkpoint, &SharedHeads::new(&plan, &checkpoint).unwrap());
    let tokens = tokens(2, 10, 16);
    let whole = model.logits(tokens.view()).unwrap();
    let mut cache = KvCache::default();
    let mut parts = Vec::new();
    for (from, to) in [(0, 4), (4, 5), (5, 6), (6, 10)] {
        parts.push(model.extend(&mut cache, tokens.slice(s![.., from..to])).unwrap());
    }
    let parts: Vec<_> = parts.iter().map(|p| p.view()).collect();
    near(&whole, &ndarray::concatenate(Axis(1), &parts).unwrap(), 1e-4);
    // Keys and values of 3 groups of 4 dimensions, f32, for 2 rows of 10 tokens.
    assert_eq!(model.kv_bytes_per_token(), 2 * 3 * 4 * 4);
    assert_eq!(cache.bytes(), 2 * 10 * model.kv_bytes_per_token());
    assert_eq!(cache.tokens(), 10);
}

/// A token of a model with a sliding window does not see what lies before it.
#[test]
fn a_sliding_window_ends_what_is_seen() {
    let model = runnable("mistral", Dtype::F32, 6, false);
    let load = |window| Model::load(&opened(&model.clone().set("sliding_window", window)).1).unwrap();
    let tokens = tokens(1, 12, 16);
    let [narrow, wide, none] =
        [json!(1), json!(12), json!(null)].map(|w| load(w).logits(tokens.view()).unwrap());
    assert_eq!(wide, none);
    // Each token alone, but at its own position, which a single token cannot tell.
    let alone = load(json!(null)).logits(tokens.slice(s![.., 7..8])).unwrap();
    near(&narrow.slice(s![.., 7..8, ..]).to_owned(), &alone, 1e-4);
    assert!((&narrow - &wide).iter().any(|d| d.abs() > 1e-2));
}

/// Where the MLP and the output projection have biases, they count.
#[test]
fn other_biases_count() {
    let plain = runnable("llama", Dtype::F32, 6, true).set("mlp_bias", json!(true));
    let mut biased = plain.clone();
    for (part, size) in [("self_attn.o_proj", 24), ("mlp.up_proj", 5), ("mlp.down_proj", 24)] {
        let bytes = models::encode(Dtype::F32, &vec![0.25; size]);
        let tensor = models::Tensor { dtype: Dtype::F32, shape: vec![size], bytes };
        for i in 0..2 {
            let mut add = |tensor| biased.tensors.insert(format!("model.layers.{i}.{part}.bias"), tensor);
            add(tensor.clone());
        }
    }
    let tokens = tokens(1, 5, 16);
    let logits = |m: &models::Model| {
        let (_root, checkpoint) = opened(m);
        let shared = SharedHeads::new(&neighbours(&checkpoint, 2), &checkpoint).unwrap();
        let expanded = converted(&checkpoint, &shared, &Expanded).logits(tokens.view()).unwrap();
        let planned = planned(&checkpoint, &shared).logits(tokens.view()).unwrap();
        near(&expanded, &planned, 1e-4);
        planned
    };
    assert!((logits(&plain) - logits(&biased)).iter().any(|d| d.abs() > 1e-2));
}

fn refusal(model: &models::Model) -> String {
    let root = tempfile::tempdir().unwrap();
    model.write(root.path());
    let checkpoint = Checkpoint::open(root.path()).map_err(RuntimeError::from);
    checkpoint.and_then(|checkpoint| Model::load(&checkpoint)).unwrap_err().to_string()
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let model = runnable("llama", Dtype::F32, 6, false);
    let with = |key: &str, value| refusal(&model.clone().set(key, value));
    models::says(&with("hidden_act", json!("tanh")), &["config.json", "tanh", "hidden_act", "silu"]);
    models::says(&with("rope_scaling", json!({"type": "linear"})), &["factor", "missing"]);
    let wild = json!({"rope_type": "wild", "rope_theta": 500.0});
    models::says(&with("rope_parameters", wild), &["wild", "rope_parameters", "llama3"]);
    models::says(&with("partial_rotary_factor", json!(0.5)), &["partial rotation", "0.5"]);
    models::says(&with("max_position_embeddings", json!(0)), &["max_position_embeddings", "found 0"]);
    models::says(&with("rms_norm_eps", json!("small")), &["rms_norm_eps", "small"]);
    let layers = runnable("qwen2", Dtype::F32, 6, true)
        .set("layer_types", json!(["linear_attention", "full_attention"]));
    models::says(&refusal(&layers), &["linear_attention", "layer_types"]);
    let open = runnable("qwen2", Dtype::F32, 6, true).set("is_causal", json!(false));
    models::says(&refusal(&open), &["is_causal"]);
    let mut biased_norm = model.clone();
    let norm = biased_norm.tensor("model.layers.1.input_layernorm.weight").clone();
    biased_norm.tensors.insert("model.layers.1.input_layernorm.bias".into(), norm);
    models::says(&refusal(&biased_norm), &["the norm model.layers.1.input_layernorm.bias"]);
    let mut missing = model.clone();
    missing.tensors.remove("model.layers.1.mlp.up_proj.weight");
    models::says(&refusal(&missing), &["model.layers.1.mlp.up_proj.weight", "missing"]);
    models::says(&with("vocab_size", json!(17)), &["model.embed_tokens.weight", "17", "16"]);
    // No scaling under any of its names, with θ where either generation keeps it.
    for rope in [json!({"rope_type": "default", "rope_theta": 500.0}), json!(null)] {
        let (_root, checkpoint) = opened(&model.clone().set("rope_parameters", rope));
        Model::load(&checkpoint).unwrap();
    }
}

#[test]
fn tokens_that_do_not_fit_are_refused() {
    let (_root, checkpoint) = opened(&runnable("llama", Dtype::F32, 6, false));
    let model = Model::load(&checkpoint).unwrap();
    let error = |tokens: Array2<u32>| model.logits(tokens.view()).unwrap_err().to_string();
    models::says(&error(tokens(1, 33, 16)), &["33", "32"]);
    models::says(&error(Array2::zeros((1, 0))), &["0 tokens"]);
    models::says(&error(Array2::from_elem((1, 3), 16)), &["token id 16", "vocabulary of 16"]);
}

/// A plan of another model is refused before anything is computed.
#[test]
fn a_plan_of_another_model_is_refused() {
    let (_root, checkpoint) = opened(&runnable("llama", Dtype::F32, 6, false));
    let other = novels();
    let plan = neighbours(&other, 2);
    let error = SharedHeads::new(&plan, &checkpoint).unwrap_err().to_string();
    models::says(&error, &["another model", "search this model again"]);
    let shared = SharedHeads::new(&plan, &other).unwrap();
    let error = Model::load(&checkpoint).unwrap().with_shared(&shared).unwrap_err().to_string();
    models::says(&error, &["another model", "search this model again"]);
}
