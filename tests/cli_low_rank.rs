//! Low-rank sharing as its users meet it: one command, two steps, and what belongs together.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use command::{done, fails, json, text};
use models::{novels, says, snapshot};
use serde_json::Value;
use tempfile::TempDir;

/// Some windows of the calibration text, moments of sixteen of them, and a place for outputs.
struct Desk {
    root: TempDir,
    model: PathBuf,
    words: PathBuf,
    other: PathBuf,
}

impl Desk {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let whole = fs::read_to_string(novels().join("calibration.txt")).unwrap();
        let [words, other] = ["words.txt", "other.txt"].map(|name| root.path().join(name));
        fs::write(&words, whole.chars().take(12_000).collect::<String>()).unwrap();
        fs::write(&other, whole.chars().skip(12_000).take(12_000).collect::<String>()).unwrap();
        Self { root, model: novels(), words, other }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Moments of a text.
    fn moments(&self, words: &Path, name: &str) -> PathBuf {
        let (model, out) = (text(&self.model), self.at(name));
        json(&["calibrate", model, "--text", text(words), "--windows", "16", "--out", text(&out)]);
        out
    }

    /// Searches, for the stock target, by low-rank sharing.
    fn search(&self, plan: &Path, more: &[&str]) -> Value {
        let args = [
            "search",
            text(&self.model),
            "--kv",
            "0.5",
            "--method",
            "low-rank",
            "--target",
            "stock",
            "--out",
        ];
        json(&[&args[..], &[text(plan)], more].concat())
    }
}

const READ: [&str; 2] = ["--calibration-windows", "16"];

fn weights(model: &Path) -> Vec<u8> {
    fs::read(model.join("model.safetensors")).unwrap()
}

#[test]
fn compress_does_everything() {
    let desk = Desk::new();
    let (model, out) = (text(&desk.model), desk.at("half"));
    let before = snapshot(&desk.model);
    let base = ["compress", model, "--kv", "0.5", "--out", text(&out)];
    let calibrated = [&base[..], &["--calibration", text(&desk.words)], &READ].concat();
    let dry = json(&[&calibrated[..], &["--dry-run"]].concat());
    assert!(!out.exists());
    let value = json(&calibrated);
    assert_eq!(value["plan"], dry["plan"]);
    assert_eq!(snapshot(&desk.model), before, "the source is untouched");
    let (method, pooling) = (&value["plan"]["method"], &value["plan"]["pooling"]);
    assert_eq!((&method["name"], &pooling["pooler"]["name"]), (&"low-rank".into(), &"low-rank".into()));
    assert_eq!((&method["fitness"]["name"], &method["target"]), (&"low-rank".into(), &"stock".into()));
    let names: Vec<_> = method["search"].as_array().unwrap().iter().map(|s| s["name"].clone()).collect();
    assert_eq!((names, &method["chosen_by_loss"]), (vec!["auto".into(), "uniform".into()], &true.into()));
    says(pooling["calibration"].as_str().unwrap(), &["sha256:"]);
    assert_eq!(pooling["refit"], "full");
    assert_eq!(pooling["calibration"], method["calibration"]);
    assert_eq!((&value["wse"], &value["note"]), (&Value::Null, &Value::Null));
    assert_eq!(
        value["error"],
        value["plan"]["layers"].as_array().unwrap().iter().map(|l| l["error"].as_f64().unwrap()).sum::<f64>()
    );
    let bytes = &value["kv_bytes_per_token"];
    assert_eq!(bytes["before"].as_u64().unwrap(), 2 * bytes["after"].as_u64().unwrap());
    let effect = &value["validation"][0];
    assert_eq!((&effect["windows"], &effect["text"]), (&8.into(), &text(&desk.words).into()));
    let number = |field: &str| effect[field].as_f64().unwrap();
    assert!(number("perplexity") > number("source_perplexity"));
    assert!(number("perplexity") < 2.0 * number("source_perplexity"), "mean pooling is at six times");
    assert!(number("kl") > 0.0 && number("same_top") > 0.4);

    // What was written is what was measured.
    let written = json(&["eval", text(&out), "--source", model, "--text", text(&desk.words)]);
    let planned = desk.at("plan.json");
    fs::write(&planned, value["plan"].to_string()).unwrap();
    let given = ["--plan", text(&planned), "--calibration", text(&desk.words)];
    let evaluated = json(&[&["eval", model, "--text", text(&desk.words)], &given[..], &READ].concat());
    let [written, evaluated] = [written, evaluated].map(|v| v["perplexity"].as_f64().unwrap());
    assert!((written - evaluated).abs() < 1e-4 * written);

    let shown = done(&[&calibrated[..], &["--force"]].concat());
    let after = format!("{:.2}", number("perplexity"));
    says(
        &shown,
        &["low-rank: asked", " error |", "that fitted nothing", "before", "after", &after, "KV cache"],
    );
    assert!(!shown.contains("WSE") && !shown.contains("note: without"));
}

