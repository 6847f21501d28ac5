//! Targets of a downstream crate: what they say is written, and what cannot be is refused.
#![cfg(feature = "checkpoint")]

mod models;

use std::fs;

use models::{
    Model, Tensor, attention, convert, not_written, plan, ready, same_plan, says, snapshot, stored,
};
use ndarray::{Array1, Array3, Axis};
use qcqa::budget::Limits;
use qcqa::checkpoint::{Checkpoint, Dtype};
use qcqa::files::{FileError, WriteOptions};
use qcqa::heads::{HeadSource, Heads, Pooled};
use qcqa::model::{Architecture, Part};
use qcqa::output::{Content, OutputModel, OutputTensor, Slot, Target, convert as write};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::{Plan, SharedHeads};
use qcqa::pooler::MeanPooler;
use qcqa::spec::Spec;
use qcqa::targets::{Expanded, Stock, TARGETS, by_name};
use qcqa::{Error, KvPooler, Run};
use serde_json::{Map, Value};

/// Groups of any size, filled up with query heads of zeros to the size of the largest; the norms of the
/// shared keys; a file; another name for the embedding.
#[derive(Debug)]
struct Filled;

impl Target for Filled {
    fn name(&self) -> &'static str {
        "filled"
    }

    fn limits(&self, _: &Architecture) -> Limits {
        Limits { same_k: true, ..Limits::default() }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let model = source.architecture();
        let size = plan.groups().flat_map(Partition::sizes).max().unwrap_or(1);
        let r = model.layers[0].queries_per_head();
        let mut output = OutputModel::from_slots(model, source.config().raw().clone(), |layer| {
            let groups = plan.layers[layer].groups.groups();
            let queries = groups.iter().flat_map(|group| {
                let heads = group.iter().flat_map(|&head| (head * r..(head + 1) * r).map(Slot::Head));
                heads.chain(std::iter::repeat(Slot::Zero)).take(size * r)
            });
            ((0..groups.len()).map(Slot::Head).collect(), queries.collect())
        })?;
        let k = output.kv_heads[0];
        output.config["num_key_value_heads"] = k.into();
        output.config["num_attention_heads"] = (k * size * r).into();
        for layer in 0..model.n_layers() {
            let norms = |_: &Heads, pooled: &Pooled| {
                let keys = pooled.key.weight();
                Ok(Array1::from_iter(keys.outer_iter().map(|key| key.iter().map(|v| v * v).sum())).into_dyn())
            };
            let made = Content::made(layer, &[k], Dtype::F32, norms);
            output.tensors.push(OutputTensor::new(format!("norms.{layer}"), made));
        }
        let embedding = "model.embed_tokens.weight";
        output.left_out.insert(embedding.to_string());
        output.tensors.push(OutputTensor::new("wte", Content::Copied(embedding.to_string())));
        output.files.push(("extra/template.jinja".into(), b"another".to_vec()));
        output.files.push(("new/layout.txt".into(), b"filled".to_vec()));
        Ok(output)
    }
}

/// Weights, biases and output columns of a query head.
fn query_head(heads: &Heads, head: usize) -> Vec<f32> {
    let (query, output) = (heads.query().unwrap(), heads.output().unwrap());
    let (weight, bias) = (query.weight(), query.bias().unwrap());
    let all = [weight.index_axis(Axis(0), head), output.index_axis(Axis(0), head)];
    all.iter().flatten().chain(bias.row(head)).copied().collect()
}

