//! Low-rank sharing in models that run: what merges without loss runs unchanged, in every form.
#![cfg(feature = "runtime")]

mod common;
mod models;
mod running;

use common::attention::map;
use ndarray::{Array2, Array3, Axis, arr2, s};
use qcqa::checkpoint::{Checkpoint, Expanded, Stock, Target, WriteOptions, convert_with};
use qcqa::runtime::{Model, Moments, Windows};
use qcqa::{
    FitnessFn, Heads, KvPooler, LowRankError, LowRankPooler, MeanPooler, Partition, Plan, Pooled,
    ProcrustesPooler, Run,
};
use running::{Slow, converted, near, neighbours, opened, runnable, tokens};
use safetensors::Dtype;
use serde_json::json;

/// Rewrites a stored tensor (f32), given as (rows, columns).
fn rewrite(model: &mut models::Model, name: &str, change: impl Fn(&mut Array2<f64>)) {
    let tensor = model.tensor(name);
    let numbers: Vec<f64> =
        tensor.bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect();
    let mut array =
        Array2::from_shape_vec((tensor.shape[0], numbers.len() / tensor.shape[0]), numbers).unwrap();
    change(&mut array);
    let numbers: Vec<f32> = array.iter().map(|&v| v as f32).collect();
    tensor.bytes = models::encode(Dtype::F32, &numbers);
}

/// Llama with biases on all four projections.
fn biased(dtype: Dtype, kv_heads: usize) -> models::Model {
    let mut model = runnable("llama", dtype, kv_heads, true).set("attention_bias", json!(true));
    for i in 0..2 {
        let numbers: Vec<f32> = (0..24).map(|j| (i * 7 + j * 5 % 11) as f32 / 16.0 - 0.4).collect();
        let tensor = models::Tensor { dtype, shape: vec![24], bytes: models::encode(dtype, &numbers) };
        model.tensors.insert(format!("model.layers.{i}.self_attn.o_proj.bias"), tensor);
    }
    model
}

/// The model whose KV heads are one head in disguise: keys turned and stretched at each frequency (h = 4, so two),
/// values mapped.
fn disguised(mut model: models::Model) -> models::Model {
    for i in 0..2 {
        for kind in ["weight", "bias"] {
            let name = |part: &str| format!("model.layers.{i}.self_attn.{part}_proj.{kind}");
            if !model.tensors.contains_key(&name("k")) {
                continue;
            }
            rewrite(&mut model, &name("k"), |rows| {
                let first = rows.slice(s![..4, ..]).to_owned();
                for head in 0..rows.nrows() / 4 {
                    for f in 0..2 {
                        let (gain, phase) = (0.6 + 0.3 * head as f64, (1 + 3 * head + 5 * f) as f64);
                        let turn = arr2(&[[phase.cos(), -phase.sin()], [phase.sin(), phase.cos()]]) * gain;
                        let pair = turn.dot(&first.select(Axis(0), &[f, f + 2]));
                        rows.row_mut(4 * head + f).assign(&pair.row(0));
                        rows.row_mut(4 * head + f + 2).assign(&pair.row(1));
                    }
                }
            });
            rewrite(&mut model, &name("v"), |rows| {
                let first = rows.slice(s![..4, ..]).to_owned();
                for head in 0..rows.nrows() / 4 {
                    rows.slice_mut(s![4 * head..4 * head + 4, ..]).assign(&map(head as u64, 4).dot(&first));
                }
            });
        }
    }
    model
}

fn logits(model: &Model, rows: usize) -> Array3<f32> {
    model.logits(tokens(rows, 11, 16).view()).unwrap()
}

fn apart(a: &Array3<f32>, b: &Array3<f32>) -> f32 {
    (a - b).iter().fold(0.0, |worst, d| worst.max(d.abs()))
}

/// The conjugate, the pairing and the map's side are right: the rotation of the real thing agrees.
#[test]
fn disguised_heads_merge_and_nothing_changes() {
    let models = [
        disguised(runnable("llama", Dtype::F32, 6, false)),
        disguised(runnable("qwen2", Dtype::F32, 3, true)),
        disguised(biased(Dtype::F32, 6)),
    ];
    for model in models {
        let (_root, checkpoint) = opened(&model);
        let source = Model::load(&checkpoint).unwrap();
        let n = checkpoint.config().kv_heads;
        let plan = models::plan(&checkpoint, &vec![Partition::one_group(n).unwrap(); 2]);
        let planned = Model::planned(&checkpoint, &plan, &LowRankPooler::default()).unwrap();
        assert_eq!(planned.kv_heads(), [1, 1]);
        near(&logits(&source, 3), &logits(&planned, 3), 1e-4);
        let mean = Model::planned(&checkpoint, &plan, &MeanPooler).unwrap();
        assert!(apart(&logits(&source, 3), &logits(&mean, 3)) > 0.05);
        let heads = checkpoint.layer(1).unwrap();
        let error = LowRankError::new(&heads).unwrap().evaluate(&plan.layers[1].groups).unwrap();
        assert!(error <= 1e-9, "{error}");
    }
}

