//! Families of a downstream crate: one file, whatever the layout, and the heads are the same.
#![cfg(feature = "checkpoint")]

mod models;

use std::path::Path;

use half::bf16;
use models::{Model, Tensor, convert, encode, plan, says};
use proptest::prelude::*;
use qcqa::Run;
use qcqa::checkpoint::{Checkpoint, Config, Family, TensorIndex};
use qcqa::files::{FileError, WriteOptions};
use qcqa::heads::HeadSource;
use qcqa::model::{Architecture, AttentionSpec, Axis, Rotary, Rotation, Stored, StoredHeads};
use qcqa::output::Target;
use qcqa::partition::Partition;
use qcqa::targets::{Expanded, Stock};
use safetensors::Dtype;

const FUSED: &str = "attention.query_key_value";

/// Where the heads of a family lie.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// [Q;K;V] in one tensor with a bias.
    Fused,
    /// Split projections stored the other way round, inputs in rows, with biases.
    Columns,
    /// The query, key and value of each head side by side.
    PerHead,
}

/// A family that only this file knows.
#[derive(Debug, Clone, Copy)]
struct Own(Layout);

impl Family for Own {
    fn model_types(&self) -> &'static [&'static str] {
        match self.0 {
            Layout::Fused => &["fused"],
            Layout::Columns => &["columns"],
            Layout::PerHead => &["per-head"],
        }
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let (heads, kv) = (config.required("num_attention_heads")?, config.required("num_key_value_heads")?);
        let (hidden, h) = (config.required("hidden_size")?, config.required("head_dim")?);
        let layer = |i: usize| {
            let name = |part: &str, kind: &str| format!("layers.{i}.{part}.{kind}");
            let part = |part: &str, axis, heads| {
                let bias = tensors.existing(name(part, "bias"));
                Stored::split(name(part, "weight"), axis, heads, h).with_bias(bias)
            };
            let among = |first, stride, extent| part(FUSED, Axis::Rows, 0).among(first, stride, extent);
            let [query, key, value] = match self.0 {
                Layout::Fused => {
                    let extent = (heads + 2 * kv) * h;
                    [0, heads, heads + kv].map(|first| among(first * h, h, extent))
                }
                Layout::PerHead => [0, 1, 2].map(|first| among(first * h, 3 * h, 3 * heads * h)),
                Layout::Columns => {
                    [("q", heads), ("k", kv), ("v", kv)].map(|(n, heads)| part(n, Axis::Columns, heads))
                }
            };
            let axis = if let Layout::Columns = self.0 { Axis::Rows } else { Axis::Columns };
            let stored = StoredHeads::new(query, key, value, part("o", axis, heads));
            let rotary = Rotary::from_theta(Rotation::HalfSplit { dims: h }, 500.0);
            AttentionSpec::new(heads, kv, h).with_rotary(rotary).with_stored(stored)
        };
        let layers = (0..config.required("num_hidden_layers")?).map(layer).collect();
        Ok(Architecture::new(config.model_type()?, hidden, layers))
    }
}

/// Numbers of `width` a row, of a matrix or a bias.
fn rows(tensor: &Tensor, width: usize) -> Vec<Vec<f32>> {
    let numbers: Vec<f32> = match tensor.dtype {
        Dtype::BF16 => tensor.bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => tensor.bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    };
    numbers.chunks(width).map(<[f32]>::to_vec).collect()
}

fn transposed(rows: &[Vec<f32>]) -> Vec<Vec<f32>> {
    (0..rows[0].len()).map(|column| rows.iter().map(|row| row[column]).collect()).collect()
}

/// The same numbers as a split model has, in another layout.
fn laid_out(split: &Model, layout: Layout) -> Model {
    const H: usize = 4;
    let mut model = split.clone();
    model.config["model_type"] = Own(layout).model_types()[0].into();
    model.tensors.retain(|name, _| !name.contains("self_attn"));
    let mut add = |name: String, dtype, rows: Vec<Vec<f32>>, vector: bool| {
        let shape = if vector { vec![rows.len()] } else { vec![rows.len(), rows[0].len()] };
        model.tensors.insert(name, Tensor { dtype, shape, bytes: encode(dtype, &rows.concat()) });
    };
    for layer in 0..2 {
        for (kind, width) in [("weight", 24), ("bias", 1)] {
            let of =
                |part: &str| split.tensors.get(&format!("model.layers.{layer}.self_attn.{part}_proj.{kind}"));
            let Some(query) = of("q") else { continue };
            let [q, k, v] = ["q", "k", "v"].map(|part| rows(of(part).unwrap(), width));
            let (dtype, fused, vector) = (query.dtype, format!("layers.{layer}.{FUSED}.{kind}"), width == 1);
            match layout {
                Layout::Fused => add(fused, dtype, [q, k, v].concat(), vector),
                Layout::PerHead => {
                    let heads = q.chunks(H).zip(k.chunks(H)).zip(v.chunks(H));
                    let each = heads.flat_map(|((q, k), v)| [q, k, v].concat());
                    add(fused, dtype, each.collect(), vector);
                }
                Layout::Columns => {
                    for (part, rows) in [("q", q), ("k", k), ("v", v)] {
                        let rows = if vector { rows } else { transposed(&rows) };
                        add(format!("layers.{layer}.{part}.{kind}"), dtype, rows, vector);
                    }
                }
            }
        }
        let output = &split.tensors[&format!("model.layers.{layer}.self_attn.o_proj.weight")];
        let columns = rows(output, 24);
        let columns = if let Layout::Columns = layout { transposed(&columns) } else { columns };
        add(format!("layers.{layer}.o.weight"), output.dtype, columns, false);
    }
    model
}

