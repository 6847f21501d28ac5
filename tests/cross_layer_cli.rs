//! Heads shared across layers, from the command line.
#![cfg(feature = "cli")]

mod command;

use std::fs;
use std::path::Path;

use command::{done, fails, json, text};

const MODEL: &str = "tests/data/novels-1m";

#[test]
fn a_plan_across_layers_is_evaluated_and_written() {
    let root = tempfile::tempdir().unwrap();
    let [plan, out, words] = ["plan.json", "out", "text.txt"].map(|name| root.path().join(name));
    let all = fs::read_to_string(Path::new(MODEL).join("evaluation.txt")).unwrap();
    fs::write(&words, &all[..8000]).unwrap();
    let told = done(&["search", MODEL, "--kv", "0.5", "--method", "cla", "--out", text(&plan)]);
    assert!(told.contains("of below"), "{told}");
    let convert = |target| ["convert", MODEL, "--plan", text(&plan), "--target", target, "--out", text(&out)];
    for target in ["stock", "expanded"] {
        let error = fails(1, &convert(target));
        assert!(
            error.contains("only where both layers have one input") && error.contains("--target remote-code"),
            "{error}"
        );
    }
    let written = json(&convert("remote-code"));
    let bytes = |of: &str| written["kv_bytes_per_token"][of].as_u64().unwrap();
    assert!(2 * bytes("after") <= bytes("before"));
    let planned = json(&["eval", MODEL, "--plan", text(&plan), "--text", text(&words)]);
    let again = json(&["eval", text(&out), "--text", text(&words)]);
    let [planned, again] = [planned, again].map(|told| told["loss"].as_f64().unwrap());
    assert!((planned - again).abs() < 1e-4, "{planned} {again}");
    // Searched once, it is not searched again.
    let error =
        fails(1, &["search", text(&out), "--kv", "0.5", "--out", text(&root.path().join("again.json"))]);
    assert!(error.contains("reads the keys and values of the layer below"), "{error}");
}

#[test]
fn what_has_no_place_for_it_says_so() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let compress = ["compress", MODEL, "--kv", "0.5", "--method", "cla", "--out", text(&out)];
    let error = fails(2, &compress);
    assert!(error.contains("--target remote-code"), "{error}");
    let error = fails(1, &[&compress[..], &["--target", "remote-code", "--allocation", "uniform"]].concat());
    assert!(error.contains("the allocation of layers that share"), "{error}");
    let told = done(&["compare", MODEL, "--kv", "0.5", "--method", "gqa,cla"]);
    assert!(told.contains("cla (exact)"), "{told}");
}