#[test]
fn a_target_of_ones_own() {
    for (kv_heads, files) in [(6, 1), (6, 2), (3, 2)] {
        let root = tempfile::tempdir().unwrap();
        let (input, out) = (root.path().join("in"), root.path().join("out"));
        Model::new("qwen2", safetensors::Dtype::BF16, kv_heads, true).sharded(files).write(&input);
        let source = Checkpoint::open(&input).unwrap();
        let groups: [&[&[usize]]; 2] = if kv_heads == 6 {
            [&[&[0, 2, 3, 5], &[1, 4]], &[&[0], &[1, 2, 3, 4, 5]]]
        } else {
            [&[&[0, 2], &[1]], &[&[0], &[1, 2]]]
        };
        let partitions = groups.map(|groups| Partition::from_groups(kv_heads, groups).unwrap());
        let plan = plan(&source, &partitions);
        let report = convert(&source, &plan, &Filled, &out, WriteOptions::default(), Run::new(0)).unwrap();
        assert_eq!(
            (report.kv_bytes_before, report.kv_bytes_after),
            (2 * 2 * kv_heads * 4 * 2, 2 * 2 * 2 * 4 * 2)
        );
        assert_eq!(report.files.len(), snapshot(&out).len());
        assert_eq!(fs::read_to_string(out.join("extra/template.jinja")).unwrap(), "another");
        assert_eq!(fs::read_to_string(out.join("new/layout.txt")).unwrap(), "filled");

        let filled = Checkpoint::open(&out).unwrap();
        let (r, size) = (6 / kv_heads, partitions.iter().flat_map(Partition::sizes).max().unwrap());
        assert_eq!((attention(&filled).kv_heads, attention(&filled).query_heads), (2, 2 * size * r));
        assert_eq!(filled.tensor("wte").unwrap(), source.tensor("model.embed_tokens.weight").unwrap());
        assert!(filled.tensor("model.embed_tokens.weight").is_err());
        for (i, groups) in groups.iter().enumerate() {
            let (old, new) = (source.heads(i).unwrap(), filled.heads(i).unwrap());
            let shared = MeanPooler.pool(&old, &partitions[i]).unwrap();
            let round = |weights: ndarray::ArrayView3<f32>| weights.mapv(|v| Dtype::Bf16.round(v));
            assert_eq!(new.key().weight(), round(shared.key.weight()));
            assert_eq!(new.value().weight(), round(shared.value.weight()));
            let norms = filled.tensor(&format!("norms.{i}")).unwrap();
            assert!(norms.iter().all(|&norm| norm > 0.0) && norms.shape() == [2]);
            for (g, group) in groups.iter().enumerate() {
                for position in 0..size * r {
                    let at = g * size * r + position;
                    let head = group.get(position / r).map(|head| head * r + position % r);
                    let found = query_head(&new, at);
                    match head {
                        Some(head) => assert_eq!(found, query_head(&old, head)),
                        None => assert!(found.iter().all(|&v| v == 0.0)),
                    }
                }
            }
        }
        if files > 1 {
            let index = fs::read(out.join("model.safetensors.index.json")).unwrap();
            let index: Value = serde_json::from_slice(&index).unwrap();
            let names: Vec<&str> = index["weight_map"].as_object().unwrap().keys().map(|k| &**k).collect();
            assert!(names.contains(&"wte") && names.contains(&"norms.1"));
            assert!(!names.contains(&"model.embed_tokens.weight"));
            assert_eq!(index["metadata"]["total_size"], filled.weight_bytes());
        }
    }
}

/// What stock says, changed.
struct Changed(fn(&mut OutputModel));

impl std::fmt::Debug for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Changed")
    }
}

impl Target for Changed {
    fn name(&self) -> &'static str {
        "changed"
    }

    fn limits(&self, model: &Architecture) -> Limits {
        Stock.limits(model)
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let mut output = Stock.output(source, plan)?;
        (self.0)(&mut output);
        Ok(output)
    }
}

const KEY: &str = "model.layers.1.self_attn.k_proj.weight";

