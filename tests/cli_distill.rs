//! Distillation from the command line: as a stage of compress, and on what was written before.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::path::Path;

use command::{done, fails, json, text};
use models::says;
use serde_json::Value;

fn weights(directory: &Path) -> Vec<u8> {
    fs::read(directory.join("model.safetensors")).unwrap()
}

#[test]
fn a_converted_model_learns_and_keeps_its_form() {
    let root = tempfile::tempdir().unwrap();
    let (model, words) = (models::novels(), models::novels().join("calibration.txt"));
    let calibration = ["--calibration", text(&words), "--calibration-windows", "16"];
    for target in ["stock", "expanded"] {
        let [half, learned, whole] =
            ["half", "learned", "whole"].map(|name| root.path().join(format!("{target}-{name}")));
        let base = ["compress", text(&model), "--kv", "0.5", "--target", target];
        done(&[&base[..], &["--refit", "none", "--out", text(&half)], &calibration].concat());
        let distill =
            ["distill", text(&half), "--source", text(&model), "--for", "20k", "--out", text(&learned)];
        let told = json(&[&distill[..], &calibration].concat());
        let course = told["course"].as_array().unwrap();
        let kl = |n: usize| course[n][1].as_f64().unwrap();
        assert!(kl(course.len() - 1) < 0.9 * kl(0), "{course:?}");
        let losses = told["losses"].as_array().unwrap();
        assert_eq!(losses.len(), 19_968 / 512);
        assert!(losses[38].as_f64().unwrap() < losses[0].as_f64().unwrap(), "{losses:?}");
        assert_eq!(told["interrupted"], false);
        assert!(!root.path().join(format!("{target}-learned.distilling")).exists());
        let record: Value = serde_json::from_slice(&fs::read(learned.join("qcqa.json")).unwrap()).unwrap();
        assert_eq!(record["target"], target);
        assert_eq!(record["plan"]["pooling"]["distilled"]["tokens"], 19_968);
        assert_eq!(
            fs::read(half.join("config.json")).unwrap(),
            fs::read(learned.join("config.json")).unwrap()
        );
        // In one command the same: what lies between is rounded once more.
        let stages = json(
            &[&base[..], &["--refit", "none", "--distill", "20k", "--out", text(&whole)], &calibration]
                .concat(),
        );
        let last = stages["stages"].as_array().unwrap().last().unwrap().clone();
        assert_eq!((&last["stage"], &last["kept"]), (&"distilled".into(), &true.into()));
        assert!((last["kl"].as_f64().unwrap() - kl(course.len() - 1)).abs() < 0.02 * kl(0));
        assert_eq!(weights(&whole).len(), weights(&learned).len());
        // Distilled heads cannot be made from the plan again.
        let plan = root.path().join(format!("{target}.json"));
        fs::write(&plan, record["plan"].to_string()).unwrap();
        let again = root.path().join("again");
        let convert =
            ["convert", text(&model), "--plan", text(&plan), "--target", target, "--out", text(&again)];
        says(&fails(2, &[&convert[..], &calibration].concat()), &["distilled"]);
    }
}

#[test]
fn what_distillation_needs_is_said_before_it_begins() {
    let root = tempfile::tempdir().unwrap();
    let (model, out) = (models::novels(), root.path().join("out"));
    let compress = ["compress", text(&model), "--kv", "0.5", "--out", text(&out)];
    for effort in ["0", "2X", "1e3", "2Mio", "", "99999999h"] {
        says(&fails(2, &[&compress[..], &["--distill", effort]].concat()), &["tokens", "time"]);
    }
    says(&fails(2, &[&compress[..], &["--distill", "2k"]].concat()), &["text"]);
    let bare = ["distill", text(&model), "--source", text(&model), "--for", "2k", "--out", text(&out)];
    says(&fails(1, &bare), &["qcqa.json"]);
    assert!(!out.exists());
}
