//! Checkpoints of every supported form are read as what they are.
#![cfg(feature = "checkpoint")]

mod models;

use models::{Model, Tensor, attention, encode, novels};
use ndarray::{Array2, Axis};
use proptest::prelude::*;
use qcqa::checkpoint::{Checkpoint, Dtype};
use qcqa::fitness::WeightSharingError;
use qcqa::heads::{HeadRows, HeadSource, Heads};
use qcqa::model::{Rotary, Rotation};
use safetensors::Dtype as Stored;
use serde_json::{Value, json};

fn open(model: &Model) -> (tempfile::TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    model.write(directory.path());
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    (directory, checkpoint)
}

/// Radians per position of each pair.
fn frequencies(checkpoint: &Checkpoint) -> &[f32] {
    &attention(checkpoint).rotary.as_ref().unwrap().frequencies
}

fn usual(dims: usize, theta: f64) -> Vec<f32> {
    Rotary::from_theta(Rotation::HalfSplit { dims }, theta).frequencies
}

/// Whether keys of all layers have a bias (or of none).
fn has_bias(checkpoint: &Checkpoint) -> bool {
    let biases = |part| checkpoint.tensors().names().filter(|name| name.contains(part)).count();
    let n = biases("k_proj.bias");
    assert!(n == biases("v_proj.bias") && [0, checkpoint.architecture().n_layers()].contains(&n));
    n > 0
}

fn row(rows: &dyn HeadRows, head: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.row_len()];
    rows.read(head, 0, &mut out);
    out
}

#[test]
fn the_model_in_the_tree() {
    let checkpoint = Checkpoint::open(novels()).unwrap();
    let (model, layer) = (checkpoint.architecture(), attention(&checkpoint));
    assert_eq!((model.n_layers(), model.hidden, layer.query_heads), (4, 128, 8));
    assert_eq!((layer.kv_heads, layer.head_dim), (8, 16));
    assert_eq!(frequencies(&checkpoint), usual(16, 10_000.0));
    assert!(model.tied_embeddings && !has_bias(&checkpoint));
    assert_eq!((checkpoint.dtype(), checkpoint.shards()), (Dtype::Bf16, 1));
    let numbers: usize =
        checkpoint.tensors().names().map(|name| checkpoint.tensor(name).unwrap().len()).sum();
    assert_eq!(checkpoint.weight_bytes(), 2 * numbers as u64);
    assert_eq!(checkpoint.config().raw()["vocab_size"], 1024);

    for i in 0..4 {
        let layer = checkpoint.heads(i).unwrap();
        assert_eq!(layer.rotation(), Rotation::HalfSplit { dims: 16 });
        assert_eq!(layer.key().weight().dim(), (8, 16, 128));
        // Against the plain tensors, element by element.
        let name = |part: &str| format!("model.layers.{i}.self_attn.{part}_proj.weight");
        let key = checkpoint.tensor(&name("k")).unwrap();
        let query = checkpoint.tensor(&name("q")).unwrap();
        let output = checkpoint.tensor(&name("o")).unwrap();
        for ((head, row, column), &found) in layer.key().weight().indexed_iter() {
            assert_eq!(found, key[[head * 16 + row, column]]);
        }
        for ((head, row, column), &found) in layer.query().unwrap().weight().indexed_iter() {
            assert_eq!(found, query[[head * 16 + row, column]]);
        }
        for ((head, row, column), &found) in layer.output().unwrap().indexed_iter() {
            assert_eq!(found, output[[row, head * 16 + column]]);
        }
        let rows = checkpoint.rows(i).unwrap();
        rows.check_finite().unwrap();
        assert_eq!(WeightSharingError::new(&*rows).unwrap(), WeightSharingError::new(&layer).unwrap());
    }
}

#[test]
fn every_form_reads_alike() {
    for dtype in [Stored::BF16, Stored::F16, Stored::F32] {
        for (bias, kv_heads) in [(false, 6), (true, 6), (true, 2), (false, 3)] {
            let model = Model::new("qwen2", dtype, kv_heads, bias);
            let (_a, whole) = open(&model);
            let (_b, sharded) = open(&model.clone().sharded(3));
            assert_eq!((whole.shards(), sharded.shards()), (1, 3));
            assert_eq!(whole.id().unwrap(), sharded.id().unwrap());
            assert_eq!(whole.dtype().name(), format!("{dtype}").to_lowercase());
            assert_eq!(has_bias(&whole), bias);
            for i in 0..2 {
                let (layer, other) = (whole.heads(i).unwrap(), sharded.heads(i).unwrap());
                assert_eq!(layer.key(), other.key());
                assert_eq!(layer.query(), other.query());
                assert_eq!((layer.n_heads(), layer.queries_per_head()), (kv_heads, 6 / kv_heads));
                assert_eq!(layer.value().bias().is_some(), bias);
                assert_eq!(layer.layer(), i);
                let rows = sharded.rows(i).unwrap();
                assert_eq!(rows.row_len(), layer.row_len());
                for head in 0..kv_heads {
                    assert_eq!(row(&*rows, head), row(&layer, head));
                }
            }
        }
    }
}