#[test]
fn weights_alone_work_and_say_what_is_lost() {
    let desk = Desk::new();
    let (model, out, again) = (text(&desk.model), desk.at("half"), desk.at("again"));
    let value = json(&["compress", model, "--kv", "0.5", "--out", text(&out)]);
    assert_eq!(value["plan"]["pooling"].get("calibration"), None);
    assert_eq!(value.get("validation"), None);
    says(value["note"].as_str().unwrap(), &["--calibration FILE", "36.3", "29.1", "novels-1m"]);
    says(&done(&["compress", model, "--kv", "0.5", "--out", text(&again)]), &["note: without --calibration"]);
    assert_eq!(weights(&out), weights(&again));

    // Such a plan takes no moments; a pooler that uses none has nothing to lose.
    let [plan, never] = ["plan.json", "never"].map(|name| desk.at(name));
    desk.search(&plan, &[]);
    let convert = ["convert", model, "--plan", text(&plan), "--out", text(&never), "--calibration"];
    let refused = fails(2, &[&convert[..], &[text(&desk.words)]].concat());
    says(&refused, &["plan.json", "weights alone", "leave `--calibration` out"]);
    assert!(!never.exists());
    let mean = ["compress", model, "--kv", "0.5", "--pooler", "mean", "--out", text(&out), "--force"];
    assert_eq!(json(&mean)["note"], Value::Null);
}

#[test]
fn a_text_and_its_moments_are_one_calibration() {
    let desk = Desk::new();
    let (model, moments) = (text(&desk.model), desk.moments(&desk.words, "moments.safetensors"));
    let [by_moments, by_text] = ["a.json", "b.json"].map(|name| desk.at(name));
    // Groups by the residual, which both can do: k is the same everywhere.
    let arbitrary = ["--target", "expanded", "--allocation", "exact", "--refit", "none"];
    let search = |plan: &Path, calibration: &Path| {
        let base = ["search", model, "--kv", "0.5", "--method", "low-rank", "--out", text(plan)];
        json(&[&base[..], &arbitrary, &["--calibration", text(calibration)], &READ].concat())
    };
    let (a, b) = (search(&by_moments, &moments), search(&by_text, &desk.words));
    assert_eq!(a["plan"], b["plan"]);
    assert_eq!(fs::read(&by_moments).unwrap(), fs::read(&by_text).unwrap());
    let convert = |plan: &Path, calibration: &Path, name: &str| {
        let out = desk.at(name);
        let base = ["convert", model, "--plan", text(plan), "--target", "expanded", "--out", text(&out)];
        json(&[&base[..], &["--calibration", text(calibration)], &READ].concat());
        weights(&out)
    };
    let one = convert(&by_moments, &moments, "one");
    assert_eq!(one, convert(&by_text, &desk.words, "two"));
    assert_eq!(one, convert(&by_moments, &desk.words, "three"), "a plan made with one takes the other");
}

