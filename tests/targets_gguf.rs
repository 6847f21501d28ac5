//! GGUF files, read again by a reader that is not the writer's.
#![cfg(feature = "runtime")]

mod made;
mod models;
mod running;

use std::fs::{self, File};
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value as Entry};
use candle_core::{DType, Device};
use models::{plan, says, snapshot};
use ndarray::{Array1, Array2, ArrayView2, s};
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::output::{Target, check_plan};
use qcqa::partition::Partition;
use qcqa::plan::{Plan, SharedHeads};
use qcqa::targets::Gguf;
use running::runnable;
use safetensors::Dtype;
use serde_json::{Value, json};

const GGUF: Gguf = Gguf { dtype: None };

/// A file, and what of it is asked.
struct Read {
    file: File,
    content: Content,
}

impl Read {
    fn open(path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        let content = Content::read(&mut file).unwrap();
        Self { file, content }
    }

    fn matrix(&mut self, name: &str) -> Array2<f32> {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).unwrap();
        let tensor = tensor.dequantize(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
        let (rows, columns) = tensor.dims2().unwrap_or((1, tensor.elem_count()));
        let numbers = tensor.flatten_all().unwrap().to_vec1().unwrap();
        Array2::from_shape_vec((rows, columns), numbers).unwrap()
    }

    fn vector(&mut self, name: &str) -> Array1<f32> {
        let info = &self.content.tensor_infos[name];
        assert_eq!(info.ggml_dtype, candle_core::quantized::GgmlDType::F32, "{name}");
        assert_eq!(info.shape.rank(), 1, "{name}");
        self.matrix(name).row(0).to_owned()
    }

    fn entry(&self, key: &str) -> &Entry {
        self.content.metadata.get(key).unwrap_or_else(|| panic!("{key} is missing"))
    }

    fn counts(&self, key: &str) -> Vec<i32> {
        match self.entry(key) {
            Entry::U32(count) => vec![*count as i32],
            Entry::Array(counts) => counts.iter().map(|count| count.to_i32().unwrap()).collect(),
            other => panic!("{key} is {other:?}"),
        }
    }

    fn texts(&self, key: &str) -> Vec<String> {
        let texts = self.entry(key).to_vec().unwrap();
        texts.iter().map(|text| text.to_string().unwrap().clone()).collect()
    }
}

/// A source without a tokenizer, unless one is given.
fn source(model: &models::Model, tokenizer: Option<&Value>) -> (tempfile::TempDir, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    let place = root.path().join("in");
    model.write(&place);
    match tokenizer {
        None => fs::remove_file(place.join("tokenizer.json")).unwrap(),
        Some(json) => fs::write(place.join("tokenizer.json"), json.to_string()).unwrap(),
    }
    let source = Checkpoint::open(place).unwrap();
    (root, source)
}

fn write(root: &tempfile::TempDir, source: &Checkpoint, plan: &Plan) -> Read {
    let out = root.path().join("out");
    let options = WriteOptions::default().force(true);
    models::convert(source, plan, &GGUF, &out, options, Run::new(0)).unwrap();
    Read::open(&out.join(Gguf::FILE))
}

fn layers(kv_heads: usize, layers: [&[&[usize]]; 2]) -> Vec<Partition> {
    layers.iter().map(|groups| Partition::from_groups(kv_heads, groups).unwrap()).collect()
}

/// Rows of a head as llama.cpp has them: those that turn together, side by side.
fn turned(head: ArrayView2<'_, f32>) -> Array2<f32> {
    let half = head.nrows() / 2;
    Array2::from_shape_fn(head.dim(), |(r, c)| head[[if r % 2 == 0 { r / 2 } else { r / 2 + half }, c]])
}

