//! Kinds of input that nobody had listed, by the numbers of docs/reliability.md from 18 on: what is left in directories, what shells
//! pass as arguments, what plans and texts become under other hands.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use command::{done, fails, json, text};
use models::{configured, copied, novels, renamed, says, snapshot, stored, with_tensors};
use qcqa::plan::read_plan;
use serde_json::{Value, json};

const POINTER: &[u8] =
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943\nsize 12345\n";

#[test]
fn kind_18_stand_ins_for_files_are_told_as_what_they_are() {
    let (root, model) = copied();
    let (plan, words) = (root.path().join("plan.json"), root.path().join("words.txt"));
    let evaluation = novels().join("evaluation.txt");
    let wide: Vec<u8> = "{\"words\": [1, 2, 3]}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let held: [(&[u8], &[&str]); 8] = [
        (POINTER, &["is a pointer of git-lfs", "git lfs pull"]),
        (b"", &["is empty"]),
        (b"<!DOCTYPE html><html>Access denied</html>", &["is a web page", "download"]),
        (b"\x1f\x8b\x08\x00 ...", &["gzip", "unpack"]),
        (b"PK\x03\x04 ...", &["zip archive"]),
        (b"GGUF\x03\0\0\0", &["GGUF"]),
        (b"\xff\xfe{\0}\0", &["UTF-16", "UTF-8"]),
        (&wide, &["UTF-16 without", "UTF-8"]),
    ];
    let eval = ["eval", text(&model), "--text", text(&evaluation)];
    let of_plan = ["convert", text(&model), "--plan", text(&plan), "--out", "never"];
    let of_text = ["eval", text(&model), "--text", text(&words)];
    let whole = snapshot(&model);
    for (bytes, parts) in held {
        for (file, args) in [
            (model.join("config.json"), &["inspect", text(&model)][..]),
            (model.join("model.safetensors"), &["inspect", text(&model)]),
            (model.join("tokenizer.json"), &eval),
            (plan.clone(), &of_plan),
            (words.clone(), &of_text),
        ] {
            fs::write(&file, bytes).unwrap();
            let message = fails(1, args);
            match (bytes, file == words) {
                // A page is a text like others, if a short one.
                (b"" | b"<!DOCTYPE html><html>Access denied</html>", true) => {
                    says(&message, &[text(&file), " tokens", "longer text"])
                }
                _ => says(&message, &[&[text(&file)], parts].concat()),
            }
            if let Some(before) = whole.get(&file) {
                fs::write(&file, before).unwrap();
            }
        }
    }
    // The index of several files.
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let index = model.join("model.safetensors.index.json");
    fs::write(&index, POINTER).unwrap();
    says(&fails(1, &["inspect", text(&model)]), &[text(&index), "git-lfs"]);
}

#[test]
fn kind_19_weights_under_other_names_are_listed_with_what_to_do() {
    let index = "pytorch_model.bin.index.json";
    for (name, parts) in [
        ("pytorch_model.bin", ["pytorch_model.bin", "save the model as safetensors"]),
        ("pytorch_model-00001-of-00002.bin", ["00001-of-00002.bin", "save the model as safetensors"]),
        ("consolidated.00.pth", ["consolidated.00.pth", "save the model as safetensors"]),
        ("consolidated.safetensors", ["consolidated.safetensors", "must be called model.safetensors"]),
        ("model-00001-of-00002.safetensors", ["model-00001-of-00002.safetensors", "need their index"]),
        ("model.safetensors.incomplete", ["model.safetensors.incomplete", "the download is incomplete"]),
        ("model-Q4_K_M.gguf", ["model-Q4_K_M.gguf", "take the model that it was made of"]),
        ("weights", ["no weights", "download the model again"]),
    ] {
        let (_root, model) = copied();
        fs::write(model.join(index), "{\"weight_map\": {}}").unwrap();
        fs::rename(model.join("model.safetensors"), model.join(name)).unwrap();
        let message = fails(1, &["inspect", text(&model)]);
        says(&message, &[&[text(&model), "model.safetensors.index.json"], &parts[..]].concat());
    }
    // Beside the right ones they change nothing, and are no part of what is written.
    let (root, model) = copied();
    let out = root.path().join("out");
    for name in ["pytorch_model.bin", index, "consolidated.safetensors", "model.fp16.safetensors"] {
        fs::write(model.join(name), "other weights").unwrap();
    }
    done(&["compress", text(&model), "--kv", "1.0", "--method", "gqa", "--out", text(&out)]);
    let weights = |directory: &Path| stored(&directory.join("model.safetensors"));
    assert!(weights(&out) == weights(&novels()) && !out.join(index).exists());
}

