//! Further kinds of the hunt, by the numbers of docs/reliability.md from 32 on: names, files beside a model and an output, and what is
//! given in other forms.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;

use command::{done, fails, json, text};
use models::{copied, novels, says, snapshot};
use serde_json::{Value, json};

#[cfg(target_os = "linux")]
#[test]
fn kind_32_names_that_are_no_text_are_names_like_others() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;

    let (root, model) = copied();
    let odd = |name: &[u8]| root.path().join(OsStr::from_bytes(name));
    let [directory, plan, out, again] =
        [&b"model\xff"[..], b"plan\xff.json", b"out\xff", b"again\xff"].map(odd);
    fs::rename(&model, &directory).unwrap();
    let run = |args: &[&OsStr]| {
        let output = Command::new(env!("CARGO_BIN_EXE_qcqa")).args(args).arg("--json").output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), error, serde_json::from_slice::<Value>(&output.stdout).unwrap())
    };
    let s = OsStr::new;
    let search = ["search", "--kv", "0.5", "--method", "gqa", "--out"].map(s);
    let commands = [
        vec![s("inspect"), directory.as_os_str()],
        [&search[..], &[plan.as_os_str(), directory.as_os_str()]].concat(),
        vec![s("convert"), directory.as_os_str(), s("--plan"), plan.as_os_str(), s("--out"), out.as_os_str()],
        vec![s("eval"), directory.as_os_str(), s("--plan"), plan.as_os_str(), s("--text")],
    ];
    let words = directory.join("evaluation.txt");
    for mut args in commands {
        if args.last() == Some(&s("--text")) {
            args.push(words.as_os_str());
        }
        let (code, error, _) = run(&args);
        assert_eq!((code, &*error), (Some(0), ""), "{args:?}");
    }
    assert!(plan.is_file() && out.join("config.json").is_file());
    // A file to copy must have a name that a list can hold; it is found before anything is computed.
    fs::write(directory.join(OsStr::from_bytes(b"notes\xfe.md")), "mine").unwrap();
    let (code, error, value) = run(&[
        s("compress"),
        directory.as_os_str(),
        s("--kv=0.5"),
        s("--calibration"),
        directory.as_os_str(),
        s("--out"),
        again.as_os_str(),
    ]);
    assert_eq!(code, Some(1));
    says(&error, &["notes", ".md", "not UTF-8", "rename"]);
    assert!(value["error"].is_string() && !again.exists());
}

#[test]
fn kind_33_a_picture_has_the_form_that_its_name_says() {
    let (root, model) = copied();
    let words = model.join("evaluation.txt");
    for name in ["plot.png", "plot.PDF", "plot.jpeg"] {
        let plot = root.path().join(name);
        let args =
            ["compare", text(&model), "--kv", "0.5", "--text", text(&words), "--plot", text(&plot), "--json"];
        says(&fails(2, &args), &["--plot", "SVG", "end in .svg"]);
        assert!(!plot.exists());
    }
}

#[test]
fn kind_34_models_below_a_model_do_not_travel() {
    let (root, model) = copied();
    let (out, step) = (root.path().join("out"), model.join("checkpoint-500"));
    let pooling = model.join("1_Pooling");
    fs::create_dir(&step).unwrap();
    fs::create_dir(&pooling).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(model.join(name), step.join(name)).unwrap();
    }
    fs::write(step.join("optimizer.pt"), "state").unwrap();
    // No weights: it is of this model.
    fs::write(pooling.join("config.json"), "{}").unwrap();
    let args = ["compress", text(&model), "--kv", "0.5", "--method", "gqa", "--out", text(&out)];
    let value = json(&args);
    assert_eq!(value["output"]["left_out"], json!(["checkpoint-500"]));
    assert!(!out.join("checkpoint-500").exists() && out.join("1_Pooling/config.json").is_file());
}

#[test]
fn kind_35_what_is_in_the_place_of_a_state_is_found_first() {
    let (root, model) = copied();
    let [plan, half, out, state] =
        ["plan.json", "half", "out", "out.distilling"].map(|name| root.path().join(name));
    done(&["search", text(&model), "--kv", "0.5", "--method", "gqa", "--out", text(&plan)]);
    done(&["convert", text(&model), "--plan", text(&plan), "--out", text(&half)]);
    let texts = ["--calibration", text(&model)];
    let compress = ["compress", text(&model), "--kv", "0.5", "--distill", "2k", "--out", text(&out)];
    let distill = ["distill", text(&half), "--source", text(&model), "--for", "2k", "--out", text(&out)];
    for args in [&compress[..], &distill] {
        for force in [&[][..], &["--force"], &["--dry-run"]] {
            let args = [args, &texts, force].concat();
            fs::write(&state, "somebody's").unwrap();
            let before = snapshot(root.path());
            says(&fails(1, &args), &[text(&state), "not the state", "remove it"]);
            assert!(snapshot(root.path()) == before);
            fs::remove_file(&state).unwrap();
            fs::create_dir(&state).unwrap();
            says(&fails(1, &args), &[text(&state), "a directory"]);
            fs::remove_dir(&state).unwrap();
        }
        // It is an output, too: none of what is read.
        let words = ["--calibration", text(&state)];
        fs::copy(model.join("calibration.txt"), &state).unwrap();
        says(&fails(1, &[args, &words].concat()), &["out.distilling", "must not lie within one another"]);
        fs::remove_file(&state).unwrap();
    }
    // A directory that no conversion wrote is none to distil.
    let args = ["distill", text(&model), "--source", text(&model), "--for", "2k", "--out", text(&out)];
    says(&fails(1, &args), &[text(&model), "qcqa.json is missing", "a conversion has written"]);
}

