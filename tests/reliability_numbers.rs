//! Kinds of input of which a number was silently wrong once, by the numbers of docs/reliability.md.
#![cfg(feature = "cli")]

mod command;
mod models;

use std::fs;
use std::path::Path;

use command::{done, fails, json, text};
use models::{configured, copied, says, with_tensors};
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::evaluate;
use qcqa::heads::HeadSource;
use qcqa::plan::read_plan;
use qcqa::runtime::Model;
use qcqa::text::{Vocabulary, Windows, read_text};
use serde_json::{Value, json};

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

/// A tokenizer that puts an end token behind every text.
fn closing(model: &Path) {
    let file = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let (a, end) = (
        json!({ "Sequence": { "id": "A", "type_id": 0 } }),
        json!({ "SpecialToken": { "id": "E", "type_id": 0 } }),
    );
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [a, end], "pair": [a, end],
        "special_tokens": { "E": { "id": "E", "ids": [2], "tokens": ["E"] } },
    });
    fs::write(file, tokenizer.to_string()).unwrap();
}

#[test]
fn kind_8_a_closing_token_is_none_of_the_query() {
    let (root, model) = copied();
    let choices = root.path().join("choices.jsonl");
    // One token each: without the first nothing is left to tell them apart.
    let items = [
        (" He looked at her and", " said", " for"),
        (" She was very", " much", " of"),
        (" It was a", " little", " and"),
    ];
    let line = |(query, right, wrong): &(&str, &str, &str)| {
        json!({ "query": query, "choices": [wrong, right], "gold": 1 }).to_string() + "\n"
    };
    fs::write(&choices, items.iter().map(line).collect::<String>()).unwrap();
    let accuracy =
        |model: &Path| json(&["eval", text(model), "--choices", text(&choices)])["choices"].clone();
    let before = accuracy(&model);
    assert_eq!(before["accuracy"], 1.0, "{before}");
    closing(&model);
    let checkpoint = Checkpoint::open(&model).unwrap();
    let words = Vocabulary::open(&checkpoint).unwrap();
    assert_eq!(words.encode(" It was").unwrap(), [words.encode_open(" It was").unwrap(), vec![2]].concat());
    assert_eq!(accuracy(&model), before);
}

#[test]
fn kind_9_an_item_that_cannot_be_scored_is_refused_by_its_line() {
    let (root, model) = copied();
    let choices = root.path().join("choices.jsonl");
    let words = Vocabulary::open(&Checkpoint::open(&model).unwrap()).unwrap();
    assert_eq!(words.encode(" the").unwrap().len(), 1, "this test needs a word of one token");
    let items = [
        json!({ "query": " It was a", "choices": [" long", " time"], "gold": 0 }),
        json!({ "query": " th", "choices": ["e", " zq"], "gold": 1 }),
    ];
    fs::write(&choices, items.map(|item| item.to_string()).join("\n")).unwrap();
    let message = fails(1, &["eval", text(&model), "--choices", text(&choices)]);
    says(&message, &["choices.jsonl", "line 2", "\"e\"", "can be scored"]);
}

/// The model is refused with this before a number comes of it.
#[track_caller]
fn not_run(model: &Path, parts: &[&str]) {
    let evaluation = model.join("evaluation.txt");
    says(&fails(1, &["eval", text(model), "--text", text(&evaluation)]), parts);
}

/// A copy of the model with these keys in its configuration; without those that are null.
fn with_keys(keys: &Value) -> (tempfile::TempDir, std::path::PathBuf) {
    let (root, model) = copied();
    configured(&model, |config| {
        let config = config.as_object_mut().unwrap();
        config.extend(keys.as_object().unwrap().clone());
        config.retain(|_, value| value != "absent");
    });
    (root, model)
}