fn assert_same_heads(one: &Checkpoint, other: &Checkpoint) {
    for i in 0..one.architecture().n_layers() {
        let [a, b] = [one, other].map(|model| model.heads(i).unwrap());
        assert_eq!((a.key(), a.value(), a.query()), (b.key(), b.value(), b.query()), "layer {i}");
        assert_eq!((a.output(), a.rotation(), a.layer()), (b.output(), b.rotation(), i), "layer {i}");
    }
}

fn open(path: &Path, layout: Layout) -> Checkpoint {
    Checkpoint::open_as(path, &[&Own(layout)]).unwrap()
}

/// A model in both layouts, in a directory of their own.
fn both(
    layout: Layout,
    dtype: Dtype,
    kv_heads: usize,
    bias: bool,
) -> (tempfile::TempDir, Checkpoint, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    let split = Model::new("qwen2", dtype, kv_heads, bias);
    split.write(&root.path().join("split"));
    laid_out(&split, layout).sharded(2).write(&root.path().join("other"));
    let (split, other) = (Checkpoint::open(root.path().join("split")).unwrap(), root.path().join("other"));
    (root, split, open(&other, layout))
}

/// What can be read, and with how many KV heads.
const ALL: [(Layout, &[usize]); 3] =
    [(Layout::Fused, &[6, 3, 1]), (Layout::Columns, &[6, 2]), (Layout::PerHead, &[6])];

#[test]
fn heads_are_those_of_the_split_layout() {
    for (layout, kv_heads) in ALL {
        for &kv_heads in kv_heads {
            for (dtype, bias) in [(Dtype::BF16, true), (Dtype::F32, false), (Dtype::F32, true)] {
                let (_root, split, other) = both(layout, dtype, kv_heads, bias);
                assert_same_heads(&split, &other);
                assert_eq!(split.dtype(), other.dtype());
            }
        }
    }
}

#[test]
fn outputs_are_those_of_the_split_layout() {
    let pairs =
        |n: usize| Partition::from_labels(&(0..n).map(|i| i % n.div_ceil(2)).collect::<Vec<_>>()).unwrap();
    for (layout, kv_heads) in ALL {
        for (&kv_heads, bias) in kv_heads.iter().flat_map(|n| [(n, false), (n, true)]) {
            let (root, split, other) = both(layout, Dtype::BF16, kv_heads, bias);
            for target in [&Stock as &dyn Target, &Expanded] {
                // Equal groups for stock, which an odd number of heads does not have in pairs.
                let groups =
                    if kv_heads % 2 == 0 { pairs(kv_heads) } else { Partition::one_group(kv_heads).unwrap() };
                let write = |source: &Checkpoint, name: &str| {
                    let out = root.path().join(format!("{name}-{}", target.name()));
                    let plan = plan(source, &[groups.clone(), groups.clone()]);
                    convert(source, &plan, target, &out, WriteOptions::default(), Run::new(0)).map(|_| out)
                };
                let expected = Checkpoint::open(write(&split, "of-split").unwrap()).unwrap();
                match (write(&other, "of-other"), layout, target.name()) {
                    (Err(error), Layout::PerHead, "stock") => says(
                        &error.to_string(),
                        &[
                            "target stock cannot hold the plan: layer 0",
                            FUSED,
                            "among others their number cannot change",
                        ],
                    ),
                    (out, ..) => assert_same_heads(&expected, &open(&out.unwrap(), layout)),
                }
            }
        }
    }
}

#[test]
fn families_are_asked_in_turn_and_named() {
    let root = tempfile::tempdir().unwrap();
    laid_out(&Model::new("qwen2", Dtype::F32, 6, true), Layout::Fused).write(root.path());
    says(&Checkpoint::open(root.path()).unwrap_err().to_string(), &["\"fused\" is not supported", "llama"]);
    let families: [&dyn Family; 2] = [&Own(Layout::Columns), &Own(Layout::Fused)];
    assert_eq!(Checkpoint::open_as(root.path(), &families).unwrap().architecture().model_type, "fused");
    let error = Checkpoint::open_as(root.path(), &families[..1]).unwrap_err().to_string();
    says(&error, &["\"fused\" is not supported", "supported are columns"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any piece of any row, from the file of any layout and from the decoded layer.
    #[test]
    fn pieces_of_rows_are_those_of_the_heads(
        which in 0..3_usize,
        bias in any::<bool>(),
        head in 0..6_usize,
        ends in (0.0..1.0, 0.0..1.0),
    ) {
        let (_root, split, other) = both(ALL[which].0, Dtype::BF16, 6, bias);
        let (rows, heads) = (other.rows(1).unwrap(), split.heads(1).unwrap());
        rows.check_finite().unwrap();
        let at = |share: f64| (share * (rows.row_len() + 1) as f64) as usize;
        let (start, end) = (at(ends.0).min(at(ends.1)), at(ends.0).max(at(ends.1)));
        let (mut stored, mut decoded) = (vec![0.0; end - start], vec![1.0; end - start]);
        rows.read(head, start, &mut stored);
        qcqa::heads::HeadRows::read(&heads, head, start, &mut decoded);
        prop_assert_eq!(rows.row_len(), qcqa::heads::HeadRows::row_len(&heads));
        prop_assert_eq!(stored, decoded);
    }
}
