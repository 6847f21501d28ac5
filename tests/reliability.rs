//! Kinds of input that went wrong once, by the numbers of docs/reliability.md.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use command::{done, fails, json, text};
use fs4::fs_std::FileExt;
use models::{novels, says, snapshot};
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::evaluate;
use qcqa::heads::HeadSource;
use qcqa::plan::read_plan;
use qcqa::runtime::Model;
use qcqa::text::{Vocabulary, Windows, read_text};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of the model in the tree, that may be lost.
fn copied() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(novels()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    (root, model)
}

/// Fails with and without `--force`, says this, and leaves everything as it was.
#[track_caller]
fn refused(root: &Path, args: &[&str], parts: &[&str]) {
    let before = snapshot(root);
    for force in [&[][..], &["--force"]] {
        says(&fails(1, &[args, force].concat()), parts);
        assert!(snapshot(root) == before, "{args:?} {force:?}");
    }
}

#[test]
fn kind_1_a_file_that_is_there_is_replaced_only_when_that_is_asked_for_and_it_is_ours() {
    let (root, model) = copied();
    let (words, plot) = (model.join("evaluation.txt"), root.path().join("plot.svg"));
    let plan = root.path().join("plan.json");
    let short = root.path().join("short.txt");
    fs::write(&short, &fs::read_to_string(&words).unwrap()[..20_000]).unwrap();
    let compare = ["compare", text(&model), "--kv", "0.5", "--method", "gqa", "--text", text(&short)];
    let compare = [&compare[..], &["--plot", text(&plot)]].concat();
    let search = ["search", text(&model), "--kv", "0.5", "--out", text(&plan)];
    for (args, out) in [(&compare[..], &plot), (&search[..], &plan)] {
        fs::write(out, "<svg>somebody's</svg> {}").unwrap();
        says(&fails(1, args), &[text(out), "exists", "--force"]);
        says(&fails(1, &[args, &["--force"]].concat()), &[text(out), "that qcqa wrote", "move it away"]);
        assert_eq!(fs::read_to_string(out).unwrap(), "<svg>somebody's</svg> {}");
        fs::remove_file(out).unwrap();
        done(args);
        says(&fails(1, args), &[text(out), "exists", "--force"]);
        done(&[args, &["--force"]].concat());
    }
}

#[test]
fn kind_2_no_output_is_an_input() {
    let (root, model) = copied();
    let weights = model.join("model.safetensors");
    let words = root.path().join("words.txt");
    fs::copy(model.join("calibration.txt"), &words).unwrap();
    let (plan, ours) = (root.path().join("plan.json"), root.path().join("ours"));
    let kv = ["--kv", "0.5", "--method", "qcqa-ec"];
    done(&[&["search", text(&model), "--out", text(&plan), "--target", "stock"], &kv[..]].concat());
    done(&["convert", text(&model), "--plan", text(&plan), "--out", text(&ours)]);
    let new = ours.join("new");
    let apart = ["must not lie within one another"];
    let search = [&["search", text(&model)], &kv[..]].concat();
    let compress = [&["compress", text(&model)], &kv[..]].concat();
    let texts = ["--calibration", text(&words)];
    let calibrate = ["calibrate", text(&model), "--text", text(&words)];
    let compare = ["compare", text(&model), "--kv", "0.5", "--text", text(&words)];
    let convert = ["convert", text(&model), "--plan", text(&plan)];
    let distill =
        ["distill", text(&ours), "--source", text(&model), "--for", "1k", "--calibration", text(&words)];
    for (args, outs) in [
        (&search[..], vec![&weights, &model]),
        (&[&search[..], &texts].concat(), vec![&words]),
        (&calibrate, vec![&words, &weights]),
        (&convert, vec![&plan, &model]),
        (&compress, vec![&model]),
        (&[&compress[..], &texts].concat(), vec![&words]),
        (&distill, vec![&ours, &model, &words, &new]),
    ] {
        for out in outs {
            refused(root.path(), &[args, &["--out", text(out)]].concat(), &apart);
        }
    }
    for out in [&words, &weights] {
        refused(root.path(), &[&compare[..], &["--plot", text(out)]].concat(), &apart);
    }
    // Through a link it is the same file.
    #[cfg(unix)]
    {
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&model, &link).unwrap();
        let through = link.join("moments");
        says(&fails(1, &[&calibrate[..], &["--out", text(&through)]].concat()), &apart);
    }
}