#[test]
fn every_number_lies_where_llama_cpp_looks_for_it() {
    let uneven: [&[&[usize]]; 2] = [&[&[0, 2, 3], &[1, 4], &[5]], &[&[0, 5], &[1, 2, 3, 4]]];
    let pairs: [&[&[usize]]; 2] = [&[&[0, 5], &[1, 4], &[2, 3]], &[&[0, 1], &[2, 3], &[4, 5]]];
    for (model_type, dtype, groups, arch, bias) in [
        ("llama", Dtype::F32, uneven, "deci", true),
        ("qwen2", Dtype::BF16, uneven, "deci", true),
        ("mistral", Dtype::F16, pairs, "llama", false),
        ("llama", Dtype::BF16, pairs, "llama", false),
    ] {
        let mut model = runnable(model_type, dtype, 6, bias).set("sliding_window", Value::Null);
        model.config["attention_bias"] = json!(bias);
        if model_type == "llama" && bias {
            let output = models::Tensor { shape: vec![24], ..model.tensors["model.norm.weight"].clone() };
            for i in 0..2 {
                model.tensors.insert(format!("model.layers.{i}.self_attn.o_proj.bias"), output.clone());
            }
        }
        let (root, source) = source(&model, None);
        let plan = plan(&source, &layers(6, groups));
        let mut read = write(&root, &source, &plan);
        assert_eq!(read.entry("general.architecture").to_string().unwrap(), arch);
        let shared = SharedHeads::new(&plan, &source).unwrap();
        let mut heads = [Vec::new(), Vec::new()];
        for layer in 0..2 {
            let (own, pooled) = shared.layer(layer).unwrap();
            let groups = plan.layers[layer].groups.groups();
            let most = groups.iter().map(Vec::len).max().unwrap();
            heads[0].push((groups.len() * most) as i32);
            heads[1].push(groups.len() as i32);
            let name = |part: &str, kind: &str| format!("blk.{layer}.attn_{part}.{kind}");
            let [q, k, v, o] = ["q", "k", "v", "output"].map(|part| read.matrix(&name(part, "weight")));
            let rows = |i: usize| s![i * 4..(i + 1) * 4, ..];
            let none = Array2::<f32>::zeros((4, 24));
            for (g, group) in groups.iter().enumerate() {
                let (key, value) = (pooled.key.weight(), pooled.value.weight());
                let near = |a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>| {
                    // As it is stored.
                    let off = (&a - &b).iter().fold(0f32, |most, x| most.max(x.abs()));
                    assert!(off < if dtype == Dtype::F32 { 1e-9 } else { 4e-3 }, "off by {off}");
                };
                near(k.slice(rows(g)), turned(key.slice(s![g, .., ..])).view());
                near(v.slice(rows(g)), value.slice(s![g, .., ..]));
                for place in 0..most {
                    let at = g * most + place;
                    let (query, output) = match group.get(place) {
                        Some(&head) => {
                            let query = own.query().unwrap().weight();
                            (
                                turned(query.slice(s![head, .., ..])),
                                own.output().unwrap().slice(s![head, .., ..]).to_owned(),
                            )
                        }
                        None => (none.clone(), none.t().to_owned()),
                    };
                    assert_eq!(q.slice(rows(at)), query);
                    assert_eq!(o.slice(s![.., at * 4..(at + 1) * 4]), output);
                }
            }
            if bias {
                let biases = read.vector(&name("k", "bias"));
                let expected = pooled.key.bias().unwrap();
                for g in 0..groups.len() {
                    let column = expected.row(g).to_owned().insert_axis(ndarray::Axis(1));
                    let off = &turned(column.view()).column(0) - &biases.slice(s![g * 4..(g + 1) * 4]);
                    assert!(off.iter().all(|x| x.abs() < 1e-6));
                }
                assert_eq!(read.vector(&name("q", "bias")).len(), heads[0][layer] as usize * 4);
            }
            if model_type == "llama" && bias {
                assert_eq!(read.vector(&name("output", "bias")), read.vector("output_norm.weight"));
            }
            for (name, from) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
                let stored = source.tensor(&format!("model.layers.{layer}.{from}.weight")).unwrap();
                assert!(read.vector(&format!("blk.{layer}.{name}.weight")).iter().eq(stored.iter()));
            }
            for name in ["gate", "up", "down"] {
                let stored = source.tensor(&format!("model.layers.{layer}.mlp.{name}_proj.weight")).unwrap();
                assert_eq!(read.matrix(&format!("blk.{layer}.ffn_{name}.weight")).into_dyn(), stored);
            }
        }
        for (name, from) in [("token_embd", "model.embed_tokens"), ("output", "lm_head")] {
            assert_eq!(
                read.matrix(&format!("{name}.weight")).into_dyn(),
                source.tensor(&format!("{from}.weight")).unwrap()
            );
        }
        let once = |mut counts: Vec<i32>| {
            if arch == "llama" {
                counts.dedup();
            }
            counts
        };
        let [queries, kv] = heads.map(once);
        assert_eq!(read.counts(&format!("{arch}.attention.head_count")), queries);
        assert_eq!(read.counts(&format!("{arch}.attention.head_count_kv")), kv);
        assert_eq!(read.counts(&format!("{arch}.feed_forward_length")), [5, 5]);
        assert_eq!(read.entry(&format!("{arch}.rope.freq_base")).to_f32().unwrap(), 500.0);
        assert_eq!(read.entry("tokenizer.ggml.model").to_string().unwrap(), "none");
        assert!(!read.content.tensor_infos.contains_key("rope_freqs.weight"));
    }
}