#[test]
fn equal_heads_merge_and_nothing_changes() {
    let mut model = runnable("llama", Dtype::F32, 6, false);
    for part in ["k", "v"] {
        rewrite(&mut model, &format!("model.layers.1.self_attn.{part}_proj.weight"), |rows| {
            let first = rows.slice(s![..4, ..]).to_owned();
            rows.slice_mut(s![8..12, ..]).assign(&first);
            rows.slice_mut(s![20..24, ..]).assign(&first);
        });
    }
    let (_root, checkpoint) = opened(&model);
    let groups =
        [vec![0, 1, 2, 3, 4, 5], vec![0, 1, 0, 2, 3, 0]].map(|l| Partition::from_labels(&l).unwrap());
    let plan = models::plan(&checkpoint, &groups);
    let planned = Model::planned(&checkpoint, &plan, &LowRankPooler::default()).unwrap();
    near(&logits(&Model::load(&checkpoint).unwrap(), 2), &logits(&planned, 2), 1e-4);
}

/// Merged at a loss too, what is computed is what the pooled tensors say.
#[test]
fn merged_models_compute_what_the_pooler_made() {
    for (kv_heads, bias) in [(6, false), (3, true)] {
        let (_root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, kv_heads, bias));
        let labels = [[0, 1, 0, 0, 2, 1], [0; 6]].map(|l| Partition::from_labels(&l[..kv_heads]).unwrap());
        let plan = models::plan(&checkpoint, &labels);
        for pooler in [&LowRankPooler::default() as &dyn KvPooler, &ProcrustesPooler::default()] {
            let planned = Model::planned(&checkpoint, &plan, pooler).unwrap();
            let slow = Slow { checkpoint: &checkpoint, plan: Some((&plan, pooler)) };
            let row = tokens(1, 11, 16);
            let expected = slow.run(&row.row(0).to_vec()).0.mapv(|v| v as f32).insert_axis(Axis(0));
            near(&logits(&planned, 1), &expected, 1e-4);
        }
    }
}

fn moments(checkpoint: &Checkpoint) -> Moments {
    let tokens = (0..96u32).map(|t| t * t % 13 + t % 4).collect();
    let model = Model::load(checkpoint).unwrap();
    Moments::measure(&model, &Windows::new(tokens, 12).unwrap(), Run::new(0)).unwrap()
}

fn written(
    checkpoint: &Checkpoint,
    plan: &Plan,
    pool: &dyn Fn(usize, &Heads) -> qcqa::Result<Pooled>,
    target: &dyn Target,
) -> (Model, Checkpoint) {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    convert_with(checkpoint, plan, pool, target, &out, WriteOptions::default(), Run::new(0)).unwrap();
    let written = Checkpoint::open(&out).unwrap();
    (Model::load(&written).unwrap(), written)
}

/// Calibrated, with an output bias that makes up for lost means: planned, stock and expanded are one model.
#[test]
fn planned_and_written_models_agree() {
    for (dtype, kv_heads) in [(Dtype::F32, 6), (Dtype::F32, 3), (Dtype::BF16, 6)] {
        let (_root, checkpoint) = opened(&biased(dtype, kv_heads));
        let moments = moments(&checkpoint);
        let alternate: Vec<_> = (0..kv_heads).map(|head| head % (kv_heads / 3)).collect();
        let alternate = Partition::from_labels(&alternate).unwrap();
        let equal = [neighbours(&checkpoint, 3), models::plan(&checkpoint, &[alternate.clone(), alternate])];
        let calibrated = |plan: &Plan, i: usize, heads: &Heads| {
            let heads = moments.attach(i, heads.clone()).map_err(qcqa::Error::plugin)?;
            LowRankPooler::default().pool(&heads, &plan.layers[i].groups)
        };
        for plan in &equal {
            let pool = |i: usize, heads: &Heads| calibrated(plan, i, heads);
            let planned = Model::planned_with(&checkpoint, plan, &pool).unwrap();
            for target in [&Stock as &dyn Target, &Expanded] {
                let (model, written) = written(&checkpoint, plan, &pool, target);
                near(&logits(&planned, 2), &logits(&model, 2), 1e-4);
                // The bias was written as the pooler made it, and is not the source's.
                let (source, new) = (checkpoint.layer(1).unwrap(), written.layer(1).unwrap());
                let made = pool(1, &source).unwrap().output_bias.unwrap();
                let tolerance = if dtype == Dtype::F32 { 0.0 } else { 1e-2 };
                let worst = (&made - &new.output_bias().unwrap()).mapv(f32::abs);
                assert!(
                    worst
                        .iter()
                        .all(|&e| e <= tolerance * (1.0 + made.iter().fold(0.0, |m: f32, v| m.max(v.abs()))))
                );
                assert_ne!(new.output_bias(), source.output_bias());
            }
            // Without it the model is another.
            let forgetful =
                |i: usize, heads: &Heads| Ok(Pooled { output_bias: None, ..calibrated(plan, i, heads)? });
            let forgetful = Model::planned_with(&checkpoint, plan, &forgetful).unwrap();
            assert!(apart(&logits(&planned, 2), &logits(&forgetful, 2)) > 1e-3);
        }
        // Weights alone, and groups of unequal sizes.
        let labels: Vec<_> = (0..kv_heads).map(|head| [0, 0, 1, 0, 2, 1][head]).collect();
        let unequal = Partition::from_labels(&labels).unwrap();
        let plan = models::plan(&checkpoint, &[unequal, Partition::one_group(kv_heads).unwrap()]);
        for pooler in [&LowRankPooler::default() as &dyn KvPooler, &ProcrustesPooler::default()] {
            let planned = Model::planned(&checkpoint, &plan, pooler).unwrap();
            near(&logits(&planned, 2), &logits(&converted(&checkpoint, &plan, pooler, &Expanded), 2), 1e-4);
        }
    }
}