#[test]
fn kinds_5_to_7_each_key_with_two_sources_is_as_in_transformers() {
    let default = |keys: Value| json!({ "rope_parameters": keys });
    let cases: [(Value, f64); 19] = [
        // Types of rotary positions: none is the default one, wherever the base stands.
        (default(json!({ "rope_theta": 10000.0 })), PLAIN),
        (default(json!({ "type": "linear", "rope_type": "default", "factor": 2.0 })), PLAIN),
        (json!({ "rope_scaling": { "rope_theta": 3000.0 } }), 4.004951802221139),
        (json!({ "rope_parameters": null }), PLAIN),
        // Counts that follow from others.
        (json!({ "head_dim": "absent" }), PLAIN),
        (json!({ "head_dim": null }), PLAIN),
        (json!({ "num_key_value_heads": "absent" }), PLAIN),
        (json!({ "num_key_value_heads": null }), PLAIN),
        (json!({ "intermediate_size": "absent" }), PLAIN),
        (json!({ "vocab_size": 1024 }), PLAIN),
        // Of two names for one thing one is read.
        (json!({ "hidden_act": "swish", "hidden_activation": "gelu" }), PLAIN),
        (json!({ "hidden_act": "absent" }), PLAIN),
        (json!({ "layer_norm_eps": 0.001 }), PLAIN),
        (json!({ "dtype": "float16", "torch_dtype": "float32" }), PLAIN),
        (json!({ "bos_token_id": 7, "eos_token_id": [5, 6] }), PLAIN),
        (json!({ "attention_bias": true, "mlp_bias": true }), PLAIN),
        (json!({ "architectures": ["MistralForCausalLM"] }), PLAIN),
        // Llama has no windows, whatever stands there.
        (json!({ "sliding_window": 16, "use_sliding_window": true }), PLAIN),
        (json!({ "sliding_window": 16, "layer_types": vec!["sliding_attention"; 4] }), PLAIN),
    ];
    for (keys, expected) in cases {
        let (_root, model) = with_keys(&keys);
        as_in_transformers(&model, expected, &[]);
    }
    // transformers refuses these, too, or would compute something that nobody meant.
    let refused: [(Value, &[&str]); 9] = [
        (
            default(json!({ "rope_type": null, "rope_theta": 10000.0 })),
            &["rope scaling null", "rope_parameters"],
        ),
        (default(json!({ "type": "wild", "factor": 2.0 })), &["\"wild\"", "rope_parameters"]),
        (json!({ "rope_scaling": { "factor": 2.0 } }), &["of no type", "rope_scaling"]),
        (json!({ "partial_rotary_factor": 0.5 }), &["partial_rotary_factor"]),
        (json!({ "head_dim": 8 }), &["k_proj.weight", "[64, 128]", "[128, 128]"]),
        (json!({ "vocab_size": 1030 }), &["embed_tokens", "[1030, 128]", "[1024, 128]"]),
        (json!({ "intermediate_size": 100 }), &["intermediate_size", "352", "found 100"]),
        (json!({ "tie_word_embeddings": false }), &["lm_head.weight", "missing", "[1024, 128]"]),
        (json!({ "num_hidden_layers": 5 }), &["layers.4.", "missing", "config.json"]),
    ];
    for (keys, parts) in refused {
        let (_root, model) = with_keys(&keys);
        not_run(&model, parts);
    }
}

#[test]
fn kinds_5_to_7_each_tensor_with_two_sources_is_as_in_transformers() {
    // Frequencies that were stored are computed anew.
    let (_root, model) = copied();
    let frequencies = |name: &str| (format!("model.{name}rotary_emb.inv_freq"), vec![8], vec![1.0; 8]);
    with_tensors(&model, &["", "layers.0.self_attn."].map(frequencies));
    as_in_transformers(&model, PLAIN, &[]);

    // One file and an index of others: the file. A tensor in two shards is refused.
    let (_root, model) = copied();
    let index = |file: &str| json!({ "weight_map": { "model.norm.weight": file } }).to_string();
    fs::write(model.join("model.safetensors.index.json"), index("model-00001-of-00001.safetensors")).unwrap();
    as_in_transformers(&model, PLAIN, &["model.safetensors is there and model.safetensors.index.json"]);
    fs::rename(model.join("model.safetensors"), model.join("a.safetensors")).unwrap();
    fs::copy(model.join("a.safetensors"), model.join("b.safetensors")).unwrap();
    let both = json!({ "weight_map": { "model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors" } });
    fs::write(model.join("model.safetensors.index.json"), both.to_string()).unwrap();
    not_run(&model, &["is both in", "a.safetensors", "b.safetensors", "again"]);
    // What an index does not list is there nevertheless.
    fs::write(model.join("model.safetensors.index.json"), index("a.safetensors")).unwrap();
    as_in_transformers(&model, PLAIN, &[]);
}

