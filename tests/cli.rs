//! The binary as its users meet it: results in both forms, exit codes, and nothing lost on the way.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::path::Path;
use std::process::Command;

use command::{done, fails, json, qcqa, text};
use models::{llama, novels, says, snapshot};
use qcqa::HeadSource;
use qcqa::checkpoint::Checkpoint;
use serde_json::Value;

#[test]
fn inspect_tells_what_a_model_is() {
    let model = novels();
    let shown = done(&["inspect", text(&model)]);
    says(&shown, &["llama, 4 layers, 8 query heads on 8 KV heads of 16, width 128", "2.00 KiB a token"]);
    let value = json(&["inspect", text(&model), "--kv", "0.5,0.01"]);
    assert_eq!(value["kv_bytes_per_token"], 2 * 2 * 16 * 8 * 4);
    assert_eq!(value["budgets"][0]["kv_heads"], 16);
    assert_eq!(value["budgets"][1]["reachable"], false);
    assert_eq!(value["source"]["dtype"], "bf16");
}

#[test]
fn compress_writes_a_model_of_half_the_cache() {
    let root = tempfile::tempdir().unwrap();
    let (model, out) = (novels(), root.path().join("half"));
    let before = snapshot(&model);
    let args = ["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ec", "--out", text(&out)];
    let dry = json(&[&args[..], &["--dry-run"]].concat());
    assert_eq!((dry["output"]["dry_run"].as_bool(), out.exists()), (Some(true), false));
    let value = json(&args);
    assert_eq!(value["plan"], dry["plan"]);
    assert_eq!(value["plan"]["method"]["name"], "qcqa-ec");
    assert_eq!(value["kv_bytes_per_token"], value["output"]["kv_bytes_per_token"]);
    assert_eq!(Checkpoint::open(&out).unwrap().architecture().kv_heads(), [4; 4]);
    assert_eq!(snapshot(&model), before, "the source is untouched");
    // Once more: refused, then replaced.
    says(&fails(1, &args), &[text(&out), "--force"]);
    done(&[&args[..], &["--force"]].concat());
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "nothing else is left");
}

#[test]
fn search_and_convert_are_compress_in_two_steps() {
    let root = tempfile::tempdir().unwrap();
    let (model, plan) = (novels(), root.path().join("plan.json"));
    let [two, one] = ["two", "one"].map(|name| root.path().join(name));
    let search =
        ["search", text(&model), "--kv", "0.5", "--seed", "3", "--target", "stock", "--out", text(&plan)];
    says(&done(&[&search[..], &["--dry-run"]].concat()), &["would be written"]);
    assert!(!plan.exists());
    let found = json(&search);
    says(&fails(1, &search), &["plan.json", "--force"]);
    let stored: Value = serde_json::from_str(&std::fs::read_to_string(&plan).unwrap()).unwrap();
    assert_eq!(stored, found["plan"]);
    assert_eq!(stored["seed"], 3);
    done(&["convert", text(&model), "--plan", text(&plan), "--out", text(&two)]);
    let method = ["--method", "qcqa-ec"];
    done(
        &[&["compress", text(&model), "--kv", "0.5", "--seed", "3", "--out", text(&one)], &method[..]]
            .concat(),
    );
    let relative = |dir: &Path| {
        let files = snapshot(dir).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(dir).unwrap().to_path_buf(), bytes)).collect::<Vec<_>>()
    };
    assert!(relative(&one) == relative(&two));
}

