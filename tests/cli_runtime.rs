//! The binary on texts: evaluation, calibration, and the comparison that draws.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::path::Path;

use command::{fails, json, text};
use models::{llama, novels, says};
use serde_json::Value;

/// The beginning of the evaluation text, some windows long.
fn short_text(directory: &Path) -> String {
    let whole = fs::read_to_string(novels().join("evaluation.txt")).unwrap();
    let path = directory.join("short.txt");
    fs::write(&path, whole.chars().take(4000).collect::<String>()).unwrap();
    text(&path).to_string()
}

#[test]
fn a_plan_and_the_model_written_from_it_are_the_same() {
    let root = tempfile::tempdir().unwrap();
    let (model, words) = (novels(), short_text(root.path()));
    let [plan, out] = ["plan.json", "half"].map(|name| root.path().join(name));
    json(&["search", text(&model), "--kv", "0.5", "--target", "stock", "--out", text(&plan)]);
    json(&["convert", text(&model), "--plan", text(&plan), "--out", text(&out)]);

    let planned = json(&["eval", text(&model), "--plan", text(&plan), "--text", &words]);
    let written = json(&["eval", text(&out), "--source", text(&model), "--text", &words]);
    for field in ["perplexity", "source_perplexity", "kl", "same_top"] {
        let [planned, written] = [&planned, &written].map(|value| value[field].as_f64().unwrap());
        assert!((planned - written).abs() <= 1e-4 * planned, "{field}: {planned} {written}");
    }
    assert_eq!(planned["runtime_kv_bytes_per_token"], 2 * 4 * 16 * 4 * 4, "four heads, four layers, f32");
    assert!(planned["perplexity"].as_f64() > planned["source_perplexity"].as_f64());

    let alone = json(&["eval", text(&model), "--text", &words]);
    assert_eq!(alone["perplexity"], alone["source_perplexity"]);
    assert_eq!(alone["kl"], Value::Null);
}

