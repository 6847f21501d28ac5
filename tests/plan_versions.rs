//! Plans of version 1 are read in the present form, and obeyed; what is not known is refused by name.
#![cfg(all(feature = "checkpoint", feature = "linalg"))]

mod models;

use std::fs;

use models::{attention, novels, same_plan, says};
use qcqa::Error;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::heads::HeadSource;
use qcqa::plan::{Plan, Refit, SharedHeads, read_plan, write_plan};
use qcqa::spec::Spec;
use serde_json::{Value, json};

const PRINT: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A plan as version 1 wrote it, for a model of 4 layers of 8 heads.
fn version_1(checkpoint: &Checkpoint) -> Value {
    let (spec, id) = (attention(checkpoint), checkpoint.id().unwrap());
    let layer = json!({"groups": [[0, 5], [1, 2], [3, 7], [4, 6]], "error": 3.25, "lower_bound": 3.0});
    json!({
        "version": 1,
        "qcqa": "0.1.0",
        "source": {
            "model_type": "llama", "layers": 4, "query_heads": spec.query_heads, "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim, "hidden": 128, "dtype": "bf16", "fingerprint": id.fingerprint,
        },
        "method": {
            "name": "low-rank",
            "search": "Exact { max_heads: 16 } or UniformGqa, by calibration loss",
            "fitness": "low-rank",
            "cardinality": "equal", "max_groups": null, "max_group_size": 4,
            "fixed": {"2": 4},
            "allocation": "UniformAllocation",
            "cost": "energy-share",
            "pooler": "low-rank",
            "target": "stock",
            "refit": "full",
        },
        "calibration": PRINT,
        "seed": 7,
        "budget": {"asked": 0.5, "reached": 0.5, "kv_heads": 16},
        "layers": [layer, layer, layer, layer],
    })
}

/// What comes of it after a change.
fn read(change: impl Fn(&mut Value)) -> Result<Plan, String> {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("plan.json");
    let mut plan = version_1(&Checkpoint::open(novels()).unwrap());
    change(&mut plan);
    fs::write(&path, plan.to_string()).unwrap();
    read_plan(&path).map_err(|e| e.to_string())
}

#[test]
fn version_1_is_read() {
    let source = Checkpoint::open(novels()).unwrap();
    let plan = read(|_| ()).unwrap();
    assert_eq!((plan.version, plan.qcqa.as_str(), plan.seed), (Plan::VERSION, "0.1.0", 7));
    assert_eq!(plan.source, source.id().unwrap());
    let method = &plan.method;
    assert_eq!(method.name, "low-rank");
    let search = [Spec::new("Exact { max_heads: 16 }"), Spec::new("uniform")];
    assert_eq!((&method.search[..], method.chosen_by_loss), (&search[..], true));
    assert_eq!(method.fitness, Spec::new("low-rank"));
    assert_eq!((method.calibration.as_deref(), method.target.as_deref()), (Some(PRINT), Some("stock")));
    assert_eq!((method.space.max_groups, method.space.max_group_size), (None, Some(4)));
    assert_eq!(method.fixed.iter().collect::<Vec<_>>(), [(&2, &4)]);
    assert_eq!((plan.budget.asked, plan.budget.reached, plan.budget.kv_heads), (0.5, 0.5, 16));
    assert_eq!(plan.group_counts(), [4; 4]);
    assert_eq!((plan.layers[3].error, plan.layers[3].lower_bound), (3.25, Some(3.0)));
    assert_eq!(plan.layers[0].groups.groups(), [[0, 5], [1, 2], [3, 7], [4, 6]]);

    // It is written as version 2, and comes back the same.
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("plan.json");
    write_plan(&path, &plan, WriteOptions::default()).unwrap();
    assert_eq!(read_plan(&path).unwrap(), plan);
    let text: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!((&text["version"], &text["pooling"]["refit"]), (&2.into(), &"full".into()));
}

#[test]
fn what_version_1_asks_for_is_obeyed() {
    let source = Checkpoint::open(novels()).unwrap();
    // A refit takes a text.
    let plan = read(|_| ()).unwrap();
    assert_eq!((plan.pooling.pooler.name(), plan.pooling.refit), ("low-rank", Some(Refit::Full)));
    let error = SharedHeads::new(&plan, &source).unwrap_err();
    assert!(matches!(error, Error::PlanRefit { refit: "full" }), "{error}");
    assert_eq!(read(|p| p["method"]["refit"] = "output".into()).unwrap().pooling.refit, Some(Refit::Output));
    // Without one, moments do, but not their absence.
    for none in [Value::Null, "none".into()] {
        let plan = read(|p| p["method"]["refit"] = none.clone()).unwrap();
        assert_eq!((plan.pooling.refit, plan.pooling.calibration.as_deref()), (None, Some(PRINT)));
        match SharedHeads::new(&plan, &source).unwrap_err() {
            Error::PlanCalibration { expected, found } => {
                assert_eq!((expected.as_deref(), found), (Some(PRINT), None))
            }
            error => panic!("{error}"),
        }
    }
    // The mean never saw the text by which its groups were chosen.
    let plan = read(|p| {
        p["method"]["refit"] = Value::Null;
        p["method"]["pooler"] = "mean".into();
        p["method"]["search"] = "Exact".into();
    });
    let plan = plan.unwrap();
    assert_eq!((plan.method.calibration.as_deref(), &plan.pooling.calibration), (Some(PRINT), &None));
    assert_eq!((&plan.method.search[..], plan.method.chosen_by_loss), (&[Spec::new("Exact")][..], false));
    let same = same_plan(&source, &[&[0, 5], &[1, 2], &[3, 7], &[4, 6]]);
    let (migrated, present) =
        (SharedHeads::new(&plan, &source).unwrap(), SharedHeads::new(&same, &source).unwrap());
    assert_eq!(migrated.layer(1).unwrap().1, present.layer(1).unwrap().1);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut Value)| read(change).unwrap_err();
    says(
        &refused(&|p| p["method"]["pooler"] = "median".into()),
        &["plan.json", "no pooler \"median\"", "mean, first"],
    );
    says(
        &refused(&|p| p["method"]["refit"] = "twice".into()),
        &["plan.json", "no refit \"twice\"", "none, output, full"],
    );
    // A refit starts from calibrated heads.
    says(&refused(&|p| p["calibration"] = Value::Null), &["plan.json", "full refit", "names no calibration"]);
    says(&refused(&|p| p["method"]["pooler"] = "mean".into()), &["full refit", "names no calibration"]);
    says(&refused(&|p| p["calibration"] = "sha1:00".into()), &["calibration must be `sha256:`", "sha1:00"]);
    says(&refused(&|p| p["version"] = 3.into()), &["plan.json", "version 3 is not supported", "version 2"]);
    says(&refused(&|p| p["version"] = 0.into()), &["version 0 is not supported"]);
    says(&refused(&|p| p["version"] = 2.into()), &["plan.json", "expected a sequence"]);
    says(&refused(&|p| p["method"]["novel"] = 1.into()), &["unknown field `novel`"]);
    says(&refused(&|p| p["source"]["kv_heads"] = 4.into()), &["layer 0 groups 8 heads"]);
}