#[test]
fn any_frequencies_are_told() {
    let scaling = json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8});
    for scaling in [scaling, json!({"rope_type": "linear", "factor": 2.0})] {
        let (root, source) =
            source(&runnable("llama", Dtype::F32, 6, false).set("rope_scaling", scaling), None);
        let plan = plan(&source, &layers(6, [&[&[0, 1, 2], &[3, 4, 5]]; 2]));
        let mut read = write(&root, &source, &plan);
        let base = f64::from(read.entry("llama.rope.freq_base").to_f32().unwrap());
        let factors = read.vector("rope_freqs.weight");
        let own = &source.architecture().layers[0].rotary.as_ref().unwrap().frequencies;
        for (f, (factor, own)) in factors.iter().zip(own).enumerate() {
            let told = base.powf(-2.0 * f as f64 / 4.0) / f64::from(*factor);
            assert!((told / f64::from(*own) - 1.0).abs() < 1e-6, "{told} for {own}");
        }
        assert_eq!(factors.len(), own.len());
    }
}

#[test]
fn tokens_are_those_of_the_tokenizer() {
    let source = running::novels();
    let root = tempfile::tempdir().unwrap();
    let plan = running::neighbours(&source, 2);
    let read = write(&root, &source, &plan);
    let text = fs::read(source.path().join("tokenizer.json")).unwrap();
    let json: Value = serde_json::from_slice(&text).unwrap();
    let tokens = read.texts("tokenizer.ggml.tokens");
    assert_eq!(tokens.len(), 1024);
    for (token, id) in json["model"]["vocab"].as_object().unwrap() {
        assert_eq!(&tokens[id.as_u64().unwrap() as usize], token);
    }
    assert_eq!(read.counts("tokenizer.ggml.token_type")[..2], [3, 1]);
    assert_eq!(read.texts("tokenizer.ggml.merges").len(), json["model"]["merges"].as_array().unwrap().len());
    assert_eq!(read.entry("tokenizer.ggml.pre").to_string().unwrap(), "gpt-2");
    assert!(!read.entry("tokenizer.ggml.add_bos_token").to_bool().unwrap());
}

/// A tokenizer of 16 tokens that merges `a` and `b`.
fn small(pre: Value, more: &[(&str, Value)]) -> Value {
    let named = ["<unk>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"];
    let vocab: serde_json::Map<_, _> =
        named.iter().enumerate().map(|(id, token)| (token.to_string(), json!(id))).collect();
    let merges = json!([["a", "b"], ["▁", "ab"]]);
    let mut model = json!({"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"});
    more.iter().for_each(|(key, value)| model[*key] = value.clone());
    json!({"model": model, "pre_tokenizer": pre, "normalizer": null, "added_tokens": [
        {"id": 0, "content": "<unk>", "special": true}, {"id": 9, "content": "<s>", "special": true},
        {"id": 10, "content": "more", "special": false}],
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}})
}