#[test]
fn every_method_optimizer_and_allocation_keeps_its_budget() {
    let root = tempfile::tempdir().unwrap();
    let (model, plan) = (novels(), root.path().join("plan.json"));
    let base = ["search", text(&model), "--out", text(&plan), "--force"];
    for (method, kv, heads) in
        [("gqa", "0.6", 16), ("key-norm", "0.6", 16), ("qcqa-ec", "0.6", 16), ("qcqa-ac", "0.6", 16)]
    {
        for allocation in ["uniform", "selection", "exact"] {
            for optimizer in ["auto", "exact", "local", "nsga2"] {
                let args =
                    ["--method", method, "--kv", kv, "--allocation", allocation, "--optimizer", optimizer];
                let value = json(&[&base[..], &args].concat());
                let reached = value["plan"]["budget"]["kv_heads"].as_u64().unwrap();
                assert!(reached <= 19, "{args:?}");
                // One k in all layers: 4 of 8 is the largest within 0.6.
                assert!(allocation != "uniform" || reached == heads, "{args:?}");
            }
        }
    }
    let mqa = json(&[&base[..], &["--method", "mqa"]].concat());
    assert_eq!(mqa["plan"]["budget"]["kv_heads"], 4);
    // The paper to the letter.
    let paper = [
        "--method",
        "qcqa-ac",
        "--optimizer",
        "nsga2",
        "--allocation",
        "selection",
        "--cost",
        "raw",
        "--kv",
        "0.5",
    ];
    let value = json(&[&base[..], &paper].concat());
    assert_eq!(value["plan"]["method"]["cost"], "raw");
    let ks: Vec<_> = value["plan"]["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l["groups"].as_array().unwrap().len())
        .collect();
    let grouped: Vec<_> = ks.iter().filter(|k| **k != 8).collect();
    assert!(grouped.iter().all(|k| *k == grouped[0]), "{ks:?}");
}

#[test]
fn compare_sets_the_methods_side_by_side() {
    let model = novels();
    let shown = done(&["compare", text(&model), "--kv", "0.5,0.25"]);
    says(&shown, &["mha", "gqa", "mqa", "qcqa-ec", "qcqa-ac", "481.48"]);
    let value = json(&["compare", text(&model), "--kv", "0.5"]);
    let wse = |method: &str, allocation: &str| {
        let lines = value["lines"].as_array().unwrap();
        let line = lines.iter().find(|l| l["method"] == method && l["allocation"] == allocation).unwrap();
        line["wse"].as_f64().unwrap()
    };
    let order =
        [wse("qcqa-ac", "uniform"), wse("qcqa-ec", "uniform"), wse("gqa", "uniform"), wse("mqa", "uniform")];
    assert!(order.is_sorted(), "{order:?}");
    says(
        &done(&["compare", text(&model), "--kv", "0.5", "--layer", "1"]),
        &["layer 1", "[0,1] [2,3] [4,5] [6,7]"],
    );
    says(&fails(2, &["compare", text(&model), "--kv", "0.5", "--layer", "4"]), &["no layer 4", "has 4"]);
}

#[test]
fn wrong_usage_is_code_two_and_names_the_way_out() {
    let model = novels();
    let out = ["--out", "never"];
    for kv in ["0", "1.5", "nan", "-0.5", "half"] {
        let kv = format!("--kv={kv}");
        says(&fails(2, &[&["compress", text(&model), &kv], &out[..]].concat()), &["above 0 and at most 1"]);
    }
    says(&fails(2, &[&["compress", text(&model)], &out[..]].concat()), &["--kv"]);
    let unreachable = fails(2, &[&["compress", text(&model), "--kv", "0.1"], &out[..]].concat());
    says(&unreachable, &["3 KV heads in all are not reachable", "4, 8, 12"]);
    let unfit =
        fails(2, &[&["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ac"], &out[..]].concat());
    says(&unfit, &["--target stock", "qcqa-ec", "expanded"]);
    fails(2, &["compress", text(&model), "--kv", "0.5", "--method", "magic", "--out", "never"]);
    assert!(!Path::new("never").exists());
    says(
        &fails(2, &["inspect", text(&model), "--device", "tpu"]),
        &["a device is cpu, cuda, cuda:N, metal or auto"],
    );
    if !cfg!(feature = "cuda") {
        for device in ["cuda", "cuda:1"] {
            says(&fails(2, &["inspect", text(&model), "--device", device]), &["feature `cuda`"]);
        }
        let words = model.join("evaluation.txt");
        let rough = ["eval", text(&model), "--device", "auto", "--dtype", "bf16", "--text", text(&words)];
        says(&fails(1, &rough), &["the CPU", "f32 alone"]);
        assert!(!done(&["eval", "--help"]).contains("--device"));
    }
}

#[test]
fn failures_are_code_one_and_also_json() {
    says(&fails(1, &["inspect", "no/such/model"]), &["no/such/model does not exist", "on this disk"]);
    let output = qcqa(&["inspect", "no/such/model", "--json"]);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    says(value["error"].as_str().unwrap(), &["no/such/model"]);

    // A plan with a pooler that nobody knows, and one of another model.
    let root = tempfile::tempdir().unwrap();
    let (model, plan) = (novels(), root.path().join("plan.json"));
    done(&["search", text(&model), "--kv", "0.5", "--target", "stock", "--out", text(&plan)]);
    let stored = std::fs::read_to_string(&plan).unwrap();
    std::fs::write(&plan, stored.replace("\"mean\"", "\"median\"")).unwrap();
    let out = root.path().join("out");
    let convert = |model: &Path| {
        fails(
            if model == novels() { 2 } else { 1 },
            &["convert", text(model), "--plan", text(&plan), "--out", text(&out)],
        )
    };
    says(&convert(&model), &["plan.json", "median", "mean, first"]);
    std::fs::write(&plan, stored).unwrap();
    let other = root.path().join("other");
    llama().write(&other);
    says(&convert(&other), &["number of layers", "4", "2"]);
    assert!(!out.exists());
}

#[test]
fn weights_that_are_no_numbers_name_their_tensor() {
    let root = tempfile::tempdir().unwrap();
    let mut model = llama();
    let tensor = model.tensor("model.layers.1.self_attn.v_proj.weight");
    tensor.bytes[8..10].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    let (directory, plan) = (root.path().join("model"), root.path().join("plan.json"));
    model.write(&directory);
    for method in ["qcqa-ec", "gqa"] {
        let message =
            fails(1, &["search", text(&directory), "--kv", "0.5", "--method", method, "--out", text(&plan)]);
        says(&message, &["model.layers.1.self_attn.v_proj.weight", "model.safetensors", "NaN"]);
    }
}

#[test]
#[cfg(unix)]
fn an_interrupt_leaves_nothing() {
    // A model large enough to be caught at work; the signal comes as soon as the hidden directory is there.
    let root = tempfile::tempdir().unwrap();
    let mut model = llama();
    for i in 0..40 {
        let mut blob = model.tensor("model.embed_tokens.weight").clone();
        blob.shape = vec![2 << 20];
        blob.bytes = vec![0; 4 << 20];
        model.tensors.insert(format!("model.blob.{i}"), blob);
    }
    let source = root.path().join("in");
    model.write(&source);
    let before = snapshot(root.path());
    let out = root.path().join("out");
    let mut child = Command::new(env!("CARGO_BIN_EXE_qcqa"))
        .args(["compress", text(&source), "--kv", "0.5", "--out", text(&out)])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let hidden = || std::fs::read_dir(root.path()).unwrap().count() > 1;
    while !hidden() && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let status = child.wait().unwrap();
    if out.exists() {
        // It was faster than the signal: then the model is whole.
        assert!(Checkpoint::open(&out).is_ok());
        return;
    }
    assert!(kill.success());
    assert_eq!(status.code(), Some(130));
    assert_eq!(snapshot(root.path()), before);
}

/// `-h` is for a glance: one screen of 24 lines; `--help` has the rest.
#[test]
fn short_help_fits_one_screen() {
    let commands = [
        &[][..],
        &["inspect"],
        &["compare"],
        &["search"],
        &["convert"],
        &["compress"],
        &["distill"],
        &["eval"],
        &["calibrate"],
    ];
    for command in commands {
        let [short, long] = ["-h", "--help"].map(|flag| done(&[command, &[flag]].concat()));
        assert!(short.lines().count() <= 24, "{command:?}:\n{short}");
        assert!(long.lines().count() >= short.lines().count(), "{command:?}");
    }
    says(&done(&["compress", "--help"]), &["--pooler", "--refit", "--optimizer", "--max-group-size"]);
    assert!(!done(&["compress", "--help"]).contains("ward,"), "an old name works, but is not advertised");
}