#[test]
fn kind_20_tensors_under_other_names_are_found() {
    for prefix in ["module.", "_orig_mod.", "base_model.model.", "language_model.", "model."] {
        let (_root, model) = copied();
        renamed(&model, |name| Some(format!("{prefix}{name}")));
        let there = format!("{prefix}model.layers.0.self_attn.k_proj.weight is there instead");
        says(&fails(1, &["inspect", text(&model)]), &["model.safetensors", &there, "rename the tensors"]);
    }
    let (_root, model) = copied();
    renamed(&model, |name| Some(name.strip_prefix("model.").unwrap_or(name).to_string()));
    says(&fails(1, &["inspect", text(&model)]), &["; layers.0.self_attn.k_proj.weight is there instead"]);
    // What training leaves among the weights is nobody's number.
    for (name, of_heads) in
        [("optimizer.state.exp_avg", false), ("model.layers.1.self_attn._extra_state", true)]
    {
        let (_root, model) = copied();
        with_tensors(&model, &[(name.to_string(), vec![8], vec![0.5; 8])]);
        let words = model.join("evaluation.txt");
        says(&fails(1, &["eval", text(&model), "--text", text(&words)]), &["config.json", name]);
        if of_heads {
            says(&fails(1, &["inspect", text(&model)]), &["config.json", name]);
        }
    }
}

#[test]
fn kind_31_a_directory_above_that_of_a_model_says_where_it_is() {
    let (root, model) = copied();
    let message = fails(1, &["inspect", text(root.path())]);
    says(
        &message,
        &[text(root.path()), "config.json is missing", "give the directory that has one", text(&model)],
    );
    // As a hub's cache has it.
    let snapshots = root.path().join("cache/snapshots");
    fs::create_dir_all(&snapshots).unwrap();
    fs::rename(&model, snapshots.join("0a1b")).unwrap();
    let message = fails(1, &["inspect", text(&root.path().join("cache"))]);
    says(&message, &[text(&snapshots.join("0a1b"))]);
}

#[test]
fn kind_24_json_as_other_programs_write_it_is_told_as_such() {
    let (root, model) = copied();
    let (plan, config) = (root.path().join("plan.json"), model.join("config.json"));
    done(&["search", text(&model), "--kv", "0.5", "--out", text(&plan)]);
    let of_plan = ["convert", text(&model), "--plan", text(&plan), "--out", "never"];
    let inspect = ["inspect", text(&model)];
    for (file, args) in [(&config, &inspect[..]), (&plan, &of_plan)] {
        let whole = fs::read_to_string(file).unwrap();
        let open = whole.trim_end().strip_suffix('}').unwrap().trim_end();
        for (changed, part) in [
            (format!("{open},\n  \"x\": NaN\n}}"), "NaN is no JSON"),
            (format!("{open},\n  \"x\": -Infinity\n}}"), "Infinity is no JSON"),
            (format!("{open},\n  \"x\": True\n}}"), "small letters"),
            (format!("{open},\n  \"x\": None\n}}"), "null for None"),
            (format!("{open},\n  'x': 1\n}}"), ""),
            (format!("// mine\n{whole}"), "comments are no JSON"),
            (format!("# mine\n{whole}"), "comments are no JSON"),
            (format!("{open},\n}}"), "trailing comma"),
            (open[..open.len() / 2].to_string(), "ends too early"),
            (format!("{whole}{whole}"), "trailing characters"),
        ] {
            fs::write(file, changed).unwrap();
            says(&fails(1, args), &[text(file), part, "line"]);
        }
        fs::write(file, whole).unwrap();
    }
    // Numbers as text, and counts with a point, are no counts; transformers has none of them, too.
    for key in
        ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]
    {
        for value in [json!("8"), json!(8.0), json!(-1), json!(0), json!([8]), json!(true)] {
            let (_root, model) = copied();
            configured(&model, |config| config[key] = value.clone());
            says(
                &fails(1, &["inspect", text(&model)]),
                &["config.json", key, "whole number", &value.to_string()],
            );
        }
    }
}