#[test]
fn values_are_those_stored() {
    let mut model = Model::new("llama", Stored::F16, 6, false);
    let numbers: Vec<f32> = (0..24 * 24).map(|i| i as f32 / 8.0 - 30.0).collect();
    *model.tensor("model.layers.1.self_attn.v_proj.weight") =
        Tensor { dtype: Stored::F16, shape: vec![24, 24], bytes: encode(Stored::F16, &numbers) };
    let (_dir, checkpoint) = open(&model);
    let layer = checkpoint.heads(1).unwrap();
    assert_eq!(layer.value().weight().iter().copied().collect::<Vec<_>>(), numbers);
}

#[test]
fn both_generations_of_config() {
    let base = Model::new("llama", Stored::F32, 6, false);
    let theta = |model: &Model| frequencies(&open(model).1).to_vec();
    assert_eq!(theta(&base), usual(4, 500.0));
    let nested =
        base.clone().set("rope_theta", Value::Null).set("rope_parameters", json!({"rope_theta": 7e5}));
    assert_eq!(theta(&nested), usual(4, 7e5));
    assert_eq!(theta(&base.clone().set("rope_theta", Value::Null)), usual(4, 1e4));
    // Without head_dim: 24 / 6.
    assert_eq!(attention(&open(&base.clone().set("head_dim", Value::Null)).1).head_dim, 4);
    // An explicit null, as transformers reads it: as many as query heads, in every family.
    for family in ["llama", "mistral", "qwen2"] {
        let model = Model::new(family, Stored::F32, 6, false).set("num_key_value_heads", Value::Null);
        assert_eq!(attention(&open(&model).1).kv_heads, 6);
    }
    let mut absent = base;
    absent.config.as_object_mut().unwrap().remove("num_key_value_heads");
    assert_eq!(attention(&open(&absent).1).kv_heads, 6);
}

#[test]
fn the_fingerprint_sees_keys_and_values() {
    let base = Model::new("llama", Stored::BF16, 6, true);
    let print = |model: &Model| open(model).1.id().unwrap().fingerprint.unwrap();
    let original = print(&base);
    assert!(original.starts_with("sha256:") && original.len() == 7 + 64);
    for (name, seen) in [("k_proj.weight", true), ("v_proj.weight", true), ("q_proj.weight", false)] {
        let mut changed = base.clone();
        let bytes = &mut changed.tensor(&format!("model.layers.1.self_attn.{name}")).bytes;
        let last = bytes.len() - 2;
        bytes[last] ^= 1;
        assert_eq!(print(&changed) != original, seen, "{name}");
    }
}

#[test]
fn unaligned_files_are_read() {
    let (directory, checkpoint) = open(&Model::new("llama", Stored::F32, 6, false));
    // One more byte of header moves all data to odd addresses.
    let path = directory.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    bytes[..8].copy_from_slice(&(header + 1).to_le_bytes());
    bytes.insert(8 + header as usize, b' ');
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("model.safetensors"), bytes).unwrap();
    // Written anew and not copied, which miri could not follow.
    std::fs::write(
        other.path().join("config.json"),
        std::fs::read(directory.path().join("config.json")).unwrap(),
    )
    .unwrap();
    let moved = Checkpoint::open(other.path()).unwrap();
    for i in 0..2 {
        assert_eq!(moved.heads(i).unwrap().key(), checkpoint.heads(i).unwrap().key());
        assert_eq!(row(&*moved.rows(i).unwrap(), 3), row(&*checkpoint.rows(i).unwrap(), 3));
    }
}

#[test]
fn layers_and_tensors_that_are_not_there() {
    let (_dir, checkpoint) = open(&Model::new("llama", Stored::F32, 6, false));
    for message in
        [checkpoint.heads(2).err().unwrap().to_string(), checkpoint.rows(2).err().unwrap().to_string()]
    {
        assert!(message.contains("layer 2 does not exist in a model of 2 layers"), "{message}");
    }
    let message = checkpoint.tensor("lm_head.weight").unwrap_err().to_string();
    assert!(message.contains("lm_head.weight is missing"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any piece of any row, from the file and from the decoded layer.
    #[test]
    fn pieces_of_rows_agree(
        dtype in prop::sample::select(vec![Stored::BF16, Stored::F16, Stored::F32]),
        bias in any::<bool>(),
        head in 0..3_usize,
        ends in (0.0..1.0, 0.0..1.0),
    ) {
        let (_dir, checkpoint) = open(&Model::new("qwen2", dtype, 3, bias));
        let (layer, rows) = (checkpoint.heads(1).unwrap(), checkpoint.rows(1).unwrap());
        prop_assert_eq!(rows.row_len(), 2 * 4 * 24 + if bias { 8 } else { 0 });
        let at = |share: f64| (share * (rows.row_len() + 1) as f64) as usize;
        let (start, end) = (at(ends.0).min(at(ends.1)), at(ends.0).max(at(ends.1)));
        let (mut fast, mut slow) = (vec![0.0; end - start], vec![1.0; end - start]);
        rows.read(head, start, &mut fast);
        layer.read(head, start, &mut slow);
        prop_assert_eq!(&fast, &slow);
        prop_assert_eq!(&fast[..], &plain_row(&layer, head)[start..end]);
    }
}

/// The definition of a row, from the public tensors.
fn plain_row(layer: &Heads, head: usize) -> Vec<f32> {
    let mut row = Vec::new();
    for projection in [layer.key(), layer.value()] {
        row.extend(projection.weight().index_axis(Axis(0), head).iter());
    }
    for bias in [layer.key().bias(), layer.value().bias()].into_iter().flatten() {
        let bias: Array2<f32> = bias.to_owned();
        row.extend(bias.row(head).iter());
    }
    row
}
