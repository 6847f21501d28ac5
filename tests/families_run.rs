//! Every family runs, backward too, and shares heads. That it runs as it should is for `tests/interop` to say, which holds each
//! against transformers.
#![cfg(feature = "runtime")]

mod made;
mod models;
mod running;

use std::collections::BTreeMap;

use made::{HEAD, QUERIES, VOCABULARY, kinds, made};
use ndarray::{Array1, s};
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::distil::gradient;
use qcqa::heads::{HeadSource, Heads, Pooled, Projection};
use qcqa::model::{NormOver, Part};
use qcqa::partition::Partition;
use qcqa::plan::{Plan, Refit, SharedHeads, Trained};
use qcqa::pooler::MeanPooler;
use qcqa::refit::refit;
use qcqa::runtime::{KvCache, Model};
use qcqa::text::Windows;
use running::{Given, near, shared_by, tokens};

fn text() -> Windows {
    Windows::new((0..24u32).map(|t| (t * t * 5 + 3 * t) % VOCABULARY as u32).collect(), 12).unwrap()
}

/// Reading through the cache, some tokens at a time, is reading at once. (Frequencies that depend on the length of a text are
/// those of the tokens read so far, in transformers too: LongRoPE is left out.)
#[test]
fn every_family_reads_through_its_cache() {
    for (kind, differs) in kinds().into_iter().filter(|(kind, _)| *kind != "phi3") {
        let model = Model::load(&made(kind, &differs, 2)).unwrap();
        let tokens = tokens(2, 14, VOCABULARY as u32);
        let whole = model.logits(tokens.view()).unwrap();
        assert!(whole.iter().all(|v| v.is_finite()) && whole.iter().any(|v| v.abs() > 0.1), "{kind}");
        let mut cache = KvCache::default();
        for (from, to) in [(0, 5), (5, 6), (6, 14)] {
            let part = model.extend(&mut cache, tokens.slice(s![.., from..to])).unwrap();
            near(&part, &whole.slice(s![.., from..to, ..]).to_owned(), 1e-3);
        }
    }
}

/// The gradient of every tensor of the heads along its own direction is the difference quotient of the divergence.
#[test]
fn every_family_passes_gradients_back() {
    for (kind, differs) in kinds() {
        let checkpoint = made(kind, &differs, 6);
        let source = Model::load(&checkpoint).unwrap();
        let (plan, mean) = in_threes(&checkpoint);
        let model = source.with_shared(&mean).unwrap();
        let windows = text();
        let gradients = gradient(&source, &model, &windows, Trained::Attention).unwrap().heads;
        let start: Vec<Pooled> = (0..2).map(|i| whole(&checkpoint.heads(i).unwrap(), &mean, i)).collect();
        for layer in 0..2 {
            for part in Part::ALL {
                let along = numbers(&gradients[layer], part);
                let norm = along.dot(&along).sqrt();
                assert!(norm > 1e-6, "{kind}: no gradient of {part:?} in layer {layer}");
                let direction = &along / norm;
                let at = |step: f32| {
                    let mut layers = start.clone();
                    move_by(&mut layers[layer], part, &direction, step);
                    let given =
                        SharedHeads::with_pooler(&plan, &checkpoint, Box::new(Given(layers))).unwrap();
                    let model = source.with_shared(&given).unwrap();
                    gradient(&source, &model, &windows, Trained::Attention).unwrap().divergence
                };
                const STEP: f32 = 5e-3;
                let slope = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
                let close = (slope - f64::from(norm)).abs() < 2e-2 * f64::from(norm) + 2e-4;
                assert!(close, "{kind}, {part:?} of layer {layer}: {slope} by differences, {norm} found");
            }
        }
    }
}