#[test]
fn kind_3_force_replaces_only_what_a_conversion_wrote() {
    let (root, model) = copied();
    let (foreign, ours) = (root.path().join("foreign"), root.path().join("ours"));
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("config.json"), "{}").unwrap();
    fs::write(foreign.join("thesis.tex"), "years").unwrap();
    let compress = ["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ec", "--force", "--out"];
    let before = snapshot(&foreign);
    says(&fails(1, &[&compress[..], &[text(&foreign)]].concat()), &["foreign", "no model that qcqa wrote"]);
    assert!(snapshot(&foreign) == before);
    // Also where another program calls its file as we do.
    fs::write(foreign.join("qcqa.json"), "{\"files\": [\"thesis.tex\"]}").unwrap();
    says(&fails(1, &[&compress[..], &[text(&foreign)]].concat()), &["foreign", "no model that qcqa wrote"]);

    done(&[&compress[..], &[text(&ours)]].concat());
    fs::create_dir(ours.join("notes")).unwrap();
    fs::write(ours.join("notes/results.csv"), "1,2").unwrap();
    says(&fails(1, &[&compress[..], &[text(&ours)]].concat()), &["holds notes/results.csv", "move it away"]);
    fs::remove_dir_all(ours.join("notes")).unwrap();
    done(&[&compress[..], &[text(&ours)]].concat());
}

#[test]
fn kind_4_what_a_killed_run_left_is_found_and_removed() {
    let (root, model) = copied();
    let out = root.path().join("out");
    let left = |name: &str, label: &str| {
        let directory = root.path().join(name);
        fs::create_dir_all(directory.join("model")).unwrap();
        fs::write(directory.join("lock"), label).unwrap();
        fs::write(directory.join("model/model.safetensors"), "half").unwrap();
        directory
    };
    let (dead, other) = (left(".qcqa.dead", "New out"), left(".qcqa.other", "New another"));
    let alive = left(".qcqa.alive", "New out");
    let held = File::open(alive.join("lock")).unwrap();
    held.lock_exclusive().unwrap();
    let compress = ["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ec", "--out", text(&out)];
    done(&[&compress[..], &["--dry-run"]].concat());
    assert!(dead.exists(), "a dry run changes nothing");
    says(&done(&compress), &["removed", text(&dead), "a killed run had left"]);
    assert_eq!([&dead, &other, &alive].map(|path| path.exists()), [false, true, true]);

    // Killed between moving the old model out and the new one in: the old one comes back before it is replaced.
    let aside = root.path().join(".qcqa.aside");
    fs::create_dir(&aside).unwrap();
    fs::write(aside.join("lock"), "Old out").unwrap();
    fs::rename(&out, aside.join("model")).unwrap();
    says(&done(&[&compress[..], &["--force"]].concat()), &["removed", text(&aside)]);
    assert!(out.join("config.json").is_file() && !aside.exists());
}

#[cfg(target_os = "linux")]
#[test]
fn kind_14_places_that_cannot_be_written_are_found_first() {
    let (root, model) = copied();
    let long = root.path().join("n".repeat(249));
    let compress = ["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ec", "--out"];
    done(&[&compress[..], &[text(&long)]].concat());
    assert!(long.join("config.json").is_file());

    let search = ["search", text(&model), "--kv", "0.5", "--out"];
    let calibrate = ["calibrate", text(&model), "--text", text(&model), "--out"];
    let plot = ["compare", text(&model), "--kv", "0.5", "--text", text(&model), "--plot"];
    let missing = root.path().join("missing/file");
    for args in [&compress[..], &search, &calibrate, &plot] {
        let dry = [&["--dry-run"][..], &[]][usize::from(args[0] == "compare")];
        says(&fails(1, &[args, &["/proc/qcqa-out"], dry].concat()), &["/proc/qcqa-out", "cannot write"]);
        if args[0] != "compress" {
            // The text is a directory: the place is looked at before it.
            says(&fails(1, &[args, &[text(&missing)], dry].concat()), &[text(&missing), "cannot write"]);
            says(&fails(1, &[args, &[text(root.path())], dry].concat()), &["within one another"]);
        }
    }
}

/// The configuration of a model, changed.
fn configured(model: &Path, change: impl FnOnce(&mut Value)) {
    let file = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut config);
    fs::write(file, config.to_string()).unwrap();
}

/// The weights of a model, with further tensors (BF16) made of those that there are.
fn with_tensors(model: &Path, more: &[(String, Vec<usize>, Vec<f32>)]) {
    let mut tensors = models::stored(&model.join("model.safetensors"));
    for (name, shape, numbers) in more {
        let bytes = models::encode(safetensors::Dtype::BF16, numbers);
        tensors.insert(name.clone(), (safetensors::Dtype::BF16, shape.clone(), bytes));
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(model.join("model.safetensors"), bytes).unwrap();
}

/// The mean loss of the first 256 tokens of the evaluation text, and what is noted of the model.
fn loss(model: &Path) -> (f64, Vec<String>) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let ids = Vocabulary::open(&checkpoint).unwrap();
    let ids = ids.encode(&read_text(&model.join("evaluation.txt")).unwrap()).unwrap();
    let windows = Windows::new(ids[..256].to_vec(), 256).unwrap();
    let found = evaluate(&Model::load(&checkpoint).unwrap(), &windows, Run::new(0)).unwrap().loss;
    (found, checkpoint.architecture().notes.clone())
}