#[test]
fn kind_21_layers_beyond_those_of_the_configuration_are_not_used() {
    let (root, model) = with_keys(&json!({ "num_hidden_layers": 3 }));
    as_in_transformers(&model, 4.386544758104269, &["model.layers.3.", "3 layers", "not used"]);
    let out = root.path().join("out");
    done(&["compress", text(&model), "--kv", "1.0", "--method", "gqa", "--out", text(&out)]);
    as_in_transformers(&out, 4.386544758104269, &["model.layers.3.", "not used"]);
}

#[test]
fn kind_22_windows_of_single_layers_are_as_in_transformers() {
    let family = |model_type: &str, keys: Value| {
        let mut all = keys;
        all["model_type"] = json!(model_type);
        with_keys(&all)
    };
    let (full, sliding) = ("full_attention", "sliding_attention");
    let cases: [(&str, Value, f64); 9] = [
        ("mistral", json!({ "sliding_window": 16 }), 3.068146445066143),
        ("mistral", json!({ "sliding_window": 16, "use_sliding_window": false }), 3.068146445066143),
        ("mistral", json!({ "sliding_window": 16, "layer_types": vec![full; 4] }), PLAIN),
        (
            "mistral",
            json!({ "sliding_window": 16, "layer_types": [sliding, full, sliding, full] }),
            3.021860224370174,
        ),
        ("qwen2", json!({ "sliding_window": 16 }), PLAIN),
        ("qwen2", json!({ "sliding_window": 16, "use_sliding_window": true }), PLAIN),
        (
            "qwen2",
            json!({ "sliding_window": 16, "use_sliding_window": true, "max_window_layers": 3 }),
            3.038681508384146,
        ),
        (
            "qwen2",
            json!({ "sliding_window": 16, "use_sliding_window": true, "layer_types": vec![full; 4] }),
            PLAIN,
        ),
        (
            "qwen2",
            json!({ "sliding_window": null, "use_sliding_window": true, "max_window_layers": 0 }),
            PLAIN,
        ),
    ];
    for (model_type, keys, expected) in cases {
        let (_root, model) = family(model_type, keys);
        as_in_transformers(&model, expected, &[]);
    }
    let refused: [(&str, Value, &[&str]); 5] = [
        ("qwen2", json!({ "sliding_window": 16, "layer_types": vec![sliding; 4] }), &["use_sliding_window"]),
        ("qwen2", json!({ "use_sliding_window": "true" }), &["use_sliding_window", "true or false"]),
        ("qwen2", json!({ "layer_types": vec![full; 2] }), &["layer_types", "each of 4 layers"]),
        (
            "mistral",
            json!({ "sliding_window": null, "layer_types": vec![sliding; 4] }),
            &["sliding_window", "null"],
        ),
        ("mistral", json!({ "layer_types": vec!["linear_attention"; 4] }), &["layer_types", full, sliding]),
    ];
    for (model_type, keys, parts) in refused {
        let (_root, model) = family(model_type, keys);
        not_run(&model, parts);
    }
}

#[test]
fn kind_23_attention_that_is_not_causal_is_refused() {
    for (model_type, causal) in
        [("llama", json!(false)), ("llama", Value::Null), ("mistral", json!(false)), ("qwen2", json!(false))]
    {
        let (_root, model) = with_keys(&json!({ "model_type": model_type, "is_causal": causal }));
        not_run(&model, &["config.json", "is_causal"]);
    }
    let (_root, model) = with_keys(&json!({ "is_causal": true }));
    as_in_transformers(&model, PLAIN, &[]);
}