/// The gradient of every tensor beside the heads, as files store it, is the difference quotient of the divergence along it.
#[test]
fn every_family_passes_gradients_back_to_norms_and_mlps() {
    for (kind, differs) in kinds() {
        let checkpoint = made(kind, &differs, 6);
        let source = Model::load(&checkpoint).unwrap();
        let ((_, mean), windows) = (in_threes(&checkpoint), text());
        let with = |others: Option<BTreeMap<String, Vec<f32>>>| {
            source.with_shared(&mean.clone().with_others(others)).unwrap()
        };
        let gradients = gradient(&source, &with(None), &windows, Trained::All).unwrap().others;
        let experts = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"].contains(&kind);
        let mut mlps = 0;
        for (name, gradient_of) in &gradients {
            mlps += usize::from(checkpoint.tensors().shape(name).unwrap().len() == 2);
            let along = Array1::from(gradient_of.clone());
            let norm = along.dot(&along).sqrt();
            assert!(norm > 1e-7, "{kind}: no gradient of {name}");
            let stored: Array1<f32> = checkpoint.tensor(name).unwrap().into_iter().collect();
            let at = |step: f32| {
                let moved = (&stored + &(&along * (step / norm))).to_vec();
                let model = with(Some(BTreeMap::from([(name.clone(), moved)])));
                gradient(&source, &model, &windows, Trained::Attention).unwrap().divergence
            };
            const STEP: f32 = 5e-3;
            let slope = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
            let close = (slope - f64::from(norm)).abs() < 2e-2 * f64::from(norm) + 2e-4;
            assert!(close, "{kind}, {name}: {slope} by differences, {norm} found");
        }
        assert_eq!(mlps == 0, experts, "{kind}: {:?}", gradients.keys());
    }
}

/// Three groups a layer by their means.
fn in_threes(checkpoint: &Checkpoint) -> (Plan, SharedHeads<'_>) {
    let heads = checkpoint.architecture().kv_heads()[0];
    let equal = Partition::from_labels(&(0..heads).map(|i| i % 3).collect::<Vec<_>>()).unwrap();
    let plan = models::plan(checkpoint, &vec![equal; 2]);
    let mean = shared_by(&plan, checkpoint, || Box::new(MeanPooler));
    (plan, mean)
}

/// Shared heads with queries and outputs spelled out.
fn whole(heads: &Heads, shared: &SharedHeads<'_>, layer: usize) -> Pooled {
    let mut pooled = shared.layer(layer).unwrap().1;
    pooled.query = heads.query().cloned();
    pooled.output = heads.output().map(|o| o.to_owned());
    pooled.output_bias = heads.output_bias().map(|b| b.to_owned());
    pooled
}

fn numbers(pooled: &Pooled, part: Part) -> Array1<f32> {
    let of = |projection: &Projection| projection.weight().iter().copied().collect();
    match part {
        Part::Key => of(&pooled.key),
        Part::Value => of(&pooled.value),
        Part::Query => of(pooled.query.as_ref().unwrap()),
        Part::Output => pooled.output.as_ref().unwrap().iter().copied().collect(),
    }
}

fn move_by(pooled: &mut Pooled, part: Part, direction: &Array1<f32>, step: f32) {
    let add = |projection: &Projection| {
        let (mut weight, bias) = projection.clone().into_parts();
        weight.iter_mut().zip(direction).for_each(|(n, d)| *n += step * d);
        Projection::new(weight, bias).unwrap()
    };
    match part {
        Part::Key => pooled.key = add(&pooled.key),
        Part::Value => pooled.value = add(&pooled.value),
        Part::Query => pooled.query = pooled.query.as_ref().map(add),
        Part::Output => {
            let output = pooled.output.as_mut().unwrap();
            output.iter_mut().zip(direction).for_each(|(n, d)| *n += step * d);
        }
    }
}

/// Both refits leave less of the attention's error in every layer, or the layer as it was.
#[test]
fn every_family_is_refitted() {
    for (kind, differs) in kinds() {
        let checkpoint = made(kind, &differs, 6);
        let heads = checkpoint.architecture().kv_heads()[0];
        let source = Model::load(&checkpoint).unwrap();
        let pairs = Partition::from_labels(&(0..heads).map(|i| i / 2).collect::<Vec<_>>()).unwrap();
        let plan = models::plan(&checkpoint, &vec![pairs; 2]);
        for level in [Refit::Output, Refit::Full] {
            let shared = shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
            let found = refit(shared, &source, &text(), level, Run::new(0)).unwrap();
            assert!(found.errors.iter().all(|[before, after]| after <= before), "{kind}: {:?}", found.errors);
            assert!(found.errors[0][1] < 0.99 * found.errors[0][0], "{kind}: {:?}", found.errors);
        }
    }
}