/// The loss is that of transformers 5.24.0 (torch 2.15.0, f32), and these words are in the notes; without words there are none.
#[track_caller]
fn as_in_transformers(model: &Path, expected: f64, noted: &[&str]) {
    let (found, notes) = loss(model);
    assert!((found - expected).abs() < 1e-5, "{found} instead of {expected}: {notes:?}");
    assert_eq!(notes.is_empty(), noted.is_empty(), "{notes:?}");
    says(&notes.join("; "), noted);
}

const PLAIN: f64 = 2.9909991214474334;

#[test]
fn kind_5_rotary_bases_in_several_places_are_taken_as_transformers_takes_them() {
    const BASE_3000: f64 = 4.004951802221139;
    let parameters = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    let cases: [(Value, f64, &[&str]); 6] = [
        (json!({}), PLAIN, &[]),
        (
            json!({ "rope_theta": 500000.0, "rope_parameters": parameters(10000.0) }),
            PLAIN,
            &["`rope_theta` is 500000.0", "10000.0 in `rope_parameters`"],
        ),
        (json!({ "rope_scaling": parameters(3000.0) }), BASE_3000, &[]),
        (
            json!({ "rope_theta": 7.0, "rope_scaling": {}, "rope_parameters": parameters(3000.0) }),
            BASE_3000,
            &["3000.0 in `rope_parameters`"],
        ),
        (json!({ "rope_parameters": parameters(100.0), "rope_scaling": parameters(3000.0) }), BASE_3000, &[]),
        (json!({ "rope_theta": 3000.0, "rope_parameters": { "rope_type": "default" } }), BASE_3000, &[]),
    ];
    for (keys, expected, noted) in cases {
        let (_root, model) = copied();
        configured(&model, |config| {
            config.as_object_mut().unwrap().remove("rope_parameters");
            config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        });
        as_in_transformers(&model, expected, noted);
    }
}

#[test]
fn kind_6_a_stored_output_embedding_counts_where_it_is_another() {
    for (factor, expected, noted) in
        [(1.0, PLAIN, &[][..]), (1.5, 3.316391910331728, &["lm_head.weight", "tie_word"])]
    {
        let (root, model) = copied();
        let embedding = Checkpoint::open(&model).unwrap().tensor("model.embed_tokens.weight").unwrap();
        let numbers = embedding.iter().map(|v| v * factor).collect();
        with_tensors(&model, &[("lm_head.weight".to_string(), embedding.shape().to_vec(), numbers)]);
        as_in_transformers(&model, expected, noted);
        // What is written of it says the same.
        let out = root.path().join("out");
        let text =
            done(&["compress", text(&model), "--kv", "1.0", "--method", "qcqa-ec", "--out", text(&out)]);
        noted.iter().for_each(|word| says(&text, &["note: ", word]));
        as_in_transformers(&out, expected, noted);
    }
}

#[test]
fn kind_7_biases_count_where_the_configuration_has_them() {
    let (root, model) = copied();
    let mut biases = Vec::new();
    for i in 0..4 {
        for (part, size) in [("k", 128), ("v", 128), ("q", 128), ("o", 128)] {
            biases.push((
                format!("model.layers.{i}.self_attn.{part}_proj.bias"),
                vec![size],
                vec![0.25; size],
            ));
        }
        for (part, size) in [("gate", 352), ("up", 352), ("down", 128)] {
            biases.push((format!("model.layers.{i}.mlp.{part}_proj.bias"), vec![size], vec![0.25; size]));
        }
    }
    with_tensors(&model, &biases);
    as_in_transformers(&model, PLAIN, &["bias is stored", "not used"]);
    let value = json(&["inspect", text(&model)]);
    assert_eq!((value["bias"].as_bool(), value["notes"].as_array().unwrap().len()), (Some(false), 1));
    // They are not dropped from the copy.
    let out = root.path().join("out");
    done(&["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ec", "--out", text(&out)]);
    assert!(models::stored(&out.join("model.safetensors")).contains_key(&biases[0].0));
    configured(&model, |config| {
        (config["attention_bias"], config["mlp_bias"]) = (json!(true), json!(true));
    });
    as_in_transformers(&model, 9.70961321796766, &[]);
}

#[test]
fn kind_10_a_byte_order_mark_is_no_text() {
    let (root, model) = copied();
    let marked = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, [b"\xef\xbb\xbf", &bytes[..]].concat()).unwrap();
    };
    let plan = root.path().join("plan.json");
    done(&["search", text(&model), "--kv", "0.5", "--out", text(&plan)]);
    let before = read_plan(&plan).unwrap();
    let choices = root.path().join("choices.jsonl");
    fs::write(&choices, "{\"query\": \"It was\", \"choices\": [\" a dark\", \" zebra\"], \"gold\": 0}\n")
        .unwrap();
    for path in [&plan, &choices, &model.join("config.json"), &model.join("evaluation.txt")] {
        marked(path);
    }
    assert_eq!(read_plan(&plan).unwrap(), before);
    as_in_transformers(&model, PLAIN, &[]);
    let value = json(&["eval", text(&model), "--choices", text(&choices)]);
    assert_eq!(value["choices"]["items"], 1, "{value}");
}
