//! Groups of unlike sizes in forms that runtimes load: filled up with query heads of zeros.
#![cfg(feature = "runtime")]

mod models;
mod running;
mod written;

use std::fs;

use models::{plan, says};
use qcqa::Run;
use qcqa::budget::Budget;
use qcqa::checkpoint::Checkpoint;
use qcqa::families::with_heads;
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::model::{Architecture, AttentionSpec};
use qcqa::output::{Target, check_form, check_plan};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Preset};
use qcqa::runtime::Model;
use qcqa::targets::{Deci, Padded, RemoteCode, Runtime, Stock};
use running::{near, tokens};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use written::{Written, config, fours_and_threes, partitions, runnable, uneven};

#[test]
fn a_padded_model_computes_what_the_expanded_one_does() {
    for (model_type, kv_heads) in [("qwen2", 6), ("qwen2", 3), ("llama", 6), ("mistral", 3)] {
        let model = runnable(model_type, Dtype::F32, kv_heads, model_type == "qwen2");
        let model = model.set("sliding_window", Value::Null).set("rope_theta", json!(700.0));
        let written = Written::new(&model, &uneven(kv_heads));
        let padded = config(&written.holds(&Padded));
        let (k, queries) = if kv_heads == 6 { (3, 9) } else { (2, 8) };
        assert_eq!(
            (&padded["num_attention_heads"], &padded["num_key_value_heads"]),
            (&json!(queries), &json!(k))
        );
        assert_eq!(padded["head_dim"], 4);
        // 9 do not divide 24.
        let expected = if model_type == "llama" { "mistral" } else { model_type };
        assert_eq!(padded["model_type"], expected);
        if model_type == "llama" {
            assert_eq!(padded["architectures"], json!(["MistralForCausalLM"]));
            assert_eq!(padded["sliding_window"], Value::Null);
            assert_eq!(
                (&padded["rope_theta"], &padded["rope_parameters"]["rope_theta"]),
                (&json!(700.0), &json!(700.0))
            );
            assert_eq!(padded["rms_norm_eps"], 1e-5);
        }
    }
    // 8 divide 24: it stays a Llama.
    let written = Written::new(&runnable("llama", Dtype::F32, 3, true), &uneven(3));
    let padded = config(&written.holds(&Padded));
    assert_eq!((&padded["model_type"], &padded["num_attention_heads"]), (&json!("llama"), &json!(8)));
}

#[test]
fn a_runtime_gets_the_plainest_form_of_a_plan() {
    let pairs: &[&[usize]] = &[&[0, 5], &[1, 4], &[2, 3]];
    let one: &[&[usize]] = &[&[0, 1, 2, 3, 4, 5]];
    let model = runnable("llama", Dtype::F32, 6, false);
    for (runtime, layers, expected) in [
        ("transformers", partitions(6, [pairs; 2]), "stock"),
        ("transformers", uneven(6), "padded"),
        ("transformers", partitions(6, [pairs, one]), "remote-code"),
        ("vllm", partitions(6, [pairs, one]), "deci"),
        ("vllm", uneven(6), "deci"),
        ("llama.cpp", uneven(6), "gguf"),
    ] {
        let written = Written::new(&model, &layers);
        // What lies there in place of a tokenizer is none.
        fs::remove_file(written.source.path().join("tokenizer.json")).unwrap();
        let runtime = Runtime::by_name(runtime).unwrap();
        assert_eq!(runtime.plainest(&written.source, &written.plan).unwrap().name(), expected);
        check_form(&written.source, runtime.widest()).unwrap();
    }
    let written = Written::new(&model, &fours_and_threes());
    let error = Runtime::by_name("vllm").unwrap().plainest(&written.source, &written.plan).unwrap_err();
    says(&error.to_string(), &["deci"]);
    let (_root, other) =
        running::opened(&runnable("mistral", Dtype::F32, 6, false).set("sliding_window", json!(8)));
    says(&check_form(&other, &Deci).unwrap_err().to_string(), &["cannot be written so", "windows"]);
}

