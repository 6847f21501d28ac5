//! Kinds of input that went wrong once, by the numbers of docs/reliability.md.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs::{self, File};
use std::path::Path;

use command::{done, fails, json, text};
use fs4::fs_std::FileExt;
use models::{configured, copied, novels, says, snapshot, with_tensors};
use serde_json::{Value, json};

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

/// Places where nobody can write: below /proc, and, but for root, in a directory without the permission.
#[cfg(unix)]
fn read_only(root: &Path) -> Vec<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let mut places = Vec::new();
    if Path::new("/proc/self").exists() {
        places.push("/proc".into());
    }
    let closed = root.join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    if File::create_new(closed.join("probe")).is_ok() {
        println!("skipped: a directory without the permission to write, which root has everywhere");
    } else {
        places.push(closed);
    }
    places
}

#[cfg(unix)]
#[test]
fn kind_14_every_command_that_writes_finds_a_read_only_place_first() {
    let (root, model) = copied();
    let (plan, half) = (root.path().join("plan.json"), root.path().join("half"));
    let words = root.path().join("words");
    fs::create_dir(&words).unwrap();
    let kv = ["--kv", "0.5", "--method", "gqa"];
    done(&[&["search", text(&model), "--out", text(&plan)], &kv[..]].concat());
    done(&["convert", text(&model), "--plan", text(&plan), "--out", text(&half)]);
    // A text that is a directory would be found as soon as it is read.
    let texts = ["--calibration", text(&words)];
    let distill = ["distill", text(&half), "--source", text(&model), "--for", "2k"];
    let commands = [
        ([&["search", text(&model)], &kv[..], &texts].concat(), "--out"),
        (vec!["calibrate", text(&model), "--text", text(&words)], "--out"),
        ([&["compare", text(&model), "--text", text(&words)], &kv[..]].concat(), "--plot"),
        (vec!["convert", text(&model), "--plan", text(&plan)], "--out"),
        ([&["compress", text(&model)], &kv[..], &texts].concat(), "--out"),
        ([&["compress", text(&model), "--distill", "2k"], &kv[..], &texts].concat(), "--out"),
        ([&distill[..], &texts].concat(), "--out"),
    ];
    for place in read_only(root.path()) {
        let out = place.join("qcqa-out");
        for (args, flag) in &commands {
            for more in [&[][..], &["--force"], &["--dry-run"]] {
                if args[0] == "compare" && more == ["--dry-run"] {
                    continue;
                }
                let message = fails(1, &[&args[..], &[flag, text(&out)], more].concat());
                says(&message, &[text(&out), "cannot write"]);
            }
        }
    }
}

#[test]
fn kind_12_tensors_of_heads_that_are_unknown_are_refused_by_name() {
    for name in ["sinks", "k_proj.weight_scale", "q_proj.lora_A.weight", "inner.weight"] {
        let (root, model) = copied();
        let tensor = format!("model.layers.2.self_attn.{name}");
        with_tensors(&model, &[(tensor.clone(), vec![8], vec![0.5; 8])]);
        let out = root.path().join("out");
        let message = fails(1, &["compress", text(&model), "--kv", "0.5", "--out", text(&out)]);
        says(&message, &["config.json", &tensor, "dequantise"]);
        assert!(!out.exists());
    }
}

