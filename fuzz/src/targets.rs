//! Files that come from elsewhere, one function for each kind: it ends in an error or in what the file says, never in a panic,
//! and reads nothing outside the directory that it is given.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use qcqa::Run;
use qcqa::calibration::{Moments, TextSource, read_texts};
use qcqa::checkpoint::{Checkpoint, Config, Dtype};
use qcqa::evaluation::Choices;
use qcqa::families::FAMILIES;
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::output::{Provenance, check_plan, convert};
use qcqa::plan::{Plan, SharedHeads, read_plan, write_plan};
use qcqa::runtime::Model;
use qcqa::targets::{Gguf, TARGETS};
use qcqa::text::{IdWidth, Vocabulary, read_ids};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

use crate::made::{VOCABULARY, kinds, made};
use crate::models;

/// A target: what is done with an input.
pub type Target = fn(&[u8]);

/// All, by name.
pub const ALL: [(&str, Target); 13] = [
    ("config", config),
    ("run", run),
    ("index", index),
    ("header", header),
    ("plan", plan),
    ("converted", converted),
    ("moments", moments),
    ("tokenizer", tokenizer),
    ("beside", beside),
    ("ids", ids),
    ("texts", texts),
    ("choices", choices),
    ("gguf", gguf),
];

/// What stands in inputs for the directory that holds the one they are in.
const ROOT: &str = "@ROOT@";

/// Where inputs are written, with models to read them beside.
pub struct Ground {
    root: TempDir,
    /// A model of every family that can be made: config.json and weights.
    pub held: BTreeMap<String, (Vec<u8>, Vec<u8>)>,
    /// A Llama in a directory.
    pub model: Checkpoint,
    /// Two heads of three in a group.
    pub plan: Plan,
}

thread_local! {
    static GROUND: Ground = Ground::new();
}

/// Does something with the one of this thread.
pub fn with<T>(work: impl FnOnce(&Ground) -> T) -> T {
    GROUND.with(work)
}

/// A tokenizer of the model's vocabulary that takes any text.
pub const WORDS: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens":
[{"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
{"id": 9, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
"normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
"pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
"special_tokens": {"<s>": {"id": "<s>", "ids": [9], "tokens": ["<s>"]}}}, "decoder": null,
"model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
"fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
"vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "t": 5, "e": 6, "Ġt": 7, "s": 8},
"merges": [["a", "b"], ["Ġ", "t"]]}}"#;

impl Ground {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let mut builder = tempfile::Builder::new();
        builder.prefix("qcqa-fuzz.");
        let root = if memory.is_dir() { builder.tempdir_in(memory) } else { builder.tempdir() }.unwrap();
        let mut held = BTreeMap::new();
        for (kind, differs) in kinds() {
            let model = made(kind, &differs, 6);
            let config = serde_json::to_vec(model.config().raw()).unwrap();
            held.entry(kind.to_string()).or_insert((config, weights(&model, |_| true)));
        }
        let (config, whole) = &held["llama"];
        for directory in ["model", "converted", "shards"] {
            let directory = root.path().join(directory);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("config.json"), config).unwrap();
        }
        fs::write(root.path().join("model/model.safetensors"), whole).unwrap();
        fs::write(root.path().join("model/tokenizer.json"), WORDS).unwrap();
        let model = Checkpoint::open(root.path().join("model")).unwrap();
        // Two shards, and what an index has no business with: a file outside, and one below.
        for (i, name) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
            let half = weights(&model, |name| name.contains("layers.0") == (i == 0));
            fs::write(root.path().join("shards").join(name), half).unwrap();
        }
        let secret = TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
        let secret = safetensors::serialize([("secret", secret)], None).unwrap();
        fs::create_dir(root.path().join("shards/below")).unwrap();
        for place in ["secret.safetensors", "shards/below/secret.safetensors"] {
            fs::write(root.path().join(place), &secret).unwrap();
        }
        let plan = models::same_plan(&model, &[&[0, 1, 2], &[3, 4, 5]]);
        Self { root, held, model, plan }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn put(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, data).unwrap();
        path
    }
}

/// The tensors of a model that have such names, as a file.
fn weights(model: &Checkpoint, take: impl Fn(&str) -> bool) -> Vec<u8> {
    let read = |name: &str| {
        let tensor = model.tensor(name).unwrap();
        let bytes: Vec<u8> = tensor.iter().flat_map(|x| x.to_le_bytes()).collect();
        (name.to_string(), tensor.shape().to_vec(), bytes)
    };
    let tensors: Vec<_> = model.tensors().names().filter(|name| take(name)).map(read).collect();
    let view = |(name, shape, bytes): &(String, Vec<usize>, Vec<u8>)| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view.dtype(), view.shape().to_vec(), bytes.clone())
    };
    let owned: Vec<_> = tensors.iter().map(view).collect();
    let views = owned.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Everything that opening a model leads to without running it.
