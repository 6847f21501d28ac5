//! Bad checkpoints and plans are refused by name, before anything is written.
#![cfg(feature = "checkpoint")]

mod models;

use std::fs;
use std::path::Path;

use models::{Model, Tensor, convert, encode, llama, not_written, plan, ready, same_plan, says};
use proptest::prelude::*;
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::heads::{HeadSource, InMemory};
use qcqa::output;
use qcqa::partition::Partition;
use qcqa::plan::{Plan, SharedHeads, read_plan};
use qcqa::targets::{Expanded, Stock};
use safetensors::Dtype;
use serde_json::{Value, json};

/// The error of opening a model after its directory was spoiled.
fn refused(model: &Model, spoil: impl FnOnce(&Path)) -> String {
    let directory = tempfile::tempdir().unwrap();
    model.write(directory.path());
    spoil(directory.path());
    Checkpoint::open(directory.path()).unwrap_err().to_string()
}

const KEY: &str = "model.layers.1.self_attn.k_proj.weight";

#[test]
fn directories() {
    let directory = tempfile::tempdir().unwrap();
    let message = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    says(&message(&directory.path().join("none")), &["none does not exist", "on this disk"]);
    says(&message(directory.path()), &["config.json is missing", "model of transformers"]);
    let lost = |path: &Path| fs::remove_file(path.join("model.safetensors")).unwrap();
    says(
        &refused(&llama(), lost),
        &["neither model.safetensors nor", "found pytorch_model.bin, stray.safetensors"],
    );
    let misnamed =
        |path: &Path| fs::rename(path.join("model.safetensors"), path.join("weights.safetensors")).unwrap();
    says(&refused(&llama(), misnamed), &["neither model.safetensors nor", "weights.safetensors"]);
    let folder = |path: &Path| {
        lost(path);
        fs::create_dir(path.join("model.safetensors")).unwrap();
    };
    says(&refused(&llama(), folder), &["model.safetensors", "a directory, not a file"]);
}

#[test]
fn configurations() {
    let with = |key: &str, value: Value| refused(&llama().set(key, value), |_| ());
    says(&with("num_attention_heads", Value::Null), &["config.json", "`num_attention_heads` is missing"]);
    says(
        &with("num_hidden_layers", json!(0)),
        &["`num_hidden_layers` must be a whole number from 1 on, found 0"],
    );
    says(&with("hidden_size", json!(-24)), &["`hidden_size`", "found -24"]);
    says(&with("hidden_size", json!("24")), &["`hidden_size`", "found \"24\""]);
    says(&with("num_key_value_heads", json!(4)), &["a divisor of the 6 query heads", "found 4"]);
    says(&with("model_type", json!("mine")), &["\"mine\" is not supported", "llama, mistral"]);
    says(&with("model_type", Value::Null), &["`model_type` is missing"]);
    says(&with("quantization_config", json!({"bits": 4})), &["quantised", "dequantise it first"]);
    says(&with("partial_rotary_factor", json!(0.5)), &["partial_rotary_factor", "0.5"]);
    says(&with("rope_theta", json!(-1)), &["`rope_theta`", "found -1"]);
    says(&with("head_dim", json!(3)), &["`head_dim` must be an even number", "found 3"]);
    says(&with("tie_word_embeddings", json!(3)), &["`tie_word_embeddings`", "found 3"]);
    let odd = llama().set("head_dim", Value::Null).set("hidden_size", json!(25));
    says(&refused(&odd, |_| ()), &["`hidden_size` must be a multiple of the 6 query heads", "found 25"]);
    let text =
        |text: &'static str| refused(&llama(), |path| fs::write(path.join("config.json"), text).unwrap());
    says(&text("{\"model_type\": "), &["config.json", "EOF"]);
    says(&text("[]"), &["config.json", "expected a map"]);
    // A count that the files do not back: it ends at the first layer that is not there, at once.
    says(
        &with("num_hidden_layers", json!(u64::MAX)),
        &["model.layers.2.self_attn.q_proj.weight is missing", "[24, 24]"],
    );
    says(&with("num_attention_heads", json!(u64::MAX - 5)), &["found"]);
    // mistral has 8 KV heads where nothing is said, which 6 query heads cannot share.
    let mut silent = llama().set("model_type", json!("mistral"));
    silent.config.as_object_mut().unwrap().remove("num_key_value_heads");
    says(&refused(&silent, |_| ()), &["`num_key_value_heads`", "found 8"]);
}