/// What heads are described to be lies where the family says: widths, norms, and the key of their number.
#[test]
fn every_family_is_described() {
    for (kind, differs) in kinds() {
        let checkpoint = made(kind, &differs, 2);
        let model = checkpoint.architecture();
        let spec = &model.layers[1];
        let expected = if model.kv_heads_at.is_some() { 2 } else { QUERIES };
        assert_eq!((spec.query_heads, spec.kv_heads, spec.head_dim), (QUERIES, expected, HEAD), "{kind}");
        let own =
            ["use_qk_norm", "qk_layernorm"].iter().any(|key| differs.get(key).is_some()) && kind != "phi";
        let normed = own
            || ["qwen3", "qwen3_moe", "olmo2", "olmo3", "olmoe", "phi", "gemma3_text", "exaone4"]
                .contains(&kind);
        assert_eq!(spec.norms.iter().all(Option::is_some), normed, "{kind}");
        let over = match kind {
            "olmo2" | "olmo3" | "olmoe" => NormOver::Width,
            _ if own => NormOver::OwnHead,
            _ => NormOver::Head,
        };
        assert_eq!(checkpoint.heads(1).unwrap().key_norm(), normed.then_some(over), "{kind}");
        let positions = ["opt", "gpt2", "bloom", "falcon", "mpt"].contains(&kind)
            || (kind == "smollm3")
            || (kind == "exaone4")
            || kind == "cohere2";
        assert_eq!(spec.rotary.is_none(), positions, "{kind}: layer 1 knows no rotation");
    }
}

/// A model type that nobody knows is refused with the families that have such tensors; one that is known and cannot be dealt
/// with, by its reason.
#[test]
fn what_is_nobodys_is_refused_with_a_way_out() {
    let root = tempfile::tempdir().unwrap();
    let refused = |kind: &str| {
        let model = running::runnable("llama", safetensors::Dtype::F32, 2, false);
        model.set("model_type", kind.into()).write(root.path());
        qcqa::checkpoint::Checkpoint::open(root.path()).unwrap_err().to_string()
    };
    models::says(
        &refused("mine"),
        &["\"mine\" is not supported", "its tensors are those of llama", "model_type"],
    );
    for (kind, reason) in [
        ("deepseek_v3", "latent attention"),
        ("qwen3_next", "linear attention or state spaces"),
        ("t5", "cross-attention"),
        ("roberta", "an encoder"),
    ] {
        models::says(&refused(kind), &["config.json", reason, kind]);
    }
}

/// A clip of projections is honoured by nobody who merges heads: it is refused.
#[test]
fn clipped_projections_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let model = running::runnable("llama", safetensors::Dtype::F32, 2, false);
    model.set("model_type", "olmo".into()).set("clip_qkv", 8.0.into()).write(root.path());
    let error = qcqa::checkpoint::Checkpoint::open(root.path()).unwrap_err().to_string();
    models::says(&error, &["config.json", "clip_qkv", "8.0"]);
}

/// Counts that no file backs end in an error, before anything of their size is made.
#[test]
fn counts_that_no_file_backs_are_refused() {
    let root = tempfile::tempdir().unwrap();
    for (kind, key) in [
        ("bloom", "n_head"),
        ("mpt", "n_heads"),
        ("falcon", "num_attention_heads"),
        ("mine", "n_head"),
        ("llama", "head_dim"),
        ("llama", "hidden_size"),
        ("phi3", "num_attention_heads"),
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_experts"),
        ("gemma2", "num_hidden_layers"),
        ("opt", "max_position_embeddings"),
    ] {
        for count in [1_000_000_000_000, u64::MAX / 2 + 2] {
            let model = running::runnable("llama", safetensors::Dtype::F32, 2, false);
            let falcon = model.set("multi_query", false.into()).set("alibi", true.into());
            falcon.set("model_type", kind.into()).set(key, count.into()).write(root.path());
            let opened = qcqa::checkpoint::Checkpoint::open(root.path());
            let loaded = opened
                .map_err(|e| e.to_string())
                .and_then(|checkpoint| Model::load(&checkpoint).map(drop).map_err(|e| e.to_string()));
            assert!(loaded.is_err(), "{kind}, {key} {count}");
        }
    }
}