#[test]
fn kind_38_tokens_that_only_files_beside_the_tokenizer_name_are_not_read_as_words() {
    let (root, model) = copied();
    let words = root.path().join("words.txt");
    let plain = fs::read_to_string(model.join("evaluation.txt")).unwrap()[..4000].to_string();
    let eval = ["eval", text(&model), "--text", text(&words)];
    fs::write(&words, &plain).unwrap();
    let before = json(&eval)["loss"].clone();
    let start = json!("<|im_start|>");
    for (file, held) in [
        ("tokenizer_config.json", json!({ "added_tokens_decoder": { "1024": { "content": start } } })),
        ("tokenizer_config.json", json!({ "extra_special_tokens": [start] })),
        ("tokenizer_config.json", json!({ "extra_special_tokens": { "image_token": start } })),
        ("tokenizer_config.json", json!({ "bos_token": { "content": start }, "add_bos_token": true })),
        ("special_tokens_map.json", json!({ "additional_special_tokens": [{ "content": start }] })),
        ("added_tokens.json", json!({ "<|im_start|>": 1024 })),
    ] {
        fs::write(model.join(file), held.to_string()).unwrap();
        fs::write(&words, &plain).unwrap();
        assert_eq!(json(&eval)["loss"], before, "where it is not in the text all is as it was");
        fs::write(&words, format!("{plain}<|im_start|>user")).unwrap();
        says(
            &fails(1, &eval),
            &[text(&model.join(file)), "\"<|im_start|>\"", "tokenizer.json does not have it"],
        );
        fs::remove_file(model.join(file)).unwrap();
    }
    // What tokenizer.json has it reads, whatever else names it.
    fs::write(model.join("tokenizer_config.json"), json!({ "eos_token": "<|endoftext|>" }).to_string())
        .unwrap();
    fs::write(&words, format!("{plain}<|endoftext|>{plain}")).unwrap();
    done(&eval);
    // Whether there is a space before a text stands in two places.
    for class in ["GPT2Tokenizer", "Qwen2TokenizerFast"] {
        let config = json!({ "tokenizer_class": class, "add_prefix_space": true });
        fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
        says(
            &fails(1, &eval),
            &["tokenizer_config.json", "add_prefix_space", "false, as in tokenizer.json", "true"],
        );
    }
    let config = json!({ "tokenizer_class": "LlamaTokenizer", "add_prefix_space": true });
    fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(&words, &plain).unwrap();
    assert_eq!(json(&eval)["loss"], before);
}

#[test]
fn kind_36_numbers_of_whatever_size_and_sign_are_told_by_their_flag() {
    let model = novels();
    let base = ["search", text(&model), "--kv", "0.5", "--out", "never.json"];
    for (flag, value) in [
        ("--population", "99999999999999"),
        ("--population", "1"),
        ("--generations", "99999999999999"),
        ("--generations", "0"),
        ("--max-groups", "-1"),
        ("--max-group-size", "-1"),
        ("--calibration-windows", "0"),
        ("--calibration-windows", "-1"),
        ("--population", "1e3"),
    ] {
        says(&fails(2, &[&base[..], &[flag, value]].concat()), &[flag, value, "invalid value"]);
    }
    let compare = ["compare", text(&model), "--kv", "0.5", "--method", "gqa", "--layer"];
    says(&fails(2, &[&compare[..], &["-1"]].concat()), &["--layer", "-1", "invalid value"]);
    says(&fails(2, &[&compare[..], &["4"]].concat()), &["there is no layer 4", "4, from 0"]);
}

#[test]
fn kind_37_items_in_other_forms_are_told_by_line_with_an_example() {
    let (root, model) = copied();
    let file = root.path().join("items.jsonl");
    let item = json!({ "query": "It was", "choices": [" late", " early"], "gold": 0 });
    let with = |key: &str, value: Value| {
        let mut item = item.clone();
        item[key] = value;
        item.to_string()
    };
    for held in [
        format!("[{item}]"),
        format!("[\n{item},\n{item}\n]"),
        serde_json::to_string_pretty(&item).unwrap(),
        format!("{item},"),
        "query,choice\nIt was,late".to_string(),
        with("gold", json!("A")),
        with("gold", json!("0")),
        with("gold", json!(-1)),
        with("gold", json!(true)),
        json!({ "ctx": "It was", "endings": ["a", "b"], "label": 0 }).to_string(),
    ] {
        fs::write(&file, held).unwrap();
        let message = fails(1, &["eval", text(&model), "--choices", text(&file)]);
        says(&message, &["items.jsonl, line 1", "each line is one item", "\"choices\": [", "\"gold\": 0"]);
    }
    for (held, part) in [
        (with("gold", json!(2)), "gold is 2, but the 2 choices count from 0"),
        (with("choices", json!([" late"])), "at least 2"),
        (String::new(), "no items"),
    ] {
        fs::write(&file, held).unwrap();
        says(&fails(1, &["eval", text(&model), "--choices", text(&file)]), &["items.jsonl, line 1", part]);
    }
    fs::write(&file, format!("{item}\r\n\r\n{item}")).unwrap();
    assert_eq!(json(&["eval", text(&model), "--choices", text(&file)])["choices"]["items"], 2);
}