#[test]
fn another_calibration_is_refused() {
    let desk = Desk::new();
    let (model, plan) = (text(&desk.model), desk.at("plan.json"));
    let value = desk.search(&plan, &[&["--calibration", text(&desk.words)], &READ[..]].concat());
    let expected = value["plan"]["pooling"]["calibration"].as_str().unwrap();
    let out = desk.at("out");
    let convert = ["convert", model, "--plan", text(&plan), "--out", text(&out)];
    let eval = ["eval", model, "--plan", text(&plan), "--text", text(&desk.other)];
    let other = desk.moments(&desk.other, "other.safetensors");
    for command in [&convert[..], &eval[..]] {
        let missing = fails(2, command);
        says(&missing, &["plan.json", expected, "none was given", "--calibration FILE"]);
        for calibration in [&other, &desk.other] {
            let message = fails(2, &[command, &["--calibration", text(calibration)], &READ].concat());
            says(&message, &["plan.json", expected, "was given", "--calibration-windows"]);
            assert_eq!(message.matches("sha256:").count(), 2, "both are named: {message}");
        }
        // The same text, read further.
        fails(2, &[command, &["--calibration", text(&desk.words), "--calibration-windows", "3"]].concat());
    }
    assert!(!out.exists());
    says(&fails(2, &["eval", model, "--calibration", text(&other)]), &["--plan"]);
}

#[test]
fn poolers_and_allocations_can_be_chosen() {
    let desk = Desk::new();
    let (model, plan) = (text(&desk.model), desk.at("plan.json"));
    let calibration = [&["--calibration", text(&desk.words)], &READ[..]].concat();
    let search = |more: &[&str]| {
        let base = ["search", model, "--kv", "0.5", "--force", "--out", text(&plan)];
        json(&[&base[..], more].concat())["plan"].clone()
    };
    // Neighbours or groups by weights, merged otherwise; moments are recorded where they are used.
    for (method, pooler, used) in [
        ("gqa", "low-rank", true),
        ("qcqa-ec", "procrustes", true),
        ("qcqa-ec", "first", false),
        ("low-rank", "mean", true),
    ] {
        let args =
            [&["--method", method, "--pooler", pooler, "--target", "stock"], &calibration[..]].concat();
        let found = search(&args);
        assert_eq!(found["pooling"]["pooler"]["name"], pooler);
        assert_eq!(found["method"].get("calibration").is_some(), used, "{method} {pooler}");
        assert_eq!(found["pooling"].get("calibration").is_some(), !matches!(pooler, "mean" | "first"));
        // The mean needs no calibration, whatever the groups were found with.
        let eval = ["eval", model, "--plan", text(&plan), "--text", text(&desk.other)];
        if matches!(pooler, "mean" | "first") {
            json(&eval);
        }
        json(&[&eval[..], &calibration].concat());
    }
    // A calibration that nobody uses is not passed over in silence.
    let note = |more: &[&str]| {
        let base = ["search", model, "--kv", "0.5", "--force", "--out", text(&plan)];
        json(&[&base[..], more, &calibration].concat())["note"].clone()
    };
    says(
        note(&[]).as_str().unwrap(),
        &["had no part in this plan", "--method low-rank", "--pooler low-rank"],
    );
    assert_eq!(note(&["--pooler", "low-rank"]), Value::Null);
    let bare = search(&[]);
    let named = (&bare["method"]["name"], &bare["pooling"]["pooler"]["name"]);
    assert_eq!(named, (&"qcqa-ec".into(), &"mean".into()));

    let low_rank = |more: &[&str]| search(&[&["--method", "low-rank"], more].concat())["method"].clone();
    let by_text = low_rank(&calibration);
    assert_eq!(
        (&by_text["cost"], &by_text["space"]["cardinality"]),
        (&"measured".into(), &"arbitrary".into())
    );
    assert_eq!(low_rank(&[])["cost"], "energy-share");
    assert_eq!(low_rank(&[])["allocation"]["name"], "uniform", "without a text one k everywhere");
    let stock = low_rank(&[&["--target", "stock"], &calibration[..]].concat());
    assert_eq!(stock["allocation"]["name"], "uniform");
    let measured =
        search(&[&["--method", "qcqa-ac", "--allocation", "sensitivity"], &calibration[..]].concat());
    assert_eq!(measured["method"]["cost"], "measured");
    assert!(measured["method"]["calibration"].is_string());
    let moments = desk.moments(&desk.words, "moments.safetensors");
    for calibration in [&[][..], &["--calibration", text(&moments)]] {
        let args = ["search", model, "--kv", "0.5", "--allocation", "sensitivity", "--out", "never"];
        says(&fails(2, &[&args[..], calibration].concat()), &["--calibration TEXT", "exact"]);
    }
}

