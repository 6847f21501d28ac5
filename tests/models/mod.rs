//! Models, small and made up, for the tests of checkpoints.
#![allow(dead_code, unreachable_pub)]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use qcqa::checkpoint::Checkpoint;
use qcqa::files::{FileError, WriteOptions};
use qcqa::heads::HeadSource;
use qcqa::model::AttentionSpec;
use qcqa::output::{self, Report, Target};
use qcqa::partition::Partition;
use qcqa::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
use qcqa::spec::Spec;
use qcqa::{KvPooler, Run};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The model in the tree: 4 layers of 8 heads, BF16, tied embeddings.
pub fn novels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/novels-1m")
}

/// A model of the folder that QCQA_MODELS names; `None`, said aloud, where that is not set.
pub fn shared_model(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("QCQA_MODELS") else {
        println!("skipped: QCQA_MODELS is not set, so {name} is not at hand");
        return None;
    };
    let path = Path::new(&folder).join(name);
    assert!(path.is_dir(), "QCQA_MODELS is set, but {} is absent", path.display());
    Some(path)
}

/// A tensor to be stored.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// Numbers of about `scale`, in the type.
    pub fn random(dtype: Dtype, shape: &[usize], scale: f32, rng: &mut ChaCha8Rng) -> Self {
        let numbers: Vec<f32> =
            (0..shape.iter().product()).map(|_| rng.random_range(-scale..scale)).collect();
        Self { dtype, shape: shape.to_vec(), bytes: encode(dtype, &numbers) }
    }
}

pub fn encode(dtype: Dtype, numbers: &[f32]) -> Vec<u8> {
    let one = |&x: &f32| match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    numbers.iter().flat_map(one).collect()
}

/// A model of 2 layers, 6 query heads, d = 24, h = 4, and its config.json.
#[derive(Clone)]
pub struct Model {
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
    pub files: usize,
}

impl Model {
    pub fn new(model_type: &str, dtype: Dtype, kv_heads: usize, bias: bool) -> Self {
        let (layers, hidden, query_heads, head_dim) = (2, 24, 6, 4);
        let config = json!({
            "model_type": model_type, "hidden_size": hidden, "num_attention_heads": query_heads,
            "zeta": 1.5, "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "head_dim": head_dim,
            "rope_theta": 500.0, "tie_word_embeddings": true, "alpha": null, "rms_norm_eps": 1e-5,
            "attention_bias": bias,
        });
        let rng = &mut ChaCha8Rng::seed_from_u64(7);
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| {
            tensors.insert(name, Tensor::random(dtype, shape, 0.5, rng));
        };
        add("model.embed_tokens.weight".into(), &[16, hidden]);
        for i in 0..layers {
            for (name, heads) in [("q", query_heads), ("k", kv_heads), ("v", kv_heads)] {
                add(format!("model.layers.{i}.self_attn.{name}_proj.weight"), &[heads * head_dim, hidden]);
                if bias {
                    add(format!("model.layers.{i}.self_attn.{name}_proj.bias"), &[heads * head_dim]);
                }
            }
            add(format!("model.layers.{i}.self_attn.o_proj.weight"), &[hidden, query_heads * head_dim]);
            add(format!("model.layers.{i}.mlp.up_proj.weight"), &[5, hidden]);
        }
        Self { config, tensors, files: 1 }
    }

