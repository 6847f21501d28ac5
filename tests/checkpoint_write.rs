//! What is written is the model that the plan describes, and loads as such.
#![cfg(feature = "checkpoint")]

mod models;

use std::fs;
use std::path::Path;

use models::{
    Model, attention, convert, convert_by, novels, plan, same_plan, shared_model, snapshot, stored,
};
use ndarray::{Array1, Array2, Array3, Axis, s};
use proptest::prelude::*;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::{FileError, WriteOptions};
use qcqa::heads::{HeadSource, Heads, Pooled, Projection};
use qcqa::output::Target;
use qcqa::partition::Partition;
use qcqa::plan::{Plan, read_plan, write_plan};
use qcqa::pooler::MeanPooler;
use qcqa::spec::Spec;
use qcqa::targets::{Expanded, Stock, TARGETS};
use qcqa::{KvPooler, Run};
use safetensors::Dtype;
use serde_json::Value;

fn write(source: &Checkpoint, plan: &Plan, target: &dyn Target, out: &Path) -> Checkpoint {
    let report = convert(source, plan, target, out, WriteOptions::default(), Run::new(0)).unwrap();
    let sizes: u64 = report.files.iter().map(|f| out.join(f).metadata().unwrap().len()).sum();
    assert_eq!((report.bytes, report.files.len()), (sizes, snapshot(out).len()));
    Checkpoint::open(out).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Causal attention of a layer in f64, from its definition: RoPE half-split, softmax, query head q on KV head
/// q/r.
fn attend(layer: &Heads, x: &Array2<f64>, theta: f64) -> Array2<f64> {
    let (query, output) = (layer.query().unwrap(), layer.output().unwrap());
    let (h, tokens) = (layer.key().head_dim(), x.nrows());
    let project = |p: &Projection, head: usize| -> Array2<f64> {
        let weight = p.weight().index_axis(Axis(0), head).mapv(f64::from);
        let bias = p.bias().map_or(Array1::zeros(h), |b| b.row(head).mapv(f64::from));
        x.dot(&weight.t()) + bias
    };
    let turn = |mut rows: Array2<f64>| {
        for (position, mut row) in rows.rows_mut().into_iter().enumerate() {
            for f in 0..h / 2 {
                let angle = position as f64 * theta.powf(-2.0 * f as f64 / h as f64);
                let (a, b) = (row[f], row[f + h / 2]);
                row[f] = a * angle.cos() - b * angle.sin();
                row[f + h / 2] = b * angle.cos() + a * angle.sin();
            }
        }
        rows
    };
    let mut sum = Array2::zeros((tokens, output.dim().1));
    for head in 0..query.n_heads() {
        let kv = head / layer.queries_per_head();
        let (q, k) = (turn(project(query, head)), turn(project(layer.key(), kv)));
        let v = project(layer.value(), kv);
        for t in 0..tokens {
            let scores = k.slice(s![..=t, ..]).dot(&q.row(t)) / (h as f64).sqrt();
            let weights = scores.mapv(f64::exp);
            let read = weights.dot(&v.slice(s![..=t, ..])) / weights.sum();
            let out = output.index_axis(Axis(0), head).mapv(f64::from).dot(&read);
            sum.row_mut(t).zip_mut_with(&out, |s, o| *s += o);
        }
    }
    sum
}

/// Base of the rotary frequencies, by config.json.
fn theta(model: &Checkpoint) -> f64 {
    let raw = model.config().raw();
    raw.get("rope_theta").unwrap_or_else(|| &raw["rope_parameters"]["rope_theta"]).as_f64().unwrap()
}

/// Inputs of 7 tokens.
fn inputs(width: usize) -> Array2<f64> {
    Array2::from_shape_fn((7, width), |(t, i)| ((t * 31 + i * 17) % 23) as f64 / 23.0 - 0.5)
}

fn assert_same_function(a: &Checkpoint, b: &Checkpoint) {
    let x = inputs(a.architecture().hidden);
    for i in 0..a.architecture().n_layers() {
        let [a, b] = [a, b].map(|model| attend(&model.heads(i).unwrap(), &x, theta(model)));
        let error = (&a - &b).iter().fold(0.0, |m: f64, e| m.max(e.abs()));
        assert!(a.iter().any(|v| v.abs() > 0.01) && error < 1e-12, "layer {i}: {error}");
    }
}

#[test]
fn stock_holds_means_and_moved_queries() {
    let source = Checkpoint::open(novels()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let groups: [&[usize]; 4] = [&[0, 5], &[1, 2], &[3, 7], &[4, 6]];
    let plan = same_plan(&source, &groups);
    let before = snapshot(&novels());
    let stock = write(&source, &plan, &Stock, &root.path().join("stock"));
    assert_eq!(snapshot(&novels()), before);

    assert_eq!((attention(&stock).kv_heads, attention(&stock).query_heads), (4, 8));
    for i in 0..4 {
        let (old, new) = (source.heads(i).unwrap(), stock.heads(i).unwrap());
        for (old, new) in [(old.key(), new.key()), (old.value(), new.value())] {
            for ((g, row, column), &found) in new.weight().indexed_iter() {
                let [a, b] = [groups[g][0], groups[g][1]].map(|m| f64::from(old.weight()[[m, row, column]]));
                let mean = half::bf16::from_f32(((a + b) / 2.0) as f32).to_f32();
                assert_eq!(found, mean, "layer {i} group {g}");
            }
        }
        for (position, &head) in groups.concat().iter().enumerate() {
            let of = |p: &Heads, q: usize| p.query().unwrap().weight().index_axis(Axis(0), q).to_owned();
            assert_eq!(of(&new, position), of(&old, head));
            let out = |p: &Heads, q: usize| p.output().unwrap().index_axis(Axis(0), q).to_owned();
            assert_eq!(out(&new, position), out(&old, head));
        }
    }
    let expanded = write(&source, &plan, &Expanded, &root.path().join("expanded"));
    assert_eq!(expanded.config().raw(), source.config().raw());
    assert_eq!(expanded.architecture(), source.architecture());
    assert_same_function(&stock, &expanded);

    let mut config = json(&root.path().join("stock/config.json"));
    assert_eq!(config["num_key_value_heads"], 4);
    config["num_key_value_heads"] = 8.into();
    assert_eq!(config, json(&novels().join("config.json")));
    assert_eq!(json(&root.path().join("expanded/config.json")), config);
    for file in ["tokenizer.json", "generation_config.json", "evaluation.txt"] {
        assert_eq!(
            fs::read(root.path().join("stock").join(file)).unwrap(),
            fs::read(novels().join(file)).unwrap()
        );
    }
    let provenance = json(&root.path().join("expanded/qcqa.json"));
    assert_eq!(provenance["plan"], serde_json::to_value(&plan).unwrap());
    assert_eq!((&provenance["target"], &provenance["saves_memory"]), (&"expanded".into(), &false.into()));
    assert!(provenance["note"].as_str().unwrap().contains("saves no memory"));
    let header = fs::read(root.path().join("stock/model.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&header).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn no_sharing_changes_no_bit() {
    let root = tempfile::tempdir().unwrap();
    for (n, dtype) in [Dtype::BF16, Dtype::F16, Dtype::F32].into_iter().enumerate() {
        for files in [1, 3] {
            let directory = root.path().join(format!("{n}-{files}"));
            let model = Model::new("qwen2", dtype, 6, true).sharded(files);
            model.write(&directory);
            let source = Checkpoint::open(&directory).unwrap();
            let alone = vec![Partition::singletons(6).unwrap(); 2];
            let holds = |target: &&dyn Target| target.limits(source.architecture()).check(&alone).is_ok();
            // A GGUF file has no tensor of the source's name, blocks have no configuration of its kind.
            for target in TARGETS
                .iter()
                .copied()
                .filter(holds)
                .filter(|target| !["gguf", "gguf-f16", "gguf-f32", "deci"].contains(&target.name()))
            {
                let out = root.path().join(format!("{n}-{files}-{}", target.name()));
                write(&source, &plan(&source, &alone), target, &out);
                for i in 0..files {
                    assert_eq!(stored(&directory.join(model.file(i))), stored(&out.join(model.file(i))));
                }
                // Some say more of the heads, none says anything else.
                let (before, mut after) =
                    (json(&directory.join("config.json")), json(&out.join("config.json")));
                if target.name() == "remote-code" {
                    let config = after.as_object_mut().unwrap();
                    assert_eq!(config["qcqa_heads"], serde_json::json!([[6, 6], [6, 6]]));
                    ["qcqa_heads", "architectures", "auto_map"]
                        .iter()
                        .for_each(|key| drop(config.remove(*key)));
                }
                assert_eq!(before, after);
            }
        }
    }
}

#[test]
fn groups_of_one_and_untouched_tensors_keep_their_bits() {
    let root = tempfile::tempdir().unwrap();
    let model = Model::new("llama", Dtype::F16, 6, true);
    model.write(&root.path().join("in"));
    let source = Checkpoint::open(root.path().join("in")).unwrap();
    let plan = same_plan(&source, &[&[0], &[1, 3, 4], &[2], &[5]]);
    write(&source, &plan, &Expanded, &root.path().join("out"));
    let new = stored(&root.path().join("out/model.safetensors"));
    for (name, (_, _, old)) in stored(&root.path().join("in/model.safetensors")) {
        let new = &new[&name].2;
        if name.contains("k_proj") || name.contains("v_proj") {
            let head = old.len() / 6;
            for i in [0, 2, 5] {
                assert_eq!(new[i * head..][..head], old[i * head..][..head], "{name} head {i}");
            }
            assert_ne!(new[head..][..head], old[head..][..head]);
        } else {
            assert_eq!(*new, old, "{name}");
        }
    }
}

#[test]
fn shards_keep_their_names_and_the_index_its_truth() {
    let root = tempfile::tempdir().unwrap();
    let (input, out) = (root.path().join("in"), root.path().join("deep/er/out"));
    Model::new("mistral", Dtype::F32, 6, false).sharded(3).write(&input);
    let source = Checkpoint::open(&input).unwrap();
    let plan = same_plan(&source, &[&[0, 3, 4], &[1, 2, 5]]);
    let stock = write(&source, &plan, &Stock, &out);
    let (old, new) =
        (json(&input.join("model.safetensors.index.json")), json(&out.join("model.safetensors.index.json")));
    assert_eq!(old["weight_map"], new["weight_map"]);
    assert_eq!(new["metadata"]["total_size"], stock.weight_bytes());
    assert_eq!(new["metadata"]["kept"], "yes");
    assert!(stock.weight_bytes() < source.weight_bytes());
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&json(&input.join("config.json"))), keys(&json(&out.join("config.json"))));
    assert_eq!(fs::read_to_string(out.join("extra/template.jinja")).unwrap(), "hello");
    for absent in ["pytorch_model.bin", "stray.safetensors"] {
        assert!(input.join(absent).exists() && !out.join(absent).exists());
    }
}

#[test]
fn a_sharded_model_of_transformers() {
    let Some(path) = shared_model("novels-14m") else { return };
    let source = Checkpoint::open(&path).unwrap();
    assert_eq!(source.shards(), 2);
    let root = tempfile::tempdir().unwrap();
    let plan = same_plan(&source, &[&[0, 7, 11], &[1, 2, 3], &[4, 6, 10], &[5, 8, 9]]);
    let stock = write(&source, &plan, &Stock, &root.path().join("stock"));
    let expanded = write(&source, &plan, &Expanded, &root.path().join("expanded"));
    assert_eq!((attention(&stock).kv_heads, attention(&stock).query_heads), (4, 12));
    assert_same_function(&stock, &expanded);
    let index = |directory: &Path| json(&directory.join("model.safetensors.index.json"));
    let (old, new) = (index(&path), index(stock.path()));
    assert_eq!(old["weight_map"], new["weight_map"]);
    assert_eq!(old["metadata"]["total_size"], source.weight_bytes());
    assert_eq!(new["metadata"]["total_size"], stock.weight_bytes());
    assert_eq!(index(expanded.path()), old);
}

#[test]
fn reports_the_cache_and_writes_nothing_in_a_dry_run() {
    let source = Checkpoint::open(novels()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let plan = same_plan(&source, &[&[0, 1, 2, 3], &[4, 5, 6, 7]]);
    let out = root.path().join("not/there/yet");
    let dry = WriteOptions::default().dry_run(true);
    for (target, after) in [(&Stock as &dyn Target, 4 * 2 * 16 * 2 * 2), (&Expanded, 4 * 8 * 16 * 2 * 2)] {
        let guess = convert(&source, &plan, target, &out, dry, Run::new(0)).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        assert_eq!((guess.kv_bytes_before, guess.kv_bytes_after), (4 * 8 * 16 * 2 * 2, after));
        let real = root.path().join(target.name());
        let report = convert(&source, &plan, target, &real, WriteOptions::default(), Run::new(0)).unwrap();
        assert_eq!(report.files, guess.files);
        assert!(report.bytes.abs_diff(guess.bytes) < 256, "{} {}", report.bytes, guess.bytes);
        fs::remove_dir_all(real).unwrap();
    }
}

/// Turns every query and output head into its negative: the function stays, all four tensors are touched.
#[derive(Debug)]
struct Negated;

impl KvPooler for Negated {
    fn spec(&self) -> Spec {
        Spec::new("negated")
    }
    fn pool(&self, heads: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        let negated = |p: &Projection| {
            let (weight, bias) = p.clone().into_parts();
            Projection::new(-weight, bias.map(|b| -b))
        };
        let mean = MeanPooler.pool(heads, partition)?;
        let shared = Pooled::new(negated(&mean.key)?, negated(&mean.value)?);
        Ok(shared.with_queries(negated(heads.query().unwrap())?, -&heads.output().unwrap()))
    }
}

#[test]
fn a_pooler_may_change_queries_and_output() {
    let root = tempfile::tempdir().unwrap();
    Model::new("qwen2", Dtype::F32, 3, true).write(&root.path().join("in"));
    let source = Checkpoint::open(root.path().join("in")).unwrap();
    let plan = same_plan(&source, &[&[0, 2], &[1]]);
    let mean = write(&source, &plan, &Expanded, &root.path().join("mean"));
    let out = root.path().join("negated");
    convert_by(Negated, &source, &plan, &Expanded, &out, WriteOptions::default()).unwrap();
    let negated = Checkpoint::open(&out).unwrap();
    assert_same_function(&mean, &negated);
    let name = "model.layers.1.self_attn.o_proj.weight";
    assert_eq!(mean.tensor(name).unwrap(), -negated.tensor(name).unwrap());
}

/// Keys beyond what F16 holds.
#[derive(Debug)]
struct Huge;

impl KvPooler for Huge {
    fn spec(&self) -> Spec {
        Spec::new("huge")
    }
    fn pool(&self, heads: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        let mean = MeanPooler.pool(heads, partition)?;
        let key = Projection::new(Array3::from_elem(mean.key.weight().dim(), 1e5), None)?;
        Ok(Pooled::new(key, mean.value))
    }
}

#[test]
fn overflow_is_an_error_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    Model::new("llama", Dtype::F16, 6, false).write(&root.path().join("in"));
    let source = Checkpoint::open(root.path().join("in")).unwrap();
    let plan = same_plan(&source, &[&[0, 1, 2], &[3, 4, 5]]);
    let out = root.path().join("a/b/out");
    let error = convert_by(Huge, &source, &plan, &Stock, &out, WriteOptions::default()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("layers.0.self_attn.k_proj.weight") && message.contains("100000"), "{message}");
    assert!(message.contains("f16"), "{message}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn plans_come_back_as_they_were_written() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("plan.json");
    let source = Checkpoint::open(novels()).unwrap();
    let mut plan = same_plan(&source, &[&[0, 1, 2], &[3, 4], &[5], &[6, 7]]);
    plan.layers[1].error = 0.1 + 0.2;
    plan.layers[2].lower_bound = Some(1.0 / 30.0);
    write_plan(&path, &plan, WriteOptions::default()).unwrap();
    assert_eq!(read_plan(&path).unwrap(), plan);
    let error = write_plan(&path, &plan, WriteOptions::default()).unwrap_err();
    assert!(matches!(error, FileError::OutputExists { .. }), "{error}");
    plan.seed = 9;
    write_plan(&path, &plan, WriteOptions::default().force(true)).unwrap();
    assert_eq!(read_plan(&path).unwrap().seed, 9);
    plan.layers.pop();
    let message = write_plan(&path, &plan, WriteOptions::default().force(true)).unwrap_err().to_string();
    assert!(message.contains("plan.json") && message.contains("3 layers"), "{message}");
    assert_eq!(read_plan(&path).unwrap().seed, 9);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Stock and expanded are the same function for any equal groups, MHA or GQA, biases or none.
    #[test]
    fn stock_and_expanded_agree(
        (kv_heads, size) in prop::sample::select(vec![(6, 2), (6, 3), (6, 6), (6, 1), (2, 2), (3, 3), (1, 1)]),
        order in Just([0_usize, 1, 2, 3, 4, 5]).prop_shuffle(),
        bias in any::<bool>(),
        files in 1..3_usize,
    ) {
        let root = tempfile::tempdir().unwrap();
        Model::new("qwen2", Dtype::F32, kv_heads, bias).sharded(files).write(&root.path().join("in"));
        let source = Checkpoint::open(root.path().join("in")).unwrap();
        let order: Vec<usize> = order.into_iter().filter(|&head| head < kv_heads).collect();
        let groups: Vec<&[usize]> = order.chunks(size).collect();
        let plan = same_plan(&source, &groups);
        let stock = write(&source, &plan, &Stock, &root.path().join("stock"));
        let expanded = write(&source, &plan, &Expanded, &root.path().join("expanded"));
        prop_assert_eq!(attention(&stock).kv_heads, kv_heads / size);
        assert_same_function(&stock, &expanded);
    }
}