fn pieces<'a>(output: &'a mut OutputModel, name: &str) -> &'a mut Vec<(Part, Slot)> {
    match &mut output.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap().content {
        Content::Heads { pieces, .. } => pieces,
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let (root, source, plan) = ready();
    let refused =
        |change| not_written(&root, &source, &plan, &Changed(change), &root.path().join("out"), false);
    let wrong = ["target changed lays out layer 1 wrongly"];
    let changed = |change, parts: &[&str]| {
        let message = refused(change);
        says(&message, &wrong);
        says(&message, parts);
    };
    changed(|o| o.tensors.retain(|t| t.name != KEY), &[KEY, "is copied as it is"]);
    changed(
        |o| {
            o.tensors.retain(|t| t.name != KEY);
            o.tensors.push(OutputTensor::new(KEY, Content::Copied(KEY.to_string())));
        },
        &[KEY, "is copied as it is"],
    );
    changed(
        |o| {
            o.tensors.retain(|t| t.name != KEY);
            o.left_out.insert(KEY.to_string());
        },
        &["keys and values lie in different orders"],
    );
    changed(|o| pieces(o, KEY).reverse(), &["keys and values lie in different orders"]);
    changed(|o| pieces(o, &KEY.replace("k_proj", "q_proj")).swap(1, 2), &["queries and outputs"]);
    changed(|o| o.kv_heads[1] = 3, &["2 KV heads are laid out, and 3 cached"]);
    changed(
        |o| {
            for name in ["k_proj", "v_proj"] {
                pieces(o, &KEY.replace("k_proj", name))[1].1 = Slot::Zero;
            }
        },
        &["query head 3 would read zeros instead of group 1"],
    );

    let never = |change, part: &str| {
        says(&refused(change), &["target changed describes an output that cannot be", part])
    };
    never(|o| o.kv_heads.truncate(1), "1 numbers of cached heads for 2 layers");
    never(|o| o.left_out.extend([KEY.to_string()]), "two things of the tensor");
    never(|o| o.files.push(("../diary.txt".into(), Vec::new())), "diary.txt is not in it");
    never(|o| o.files.push(("/diary.txt".into(), Vec::new())), "diary.txt is not in it");
    never(|o| o.files.push(("".into(), Vec::new())), "is not in it");
    never(|o| o.files.push(("config.json".into(), Vec::new())), "config.json is another's");
    never(|o| o.files.push(("model.safetensors".into(), Vec::new())), "is another's");
    never(|o| o.files.extend([("a".into(), Vec::new()), ("a".into(), Vec::new())]), "a is another's");
    never(
        |o| o.tensors.push(OutputTensor::new("new", Content::Copied("old".into()))),
        "old, which the source",
    );
    never(|o| o.tensors.push(OutputTensor::new("new", Content::OutputBias(0))), "there is none");
    never(|o| o.tensors.push(OutputTensor::new("new", Content::OutputBias(2))), "new is of layer 2");
    never(
        |o| {
            let huge = Content::made(0, &[usize::MAX, 2], Dtype::F32, |_, _| Err(Error::NoQueries));
            o.tensors.push(OutputTensor::new("new", huge));
        },
        "is too large",
    );
}

#[test]
fn made_tensors_are_held_to_their_shape() {
    let (root, source, plan) = ready();
    let out = root.path().join("out");
    let refused = |change| {
        let error = convert(&source, &plan, &Changed(change), &out, WriteOptions::default(), Run::new(0))
            .unwrap_err();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        error.to_string()
    };
    let message = refused(|o| {
        let made = Content::made(0, &[3], Dtype::F32, |_, _| Ok(Array1::zeros(4).into_dyn()));
        o.tensors.push(OutputTensor::new("made", made));
    });
    says(&message, &["made: expected shape [3], found [4]"]);
    let message = refused(|o| {
        let made = Content::made(0, &[1], Dtype::F32, |_, _| Ok(Array1::from_elem(1, f32::NAN).into_dyn()));
        o.tensors.push(OutputTensor::new("made", made));
    });
    says(&message, &["made: a value is NaN or infinite"]);
    let message = refused(|o| {
        let made = Content::made(0, &[1], Dtype::F16, |_, _| Ok(Array1::from_elem(1, 1e6).into_dyn()));
        o.tensors.push(OutputTensor::new("made", made));
    });
    says(&message, &["tensor made", "1000000", "f16"]);
}

/// Adds 1 to the bias of the output projection.
#[derive(Debug)]
struct Lifted;

impl KvPooler for Lifted {
    fn spec(&self) -> Spec {
        Spec::new("lifted")
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        let mut pooled = MeanPooler.pool(heads, partition)?;
        pooled.output_bias = heads.output_bias().map(|bias| &bias + 1.0);
        Ok(pooled)
    }
}