    /// The same in several files with an index.
    pub fn sharded(self, files: usize) -> Self {
        Self { files, ..self }
    }

    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap()
    }

    pub fn file(&self, i: usize) -> String {
        match self.files {
            1 => "model.safetensors".to_string(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        }
    }

    /// Writes the directory, with a tokenizer, a folder and weights that must not be copied beside it.
    pub fn write(&self, directory: &Path) {
        fs::create_dir_all(directory.join("extra")).unwrap();
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let mut map = serde_json::Map::new();
        for i in 0..self.files {
            // Dealt out in turn, so that every layer lies in several files.
            let of_file = self.tensors.iter().skip(i).step_by(self.files);
            let views = of_file
                .clone()
                .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
            let bytes = safetensors::serialize(views, Some(metadata.clone())).unwrap();
            fs::write(directory.join(self.file(i)), bytes).unwrap();
            map.extend(of_file.map(|(name, _)| (name.clone(), self.file(i).into())));
        }
        if self.files > 1 {
            let index = json!({"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": map});
            fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        fs::write(directory.join("config.json"), self.config.to_string()).unwrap();
        fs::write(directory.join("tokenizer.json"), "{}").unwrap();
        fs::write(directory.join("extra/template.jinja"), "hello").unwrap();
        fs::write(directory.join("pytorch_model.bin"), "old weights").unwrap();
        fs::write(directory.join("stray.safetensors"), "other weights").unwrap();
    }
}

/// The attention of a model's first layer.
pub fn attention(checkpoint: &Checkpoint) -> &AttentionSpec {
    &checkpoint.architecture().layers[0]
}

/// A plan of these groups, for this model, pooled by the mean.
pub fn plan(source: &dyn HeadSource, layers: &[Partition]) -> Plan {
    pooled_plan(source, layers, Pooling::new(Spec::new("mean")))
}

/// A plan of these groups, for this model.
pub fn pooled_plan(source: &dyn HeadSource, layers: &[Partition], pooling: Pooling) -> Plan {
    let id = source.id().unwrap();
    let kv_heads: usize = layers.iter().map(Partition::n_groups).sum();
    let asked = kv_heads as f64 / id.kv_heads() as f64;
    let method = Method::new("test", Spec::new("by hand"), Spec::new("none"), Spec::new("by hand"));
    let layers = layers.iter().map(|groups| LayerPlan::new(groups.clone(), 0.1)).collect();
    Plan::new(id, method, pooling, layers, asked, 0).unwrap()
}

/// The same groups in every layer.
pub fn same_plan(source: &dyn HeadSource, groups: &[&[usize]]) -> Plan {
    let model = source.architecture();
    let partition = Partition::from_groups(model.layers[0].kv_heads, groups).unwrap();
    plan(source, &vec![partition; model.n_layers()])
}

/// Converts as the plan says.
pub fn convert(
    source: &Checkpoint,
    plan: &Plan,
    target: &dyn Target,
    out: &Path,
    options: WriteOptions,
    run: Run<'_>,
) -> Result<Report, FileError> {
    output::convert(source, &SharedHeads::new(plan, source)?, target, out, options, run)
}

/// Converts with another pooler than the plan's.
pub fn convert_by(
    pooler: impl KvPooler + 'static,
    source: &Checkpoint,
    plan: &Plan,
    target: &dyn Target,
    out: &Path,
    options: WriteOptions,
) -> Result<Report, FileError> {
    let shared = SharedHeads::with_pooler(plan, source, Box::new(pooler))?;
    output::convert(source, &shared, target, out, options, Run::new(0))
}

/// Every file below a directory, with its bytes.
pub fn snapshot(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

/// Type, shape and bytes of every tensor of one file.
pub fn stored(path: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(n, t)| (n.to_string(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

/// Checks that an error says these things.
#[track_caller]
pub fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

/// Six KV heads in BF16.
pub fn llama() -> Model {
    Model::new("llama", Dtype::BF16, 6, false)
}

/// A source, and a plan of two groups of three for it, in a directory of their own.
pub fn ready() -> (TempDir, Checkpoint, Plan) {
    let root = tempfile::tempdir().unwrap();
    llama().write(&root.path().join("in"));
    let source = Checkpoint::open(root.path().join("in")).unwrap();
    let plan = same_plan(&source, &[&[0, 1, 2], &[3, 4, 5]]);
    (root, source, plan)
}

/// The error of a conversion, the same in a dry run, after which nothing has changed.
pub fn not_written(
    root: &TempDir,
    source: &Checkpoint,
    plan: &Plan,
    target: &dyn Target,
    out: &Path,
    force: bool,
) -> String {
    let before = snapshot(root.path());
    let [dry, wet] = [true, false].map(|dry_run| {
        let options = WriteOptions::default().force(force).dry_run(dry_run);
        convert(source, plan, target, out, options, Run::new(0)).unwrap_err().to_string()
    });
    assert_eq!(dry, wet);
    assert_eq!(snapshot(root.path()), before);
    dry
}

/// A copy of the model in the tree, that may be lost.
pub fn copied() -> (TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let model = root.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(novels()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    (root, model)
}

/// The configuration of a model, changed.
pub fn configured(model: &Path, change: impl FnOnce(&mut Value)) {
    let file = model.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    change(&mut config);
    fs::write(file, config.to_string()).unwrap();
}

/// The weights of a model, with further tensors (BF16) made of those that there are.
pub fn with_tensors(model: &Path, more: &[(String, Vec<usize>, Vec<f32>)]) {
    let mut tensors = stored(&model.join("model.safetensors"));
    for (name, shape, numbers) in more {
        let bytes = encode(Dtype::BF16, numbers);
        tensors.insert(name.clone(), (Dtype::BF16, shape.clone(), bytes));
    }
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(model.join("model.safetensors"), bytes).unwrap();
}

/// The weights of a model under other names, or without those of which there is no other.
pub fn renamed(model: &Path, name: impl Fn(&str) -> Option<String>) {
    let tensors = stored(&model.join("model.safetensors"));
    let views = tensors.iter().filter_map(|(old, (dtype, shape, bytes))| {
        Some((name(old)?, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(model.join("model.safetensors"), bytes).unwrap();
}
