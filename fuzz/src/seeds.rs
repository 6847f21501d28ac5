//! Inputs that are as they should be, or nearly so, to begin with.
#![allow(dead_code, unreachable_pub)]

use qcqa::calibration::Moments;
use qcqa::heads::HeadSource;
use qcqa::output::convert;
use qcqa::plan::SharedHeads;
use qcqa::targets::Stock;
use qcqa::{Run, files::WriteOptions};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::targets::{Ground, WORDS, with};

fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// The inputs of a target.
pub fn of(target: &str) -> Vec<Vec<u8>> {
    with(|ground| match target {
        "config" | "run" => ground.held.values().map(|(config, _)| config.clone()).collect(),
        "index" => indices(ground),
        "header" => vec![ground.held["llama"].1.clone(), short_header()],
        "plan" => plans(ground),
        "converted" => vec![provenance(ground)],
        "moments" => moments(ground),
        "tokenizer" => tokenizers(),
        "beside" => beside(),
        "ids" => {
            [0, 1, 2, 5, 9].map(|which| [&[which][..], &[1, 0, 2, 0, 3, 0, 0, 0].repeat(5)].concat()).to_vec()
        }
        "texts" => [[8, 0, 1, 1, 1], [200, 1, 3, 1, 1], [255, 2, 255, 255, 1]]
            .map(|head| [&head[..], "ab at a bat, tea. ".repeat(16).as_bytes()].concat())
            .to_vec(),
        "choices" => vec![
            b"{\"query\": \"It was\", \"choices\": [\" late\", \" early\"], \"gold\": 0}\n\n".repeat(2),
            b"{\"query\": \"a\", \"choices\": [\"b\", \"c\", \"d\"], \"gold\": 2, \"more\": []}".to_vec(),
        ],
        "gguf" => {
            let both = tokenizers().into_iter().map(|text| (0, text));
            let both = both.chain(beside().into_iter().map(|text| (4, text[1..].to_vec())));
            both.enumerate()
                .map(|(i, (which, text))| [&[which + (i % 4) as u8][..], &text].concat())
                .collect()
        }
        other => panic!("no target {other}"),
    })
}

fn indices(ground: &Ground) -> Vec<Vec<u8>> {
    let names: Vec<&str> = ground.model.tensors().names().collect();
    let of = |other: &str| {
        let file = |name: &&str| if name.contains("layers.0") { "a.safetensors" } else { "b.safetensors" };
        let mut map: serde_json::Map<_, _> =
            names.iter().map(|name| (name.to_string(), json!(file(name)))).collect();
        if !other.is_empty() {
            map.insert("secret".to_string(), json!(other));
        }
        text(&json!({ "metadata": { "total_size": 1 }, "weight_map": map }))
    };
    [
        "",
        "../secret.safetensors",
        "@ROOT@/secret.safetensors",
        "below/secret.safetensors",
        "./a.safetensors",
        "below/../../secret.safetensors",
        "..",
        "a.safetensors/",
    ]
    .map(of)
    .to_vec()
}

/// Few tensors: what changes then is mostly the header.
fn short_header() -> Vec<u8> {
    let tensor = TensorView::new(Dtype::F32, vec![2, 2], &[0; 16]).unwrap();
    let names = ["model.layers.0.self_attn.q_proj.weight", "b"];
    safetensors::serialize(names.map(|name| (name, tensor.clone())), None).unwrap()
}

/// Of version 2, and what version 1 would have been.
fn plans(ground: &Ground) -> Vec<Vec<u8>> {
    let of_two = serde_json::to_value(&ground.plan).unwrap();
    let id = ground.model.id().unwrap();
    let layer = json!({ "groups": [[0, 5], [1, 2], [3, 4]], "error": 3.25, "lower_bound": 3.0 });
    let of_one = json!({
        "version": 1, "qcqa": "0.1.0",
        "source": {
            "model_type": "llama", "layers": 2, "query_heads": 6, "kv_heads": 6, "head_dim": 4, "hidden": 24,
            "dtype": "f32", "fingerprint": id.fingerprint,
        },
        "method": {
            "name": "low-rank", "search": "Exact { max_heads: 16 }", "fitness": "low-rank", "cardinality": "equal",
            "max_groups": null, "max_group_size": 4, "fixed": { "0": 3 }, "allocation": "UniformAllocation",
            "cost": "energy-share", "pooler": "low-rank", "target": "stock", "refit": "full",
        },
        "calibration": format!("sha256:{}", "0123456789abcdef".repeat(4)), "seed": 7,
        "budget": { "asked": 0.5, "reached": 0.5, "kv_heads": 6 }, "layers": [layer, layer],
    });
    let mean = {
        let mut plan = of_one.clone();
        plan["method"]["pooler"] = json!("mean");
        plan["method"]["refit"] = json!("none");
        plan["calibration"] = Value::Null;
        plan
    };
    vec![text(&of_two), text(&of_one), text(&mean), text(&json!({ "plan": of_two, "target": "stock" }))]
}