#[test]
fn weight_files() {
    let spoilt = |spoil: fn(&mut Vec<u8>)| {
        refused(&llama(), |path| {
            let file = path.join("model.safetensors");
            let mut bytes = fs::read(&file).unwrap();
            spoil(&mut bytes);
            fs::write(file, bytes).unwrap();
        })
    };
    let file = "model.safetensors: not a whole safetensors file of";
    says(&spoilt(|b| b.truncate(b.len() - 1)), &[file, "not fully covered"]);
    says(&spoilt(|b| b.truncate(100)), &[file, "100 bytes", "invalid header length"]);
    says(&spoilt(Vec::clear), &["model.safetensors is empty", "again"]);
    says(&spoilt(|b| b.push(0)), &[file, "not fully covered"]);
    says(&spoilt(|b| b[..8].fill(0xff)), &[file, "header too large"]);
    says(
        &spoilt(|b| b[..8].copy_from_slice(&99_000_000_u64.to_le_bytes())),
        &[file, "invalid header length"],
    );
    says(&spoilt(|b| b[8] = b'?'), &[file, "invalid JSON"]);
    let overlap = |path: &Path| {
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend([0; 4]);
        fs::write(path.join("model.safetensors"), bytes).unwrap();
    };
    says(&refused(&llama(), overlap), &[file, "invalid offset"]);
}

#[test]
fn indices() {
    let sharded = llama().sharded(2);
    let spoilt = |spoil: fn(&mut Value)| {
        refused(&sharded, |path| {
            let file = path.join("model.safetensors.index.json");
            let mut index = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
            spoil(&mut index);
            fs::write(file, index.to_string()).unwrap();
        })
    };
    let gone = |path: &Path| fs::remove_file(path.join("model-00002-of-00002.safetensors")).unwrap();
    says(&refused(&sharded, gone), &["index.json", "names model-00002-of-00002.safetensors", "no such file"]);
    says(
        &spoilt(|i| i["weight_map"][KEY] = "../model-00001-of-00002.safetensors".into()),
        &[KEY, "plain name"],
    );
    says(&spoilt(|i| i["weight_map"][KEY] = "/etc/passwd".into()), &[KEY, "plain name"]);
    says(&spoilt(|i| i["weight_map"][KEY] = "config.json".into()), &[KEY, "plain name"]);
    says(&spoilt(|i| i["weight_map"][KEY] = "other.safetensors".into()), &["names other.safetensors", KEY]);
    says(&spoilt(|i| i["weight_map"][KEY] = 3.into()), &["`weight_map`", KEY]);
    says(
        &spoilt(|i| i["weight_map"]["ghost"] = "model-00001-of-00002.safetensors".into()),
        &["tensor ghost", "does not"],
    );
    says(&spoilt(|i| i["weight_map"] = json!({})), &["`weight_map`", "nothing in it"]);
    says(&spoilt(|i| *i = json!({})), &["`weight_map`", "found nothing"]);
    let doubled = |path: &Path| {
        fs::copy(
            path.join("model-00001-of-00002.safetensors"),
            path.join("model-00002-of-00002.safetensors"),
        )
        .unwrap();
    };
    says(&refused(&sharded, doubled), &["is both in", "00001-of-00002", "00002-of-00002"]);
}

#[test]
fn tensors() {
    let with = |change: fn(&mut Model)| {
        let mut model = llama();
        change(&mut model);
        refused(&model, |_| ())
    };
    says(&with(|m| drop(m.tensors.remove(KEY))), &[KEY, "is missing", "[24, 24]"]);
    says(
        &with(|m| m.tensor(KEY).shape = vec![12, 48]),
        &["model.safetensors", KEY, "[24, 24]", "found [12, 48]"],
    );
    let eight_bits = |m: &mut Model| {
        *m.tensor(KEY) = Tensor { dtype: Dtype::I8, shape: vec![24, 24], bytes: vec![0; 576] };
    };
    says(&with(eight_bits), &["model.safetensors", KEY, "BF16, F16 or F32", "found I8"]);
    let other = |m: &mut Model| {
        *m.tensor(KEY) = Tensor { dtype: Dtype::F32, shape: vec![24, 24], bytes: vec![0; 4 * 576] };
    };
    says(&with(other), &[KEY, "BF16, as the keys of layer 0", "found F32"]);
    let normed = |m: &mut Model| {
        let norm = Tensor { dtype: Dtype::BF16, shape: vec![4], bytes: vec![0; 8] };
        m.tensors.insert("model.layers.0.self_attn.q_norm.weight".into(), norm);
    };
    says(&with(normed), &["q_norm.weight", "not supported"]);
    let bias = "model.layers.1.self_attn.v_proj.bias";
    let uneven = |m: &mut Model| {
        let bias = Tensor { dtype: Dtype::BF16, shape: vec![24], bytes: vec![0; 48] };
        m.tensors.insert("model.layers.1.self_attn.v_proj.bias".into(), bias);
        m.config["attention_bias"] = json!(true);
    };
    says(&with(uneven), &[bias, "in some layers but not in all"]);
}