#[test]
fn kind_25_ids_of_another_width_and_tokenizers_in_another_form_are_told() {
    let (root, model) = copied();
    let ids = root.path().join("ids");
    let eval = ["eval", text(&model), "--ids", text(&ids)];
    let numbers = || (0..2000_u32).map(|i| i % 1000 + 1);
    let wide: Vec<u8> = numbers().flat_map(u32::to_le_bytes).collect();
    let wider: Vec<u8> = numbers().flat_map(|id| u64::from(id).to_le_bytes()).collect();
    for bytes in [&wide, &wider] {
        fs::write(&ids, bytes).unwrap();
        says(&fails(1, &eval), &[text(&ids), "every second 2-byte token id is 0", "write ids of 2 bytes"]);
    }
    fs::write(&ids, [b"\x93NUMPY\x01\0v\0", &wide[..]].concat()).unwrap();
    says(&fails(1, &eval), &[text(&ids), "NumPy", "tofile"]);
    fs::write(&ids, numbers().flat_map(|id| (id as u16).to_le_bytes()).collect::<Vec<_>>()).unwrap();
    done(&eval);

    let words = model.join("evaluation.txt");
    fs::rename(model.join("tokenizer.json"), model.join("tokenizer.model")).unwrap();
    let message = fails(1, &["eval", text(&model), "--text", text(&words)]);
    says(&message, &["tokenizer.json is missing", "in another form", "save_pretrained", "--ids"]);
}

#[test]
fn kind_26_what_shells_leave_of_paths_is_no_path() {
    let (root, model) = copied();
    let kv = ["--kv", "0.5", "--method", "gqa"];
    let run = |args: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_qcqa")).current_dir(root.path()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    // `--out=~/half` reaches no home, and would make a directory that is called ~.
    for flag in ["--out=~/half", "--out=~", "--out=~user/half", "--calibration=~/text"] {
        let rest = if flag.starts_with("--out") { "--dry-run" } else { "--out=half" };
        let args = [&["compress", text(&model), flag, rest], &kv[..]].concat();
        says(&run(&args), &["~", "the shell has not replaced", "$HOME"]);
    }
    says(&run(&["inspect", "~/model"]), &["the shell has not replaced"]);
    // What is piped has a name; `-` is none.
    for args in [
        &["eval", text(&model), "--text", "-"][..],
        &["inspect", "-"],
        &["search", text(&model), "--kv=0.5", "--out", "-"],
    ] {
        says(&run(args), &["- is no file here", "/dev/stdin"]);
    }
    // A variable that is not set.
    for args in [
        &["inspect", ""][..],
        &["eval", text(&model), "--text", ""],
        &["search", text(&model), "--kv", "0.5", "--out", ""],
    ] {
        says(&run(args), &["a value is required"]);
    }
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "nothing was made");
    says(
        &fails(1, &["inspect", "Someone/Some-Model"]),
        &["Someone/Some-Model does not exist", "downloaded first"],
    );
    says(&fails(1, &["inspect", text(&model.join("config.json"))]), &["is not a directory"]);
}

