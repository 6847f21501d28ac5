//! Messages of kind 17 of docs/reliability.md: which file, what was expected, what was found, what to do.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::path::{Path, PathBuf};

use command::{done, fails, json, text};
use models::{configured, copied, novels, renamed, says, with_tensors};
use serde_json::json;
use tempfile::TempDir;

/// The model as a hub's cache holds it: links into a folder of blobs.
#[cfg(unix)]
fn cached() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (root.path().join("blobs"), root.path().join("snapshots/0a1b"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for entry in fs::read_dir(novels()).unwrap() {
        let name = entry.unwrap().file_name();
        fs::copy(novels().join(&name), blobs.join(&name)).unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
    }
    (root, snapshot)
}

#[cfg(unix)]
#[test]
fn kind_17_a_link_to_nothing_is_an_incomplete_download() {
    let (root, model) = cached();
    done(&["inspect", text(&model)]);
    let words = novels().join("evaluation.txt");
    let out = root.path().join("out");
    let eval = ["eval", text(&model), "--text", text(&words)];
    let compress = ["compress", text(&model), "--kv", "0.5", "--method", "gqa", "--out", text(&out)];
    let of_model = root.path().join("link");
    for (name, args) in [
        ("model.safetensors", &["inspect", text(&model)][..]),
        ("config.json", &["inspect", text(&model)]),
        ("tokenizer.json", &eval),
        // What is only copied, too.
        ("generation_config.json", &compress),
    ] {
        let (blob, aside) = (root.path().join("blobs").join(name), root.path().join("aside"));
        fs::rename(&blob, &aside).unwrap();
        let goal = format!("../../blobs/{name}");
        says(&fails(1, args), &[text(&model.join(name)), &goal, "download is incomplete", "again"]);
        fs::rename(&aside, &blob).unwrap();
    }
    // An index, and a shard that it names.
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let index = model.join("model.safetensors.index.json");
    let link = |goal: &str, at: &Path| std::os::unix::fs::symlink(goal, at).unwrap();
    link("../../blobs/index", &index);
    let incomplete = ["is a link to ../../blobs/index, which is not there", "download is incomplete"];
    says(&fails(1, &["inspect", text(&model)]), &[&[text(&index)], &incomplete[..]].concat());
    fs::write(root.path().join("blobs/index"), "{\"weight_map\": {\"a\": \"model-1.safetensors\"}}").unwrap();
    let shard = model.join("model-1.safetensors");
    link("../../blobs/shard", &shard);
    says(
        &fails(1, &["inspect", text(&model)]),
        &[text(&shard), "../../blobs/shard", "download is incomplete"],
    );
    // The directory, a text, a plan.
    link("nowhere", &of_model);
    for args in [
        ["inspect", text(&of_model), "--kv", "0.5"],
        ["eval", text(&novels()), "--text", text(&of_model)],
        ["eval", text(&novels()), "--plan", text(&of_model)],
    ] {
        says(&fails(1, &args), &[text(&of_model), "nowhere"]);
    }
}

#[test]
fn kind_17_a_missing_tensor_is_told_with_its_file_its_shape_and_a_way_out() {
    let (_root, model) = copied();
    let (words, file) = (model.join("evaluation.txt"), model.join("model.safetensors"));
    let eval = ["eval", text(&model), "--text", text(&words)];
    configured(&model, |config| config["tie_word_embeddings"] = json!(false));
    let head = ["tensor lm_head.weight is missing", "[1024, 128]", "set `tie_word_embeddings` to true"];
    says(&fails(1, &eval), &[&[text(&file)], &head[..]].concat());
    configured(&model, |config| config["tie_word_embeddings"] = json!(true));
    let whole = fs::read(&file).unwrap();
    for (tensor, shape) in [
        ("model.layers.1.self_attn.v_proj.weight", "[128, 128]"),
        ("model.layers.1.mlp.down_proj.weight", "[128, 352]"),
        ("model.layers.3.mlp.gate_proj.weight", ""),
        ("model.layers.2.input_layernorm.weight", "[128]"),
        ("model.norm.weight", "[128]"),
        ("model.embed_tokens.weight", "[1024, 128]"),
    ] {
        renamed(&model, |name| (name != tensor).then(|| name.to_string()));
        let message = fails(1, &eval);
        says(&message, &[text(&file), tensor, "is missing", shape, "download the model again"]);
        assert!(!message.contains("shape []"), "{message}");
        fs::write(&file, &whole).unwrap();
    }
}

#[test]
fn kind_17_models_of_two_vocabularies_are_told_apart() {
    let (_root, model) = copied();
    let rows: Vec<f32> = (0..64 * 128).map(|i| (i % 7) as f32 * 0.01).collect();
    with_tensors(&model, &[("model.embed_tokens.weight".to_string(), vec![64, 128], rows)]);
    configured(&model, |config| config["vocab_size"] = json!(64));
    let (source, ids) = (novels(), model.join("ids"));
    fs::write(&ids, (0..600_u16).flat_map(|id| (id % 64 + 1).min(63).to_le_bytes()).collect::<Vec<_>>())
        .unwrap();
    let message = fails(1, &["eval", text(&model), "--source", text(&source), "--ids", text(&ids)]);
    let ours = format!("{} has a vocabulary of 64 tokens", text(&model));
    says(&message, &[&ours, text(&source), "1024", "converted from"]);
    // A tokenizer of another model, by its file.
    let words = source.join("evaluation.txt");
    let message = fails(1, &["eval", text(&model), "--text", text(&words)]);
    says(&message, &[text(&model.join("tokenizer.json")), "vocabulary of 64", "another model"]);
}

#[test]
fn kind_17_weights_are_no_moments() {
    let (model, root) = (novels(), tempfile::tempdir().unwrap());
    let (weights, out) = (model.join("model.safetensors"), root.path().join("out"));
    for command in ["search", "compress"] {
        let args = [command, text(&model), "--kv", "0.5", "--method", "low-rank", "--out", text(&out)];
        let message = fails(1, &[&args[..], &["--calibration", text(&weights)]].concat());
        says(&message, &[text(&weights), "the weights of a model", "no moments", "qcqa calibrate"]);
    }
    says(&fails(1, &["eval", text(&model), "--text", text(&weights)]), &[text(&weights), "no text"]);
}

#[test]
fn kind_17_quantised_models_are_refused_by_that_name() {
    for file in ["quantize_config.json", "quant_config.json", "hf_quant_config.json"] {
        for ending in ["qweight", "qzeros", "g_idx", "weight_scale_inv"] {
            let (_root, model) = copied();
            fs::write(model.join(file), "{\"bits\": 4}").unwrap();
            let tensor = format!("model.layers.0.mlp.up_proj.{ending}");
            with_tensors(&model, &[(tensor.clone(), vec![2], vec![0.0; 2])]);
            let parts = ["config.json", "a quantised model", &tensor, file, "dequantise it first"];
            says(&fails(1, &["inspect", text(&model)]), &parts);
        }
    }
    let (_root, model) = copied();
    configured(&model, |config| config["quantization_config"] = json!({ "quant_method": "gptq" }));
    says(&fails(1, &["inspect", text(&model)]), &["quantization_config", "dequantise it first"]);
}

#[test]
fn kind_17_what_a_conversion_says_of_itself_is_a_plan() {
    let (root, model) = copied();
    let [plan, out, again] = ["plan.json", "out", "again"].map(|name| root.path().join(name));
    done(&["search", text(&model), "--kv", "0.5", "--target", "stock", "--out", text(&plan)]);
    done(&["convert", text(&model), "--plan", text(&plan), "--out", text(&out)]);
    let record = out.join("qcqa.json");
    done(&["convert", text(&model), "--plan", text(&record), "--out", text(&again)]);
    let weights = |directory: &Path| fs::read(directory.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&again));
    // The plan in it is still for one model.
    let other = fails(1, &["convert", text(&out), "--plan", text(&record), "--out", text(&again), "--force"]);
    says(&other, &["qcqa.json", "for another model"]);
    // What is neither.
    for (held, parts) in [
        ("{\"model_type\": \"llama\"}", ["holds no plan", "model_type"]),
        ("[]", ["holds no plan", "no object"]),
        ("{\"version\": \"2\"}", ["holds no plan", "version"]),
    ] {
        fs::write(&plan, held).unwrap();
        let message = fails(1, &["convert", text(&model), "--plan", text(&plan), "--out", text(&again)]);
        says(&message, &[&[text(&plan), "give a plan, or the qcqa.json"], &parts[..]].concat());
    }
    let value = json(&["inspect", text(&out)]);
    assert_eq!(value["source"]["kv_heads"], 4);
}