#[test]
fn numbers_that_are_none() {
    for (dtype, number) in
        [(Dtype::BF16, f32::NAN), (Dtype::F16, f32::INFINITY), (Dtype::F32, f32::NEG_INFINITY)]
    {
        for part in ["k", "v", "q", "o"] {
            let name = format!("model.layers.1.self_attn.{part}_proj.weight");
            let mut model = Model::new("llama", dtype, 6, false);
            let size = dtype.bitsize() / 8;
            model.tensor(&name).bytes[7 * size..8 * size].copy_from_slice(&encode(dtype, &[number]));
            let root = tempfile::tempdir().unwrap();
            model.write(&root.path().join("in"));
            let source = Checkpoint::open(root.path().join("in")).unwrap();
            let parts = [name.as_str(), "model.safetensors", "NaN or infinite"];
            says(&source.heads(1).unwrap_err().to_string(), &parts);
            assert_eq!(source.rows(1).unwrap().check_finite().is_err(), "kv".contains(part));
            source.heads(0).unwrap();
            let plan = same_plan(&source, &[&[0, 1, 2], &[3, 4, 5]]);
            let run = Run::new(0);
            let out = root.path().join("out");
            let error = convert(&source, &plan, &Stock, &out, WriteOptions::default(), run).unwrap_err();
            says(&error.to_string(), &parts);
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        }
    }
}

#[test]
fn plans_for_another_model() {
    let (root, source, plan) = ready();
    let out = root.path().join("out");
    let with = |change: fn(&mut Plan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        not_written(&root, &source, &plan, &Stock, &out, false)
    };
    says(
        &with(|p| p.source.model_type = "mistral".into()),
        &["another model", "model_type is mistral", "this model's is llama"],
    );
    says(&with(|p| p.source.hidden = 32), &["hidden size is 32", "is 24"]);
    says(&with(|p| p.source.layers.iter_mut().for_each(|l| l.head_dim = 8)), &["head_dim is 8", "is 4"]);
    says(
        &with(|p| p.source.layers.iter_mut().for_each(|l| l.query_heads = 12)),
        &["number of query heads is 12", "is 6"],
    );
    says(&with(|p| p.source.dtype = "f16".into()), &["dtype is f16", "is bf16"]);
    says(&with(|p| p.source.fingerprint = Some("sha256:00".into())), &["fingerprint", "sha256:00"]);
    says(&with(|p| p.source.fingerprint = None), &["fingerprint", "none"]);
    says(&with(|p| p.version = 3), &["version 3", "reads version 2"]);
    says(&with(|p| drop(p.layers.pop())), &["groups for 1 layers", "has 2"]);
    // Heads that come from elsewhere.
    let elsewhere = InMemory::new(vec![source.heads(0).unwrap(), source.heads(1).unwrap()]).unwrap();
    let plan = same_plan(&elsewhere, &[&[0, 1, 2], &[3, 4, 5]]);
    let shared = SharedHeads::new(&plan, &elsewhere).unwrap();
    let error =
        output::convert(&source, &shared, &Stock, &out, WriteOptions::default(), Run::new(0)).unwrap_err();
    says(&error.to_string(), &["another model", "model_type is raw", "is llama"]);
}

