//! Calibration texts as the command line takes them: several, with shares, or none at all.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::path::{Path, PathBuf};

use command::{done, fails, json, text};
use models::{novels, says};
use serde_json::Value;
use tempfile::TempDir;

/// Two texts of some windows each.
fn desk() -> (TempDir, PathBuf, [PathBuf; 2]) {
    let (root, model) = (tempfile::tempdir().unwrap(), novels());
    let texts = ["calibration.txt", "evaluation.txt"].map(|name| {
        let whole = fs::read_to_string(model.join(name)).unwrap();
        let path = root.path().join(name);
        fs::write(&path, whole.chars().take(20_000).collect::<String>()).unwrap();
        path
    });
    (root, model, texts)
}

fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| arg.to_string()).collect()
}

fn borrowed(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn windows(calibration: &Value) -> Vec<[u64; 2]> {
    let of = |text: &Value| ["fit_windows", "validation_windows"].map(|role| text[role].as_u64().unwrap());
    calibration["texts"].as_array().unwrap().iter().map(of).collect()
}

#[test]
fn every_text_has_its_share_and_its_row() {
    let (root, model, [one, two]) = desk();
    let (model, out) = (text(&model), root.path().join("half"));
    let base =
        ["compress", model, "--kv", "0.5", "--out", text(&out), "--force", "--calibration-windows", "8"];
    let args = |calibration: &[&str]| owned(&[&base[..], &["--calibration"], calibration].concat());
    let compress = |calibration: &[&str]| json(&borrowed(&args(calibration)));
    let refused = |calibration: &[&str]| fails(1, &borrowed(&args(calibration)));
    let value = compress(&[text(&one), text(&two)]);
    assert_eq!(windows(&value["calibration"]), [[2, 2], [2, 2]]);
    let rows = value["validation"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (row, path) in rows.iter().zip([&one, &two]) {
        assert_eq!(
            (&row["text"], &row["windows"], &row["tokens"]),
            (&text(path).into(), &2.into(), &510.into())
        );
        let number = |of: &Value, field: &str| of[field].as_f64().unwrap();
        for figure in [row, &row["fitted"]] {
            assert!(number(figure, "kl") > 0.0 && number(figure, "perplexity") > 1.0);
            assert!(number(figure, "source_perplexity") > 1.0 && number(figure, "same_top") > 0.3);
        }
    }
    let stages = value["stages"].as_array().unwrap();
    let kept: Vec<&Value> = stages.iter().filter(|stage| stage["kept"] == true).collect();
    assert_eq!((kept.len(), &kept[0]["pooling"]), (1, &value["plan"]["pooling"]));
    assert_eq!((&stages[0]["stage"], &stages[1]["stage"]), (&"weights only".into(), &"closed form".into()));
    assert!(stages.iter().all(|stage| stage["kl"].as_f64() >= kept[0]["kl"].as_f64()));
    // Of so small a model what the target's limits cost is said unasked: like against like, before refits.
    let (cost, closed) = (&value["limit_cost"], &stages[1]);
    assert_eq!((&cost["target"], &cost["within"]["kl"]), (&"stock".into(), &closed["kl"]));
    assert_eq!(cost["within"]["loss"], closed["loss"]);
    assert_ne!(cost["plan_without"]["layers"], value["plan"]["layers"]);
    let number = |of: &Value| of.as_f64().unwrap();
    let apart = number(&cost["within"]["loss"]) - number(&cost["without"]["loss"]);
    assert_eq!(number(&cost["loss"]), apart);

    let shown = done(&borrowed(&args(&[text(&one), text(&two)])));
    let tokens = "4 windows fit (1024 tokens, 8.0 for each input dimension), 4 validate";
    says(
        &shown,
        &[
            tokens,
            "calibration.txt: 2 fit, 2 validate",
            "on text that fitted nothing",
            "KL to source",
            "what the limits of stock cost",
        ],
    );
    says(&shown, &["weights only", "closed form", "(kept)", "windows would do (--calibration-windows"]);

    // Shares; a file of that very name has none.
    let three = format!("{}:3", text(&one));
    let shares = compress(&[&three, text(&two)]);
    assert_eq!(windows(&shares["calibration"]), [[3, 3], [1, 1]]);
    fs::copy(&two, &three).unwrap();
    let named = compress(&[&three, text(&one)]);
    assert_eq!(windows(&named["calibration"]), [[2, 2], [2, 2]]);
    says(&refused(&[&format!("{}:x", text(&one))]), &["calibration.txt:x", "cannot read"]);
    says(&refused(&[text(&one), text(&root.path().join("no"))]), &["no", "cannot read"]);
    let short = root.path().join("short");
    fs::write(&short, "Few words.").unwrap();
    says(&refused(&[text(&one), text(&short)]), &["short", "one window takes 256"]);
}

/// Moments of several texts are the calibration that the texts are, in their order.
#[test]
fn moments_of_several_texts_are_their_calibration() {
    let (root, model, [one, two]) = desk();
    let (model, at) = (text(&model), |name: &str| root.path().join(name));
    let [plan, moments] = [at("plan.json"), at("moments.safetensors")];
    let calibration = ["--calibration", text(&one), text(&two), "--calibration-windows", "8"];
    let search =
        ["search", model, "--kv", "0.5", "--pooler", "low-rank", "--refit", "none", "--out", text(&plan)];
    let found = json(&[&search[..], &calibration].concat());
    assert_eq!(windows(&found["calibration"]), [[2, 2], [2, 2]]);
    let measured = json(&[
        "calibrate",
        model,
        "--windows",
        "8",
        "--out",
        text(&moments),
        "--text",
        text(&one),
        text(&two),
    ]);
    assert_eq!((&measured["tokens"], windows(&measured)), (&1024.into(), vec![[2, 2], [2, 2]]));
    let convert = |calibration: &[&str]| {
        let out = at("out");
        let args = ["convert", model, "--plan", text(&plan), "--out", text(&out), "--force"];
        owned(&[&args[..], calibration].concat())
    };
    let refused = |args: Vec<String>| fails(2, &borrowed(&args));
    let weights = |args: Vec<String>| {
        json(&borrowed(&args));
        fs::read(at("out").join("model.safetensors")).unwrap()
    };
    assert!(weights(convert(&["--calibration", text(&moments)])) == weights(convert(&calibration)));
    let swapped = ["--calibration", text(&two), text(&one), "--calibration-windows", "8"];
    says(&refused(convert(&swapped)), &["plan.json", "in their order"]);
    let among = ["--calibration", text(&moments), text(&one)];
    says(&refused(convert(&among)), &["moments.safetensors", "stand alone"]);
}

#[test]
fn text_that_is_too_little_is_named() {
    let (root, model, [one, _]) = desk();
    let (model, [moments, out]) = (text(&model), ["moments", "out"].map(|name| root.path().join(name)));
    let ids = |name: &str, ids: &[u16]| -> PathBuf {
        let path = root.path().join(name);
        fs::write(&path, ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
        path
    };
    let window: Vec<u16> = (0..256).map(|t| t * t % 1000).collect();
    let drum = ids("drum.ids", &window.repeat(30));
    let calibrate =
        |ids: &Path| ["calibrate", model, "--out", text(&moments), "--ids", text(ids)].map(str::to_string);
    let refused = fails(1, &borrowed(&calibrate(&drum)));
    says(&refused, &["drum.ids", "of 30 windows read 1 is new"]);
    let others: Vec<u16> = (0..512).map(|t: u16| t * 7 % 1000).collect();
    let half = ids("half.ids", &[window.repeat(6), others].concat());
    says(&done(&borrowed(&calibrate(&half))), &["half.ids", "of 8 windows read 3 are new"]);

    // One window chooses nothing, and no figure pretends that it does.
    let whole =
        ["compress", model, "--kv", "0.5", "--out", text(&out), "--force", "--calibration", text(&one)];
    let single = [&whole[..], &["--calibration-windows", "1"]].concat();
    let value = json(&single);
    assert_eq!((&value["validation"], &value["stages"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    says(&done(&single), &["calibration.txt has one window", "chooses nothing", "qcqa eval"]);
    assert_eq!(value["limit_cost"], Value::Null);
    let asked = fails(2, &[&single[..], &["--limit-cost"]].concat());
    says(&asked, &["--limit-cost", "fitted nothing", "--calibration TEXT"]);
}

/// A figure on text that fitted is not passed off as one on other text.
#[test]
fn evaluating_on_the_calibration_is_said() {
    let (_root, model, [one, two]) = desk();
    let calibration = ["--calibration", text(&one), "--calibration-windows", "8"];
    let note = |words: &Path| {
        let args = ["compare", text(&model), "--kv", "0.5", "--method", "gqa", "--text", text(words)];
        json(&[&args[..], &calibration].concat())["note"].clone()
    };
    says(note(&one).as_str().unwrap(), &["8 of", "fitted or chose"]);
    assert_eq!(note(&two), Value::Null);
}

/// Where no text is at hand, the model writes one; a plan knows its seed.
#[test]
fn a_model_calibrates_itself() {
    let (root, model, _) = desk();
    let (model, out) = (text(&model), root.path().join("half"));
    let plan = root.path().join("plan.json");
    let own = ["--calibration", "self", "--calibration-windows", "16"];
    let base = ["compress", model, "--kv", "0.5", "--out", text(&out), "--seed", "5"];
    let value = json(&[&base[..], &own].concat());
    assert_eq!(value["calibration"]["texts"][0]["text"], "self");
    says(&value["calibration"]["notes"].to_string(), &["no substitute for text"]);
    fs::write(&plan, value["plan"].to_string()).unwrap();
    let again = root.path().join("again");
    json(&[&["convert", model, "--plan", text(&plan), "--out", text(&again)][..], &own].concat());
    let weights = |path: &Path| fs::read(path.join("model.safetensors")).unwrap();
    assert!(weights(&out) == weights(&again));
    // A file of that name is ./self.
    let missing = [&base[..], &["--force", "--calibration", "./self"]].concat();
    says(&fails(1, &missing), &["./self", "cannot read"]);
}
