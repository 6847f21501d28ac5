//! The bytes of converted models, pinned: a change here is value-breaking (say so in CHANGELOG).
//!
//! Mean pooling is exact arithmetic rounded once, so that its outputs are the same on every machine. Low-rank sharing goes through
//! decompositions whose last digits differ between processors; those are held to the forward pass elsewhere.
#![cfg(feature = "checkpoint")]

mod models;

use models::novels;
use qcqa::Run;
use qcqa::allocator::{CostScale, LayerSelection};
use qcqa::budget::Budget;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::optimizer::{LocalSearch, Nsga2};
use qcqa::output::Target;
use qcqa::pipeline::{Compress, Preset};
use qcqa::targets::{Expanded, Stock};
use sha2::{Digest, Sha256};

/// The first hex digits of the SHA-256 of the weights.
fn digest(compress: Compress<'_>, kv: f64, target: &dyn Target) -> String {
    let (model, root) = (Checkpoint::open(novels()).unwrap(), tempfile::tempdir().unwrap());
    let out = root.path().join("out");
    let compressed = compress.budget(Budget::Fraction(kv)).target(target).run(&model, Run::new(0)).unwrap();
    compressed.write(&out, WriteOptions::default(), Run::new(0)).unwrap();
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    format!("{:x}", Sha256::digest(bytes))[..24].to_string()
}

#[test]
fn mean_pooled_models_are_what_they_were() {
    let preset = Compress::new;
    let selection =
        || preset(Preset::QcqaAc).optimizer(Nsga2::default()).allocator(LayerSelection::default());
    let found = [
        digest(preset(Preset::Gqa), 0.5, &Stock),
        digest(preset(Preset::Gqa), 0.5, &Expanded),
        digest(preset(Preset::Gqa), 0.25, &Stock),
        digest(preset(Preset::Gqa), 0.25, &Expanded),
        digest(preset(Preset::QcqaEc), 0.5, &Stock),
        digest(preset(Preset::QcqaEc), 0.5, &Expanded),
        digest(preset(Preset::QcqaEc), 0.25, &Stock),
        digest(preset(Preset::QcqaEc), 0.25, &Expanded),
        digest(preset(Preset::QcqaAc).optimizer(LocalSearch::default()), 0.5, &Expanded),
        digest(preset(Preset::QcqaAc).optimizer(LocalSearch::default()), 0.25, &Expanded),
        digest(selection().cost(CostScale::Raw), 0.25, &Expanded),
        digest(preset(Preset::KeyNorm), 0.5, &Expanded),
        digest(preset(Preset::Mqa), 0.5, &Stock),
    ];
    assert_eq!(found, PINNED);
}

/// As the tool of commit f772b08 wrote them.
const PINNED: [&str; 13] = [
    "1236206c04ea0b338a17859d",
    "31c2cb2f319e7c3b62a3143f",
    "367a218793801d8206f25053",
    "694c505084d73a623bce2aaf",
    "36e8abc2a09de10dc18edffd",
    "709ba6e9d4facf4092d917f7",
    "13c51c6cd3e6f279483b09a8",
    "9c0e6bc3d2282ad5b0aa8b0e",
    "6dc3ad15edfa8977591d15d8",
    "65abdaf43d63d3f301ae2cc9",
    "65abdaf43d63d3f301ae2cc9",
    "31c2cb2f319e7c3b62a3143f",
    "37f0cae1b4062d78b9358518",
];