#[test]
fn kind_27_numbers_as_shells_pass_them() {
    let model = novels();
    fn search<'a>(model: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
        [&["search", model, "--out", "never.json", "--dry-run"], flags].concat()
    }
    let search = |flags: &[&'static str]| search(text(&model), flags);
    for kv in ["50", "50%", "0", "nan", "inf", "1/2", "0,5", "-0.5", "1.0001"] {
        says(&fails(2, &search(&["--kv", kv])), &["--kv", kv, "above 0 and at most 1", "0.5 keeps half"]);
    }
    let half = json(&search(&["--kv", "0.5"]));
    for kv in ["--kv=.5", "--kv=5e-1", "--kv=+0.50"] {
        assert_eq!(json(&search(&[kv]))["plan"], half["plan"], "{kv}");
    }
    says(&fails(2, &search(&["--kv", "1e-3"])), &["not reachable", "4, 8, 12"]);
    says(&fails(2, &search(&["--kv", "0.5", "--kv", "0.25"])), &["--kv", "multiple times"]);
    for seed in ["-1", "1.5", "abc", "18446744073709551616"] {
        says(&fails(2, &search(&["--kv", "0.5", "--seed", seed])), &["--seed", seed, "invalid value"]);
    }
}

#[test]
fn kind_28_plans_edited_by_hand_are_obeyed_or_refused_by_their_place() {
    let (root, model) = copied();
    let plan = root.path().join("plan.json");
    done(&["search", text(&model), "--kv", "0.5", "--method", "gqa", "--out", text(&plan)]);
    let (whole, read): (Value, _) =
        (serde_json::from_slice(&fs::read(&plan).unwrap()).unwrap(), read_plan(&plan).unwrap());
    let with = |groups: Value| {
        let mut changed = whole.clone();
        changed["layers"][1]["groups"] = groups;
        fs::write(&plan, changed.to_string()).unwrap();
    };
    // The order of groups, and of heads in them, says nothing.
    with(json!([[7, 6], [2, 3], [1, 0], [5, 4]]));
    assert_eq!(read_plan(&plan).unwrap(), read);
    for (groups, part) in [
        (json!([[0, 1], [1, 2, 3], [4, 5], [6, 7]]), "head 1 is in more than one group"),
        (json!([[0, 1], [2, 3], [4, 5], [6]]), "groups 7 heads, its source has 8"),
        (json!([[0, 1], [2, 3], [4, 5], [6, 8]]), "head 8 does not exist"),
        (json!([[0, 1], [2, 3], [4, 5], [6, 7], []]), "group 4 is empty"),
        (json!([[0.0, 1], [2, 3], [4, 5], [6, 7]]), "0.0"),
        (json!([["0", 1], [2, 3], [4, 5], [6, 7]]), "\"0\""),
        (json!([[-1, 1], [2, 3], [4, 5], [6, 7]]), "-1"),
        (json!([[0, 1, 2], [3], [4, 5], [6, 7]]), "one size"),
    ] {
        with(groups);
        says(
            &fails(1, &["convert", text(&model), "--plan", text(&plan), "--out", "never"]),
            &[text(&plan), part],
        );
    }
    type Change = (&'static str, fn(&mut Value), &'static str);
    let changes: [Change; 6] = [
        ("a layer less", |p| drop(p["layers"].as_array_mut().unwrap().pop()), "3 layers, its source has 4"),
        ("a field more", |p| p["note"] = json!("mine"), "unknown field `note`"),
        (
            "no error",
            |p| drop(p["layers"][0].as_object_mut().unwrap().remove("error")),
            "missing field `error`",
        ),
        ("another width", |p| p["source"]["hidden"] = json!(64), "hidden size is 64, this model's is 128"),
        ("another model", |p| p["source"]["fingerprint"] = json!("sha256:0"), "for another model"),
        ("a newer one", |p| p["version"] = json!(9), "plan version 9"),
    ];
    for (what, change, part) in changes {
        let mut changed = whole.clone();
        change(&mut changed);
        fs::write(&plan, changed.to_string()).unwrap();
        let message = fails(1, &["convert", text(&model), "--plan", text(&plan), "--out", "never"]);
        assert!(message.contains(part) && message.contains(text(&plan)), "{what}: {message}");
    }
}