/// What a conversion writes.
fn provenance(ground: &Ground) -> Vec<u8> {
    let out = ground.at("seed");
    let shared = SharedHeads::new(&ground.plan, &ground.model).unwrap();
    convert(&ground.model, &shared, &Stock, &out, WriteOptions::default().force(true), Run::new(0)).unwrap();
    std::fs::read(out.join("qcqa.json")).unwrap()
}

fn moments(ground: &Ground) -> Vec<Vec<u8>> {
    let size = 25;
    let matrix: Vec<u8> =
        (0..size * size).flat_map(|i| f64::from(u8::from(i / size == i % size)).to_le_bytes()).collect();
    let tokens = 7_i64.to_le_bytes();
    let made = |metadata| {
        let layer = TensorView::new(Dtype::F64, vec![size, size], &matrix).unwrap();
        let tensors = [
            ("layers.0", layer.clone()),
            ("layers.1", layer),
            ("tokens", TensorView::new(Dtype::I64, vec![], &tokens).unwrap()),
        ];
        safetensors::serialize(tensors, metadata).unwrap()
    };
    let place = ground.at("seed.safetensors");
    let plain = made(None);
    std::fs::write(&place, &plain).unwrap();
    let read = Moments::read(&place, &ground.model.id().unwrap()).unwrap();
    std::fs::write(&place, []).unwrap();
    read.write(&place, WriteOptions::default().force(true)).unwrap();
    let print = ground.model.id().unwrap().fingerprint.unwrap();
    let named = made(Some([("fingerprint".to_string(), print)].into()));
    vec![plain, std::fs::read(place).unwrap(), named]
}

fn tokenizers() -> Vec<Vec<u8>> {
    let words: Value = serde_json::from_str(WORDS).unwrap();
    let with = |change: &dyn Fn(&mut Value)| {
        let mut words = words.clone();
        change(&mut words);
        text(&words)
    };
    let steps = |all: Value| json!({ "type": "Sequence", "pretokenizers": all });
    let level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    vec![
        with(&|_| ()),
        with(&|w| {
            w["pre_tokenizer"] = steps(json!([{ "type": "Digits", "individual_digits": true }, level]))
        }),
        with(&|w| {
            let split = json!({ "type": "Split", "pattern": { "Regex": "[a-z]+|\\s" }, "behavior": "Isolated", "invert": false });
            w["pre_tokenizer"] = steps(json!([split, level]));
        }),
        with(&|w| {
            w["pre_tokenizer"] =
                json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false });
            w["model"]["byte_fallback"] = json!(true);
            w["model"]["vocab"] = json!({ "<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5 });
            w["model"]["merges"] = json!(["a b"]);
        }),
        with(&|w| {
            let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
            w["normalizer"] = json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, replace] });
            w["pre_tokenizer"] = Value::Null;
            w["model"]["vocab"] = json!({ "<unk>": 0, "▁": 2, "a": 3 });
            w["model"]["merges"] = json!([]);
            w["model"]["byte_fallback"] = json!(true);
        }),
        with(&|w| {
            w["model"] =
                json!({ "type": "WordLevel", "vocab": { "<unk>": 0, "ab": 1 }, "unk_token": "<unk>" })
        }),
        with(&|w| {
            w["model"] = json!({ "type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["ab", -1.0], ["a", -2.5]] })
        }),
        with(
            &|w| w["model"] = json!({ "type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": { "<unk>": 0, "ab": 1, "##a": 2 } }),
        ),
        with(&|w| {
            w["truncation"] =
                json!({ "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 });
            w["padding"] = json!({ "strategy": { "Fixed": 64 }, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>" });
        }),
        with(&|w| {
            w["post_processor"] = json!({ "type": "BertProcessing", "sep": ["<s>", 9], "cls": ["<unk>", 0] })
        }),
        with(
            &|w| w["normalizer"] = json!({ "type": "Sequence", "normalizers": [{ "type": "NFKC" }, { "type": "Lowercase" }, { "type": "Strip", "strip_left": true, "strip_right": true }, { "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true }] }),
        ),
    ]
}

fn beside() -> Vec<Vec<u8>> {
    let start = "<|im_start|>";
    let config = json!({
        "tokenizer_class": "LlamaTokenizer", "add_prefix_space": true, "bos_token": { "content": "<s>" }, "eos_token": "b",
        "add_bos_token": true, "add_eos_token": false, "chat_template": "{{ messages }}",
        "added_tokens_decoder": { "9": { "content": "<s>" }, "1024": { "content": start } }, "extra_special_tokens": { "image_token": start },
    });
    let class = json!({ "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": false });
    let map = json!({ "additional_special_tokens": [{ "content": start }], "unk_token": "<unk>" });
    let added = json!({ "<|im_start|>": 1024, "<s>": 9 });
    [(0, config), (0, class), (1, map), (2, added)]
        .map(|(which, value)| [&[which][..], &text(&value)].concat())
        .to_vec()
}