#[test]
fn kind_13_files_that_would_be_stale_are_left_and_listed() {
    let (root, model) = copied();
    let stale = [
        "params.json",
        "weights.npz",
        "old/model.pkl",
        "adapter_config.json",
        "net.mlmodel",
        // Whatever safetensors are not the model's own, and what belongs to them.
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "old/model.safetensors",
        "model.safetensors.incomplete",
        "quant_config.json",
        "optimizer.pt",
    ];
    fs::create_dir(model.join("old")).unwrap();
    for name in stale {
        fs::write(model.join(name), "{\"n_kv_heads\": 8}").unwrap();
    }
    fs::write(model.join("notes.md"), "of the model").unwrap();
    let out = root.path().join("out");
    let compress = ["compress", text(&model), "--kv", "0.5", "--method", "qcqa-ec", "--out", text(&out)];
    let value = json(&[&compress[..], &["--dry-run"]].concat());
    let mut listed: Vec<&str> =
        value["output"]["left_out"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let mut expected = stale.to_vec();
    listed.sort_unstable();
    expected.sort_unstable();
    assert_eq!(listed, expected);
    says(&done(&compress), &["not copied", "weights.npz"]);
    assert!(stale.iter().all(|name| !out.join(name).exists()) && out.join("notes.md").is_file());
}

#[test]
fn kind_15_wrong_arguments_are_code_two_and_json_where_that_is_asked_for() {
    let model = novels();
    for flag in ["--max-groups", "--max-group-size", "--population", "--generations"] {
        let args = ["search", text(&model), "--kv", "0.5", flag, "0", "--out", "never.json"];
        says(&fails(2, &args), &[flag, "0"]);
    }
    let output = command::qcqa(&["search", text(&model), "--kv", "2", "--out", "never.json", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    says(value["error"].as_str().unwrap(), &["--kv", "at most 1"]);
    assert!(command::qcqa(&["--help"]).status.success());
}

#[test]
fn kind_11_descriptions_of_single_layers_are_refused_until_they_are_understood() {
    for key in ["per_layer_config", "num_key_value_heads_per_layer", "block_configs"] {
        let (_root, model) = copied();
        configured(&model, |config| config[key] = json!([8, 8, 8, 8]));
        says(&fails(1, &["inspect", text(&model)]), &["config.json", key, "not supported"]);
    }
}

#[test]
fn kind_16_plans_that_contradict_themselves_are_refused() {
    let (root, model) = copied();
    let (plan, out) = (root.path().join("plan.json"), root.path().join("out"));
    done(&["search", text(&model), "--kv", "0.5", "--target", "stock", "--out", text(&plan)]);
    let stored: Value = serde_json::from_slice(&fs::read(&plan).unwrap()).unwrap();
    let changes: [(&str, Value, &[&str]); 5] = [
        ("/budget/reached", json!(0.9), &["0.9 of the KV cache is reached", "0.5"]),
        ("/budget/asked", json!(7.0), &["asks for 7"]),
        ("/budget/asked", json!(0.25), &["needs 0.5", "0.25 was allowed"]),
        ("/layers/1/lower_bound", json!(1e9), &["layer 1", "a lower bound of 1000000000"]),
        ("/layers/0/lower_bound", json!(-1.0), &["layer 0", "a lower bound of -1"]),
    ];
    let names: [(&str, Value, &[&str]); 9] = [
        ("/method/name", json!(""), &["method has no name"]),
        ("/method/target", json!(" "), &["target has no name"]),
        ("/method/search", json!([]), &["`search` is empty"]),
        ("/method/search/0/name", json!(""), &["search has no name"]),
        ("/method/allocation/name", json!(""), &["allocation has no name"]),
        // A name of ours with what is not.
        ("/method/fitness", json!({"name": "wse", "power": 3}), &["fitness", "power"]),
        ("/method/search", json!([{"name": "exact", "depth": 3}]), &["search", "depth"]),
        ("/method/name", json!("mqa"), &["method is mqa", "layer 0", "[2, 2, 2, 2]"]),
        ("/pooling/pooler/name", json!("median"), &["no pooler \"median\"", "known are mean"]),
    ];
    let records: [(&str, Value, &[&str]); 3] = [
        ("/method/space/max_groups", json!(3), &["searched otherwise", "at most 3"]),
        ("/method/space/max_group_size", json!(1), &["searched otherwise", "of at most 1 heads"]),
        ("/method/fixed", json!({"2": 3}), &["searched otherwise", "layer 2 has 4 groups", "3 were fixed"]),
    ];
    for (place, value, parts) in changes.into_iter().chain(names).chain(records) {
        let mut changed = stored.clone();
        match changed.pointer_mut(place) {
            Some(found) => *found = value,
            None => changed["method"]["fixed"] = value,
        }
        fs::write(&plan, changed.to_string()).unwrap();
        let code = if place.starts_with("/pooling") { 2 } else { 1 };
        let message = fails(code, &["convert", text(&model), "--plan", text(&plan), "--out", text(&out)]);
        says(&message, &[&[text(&plan)][..], parts].concat());
    }
    // Names that are not ours are those of others' plugins, whose plans are obeyed as far as groups and pooler go.
    let mut others = stored;
    others["method"]["name"] = json!("theirs");
    others["method"]["target"] = json!("their-target");
    for part in ["fitness", "allocation"] {
        others["method"][part] = json!({"name": "their-own", "depth": 3});
    }
    fs::write(&plan, others.to_string()).unwrap();
    done(&["convert", text(&model), "--plan", text(&plan), "--out", text(&out)]);
}