#[test]
fn biases_of_outputs_are_written_where_they_changed() {
    let root = tempfile::tempdir().unwrap();
    let mut model = Model::new("llama", safetensors::Dtype::F32, 6, true);
    for layer in 0..2 {
        let bytes = (0..24).flat_map(|i| (i as f32 - 7.0).to_le_bytes()).collect();
        let bias = Tensor { dtype: safetensors::Dtype::F32, shape: vec![24], bytes };
        model.tensors.insert(format!("model.layers.{layer}.self_attn.o_proj.bias"), bias);
    }
    model.write(&root.path().join("in"));
    let source = Checkpoint::open(root.path().join("in")).unwrap();
    let plan = same_plan(&source, &[&[0, 1, 2], &[3, 4, 5]]);
    let holds = |target: &&dyn Target| target.limits(source.architecture()).check(plan.groups()).is_ok();
    for target in TARGETS.iter().copied().filter(holds).filter(|target| !target.name().starts_with("gguf")) {
        let [same, lifted] =
            ["same", "lifted"].map(|name| root.path().join(format!("{}-{name}", target.name())));
        convert(&source, &plan, target, &same, WriteOptions::default(), Run::new(0)).unwrap();
        let shared = SharedHeads::with_pooler(&plan, &source, Box::new(Lifted)).unwrap();
        write(&source, &shared, target, &lifted, WriteOptions::default(), Run::new(0)).unwrap();
        let name = "model.layers.1.self_attn.o_proj.bias";
        let bytes = |path: &std::path::Path| stored(&path.join("model.safetensors"))[name].2.clone();
        assert_eq!(bytes(&same), bytes(source.path()));
        let lifted = Checkpoint::open(&lifted).unwrap();
        assert_eq!(lifted.tensor(name).unwrap(), source.tensor(name).unwrap() + 1.0);
    }
}

#[test]
fn what_stock_and_expanded_can_hold() {
    let model = Architecture::new("raw", 12, vec![qcqa::model::AttentionSpec::new(6, 6, 4); 2]);
    let of = |labels: [usize; 6]| Partition::from_labels(&labels).unwrap();
    let (pairs, halves, uneven) = (of([0, 0, 1, 1, 2, 2]), of([0, 0, 0, 1, 1, 1]), of([0, 0, 0, 0, 1, 1]));
    let check = |target: &dyn Target, layers: [&Partition; 2]| target.limits(&model).check(layers);
    check(&Stock, [&pairs, &pairs]).unwrap();
    let message = |layers| check(&Stock, layers).unwrap_err().to_string();
    assert_eq!(message([&pairs, &halves]), "layer 1 has 2 groups, but all layers must have the 3 of layer 0");
    assert_eq!(
        message([&uneven, &uneven]),
        "layer 0 has groups of [4, 2] heads, but all groups must have one size"
    );
    check(&Expanded, [&uneven, &pairs]).unwrap();
    for &target in TARGETS {
        assert_eq!(by_name(target.name()).unwrap().name(), target.name());
    }
    assert!(by_name("onnx").is_none());
    // Of tensors that no file has nothing can be written.
    let source = qcqa::heads::InMemory::new(vec![raw(); 2]).unwrap();
    let slots = |_| (vec![Slot::Head(0)], vec![Slot::Head(0)]);
    let error = OutputModel::from_slots(source.architecture(), Map::new(), slots).unwrap_err();
    assert!(matches!(error, Error::Limits { layer: 0, .. }), "{error}");
}

fn raw() -> Heads {
    let projection = || qcqa::heads::Projection::new(Array3::ones((4, 2, 3)), None).unwrap();
    Heads::new(projection(), projection()).unwrap()
}

/// Fixes half of the heads of layer 0.
#[derive(Debug)]
struct Pinned;

impl Target for Pinned {
    fn name(&self) -> &'static str {
        "pinned"
    }

    fn limits(&self, model: &Architecture) -> Limits {
        Limits { fixed: [(0, model.layers[0].kv_heads / 2)].into(), ..Expanded.limits(model) }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        Expanded.output(source, plan)
    }
}

#[test]
fn what_a_target_fixes_nobody_changes() {
    let source = Checkpoint::open(models::novels()).unwrap();
    let plan = |fixed: &[(usize, usize)]| {
        let limits = Limits { fixed: fixed.iter().copied().collect(), ..Limits::default() };
        Compress::new(Preset::QcqaAc).target(&Pinned).limits(limits).plan(&source, Run::new(0))
    };
    for fixed in [&[][..], &[(0, 4)], &[(1, 2)]] {
        let plan = plan(fixed).unwrap();
        assert_eq!(plan.group_counts()[0], 4);
        assert!(fixed.iter().all(|&(layer, k)| plan.group_counts()[layer] == k));
    }
    says(
        &plan(&[(0, 2)]).unwrap_err().to_string(),
        &["layer 0 is fixed to 2 groups", "the target pinned fixes 4"],
    );
}
