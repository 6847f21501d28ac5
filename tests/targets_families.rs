//! Which forms the families take that say less of their heads than Llama: fused tensors, heads that turn in part, widths that follow
//! from the number of query heads. That transformers loads them is for `tests/interop` to say.
#![cfg(feature = "runtime")]

mod made;
mod models;
mod running;

use made::{VOCABULARY, made_in};
use models::plan;
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::output::{Target, check_plan};
use qcqa::partition::Partition;
use qcqa::runtime::Model;
use qcqa::targets::{Expanded, Padded, RemoteCode, Stock};
use running::{near, tokens};
use serde_json::{Value, json};

/// Plans for two layers of six heads, by what they ask for.
fn plans() -> [(&'static str, [Partition; 2]); 4] {
    let of = |labels: [usize; 6]| Partition::from_labels(&labels).unwrap();
    let pairs = of([0, 1, 2, 0, 1, 2]);
    [
        ("equal", [pairs.clone(), of([0, 0, 1, 1, 2, 2])]),
        ("equal by layer", [pairs, of([0, 1, 0, 1, 0, 1])]),
        ("unequal", [of([0, 1, 0, 0, 1, 2]), of([0, 1, 1, 2, 2, 2])]),
        ("by layer", [of([0, 0, 0, 0, 1, 1]), of([0, 1, 2, 3, 0, 1])]),
    ]
}

/// The plans that a target holds of a model, each written and computing what the expanded form computes. Limits say before any search
/// what cannot be.
fn held(source: &Checkpoint, target: &dyn Target) -> Vec<&'static str> {
    let (root, ids) = (tempfile::tempdir().unwrap(), tokens(2, 14, VOCABULARY as u32));
    let mut held = Vec::new();
    for (name, layers) in plans() {
        let plan = plan(source, &layers);
        let within = target.limits(source.architecture()).check(plan.groups()).is_ok();
        assert_eq!(check_plan(source, &plan, target).is_ok(), within, "{} {name}", target.name());
        if !within {
            continue;
        }
        let [expected, found] = [&Expanded as &dyn Target, target].map(|target| {
            let out = root.path().join(format!("{name} {}", target.name()));
            let options = WriteOptions::default().force(true);
            models::convert(source, &plan, target, &out, options, Run::new(0)).unwrap();
            let written = Checkpoint::open(&out).unwrap();
            if target.name() != "expanded" {
                assert_eq!(written.architecture().kv_heads(), plan.group_counts());
            }
            Model::load(&written).unwrap().logits(ids.view()).unwrap()
        });
        near(&found, &expected, 1e-4);
        held.push(name);
    }
    held
}

#[test]
fn query_heads_are_added_where_a_type_takes_them() {
    let rope = json!({"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5});
    let long = json!({"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]});
    let (one_k, any) = (["equal", "unequal"], ["equal", "equal by layer", "unequal", "by layer"]);
    let cases: [(&str, Value, &[&str], &[&str]); 5] = [
        ("phi", json!({"rope_parameters": rope}), &one_k, &any),
        ("phi", json!({"rope_parameters": rope, "qk_layernorm": true}), &one_k[..1], &any[..2]),
        ("phi3", json!({"partial_rotary_factor": 0.5}), &one_k, &any),
        ("phi3", json!({"rope_scaling": long, "original_max_position_embeddings": 8}), &one_k[..1], &any),
        ("stablelm", json!({"use_qkv_bias": true, "rope_parameters": rope}), &one_k[..1], &any[..2]),
    ];
    for (kind, differs, padded, remote) in cases {
        let root = tempfile::tempdir().unwrap();
        let source = made_in(root.path(), kind, &differs, 6);
        assert_eq!(held(&source, &Stock), ["equal"], "{kind} {differs}");
        assert_eq!(held(&source, &Padded), padded, "{kind} {differs}");
        assert_eq!(held(&source, &RemoteCode), remote, "{kind} {differs}");
    }
}

/// Where layers were given their numbers, those of the whole still follow from what the source was made with.
#[test]
fn what_was_written_by_layer_is_shared_again() {
    let root = tempfile::tempdir().unwrap();
    let source = made_in(&root.path().join("in"), "stablelm", &json!({"partial_rotary_factor": 0.5}), 6);
    let [_, (_, layers), ..] = plans();
    let [by_layer, again] = ["by layer", "again"].map(|name| root.path().join(name));
    let convert = |source: &Checkpoint, layers: &[Partition], target: &dyn Target, out| {
        models::convert(source, &plan(source, layers), target, out, WriteOptions::default(), Run::new(0))
            .unwrap();
        Checkpoint::open(out).unwrap()
    };
    let remote = convert(&source, &layers, &RemoteCode, &by_layer);
    assert_eq!(remote.architecture().kv_heads(), [3, 2]);
    let one = [3, 2].map(|n| Partition::one_group(n).unwrap());
    let stock = convert(&remote, &one, &Stock, &again);
    assert_eq!(stock.architecture().kv_heads(), [1, 1]);
    assert!(stock.config().get("qcqa_heads").is_none() && !again.join("modeling_qcqa.py").exists());
}