#[test]
fn scaled_positions_are_spelled_in_both_ways() {
    let scaling = json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8});
    for parameters in [false, true] {
        let mut model = runnable("llama", Dtype::F32, 6, false);
        if parameters {
            let mut all = scaling.clone();
            all["rope_theta"] = json!(500.0);
            model.config.as_object_mut().unwrap().remove("rope_theta");
            model = model.set("rope_parameters", all);
        } else {
            model = model.set("rope_scaling", scaling.clone());
        }
        let written = Written::new(&model, &uneven(6));
        let padded = written.holds(&Padded);
        assert!(padded.architecture().notes.is_empty(), "{:?}", padded.architecture().notes);
        let config = config(&padded);
        assert_eq!(config["rope_scaling"], scaling);
        assert_eq!(config["rope_parameters"]["rope_theta"], config["rope_theta"]);
        assert_eq!(config["rope_parameters"]["rope_type"], "llama3");
    }
}

#[test]
fn what_padded_cannot_hold_is_refused() {
    let refused = |model: &models::Model, layers: &[Partition], parts: &[&str]| {
        let written = Written::new(model, layers);
        let error = check_plan(&written.source, &written.plan, &Padded).unwrap_err().to_string();
        says(&error, &["target padded"]);
        says(&error, parts);
    };
    refused(&runnable("llama", Dtype::F32, 6, true), &uneven(6), &["biases (`attention_bias`)", "\"llama\""]);
    // Two groups of five and one make ten places for six heads.
    let wide = partitions(6, [&[&[0, 1, 2, 3, 4], &[5]]; 2]);
    refused(&runnable("llama", Dtype::F32, 6, false), &wide, &["[5, 1]", "at most 150%"]);
    let other = partitions(6, [&[&[0, 1, 2], &[3, 4, 5]], &[&[0, 1], &[2, 3], &[4, 5]]]);
    refused(&runnable("llama", Dtype::F32, 6, false), &other, &["layer 1 has 3 groups"]);
    let with = |model_type: &str| {
        let model = Architecture::new(model_type, 24, vec![AttentionSpec::new(6, 6, 4); 2]);
        with_heads(&model, &Map::new(), 9, 3).unwrap_err().to_string()
    };
    says(&with("opt"), &["\"opt\"", "llama, mistral, qwen2"]);
    says(&with("stablelm"), &["\"stablelm\"", "cannot become 9", "groups of one size"]);
    says(&with("gemma2"), &["\"gemma2\"", "must divide the width of 24, and 9 do not"]);
}

#[test]
fn remote_code_holds_any_plan_and_opens_again() {
    for (model_type, kv_heads) in [("qwen2", 6), ("llama", 6), ("mistral", 6)] {
        let model = runnable(model_type, Dtype::F32, kv_heads, model_type == "qwen2");
        let model = model.set("sliding_window", Value::Null);
        let layers = partitions(6, [&[&[0, 1, 2, 3, 4], &[5]], &[&[0, 3], &[1, 2], &[4], &[5]]]);
        let written = Written::new(&model, &layers);
        let remote = written.holds(&RemoteCode);
        let found = config(&remote);
        assert_eq!(found["qcqa_heads"], json!([[10, 2], [8, 4]]));
        assert_eq!(found["auto_map"]["AutoModelForCausalLM"], "modeling_qcqa.QcqaForCausalLM");
        assert_eq!((&found["model_type"], &found["num_attention_heads"]), (&json!(model_type), &json!(6)));
        let file = fs::read_to_string(remote.path().join("modeling_qcqa.py")).unwrap();
        let class = found["model_type"].as_str().unwrap().to_uppercase()[..1].to_string() + &model_type[1..];
        assert!(file.contains(&format!("from transformers import {class}ForCausalLM\n")), "{file}");
        assert!(!file.contains("Stock"), "{file}");

        // What was written can be shared again: by layer, and where layers differ in query heads not as a stock model.
        let again = plan(&remote, &partitions_of(&[2, 4]));
        let out = written.root.path().join("again");
        models::convert(&remote, &again, &RemoteCode, &out, WriteOptions::default(), Run::new(0)).unwrap();
        assert_eq!(Checkpoint::open(&out).unwrap().architecture().kv_heads(), [1, 1]);
        let error = check_plan(&remote, &again, &Stock).unwrap_err().to_string();
        says(&error, &["layer 1 has 8 query heads", "layer 0 has 10"]);
        let padded = written.root.path().join("padded again");
        models::convert(&remote, &again, &Padded, &padded, WriteOptions::default(), Run::new(0)).unwrap();
        let padded = Checkpoint::open(&padded).unwrap();
        // Whoever loads it wants no code beside it.
        assert!(!padded.path().join("modeling_qcqa.py").exists() && out.join("modeling_qcqa.py").exists());
        assert!(config(&padded).get("qcqa_heads").is_none() && config(&padded).get("auto_map").is_none());
        let ids = tokens(2, 12, 16);
        let logits = |checkpoint: &Checkpoint| Model::load(checkpoint).unwrap().logits(ids.view()).unwrap();
        near(&logits(&padded), &logits(&Checkpoint::open(&out).unwrap()), 1e-4);
    }
}