#[cfg(unix)]
#[test]
fn kind_29_pipes_devices_and_odd_names_are_files_like_others() {
    let (root, model) = copied();
    let words = fs::read_to_string(model.join("evaluation.txt")).unwrap();
    let plain = json(&["eval", text(&model), "--text", text(&model.join("evaluation.txt"))])["loss"].clone();
    let piped = Command::new(env!("CARGO_BIN_EXE_qcqa"))
        .args(["eval", text(&model), "--json", "--text", "/dev/stdin"])
        .stdin(Stdio::from(fs::File::open(model.join("evaluation.txt")).unwrap()))
        .output()
        .unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&piped.stdout).unwrap()["loss"], plain);
    // One line, without an end.
    let line = root.path().join("line.txt");
    fs::write(&line, words.replace('\n', " ").trim_end()).unwrap();
    done(&["eval", text(&model), "--text", text(&line)]);
    says(&fails(1, &["eval", text(&model), "--text", "/dev/null"]), &["/dev/null", "0 tokens"]);
    says(&fails(1, &["eval", text(&model), "--text", text(&model)]), &[text(&model), "directory"]);
    fs::write(&line, b"Caf\xe9 ".repeat(2000)).unwrap();
    says(&fails(1, &["eval", text(&model), "--text", text(&line)]), &["line.txt", "not UTF-8 at byte 3"]);
    // Names of directories.
    let (odd, link) = (root.path().join("my model é"), root.path().join("link"));
    fs::rename(&model, &odd).unwrap();
    std::os::unix::fs::symlink(&odd, &link).unwrap();
    for name in [format!("{}/", odd.display()), format!("{}/.", odd.display()), link.display().to_string()] {
        done(&["inspect", &name]);
        let compress = ["compress", &name, "--kv", "0.5", "--method", "gqa", "--force", "--out"];
        for out in [".", "..", "/", text(&odd), text(&link), text(&odd.join("sub"))] {
            let args = [&compress[..], &[out]].concat();
            let output =
                Command::new(env!("CARGO_BIN_EXE_qcqa")).current_dir(&odd).args(&args).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{out}");
            says(&String::from_utf8_lossy(&output.stderr), &["must not lie within one another"]);
        }
        let search = ["search", &name, "--kv", "0.5", "--force", "--out"];
        says(&fails(1, &[&search[..], &["/dev/null"]].concat()), &["/dev/null", "that qcqa wrote"]);
        says(&fails(1, &[&search[..], &["new-directory/"]].concat()), &["new-directory", "cannot write"]);
    }
}

#[test]
fn kind_30_types_of_numbers_that_are_not_read_are_told_by_tensor() {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    for (dtype, size) in [(Dtype::F64, 8), (Dtype::F8_E4M3, 1), (Dtype::I8, 1)] {
        let (_root, model) = copied();
        let file = model.join("model.safetensors");
        let name = "model.layers.0.self_attn.k_proj.weight";
        let mut tensors = stored(&file);
        let (of, shape, bytes) = tensors.get_mut(name).unwrap();
        (*of, *bytes) = (dtype, vec![0; shape.iter().product::<usize>() * size]);
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
        let found = format!("found {dtype}");
        says(
            &fails(1, &["inspect", text(&model)]),
            &[text(&file), name, "BF16, F16 or F32", "convert the model", &found],
        );
    }
    let (root, model) = copied();
    let name = "model.layers.1.self_attn.v_proj.weight".to_string();
    with_tensors(&model, &[(name.clone(), vec![128, 128], vec![f32::NAN; 128 * 128])]);
    let out = root.path().join("plan.json");
    says(
        &fails(1, &["search", text(&model), "--kv", "0.5", "--out", text(&out)]),
        &[&name, "NaN or infinite"],
    );
    assert!(!out.exists());
}