#[test]
fn sentencepiece_by_scores() {
    let spaces = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let model = runnable("llama", Dtype::F32, 6, false).set("eos_token_id", json!([9, 3]));
    let tokenizer = small(spaces, &[("byte_fallback", json!(true))]);
    let (root, source) = source(&model, Some(&tokenizer));
    let plan = plan(&source, &layers(6, [&[&[0, 1, 2], &[3, 4, 5]]; 2]));
    let read = write(&root, &source, &plan);
    assert_eq!(read.entry("tokenizer.ggml.model").to_string().unwrap(), "llama");
    assert_eq!(read.counts("tokenizer.ggml.token_type"), [2, 6, 1, 1, 1, 1, 1, 5, 5, 3, 4, 5, 5, 5, 5, 5]);
    let scores = read.entry("tokenizer.ggml.scores").to_vec().unwrap();
    let scores: Vec<f32> = scores.iter().map(|score| score.to_f32().unwrap()).collect();
    assert_eq!((scores[5], scores[6]), (0.0, -1.0));
    assert!(scores[3] < -1e30, "{scores:?}");
    assert!(read.entry("tokenizer.ggml.add_space_prefix").to_bool().unwrap());
    assert!(read.entry("tokenizer.ggml.add_bos_token").to_bool().unwrap());
    assert!(!read.entry("tokenizer.ggml.add_eos_token").to_bool().unwrap());
    assert_eq!(read.counts("tokenizer.ggml.eos_token_id"), [9]);
    assert_eq!(read.counts("tokenizer.ggml.unknown_token_id"), [0]);
}

#[test]
fn what_llama_cpp_would_compute_otherwise_is_refused() {
    let refused = |source: &Checkpoint, parts: &[&str]| {
        let heads = source.architecture().layers[0].kv_heads;
        let whole = Partition::from_groups(heads, &[&(0..heads).collect::<Vec<_>>()]).unwrap();
        let plan = plan(source, &vec![whole; source.architecture().n_layers()]);
        let error = check_plan(source, &plan, &GGUF).unwrap_err();
        says(&error.to_string(), parts);
    };
    let mut taken = Vec::new();
    for (kind, differs) in made::kinds() {
        let source = made::made(kind, &differs, 6);
        let heads = source.architecture().layers[0].kv_heads;
        let whole = Partition::from_groups(heads, &[&(0..heads).collect::<Vec<_>>()]).unwrap();
        let plan = plan(&source, &vec![whole; source.architecture().n_layers()]);
        match check_plan(&source, &plan, &GGUF) {
            Ok(()) => taken.push(kind),
            Err(error) => says(&error.to_string(), &["llama.cpp"]),
        }
    }
    taken.dedup();
    assert_eq!(taken, ["llama", "qwen3", "seed_oss", "ernie4_5", "helium"]);
    let model = || runnable("llama", Dtype::F32, 6, false);
    let with = |tokenizer: Value, parts: &[&str]| refused(&source(&model(), Some(&tokenizer)).1, parts);
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})
    };
    with(small(split("[a-z]+"), &[]), &["tokenizer.json", "Split by \"[a-z]+\", ByteLevel"]);
    with(small(json!({"type": "ByteLevel", "add_prefix_space": true}), &[]), &["cuts texts by ByteLevel"]);
    with(small(json!({"type": "Sequence", "pretokenizers": []}), &[]), &["tokenizer.json", "cuts texts by"]);
    with(json!({"model": {"type": "Unigram"}}), &["`model.type` must be \"BPE\", found \"Unigram\""]);
    with(json!({"model": {"type": "BPE", "vocab": {"a": 16}}}), &["numbers below 16", "16 of \"a\""]);
    with(json!({}), &["`model.vocab` must be tokens with their numbers"]);
    // SentencePiece would merge `▁a` and `b`, too.
    let mut lacking =
        small(json!({"type": "Metaspace", "replacement": "▁"}), &[("byte_fallback", json!(true))]);
    lacking["model"]["vocab"]["▁a"] = json!(7);
    with(lacking, &["\"▁a\" and \"b\""]);
    let (root, checkpoint) = source(&model(), None);
    fs::write(root.path().join("in/tokenizer.model"), "x").unwrap();
    refused(&checkpoint, &["tokenizer.model", "without tokenizer.json", "save_pretrained"]);
}