fn opened(model: &Checkpoint) {
    let layers = model.architecture().n_layers();
    assert_eq!(model.id().unwrap().layers.len(), layers);
    for layer in 0..layers {
        if let Ok(rows) = model.rows(layer) {
            let _ = rows.check_finite();
        }
        let _ = (model.heads(layer), model.stored_bytes(layer));
    }
    assert!(model.heads(layers).is_err());
    let _ = (model.kv_bytes_per_token(), model.weight_bytes());
}

/// A configuration over the weights of its family.
fn configured(data: &[u8]) -> Option<Checkpoint> {
    with(|ground| {
        let kind = Config::parse("config.json", data).ok();
        let kind = kind.and_then(|config| config.model_type().ok().map(str::to_string));
        let (_, weights) = kind.and_then(|kind| ground.held.get(&kind)).unwrap_or(&ground.held["llama"]);
        Checkpoint::from_bytes(data, weights.clone(), FAMILIES).ok()
    })
}

/// config.json.
pub fn config(data: &[u8]) {
    if let Some(model) = configured(data) {
        opened(&model);
    }
}

/// config.json of a model that runs.
pub fn run(data: &[u8]) {
    let Some(model) = configured(data).and_then(|model| Model::load(&model).ok()) else { return };
    let n = model.positions().min(5);
    let tokens = Array2::from_shape_fn((1, n), |(_, i)| (i % model.vocabulary()) as u32);
    if let Ok(logits) = model.logits(tokens.view()) {
        assert_eq!(logits.dim(), (1, n, model.vocabulary()));
    }
}

/// model.safetensors.index.json, beside two shards.
pub fn index(data: &[u8]) {
    with(|ground| {
        let text = String::from_utf8_lossy(data).replace(ROOT, &ground.root.path().to_string_lossy());
        ground.put("shards/model.safetensors.index.json", text.as_bytes());
        if let Ok(model) = Checkpoint::open(ground.at("shards")) {
            assert!(model.tensors().names().all(|name| name != "secret"), "read outside: {text}");
            opened(&model);
        }
    });
}

/// model.safetensors.
pub fn header(data: &[u8]) {
    let config = with(|ground| ground.held["llama"].0.clone());
    if let Ok(model) = Checkpoint::from_bytes(&config, data.to_vec(), FAMILIES) {
        opened(&model);
    }
}

/// A plan that was read is a plan: it is written and read again as it is, and obeyed or refused.
fn obeyed(ground: &Ground, plan: &Plan) {
    plan.check().unwrap();
    let again = ground.at("again.json");
    write_plan(&again, plan, WriteOptions::default().force(true)).unwrap();
    assert_eq!(&read_plan(&again).unwrap(), plan);
    if let Ok(shared) = SharedHeads::new(plan, &ground.model) {
        for layer in 0..plan.layers.len() {
            let _ = shared.layer(layer);
        }
    }
    for target in TARGETS {
        let _ = check_plan(&ground.model, plan, *target);
    }
}

/// A plan of version 1 or 2.
pub fn plan(data: &[u8]) {
    with(|ground| {
        if let Ok(plan) = read_plan(&ground.put("plan.json", data)) {
            obeyed(ground, &plan);
        }
    });
}

/// qcqa.json of a directory that was converted.
pub fn converted(data: &[u8]) {
    with(|ground| {
        ground.put("converted/qcqa.json", data);
        if let Ok(found) = Provenance::read(&ground.at("converted")) {
            obeyed(ground, &found.plan);
        }
    });
}

/// A file of moments.
pub fn moments(data: &[u8]) {
    with(|ground| {
        let (path, id) = (ground.put("moments.safetensors", data), ground.model.id().unwrap());
        let Ok(read) = Moments::read(&path, &id) else { return };
        for layer in 0..read.n_layers() {
            read.attach(ground.model.heads(layer).unwrap()).unwrap();
        }
        let again = ground.at("again.safetensors");
        read.write(&again, WriteOptions::default().force(true)).unwrap();
        assert_eq!(Moments::read(&again, &id).unwrap(), read);
    });
}

const TEXT: &str = "ab at a <s> bat, tea \u{e9}\u{10348}\n\n\tabab 12 <unk>s";