/// All heads of a layer in one group.
fn partitions_of(heads: &[usize]) -> Vec<Partition> {
    heads.iter().map(|&n| Partition::one_group(n).unwrap()).collect()
}

#[test]
fn descriptions_of_layers_are_held_to_what_they_can_be() {
    let written = Written::new(&runnable("llama", Dtype::F32, 6, false), &uneven(6));
    let remote = written.convert(&RemoteCode);
    let wrong = [
        json!([[9, 3]]),
        json!([[9, 3], [9, 2]]),
        json!([[9, 3], [9, 0]]),
        json!([[9, 3], [9]]),
        json!("9"),
        json!([[9, 3], [u64::MAX, 1]]),
        json!([[9, 3], [-9, 3]]),
    ];
    for heads in wrong {
        models::configured(remote.path(), |config| config["qcqa_heads"] = heads.clone());
        let error = Checkpoint::open(remote.path()).unwrap_err().to_string();
        says(&error, &["qcqa_heads", "for each of 2 layers"]);
    }
    models::configured(remote.path(), |config| config["qcqa_heads"] = json!([[9, 3], [12, 3]]));
    says(&Checkpoint::open(remote.path()).unwrap_err().to_string(), &["layers.1.self_attn"]);
}

#[test]
fn what_filling_up_costs_is_said() {
    let written = Written::new(&runnable("llama", Dtype::F32, 6, false), &uneven(6));
    let out = written.root.path().join("out");
    let options = WriteOptions::default().dry_run(true);
    let report =
        models::convert(&written.source, &written.plan, &Padded, &out, options, Run::new(0)).unwrap();
    // In each of two layers three heads of 4 x 24 numbers, of queries and of outputs.
    assert_eq!((report.query_heads, report.dead_query_heads), (12, 6));
    assert_eq!(report.dead_bytes, 6 * 2 * 4 * 24 * 4);
    assert_eq!(report.kv_bytes_after * 2, report.kv_bytes_before);
}

#[test]
fn the_search_keeps_to_what_padded_holds() {
    let source = Checkpoint::open(models::novels()).unwrap();
    let plan = |target: &'static dyn Target, preset| {
        Compress::new(preset).target(target).budget(Budget::Fraction(0.5)).plan(&source, Run::new(0)).unwrap()
    };
    let (padded, equal) = (plan(&Padded, Preset::QcqaAc), plan(&Stock, Preset::QcqaEc));
    assert_eq!(padded.group_counts(), [4; 4]);
    assert_eq!(padded.method.space.max_filled, Some(Padded::MOST));
    // Four groups of at most three of eight heads.
    assert!(padded.groups().all(|groups| groups.sizes().iter().all(|&size| size <= 3)));
    assert!(padded.error() < equal.error(), "{} and {}", padded.error(), equal.error());
    check_plan(&source, &padded, &Padded).unwrap();
}
