//! Plans of small models, written in a form and opened again.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

use std::fs;

use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::output::{Target, read_back};
use qcqa::partition::Partition;
use qcqa::plan::{Plan, SharedHeads};
use qcqa::runtime::Model;
use qcqa::targets::Expanded;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::models::{self, plan};
use crate::running::{self, near, tokens};

/// Four groups, and three: twelve query heads hold both, and six may become nine.
pub fn fours_and_threes() -> Vec<Partition> {
    partitions(6, [&[&[0, 1], &[2, 3], &[4], &[5]], &[&[0, 3], &[1, 4], &[2, 5]]])
}

pub fn partitions(kv_heads: usize, layers: [&[&[usize]]; 2]) -> Vec<Partition> {
    layers.iter().map(|groups| Partition::from_groups(kv_heads, groups).unwrap()).collect()
}

/// Six query heads on six KV heads, or on three.
pub fn uneven(kv_heads: usize) -> Vec<Partition> {
    match kv_heads {
        6 => partitions(6, [&[&[0, 2, 3], &[1, 4], &[5]], &[&[0], &[1, 2], &[3, 4, 5]]]),
        _ => partitions(3, [&[&[0, 2], &[1]], &[&[0], &[1, 2]]]),
    }
}

/// What a runtime must be told where another type has another default.
pub fn runnable(model_type: &str, dtype: Dtype, kv_heads: usize, bias: bool) -> models::Model {
    running::runnable(model_type, dtype, kv_heads, bias).set("intermediate_size", json!(5))
}

pub struct Written {
    pub root: tempfile::TempDir,
    pub source: Checkpoint,
    pub plan: Plan,
}

impl Written {
    pub fn new(model: &models::Model, layers: &[Partition]) -> Self {
        let (root, source) = running::opened(model);
        let plan = plan(&source, layers);
        Self { root, source, plan }
    }

    /// Writes the plan in this form, and opens it again.
    pub fn convert(&self, target: &dyn Target) -> Checkpoint {
        let out = self.root.path().join(target.name());
        models::convert(&self.source, &self.plan, target, &out, WriteOptions::default(), Run::new(0))
            .unwrap();
        Checkpoint::open(&out).unwrap()
    }

    /// Checks that a form computes what the expanded one does, and holds the plan's shared heads.
    pub fn holds(&self, target: &dyn Target) -> Checkpoint {
        let (expanded, written) = (self.convert(&Expanded), self.convert(target));
        let ids = tokens(2, 12, 16);
        let logits = |checkpoint: &Checkpoint| Model::load(checkpoint).unwrap().logits(ids.view()).unwrap();
        near(&logits(&written), &logits(&expanded), 1e-4);
        assert_eq!(written.architecture().kv_heads(), self.plan.group_counts());
        let shared = SharedHeads::new(&self.plan, &self.source).unwrap();
        let back = read_back(&self.source, &written, &self.plan, target).unwrap();
        for layer in 0..2 {
            let [expected, found] = [&shared, &back].map(|shared| shared.layer(layer).unwrap().1);
            assert_eq!(found.key, expected.key);
            assert_eq!(found.value, expected.value);
        }
        written
    }
}

pub fn config(checkpoint: &Checkpoint) -> Value {
    serde_json::from_slice(&fs::read(checkpoint.path().join("config.json")).unwrap()).unwrap()
}