fn tokenised(ground: &Ground) {
    if let Ok(words) = Vocabulary::open(&ground.model) {
        for text in [TEXT, "", " "] {
            let all = [words.encode(text), words.encode_open(text)];
            assert!(all.into_iter().flatten().flatten().all(|id| (id as usize) < VOCABULARY));
        }
        assert!(words.ordinary().iter().all(|&id| (id as usize) < VOCABULARY));
    }
}

/// tokenizer.json.
pub fn tokenizer(data: &[u8]) {
    with(|ground| {
        ground.put("model/tokenizer.json", data);
        tokenised(ground);
        ground.put("model/tokenizer.json", WORDS.as_bytes());
    });
}

/// What names tokens beside tokenizer.json; the first byte says which file.
pub fn beside(data: &[u8]) {
    let Some((which, text)) = data.split_first() else { return };
    let names = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];
    let name = format!("model/{}", names[usize::from(*which) % names.len()]);
    with(|ground| {
        let path = ground.put(&name, text);
        tokenised(ground);
        fs::remove_file(path).unwrap();
    });
}

/// Token ids; the first byte says how wide.
pub fn ids(data: &[u8]) {
    let Some((which, bytes)) = data.split_first() else { return };
    let width = if which % 2 == 0 { IdWidth::U16 } else { IdWidth::U32 };
    let vocabulary = [0, 1, 24, 1 << 16, usize::MAX][usize::from(which / 2) % 5];
    with(|ground| {
        if let Ok(ids) = read_ids(&ground.put("ids.bin", bytes), width, vocabulary) {
            assert!(ids.iter().all(|&id| (id as usize) < vocabulary));
        }
    });
}

/// Calibration texts with their shares: 1 to 3 of them, by the first bytes.
pub fn texts(data: &[u8]) {
    let Some((&[most, count, a, b, c], text)) = data.split_first_chunk::<5>() else { return };
    let count = usize::from(count % 3) + 1;
    let share = |byte: u8| if byte == u8::MAX { usize::MAX } else { usize::from(byte) };
    with(|ground| {
        let part = text.len().div_ceil(count).max(1);
        let mut sources = Vec::new();
        for (i, byte) in [a, b, c].into_iter().enumerate().take(count) {
            let part = text.chunks(part).nth(i).unwrap_or_default();
            let path = ground.put(&format!("text-{i}"), part);
            sources.push(TextSource::file(path).with_share(share(byte)));
        }
        if let Ok((_, texts)) = read_texts(&ground.model, &sources, share(most), Run::new(0)) {
            assert_eq!(texts.each().len(), count);
            let windows = texts.fit();
            assert_eq!(texts.known(windows), windows.count());
            assert!(texts.validation().is_none_or(|chosen| texts.known(chosen) == chosen.count()));
            assert!(texts.fingerprint(&ground.model.id().unwrap()).starts_with("sha256:"));
        }
    });
}

/// Multiple choice.
pub fn choices(data: &[u8]) {
    with(|ground| {
        if let Ok(choices) = Choices::read(&ground.put("items.jsonl", data)) {
            assert!(choices.items().iter().all(|item| item.gold < item.choices.len()));
        }
    });
}

/// A tokenizer, or what is beside it, in a GGUF file, which another reader reads; the first byte says which, and the type.
pub fn gguf(data: &[u8]) {
    let Some((which, text)) = data.split_first() else { return };
    let dtype = [None, Some(Dtype::F16), Some(Dtype::F32), Some(Dtype::Bf16)][usize::from(which % 4)];
    let name = ["model/tokenizer.json", "model/tokenizer_config.json"][usize::from(which / 4 % 2)];
    with(|ground| {
        ground.put(name, text);
        let (out, target) = (ground.at("out"), Gguf { dtype });
        let shared = SharedHeads::new(&ground.plan, &ground.model).unwrap();
        if check_plan(&ground.model, &ground.plan, &target).is_ok() {
            convert(&ground.model, &shared, &target, &out, WriteOptions::default(), Run::new(0)).unwrap();
            let mut file = fs::File::open(out.join(Gguf::FILE)).unwrap();
            let content = candle_core::quantized::gguf_file::Content::read(&mut file).unwrap();
            let tokens = content.metadata["tokenizer.ggml.tokens"].to_vec().unwrap();
            assert_eq!(tokens.len(), VOCABULARY);
            for name in content.tensor_infos.keys() {
                content.tensor(&mut file, name, &candle_core::Device::Cpu).unwrap();
            }
            fs::remove_dir_all(out).unwrap();
        }
        fs::remove_file(ground.at(name)).unwrap();
        ground.put("model/tokenizer.json", WORDS.as_bytes());
    });
}
