//! Low-rank sharing in models that run: what merges without loss runs unchanged, in every form.
#![cfg(feature = "runtime")]

mod common;
mod models;
mod running;

use common::attention::map;
use ndarray::{Array2, Array3, Axis, arr2, s};
use qcqa::calibration::{Calibration, Moments};
use qcqa::checkpoint::Checkpoint;
use qcqa::fitness::LowRankError;
use qcqa::heads::{HeadSource, Heads, Pooled};
use qcqa::output::Target;
use qcqa::partition::Partition;
use qcqa::plan::SharedHeads;
use qcqa::pooler::{LowRankPooler, ProcrustesPooler};
use qcqa::runtime::Model;
use qcqa::spec::Spec;
use qcqa::targets::{Expanded, Stock};
use qcqa::text::Windows;
use qcqa::{FitnessFn, KvPooler, Run};
use running::{
    MakePooler, Slow, converted, near, neighbours, opened, planned, runnable, shared_by, tokens, written,
};
use safetensors::Dtype;
use serde_json::json;

const POOLERS: [MakePooler; 2] =
    [|| Box::new(LowRankPooler::default()), || Box::new(ProcrustesPooler::default())];

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
        let n = checkpoint.architecture().layers[0].kv_heads;
        let plan = models::plan(&checkpoint, &vec![Partition::one_group(n).unwrap(); 2]);
        let shared = source.with_shared(&shared_by(&plan, &checkpoint, POOLERS[0])).unwrap();
        assert_eq!(shared.kv_heads(), [1, 1]);
        near(&logits(&source, 3), &logits(&shared, 3), 1e-4);
        let mean = source.with_shared(&SharedHeads::new(&plan, &checkpoint).unwrap()).unwrap();
        assert!(apart(&logits(&source, 3), &logits(&mean, 3)) > 0.05);
        let heads = checkpoint.heads(1).unwrap();
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
    let planned = planned(&checkpoint, &shared_by(&plan, &checkpoint, POOLERS[0]));
    near(&logits(&Model::load(&checkpoint).unwrap(), 2), &logits(&planned, 2), 1e-4);
}

/// Merged at a loss too, what is computed is what the pooled tensors say.
#[test]
fn merged_models_compute_what_the_pooler_made() {
    for (kv_heads, bias) in [(6, false), (3, true)] {
        let (_root, checkpoint) = opened(&runnable("qwen2", Dtype::F32, kv_heads, bias));
        let labels = [[0, 1, 0, 0, 2, 1], [0; 6]].map(|l| Partition::from_labels(&l[..kv_heads]).unwrap());
        let plan = models::plan(&checkpoint, &labels);
        for pooler in POOLERS {
            let shared = shared_by(&plan, &checkpoint, pooler);
            let planned = planned(&checkpoint, &shared);
            let slow = Slow { checkpoint: &checkpoint, shared: Some(&shared) };
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

/// Low-rank sharing that leaves the output bias as it is.
#[derive(Debug)]
struct Forgetful;

impl KvPooler for Forgetful {
    fn spec(&self) -> Spec {
        Spec::new("forgetful")
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        let mut pooled = LowRankPooler::default().pool(heads, partition)?;
        pooled.output_bias = None;
        Ok(pooled)
    }
}

/// Calibrated, with an output bias that makes up for lost means: planned, stock and expanded are one model.
#[test]
fn planned_and_written_models_agree() {
    for (dtype, kv_heads) in [(Dtype::F32, 6), (Dtype::F32, 3), (Dtype::BF16, 6)] {
        let (_root, checkpoint) = opened(&biased(dtype, kv_heads));
        let calibration = Calibration::new(&checkpoint, moments(&checkpoint)).unwrap();
        let alternate: Vec<_> = (0..kv_heads).map(|head| head % (kv_heads / 3)).collect();
        let alternate = Partition::from_labels(&alternate).unwrap();
        let equal = [neighbours(&checkpoint, 3), models::plan(&checkpoint, &[alternate.clone(), alternate])];
        for plan in &equal {
            let shared = shared_by(plan, &calibration, POOLERS[0]);
            assert_eq!(shared.done().calibration, calibration.calibration());
            let directly = planned(&checkpoint, &shared);
            for target in [&Stock as &dyn Target, &Expanded] {
                let (_root, written) = written(&checkpoint, &shared, target);
                near(&logits(&directly, 2), &logits(&Model::load(&written).unwrap(), 2), 1e-4);
                // The bias was written as the pooler made it, and is not the source's.
                let (source, new) = (checkpoint.heads(1).unwrap(), written.heads(1).unwrap());
                let made = shared.layer(1).unwrap().1.output_bias.unwrap();
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
            let forgetful = planned(&checkpoint, &shared_by(plan, &calibration, || Box::new(Forgetful)));
            assert!(apart(&logits(&directly, 2), &logits(&forgetful, 2)) > 1e-3);
        }
        // Weights alone, and groups of unequal sizes.
        let labels: Vec<_> = (0..kv_heads).map(|head| [0, 0, 1, 0, 2, 1][head]).collect();
        let unequal = Partition::from_labels(&labels).unwrap();
        let plan = models::plan(&checkpoint, &[unequal, Partition::one_group(kv_heads).unwrap()]);
        for pooler in POOLERS {
            let shared = shared_by(&plan, &checkpoint, pooler);
            let directly = logits(&planned(&checkpoint, &shared), 2);
            near(&directly, &logits(&converted(&checkpoint, &shared, &Expanded), 2), 1e-4);
        }
    }
}