#[test]
fn plans_that_are_none() {
    let (root, _, plan) = ready();
    let path = root.path().join("plan.json");
    let read = |change: fn(&mut Value)| {
        let mut value = serde_json::to_value(&plan).unwrap();
        change(&mut value);
        fs::write(&path, value.to_string()).unwrap();
        read_plan(&path).unwrap_err().to_string()
    };
    says(
        &read(|p| p["layers"][0]["groups"] = json!([[0, 1], [3, 4, 5]])),
        &["plan.json", "head 5 does not exist"],
    );
    says(
        &read(|p| p["layers"][0]["groups"] = json!([[0, 1], [2, 3, 4]])),
        &["plan.json", "layer 0 groups 5 heads"],
    );
    says(
        &read(|p| p["layers"][1]["groups"] = json!([[0, 1, 2], [2, 4, 5]])),
        &["plan.json", "head 2", "more than one"],
    );
    says(&read(|p| p["layers"][1]["groups"] = json!([[0, 1, 2], []])), &["plan.json", "empty"]);
    says(&read(|p| p["layers"][1]["error"] = json!(-1.0)), &["plan.json", "layer 1", "-1"]);
    says(&read(|p| p["version"] = json!(9)), &["plan.json", "version 9", "update qcqa"]);
    // A newer plan is called so even where its fields are new.
    says(&read(|p| *p = json!({"version": 3, "novel": []})), &["version 3 is not supported"]);
    says(&read(|p| p["novel"] = json!(1)), &["plan.json", "unknown field `novel`"]);
    says(&read(|p| drop(p.as_object_mut().unwrap().remove("seed"))), &["plan.json", "missing field `seed`"]);
    fs::write(&path, "{").unwrap();
    says(&read_plan(&path).unwrap_err().to_string(), &["plan.json", "EOF"]);
    fs::remove_file(&path).unwrap();
    says(&read_plan(&path).unwrap_err().to_string(), &["cannot read", "plan.json"]);
    fs::File::create(&path).unwrap().set_len(65 << 20).unwrap();
    says(&read_plan(&path).unwrap_err().to_string(), &["plan.json", "larger than 67108864 bytes"]);
}

#[test]
fn plans_that_stock_cannot_hold() {
    let (root, source, _) = ready();
    let out = root.path().join("out");
    let groups = |groups: &[&[usize]]| Partition::from_groups(6, groups).unwrap();
    let (three, two) = (groups(&[&[0, 1], &[2, 3], &[4, 5]]), groups(&[&[0, 1, 2], &[3, 4, 5]]));
    let uneven = groups(&[&[0, 1, 2, 3], &[4, 5]]);
    let refused =
        |layers: &[Partition]| not_written(&root, &source, &plan(&source, layers), &Stock, &out, false);
    let rule = ["target stock cannot hold the plan"];
    let message = refused(&[two.clone(), three]);
    says(&message, &["layer 1 has 3 groups", "2 of layer 0"]);
    says(&message, &rule);
    let message = refused(&[two, uneven.clone()]);
    says(&message, &["layer 1 has groups of [4, 2] heads"]);
    says(&message, &rule);
    convert(
        &source,
        &plan(&source, &[uneven.clone(), uneven]),
        &Expanded,
        &out,
        WriteOptions::default(),
        Run::new(0),
    )
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Bytes changed or lost anywhere in any file end in an error or in a model, never in a panic.
    #[test]
    fn spoilt_bytes_do_no_harm(
        files in 1..3_usize,
        which in 0..3_usize,
        at in 0.0..1.0,
        // Mostly in the header, where a byte decides most.
        near in 0..8_usize,
        to in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let model = llama().sharded(files);
        model.write(directory.path());
        let names = [model.file(0), "config.json".to_string(), "model.safetensors.index.json".to_string()];
        let path = directory.path().join(&names[which.min(files)]);
        let mut bytes = fs::read(&path).unwrap();
        let place = (at * bytes.len() as f64) as usize >> near;
        bytes[place] = to;
        if cut && near == 0 {
            bytes.truncate(place);
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(directory.path()) {
            let layers = checkpoint.architecture().n_layers();
            for i in 0..layers {
                let rows = checkpoint.rows(i).unwrap();
                let (finite, heads) = (rows.check_finite().is_ok(), checkpoint.heads(i));
                prop_assert!(finite || heads.is_err());
                // Rows are keys and values; the other two may be spoilt without them.
                let elsewhere = |e: qcqa::Error| ["q_proj", "o_proj"].iter().any(|p| e.to_string().contains(p));
                prop_assert!(!finite || heads.map_or_else(elsewhere, |_| true));
            }
            prop_assert!(checkpoint.heads(layers).is_err());
            prop_assert_eq!(checkpoint.id().unwrap().layers.len(), layers);
        }
    }
}