#[test]
fn matrices_of_another_type() {
    let (root, source) = source(&runnable("llama", Dtype::BF16, 6, false), None);
    let plan = plan(&source, &layers(6, [&[&[0, 1, 2], &[3, 4, 5]]; 2]));
    let [kept, f16, f32] = [None, Some(qcqa::checkpoint::Dtype::F16), Some(qcqa::checkpoint::Dtype::F32)]
        .map(|dtype| {
            let (target, out) = (Gguf { dtype }, root.path().join(format!("{dtype:?}")));
            models::convert(&source, &plan, &target, &out, WriteOptions::default(), Run::new(0)).unwrap();
            Read::open(&out.join(Gguf::FILE))
        });
    for ((mut read, kind), file_type) in
        [(kept, "BF16"), (f16, "F16"), (f32, "F32")].into_iter().zip([32, 1, 0])
    {
        for name in ["token_embd", "blk.1.attn_k", "blk.0.ffn_down"] {
            let found = read.content.tensor_infos[&format!("{name}.weight")].ggml_dtype;
            assert_eq!(format!("{found:?}"), kind, "{name}");
        }
        assert_eq!(read.counts("general.file_type"), [file_type]);
        // What bf16 holds, the others hold.
        let stored = source.tensor("model.layers.0.mlp.down_proj.weight").unwrap();
        assert_eq!(read.matrix("blk.0.ffn_down.weight").into_dyn(), stored);
    }
}

#[test]
fn a_file_appears_whole_and_the_same() {
    let (root, source) = source(&runnable("llama", Dtype::BF16, 6, false).sharded(3), None);
    fs::write(source.path().join("LICENSE.txt"), "yours").unwrap();
    let plan = plan(&source, &layers(6, [&[&[0, 2, 3], &[1, 4], &[5]], &[&[0, 1, 2, 3, 4, 5]]]));
    let convert = |out: &str, options: WriteOptions| {
        let place = root.path().join(out);
        let report = models::convert(&source, &plan, &GGUF, &place, options, Run::new(0)).unwrap();
        (report, place)
    };
    let (dry, place) = convert("a", WriteOptions::default().dry_run(true));
    assert!(!place.exists());
    let (report, a) = convert("a", WriteOptions::default());
    let (_, b) = convert("b", WriteOptions::default());
    let files = |place: &Path| -> Vec<_> {
        let all = snapshot(place).into_iter();
        all.map(|(path, bytes)| (path.strip_prefix(place).unwrap().to_path_buf(), bytes)).collect()
    };
    assert_eq!(files(&a), files(&b));
    let names: Vec<_> = files(&a).into_iter().map(|(path, _)| path.to_string_lossy().into_owned()).collect();
    assert_eq!(names, ["LICENSE.txt", "model.gguf", "qcqa.json"]);
    assert_eq!(dry.files, report.files);
    assert!(dry.bytes.abs_diff(report.bytes) < 4096, "{} said, {} written", dry.bytes, report.bytes);
    assert_eq!(report.kv_bytes_after, 4 * 2 * 4 * 2);
    // Another run may replace it, and then nothing is left of it.
    let again = WriteOptions::default().force(true);
    models::convert(&source, &plan, &qcqa::targets::Expanded, &a, again, Run::new(0)).unwrap();
    assert!(!a.join("model.gguf").exists() && a.join("config.json").exists());
    assert_eq!(GGUF.name(), "gguf");
}