/// A pipe gives its bytes once: its first are not lost to finding out what it holds.
#[cfg(unix)]
#[test]
fn pipes_are_read_whole() {
    let desk = Desk::new();
    let moments = desk.moments(&desk.words, "moments.safetensors");
    let plan_of = |calibration: &Path, name: &str| {
        desk.search(&desk.at(name), &[&["--calibration", text(calibration)], &READ[..]].concat());
        fs::read(desk.at(name)).unwrap()
    };
    for (i, file) in [&desk.words, &moments].into_iter().enumerate() {
        let expected = plan_of(file, &format!("file{i}.json"));
        let plan = desk.at(&format!("pipe{i}.json"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_qcqa"))
            .args(["search", text(&desk.model), "--kv", "0.5", "--method", "low-rank", "--target", "stock"])
            .args(["--out", text(&plan), "--calibration", "/dev/stdin"])
            .args(READ)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&fs::read(file).unwrap()).unwrap();
        assert!(child.wait().unwrap().success());
        assert!(fs::read(&plan).unwrap() == expected, "{}", file.display());
    }
}

/// What is no moment names file and layer, wherever it is met.
#[test]
fn moments_that_are_none_are_named() {
    let desk = Desk::new();
    let (model, out, plan) = (text(&desk.model), desk.at("out"), desk.at("plan.json"));
    let moments = desk.moments(&desk.words, "moments.safetensors");
    let calibration = ["--calibration", text(&moments)];
    desk.search(&plan, &calibration);
    // Symmetric, with a negative eigenvalue.
    let mut bytes = fs::read(&moments).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let layer = tensors.tensor("layers.2").unwrap();
    let (at, width) = (layer.data().as_ptr() as usize - bytes.as_ptr() as usize, layer.shape()[1]);
    for i in [1, width] {
        bytes[at + 8 * i..at + 8 * i + 8].copy_from_slice(&1e3f64.to_le_bytes());
    }
    fs::write(&moments, bytes).unwrap();
    let kv = ["--kv", "0.5"];
    for command in [
        &[&["search", model, "--method", "low-rank", "--out", "never"], &kv[..]].concat(),
        &[&["compress", model, "--method", "gqa", "--pooler", "low-rank", "--out", text(&out)], &kv[..]]
            .concat(),
        &[&["compare", model, "--method", "low-rank"], &kv[..]].concat(),
        &vec!["convert", model, "--plan", text(&plan), "--out", text(&out)],
        &vec!["eval", model, "--plan", text(&plan), "--text", text(&desk.other)],
    ] {
        let message = fails(1, &[&command[..], &calibration].concat());
        says(&message, &[text(&moments), "layer 2", "no negative eigenvalue", "qcqa calibrate"]);
        assert!(!message.contains("weight"), "{message}");
    }
    assert!(!out.exists());
}

#[test]
fn compare_has_a_line_for_low_rank() {
    let desk = Desk::new();
    let (model, plot) = (text(&desk.model), desk.at("plot.svg"));
    let calibration = [&["--calibration", text(&desk.words)], &READ[..]].concat();
    let args = ["compare", model, "--kv", "0.5,0.25", "--text", text(&desk.other), "--plot", text(&plot)];
    let value = json(&[&args[..], &calibration].concat());
    let lines = value["lines"].as_array().unwrap();
    let perplexities = |wanted: bool| {
        let of = lines.iter().filter(move |l| (l["method"] == "low-rank") == wanted && l["asked"] == 0.5);
        of.map(|l| l["perplexity"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let [low_rank] = perplexities(true)[..] else { panic!("one line for each budget") };
    assert!(perplexities(false).iter().all(|p| *p > 2.0 * low_rank));
    let line = lines.iter().find(|l| l["method"] == "low-rank").unwrap();
    assert_eq!((&line["wse"], &line["allocation"]), (&Value::Null, &"sensitivity".into()));
    assert!(line["error"].as_f64() > Some(0.0) && line["share"].as_f64() < Some(0.2));
    assert!(lines.iter().all(|l| (l["refit"] == "full") == (l["method"] == "low-rank")));
    says(&fs::read_to_string(&plot).unwrap(), &["low-rank (sensitivity) + full refit", "gqa"]);

    // Refits as asked for; without a text to show them on, none.
    let one = ["compare", model, "--kv", "0.5", "--method", "low-rank,gqa"];
    let text_of = ["--text", text(&desk.other)];
    let refit = |more: &[&str]| json(&[&one[..], more].concat())["lines"][1].clone();
    let none = refit(&[&text_of[..], &calibration, &["--refit", "none"]].concat());
    assert_eq!((&none["method"], &none["refit"]), (&"low-rank".into(), &Value::Null));
    assert!(none["perplexity"].as_f64() > Some(low_rank), "the refit helped");
    assert_eq!(refit(&calibration)["refit"], Value::Null);
    let full = [&one[..], &["--refit", "full"]].concat();
    says(&fails(2, &[&full[..], &calibration].concat()), &["--text FILE"]);
    says(&fails(2, &[&full[..], &text_of].concat()), &["--calibration TEXT"]);
    let mean = ["compare", model, "--kv", "0.5", "--method", "gqa", "--refit", "full"];
    says(&fails(2, &[&mean[..], &text_of, &calibration].concat()), &["--pooler low-rank"]);

    // By name, from weights alone; a bare comparison has no such line.
    let named = json(&["compare", model, "--kv", "0.5", "--method", "gqa,low-rank"]);
    let methods: Vec<_> = named["lines"].as_array().unwrap().iter().map(|l| l["method"].clone()).collect();
    assert_eq!(methods, ["gqa", "low-rank"]);
    assert!(!done(&["compare", model, "--kv", "0.5"]).contains("low-rank"));
}

#[test]
fn wrong_calibrations_are_named() {
    let desk = Desk::new();
    let (model, out) = (text(&desk.model), desk.at("out"));
    let bad = desk.at("bad");
    let refused = |calibration: &Path| {
        let args =
            ["compress", model, "--kv", "0.5", "--out", text(&out), "--calibration", text(calibration)];
        fails(1, &args)
    };
    says(&refused(&desk.at("missing")), &["missing", "cannot read"]);
    says(&refused(desk.root.path()), &["cannot read", text(desk.root.path())]);
    fs::write(&bad, [b"text ".as_slice(), &[0xff, 0xfe]].concat()).unwrap();
    says(&refused(&bad), &["bad", "not UTF-8 at byte 5"]);
    fs::write(&bad, "too short").unwrap();
    says(&refused(&bad), &["bad", "one window takes 256"]);
    fs::write(&bad, "").unwrap();
    says(&refused(&bad), &["bad", "0 tokens"]);

    // Moments: of another model, cut short, and a header that promises more than there is.
    let moments = desk.moments(&desk.words, "moments.safetensors");
    let whole = fs::read(&moments).unwrap();
    fs::write(&bad, &whole[..whole.len() / 2]).unwrap();
    says(&refused(&bad), &["bad", "not a whole safetensors file", "qcqa calibrate"]);
    fs::write(&bad, [&99_000_000u64.to_le_bytes()[..], b"{\"layers.0\":"].concat()).unwrap();
    says(&refused(&bad), &["bad", "not a whole safetensors file"]);
    let mut stranger = whole;
    let fingerprint = b"\"fingerprint\":\"sha256:";
    let at = stranger.windows(fingerprint.len()).position(|w| w == fingerprint).unwrap() + fingerprint.len();
    stranger[at] = if stranger[at] == b'0' { b'1' } else { b'0' };
    fs::write(&bad, stranger).unwrap();
    says(&refused(&bad), &["bad", "moments are of another model", "fingerprint"]);
    assert!(!out.exists());
    let zero = ["compress", model, "--kv", "0.5", "--out", text(&out), "--calibration-windows", "0"];
    says(&fails(2, &zero), &["--calibration-windows"]);

    // What is already there is found before the text is read.
    fs::write(&out, "mine").unwrap();
    let args = ["compress", model, "--kv", "0.5", "--out", text(&out), "--calibration", text(&bad)];
    says(&fails(1, &args), &["out"]);
    assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
}