#[test]
fn token_ids_serve_where_there_is_no_tokenizer() {
    let root = tempfile::tempdir().unwrap();
    let ids = root.path().join("ids.bin");
    let tokens = (0..600u16).map(|i| (i * 7) % 1024);
    fs::write(&ids, tokens.flat_map(u16::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    let value = json(&["eval", text(&novels()), "--ids", text(&ids)]);
    assert_eq!((value["windows"].as_u64(), value["tokens"].as_u64()), (Some(2), Some(510)));
}

#[test]
fn choices_are_scored() {
    let root = tempfile::tempdir().unwrap();
    let items = root.path().join("items.jsonl");
    let item = r#"{"query": "He looked at the", "choices": [" house", " qxzqxz"], "gold": 0}"#;
    fs::write(&items, format!("{item}\n{}\n", item.replace("\"gold\": 0", "\"gold\": 1"))).unwrap();
    let value = json(&["eval", text(&novels()), "--choices", text(&items)]);
    assert_eq!(value["choices"]["accuracy"], 0.5);
    assert_eq!(value["choices"]["items"], 2);
}

#[test]
fn compare_adds_perplexity_and_draws() {
    let root = tempfile::tempdir().unwrap();
    let (model, words, plot) = (novels(), short_text(root.path()), root.path().join("plot.svg"));
    let value = json(&[
        "compare",
        text(&model),
        "--kv",
        "0.5",
        "--text",
        &words,
        "--plot",
        text(&plot),
        "--optimizer",
        "exact,nsga2",
    ]);
    let lines = value["lines"].as_array().unwrap();
    let source = value["source_perplexity"].as_f64().unwrap();
    assert!(
        lines
            .iter()
            .all(|line| line["perplexity"].as_f64().unwrap() > source && line["kl"].as_f64() > Some(0.0))
    );
    let searched: Vec<_> =
        lines.iter().filter(|l| l["method"] == "qcqa-ec").map(|l| &l["optimizer"]).collect();
    assert_eq!(searched, ["exact", "nsga2"]);
    let svg = fs::read_to_string(&plot).unwrap();
    says(&svg, &["<svg", "perplexity", "qcqa-ac exact", "gqa"]);
    says(&fails(2, &["compare", text(&model), "--kv", "0.5", "--plot", text(&plot)]), &["--text"]);
}

#[test]
fn calibrate_writes_once_and_only_when_asked() {
    let root = tempfile::tempdir().unwrap();
    let (model, words, out) = (novels(), short_text(root.path()), root.path().join("moments.safetensors"));
    let args = ["calibrate", text(&model), "--text", &words, "--windows", "2", "--out", text(&out)];
    let dry = json(&[&args[..], &["--dry-run"]].concat());
    assert_eq!((dry["tokens"].as_u64(), out.exists()), (Some(256), false), "one fits, one validates");
    says(
        &fails(2, &["calibrate", text(&model), "--text", &words, "--windows", "0", "--out", "never"]),
        &["--windows"],
    );
    json(&args);
    assert!(out.is_file());
    says(&fails(1, &args), &["moments.safetensors", "--force"]);
}

#[test]
fn bad_texts_say_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let model = novels();
    let file = root.path().join("text");
    fs::write(&file, b"caf\xe9").unwrap();
    says(&fails(1, &["eval", text(&model), "--text", text(&file)]), &["UTF-8", "--ids"]);
    fs::write(&file, "too short").unwrap();
    says(&fails(1, &["eval", text(&model), "--text", text(&file)]), &["256"]);
    says(&fails(2, &["eval", text(&model)]), &["--text", "--ids"]);
    fs::write(&file, u16::MAX.to_le_bytes().repeat(300)).unwrap();
    says(&fails(1, &["eval", text(&model), "--ids", text(&file)]), &["65535", "1024"]);
}

/// A plan that contradicts itself or the model says so, with its file, before anything is computed.
#[test]
fn edited_plans_are_named_and_never_obeyed() {
    let root = tempfile::tempdir().unwrap();
    let (model, words) = (novels(), short_text(root.path()));
    let [plan, out] = ["plan.json", "out"].map(|name| root.path().join(name));
    json(&["search", text(&model), "--kv", "0.5", "--target", "stock", "--out", text(&plan)]);
    let good: Value = serde_json::from_str(&fs::read_to_string(&plan).unwrap()).unwrap();
    let convert = ["convert", text(&model), "--plan", text(&plan), "--out", text(&out)];
    let eval = ["eval", text(&model), "--plan", text(&plan), "--text", &words];
    let edited = |change: &dyn Fn(&mut Value)| {
        let mut value = good.clone();
        value["pooling"]["calibration"] = format!("sha256:{}", "0".repeat(64)).into();
        value["pooling"]["pooler"]["name"] = "low-rank".into();
        change(&mut value);
        fs::write(&plan, value.to_string()).unwrap();
    };
    let refused = |code: i32, change: &dyn Fn(&mut Value), words: &[&str]| {
        edited(change);
        for command in [&convert[..], &eval] {
            let message = fails(code, command);
            says(&message, &[&["plan.json"], words].concat());
            assert_eq!(message.matches("plan.json").count(), 1, "{message}");
            assert!(!message.contains('\u{1b}'), "{message:?}");
        }
    };
    refused(1, &|v| v["source"]["hidden"] = 64.into(), &["another model", "hidden size"]);
    let red = || Value::from("\u{1b}[31mred");
    refused(1, &|v| v["source"]["model_type"] = red(), &["another model", "\\u{1b}[31mred"]);
    refused(1, &|v| v["pooling"]["calibration"] = red(), &["64 hex digits"]);
    refused(1, &|v| v["\u{1b}[31m"] = 1.into(), &["unknown field"]);
    refused(2, &|v| v["pooling"]["pooler"]["name"] = red(), &["no pooler"]);
    refused(2, &|v| v["pooling"]["pooler"]["colour"] = 1.into(), &["no setting", "colour", "ridge"]);
    refused(1, &|v| v["pooling"]["pooler"]["ridge"] = red(), &["ridge is", "a number"]);
    refused(1, &|v| v["pooling"]["refit"] = red(), &["output", "full"]);
    refused(2, &|v| v["pooling"]["refit"] = "full".into(), &["none was given", "--calibration FILE"]);
    let uncalibrated = |v: &mut Value| {
        v["pooling"]["refit"] = "full".into();
        v["pooling"].as_object_mut().unwrap().remove("calibration");
    };
    refused(1, &uncalibrated, &["full refit", "names no calibration"]);
    let mean = |v: &mut Value| {
        v["pooling"]["refit"] = "full".into();
        v["pooling"]["pooler"]["name"] = "mean".into();
    };
    refused(2, &mean, &["a refit starts from calibrated heads", "pooler mean", "procrustes"]);

    // What the target cannot hold: a rule of convert alone.
    edited(&|v| {
        v["method"]["space"]["cardinality"] = "arbitrary".into();
        v["method"]["name"] = "custom".into();
        for layer in v["layers"].as_array_mut().unwrap() {
            layer["groups"] = serde_json::json!([[0, 1, 2], [3, 4], [5, 6], [7]]);
        }
    });
    says(&fails(1, &convert), &["plan.json", "target stock cannot hold the plan", "expanded"]);
    says(&fails(2, &eval), &["none was given"]);
    assert!(!out.exists());
}

/// A text that cannot be read is told before a calibration is looked at, let alone measured.
#[test]
fn texts_are_read_before_what_takes_long() {
    let root = tempfile::tempdir().unwrap();
    let (model, words) = (novels(), short_text(root.path()));
    let [plan, file] = ["plan.json", "file"].map(|name| root.path().join(name));
    let search = ["search", text(&model), "--kv", "0.5", "--method", "low-rank", "--out", text(&plan)];
    json(&[&search[..], &["--calibration", &words, "--refit", "none"]].concat());
    let compare = ["compare", text(&model), "--kv", "0.5"];
    let eval = ["eval", text(&model), "--plan", text(&plan)];
    for command in [&compare[..], &eval] {
        let refused = |form: &str| {
            let message = fails(1, &[command, &[form, text(&file), "--calibration", "never"]].concat());
            assert!(!message.contains("never"), "{message}");
            message
        };
        says(&refused("--text"), &["cannot read", text(&file)]);
        fs::write(&file, "too short").unwrap();
        says(&refused("--text"), &[text(&file), "one window takes 256"]);
        fs::write(&file, u16::MAX.to_le_bytes().repeat(300)).unwrap();
        says(&refused("--ids"), &[text(&file), "65535"]);
        fs::remove_file(&file).unwrap();
    }
    let choices = ["--choices", text(&file), "--calibration", "never"];
    says(&fails(1, &[&eval[..], &choices].concat()), &["cannot read", text(&file)]);
}

/// Only errors that somebody judges by are computed: squares of these weights overflow f32, not f64.
#[test]
fn compare_computes_what_is_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let mut model = llama();
    let tensor = model.tensor("model.layers.1.self_attn.v_proj.weight");
    tensor.bytes[8..10].copy_from_slice(&half::bf16::from_f32(1e30).to_le_bytes());
    model.write(root.path());
    let compare = ["compare", text(root.path()), "--kv", "0.5", "--method"];
    says(&fails(1, &[&compare[..], &["low-rank,gqa"]].concat()), &["keys and values of a layer"]);
    let value = json(&[&compare[..], &["low-rank"]].concat());
    assert_eq!(value["lines"].as_array().unwrap().len(), 1);
}
