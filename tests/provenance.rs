//! What qcqa.json says was done is what was done, whatever plan, pooler and calibration.
#![cfg(all(feature = "checkpoint", feature = "linalg"))]

mod models;

use std::fs;
use std::sync::LazyLock;

use models::{Model, pooled_plan};
use ndarray::Array2;
use proptest::prelude::*;
use qcqa::checkpoint::{Checkpoint, Family};
use qcqa::families::Llama;
use qcqa::files::WriteOptions;
use qcqa::heads::{HeadSource, Heads, Moment, Pooled};
use qcqa::model::{Architecture, ModelId};
use qcqa::output::convert;
use qcqa::partition::Partition;
use qcqa::plan::{Plan, Pooling, Refit, SharedHeads};
use qcqa::pooler::{FirstHead, MeanPooler, POOLERS};
use qcqa::spec::Spec;
use qcqa::targets::Expanded;
use qcqa::{Error, KvPooler, Run};
use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

/// A model in f32, so that nothing is rounded.
static MODEL: LazyLock<TempDir> = LazyLock::new(|| {
    let directory = tempfile::tempdir().unwrap();
    Model::new("llama", Dtype::F32, 6, true).write(directory.path());
    directory
});

fn print(of: u8) -> String {
    format!("sha256:{}", format!("{of:02x}").repeat(32))
}

/// A checkpoint with the moments of a text.
#[derive(Debug)]
struct Calibrated<'a>(&'a Checkpoint, u8);

impl HeadSource for Calibrated<'_> {
    fn architecture(&self) -> &Architecture {
        self.0.architecture()
    }

    fn id(&self) -> qcqa::Result<ModelId> {
        self.0.id()
    }

    fn heads(&self, layer: usize) -> qcqa::Result<Heads> {
        let heads = self.0.heads(layer)?;
        let size = heads.key().inputs() + 1;
        let mut moment = Array2::from_elem((size, size), 0.1);
        moment
            .diag_mut()
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v = 1.0 + (i * usize::from(self.1) % 7) as f64);
        moment[[size - 1, size - 1]] = 1.0;
        heads.with_moment(Moment::new(moment)?)
    }

    fn calibration(&self) -> Option<String> {
        Some(print(self.1))
    }
}

/// The last head of each group: a pooler that no registry knows.
#[derive(Debug)]
struct LastHead;

impl KvPooler for LastHead {
    fn spec(&self) -> Spec {
        Spec::new("last").with("of", "each")
    }

    fn pool(&self, heads: &Heads, groups: &Partition) -> qcqa::Result<Pooled> {
        let last: Vec<usize> = groups.groups().iter().map(|group| group[group.len() - 1]).collect();
        let pick = |p: &qcqa::heads::Projection| {
            let bias = p.bias().map(|b| b.select(ndarray::Axis(0), &last));
            qcqa::heads::Projection::new(p.weight().select(ndarray::Axis(0), &last), bias)
        };
        Ok(Pooled::new(pick(heads.key())?, pick(heads.value())?))
    }
}

fn own(index: usize) -> Box<dyn KvPooler> {
    match index {
        0 => Box::new(MeanPooler),
        1 => Box::new(FirstHead),
        2 => POOLERS.make(&Spec::new("low-rank").with("ridge", 0.03)).unwrap(),
        3 => POOLERS.make(&Spec::new("procrustes").with("rounds", 2_usize)).unwrap(),
        _ => Box::new(LastHead),
    }
}

/// The output that a record describes is the one that is there.
fn assert_true(source: &Checkpoint, moments: Option<u8>, record: &Plan, out: &Checkpoint) {
    let calibrated = moments.map(|of| Calibrated(source, of));
    let claimed = record.pooling.calibration.is_some();
    if claimed {
        assert_eq!(record.pooling.calibration, moments.map(print), "moments that were there");
    }
    assert_eq!(record.pooling.refit, None, "nothing was refitted");
    let pooler = match record.pooling.pooler.name() {
        "last" => Box::new(LastHead),
        _ => POOLERS.make(&record.pooling.pooler).unwrap(),
    };
    assert_eq!(pooler.spec(), record.pooling.pooler, "every setting");
    for (layer, groups) in record.groups().enumerate() {
        // With the moments that the record names, or without any.
        let heads = match &calibrated {
            Some(calibrated) if claimed => calibrated.heads(layer).unwrap(),
            _ => source.heads(layer).unwrap(),
        };
        let (pooled, written) = (pooler.pool(&heads, groups).unwrap(), out.heads(layer).unwrap());
        let query = pooled.query.as_ref().or(heads.query()).unwrap();
        let output = pooled.output.as_ref().map(|o| o.view()).or(heads.output()).unwrap();
        assert_eq!((written.query().unwrap(), written.output().unwrap()), (query, output), "layer {layer}");
        for head in 0..groups.n_heads() {
            let group = groups.group_of(head);
            for (written, pooled) in [(written.key(), &pooled.key), (written.value(), &pooled.value)] {
                let of = |p: &qcqa::heads::Projection, head| {
                    let bias = p.bias().unwrap().row(head).to_vec();
                    (p.weight().index_axis(ndarray::Axis(0), head).to_owned(), bias)
                };
                assert_eq!(of(written, head), of(pooled, group), "layer {layer} head {head}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn never_claims_what_was_not_done(
        labels in prop::collection::vec(prop::collection::vec(0..4_usize, 6), 2),
        planned in 0..4_usize,
        instead in prop::option::of(0..5_usize),
        asked in prop::option::of(1..3_u8),
        refit in any::<bool>(),
        given in prop::option::of(1..3_u8),
    ) {
        let source = Checkpoint::open_as(MODEL.path(), &[&Llama as &dyn Family]).unwrap();
        let calibrated = given.map(|of| Calibrated(&source, of));
        let heads: &dyn HeadSource = calibrated.as_ref().map_or(&source, |c| c);
        let groups: Vec<_> = labels.iter().map(|labels| Partition::from_labels(labels).unwrap()).collect();
        let refit = Some(if asked == Some(1) { Refit::Output } else { Refit::Full }).filter(|_| refit && asked.is_some());
        let pooling = Pooling::new(own(planned).spec()).with_calibration(asked.map(print)).with_refit(refit);
        let plan = pooled_plan(&source, &groups, pooling.clone());

        let shared = match instead {
            Some(index) => SharedHeads::with_pooler(&plan, heads, own(index)).unwrap(),
            None => match SharedHeads::new(&plan, heads) {
                Ok(shared) => shared,
                // Refused, and rightly so.
                Err(Error::PlanRefit { refit: name }) => {
                    prop_assert_eq!(refit.map(Refit::name), Some(name));
                    return Ok(());
                }
                Err(Error::PlanCalibration { expected, found }) => {
                    let used = given.map(print).filter(|_| own(planned).needs().moment);
                    prop_assert!(expected == asked.map(print) && found == used && found != expected);
                    return Ok(());
                }
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            },
        };
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        convert(&source, &shared, &Expanded, &out, WriteOptions::default(), Run::new(0)).unwrap();
        let provenance: Value = serde_json::from_slice(&fs::read(out.join("qcqa.json")).unwrap()).unwrap();
        let record: Plan = serde_json::from_value(provenance["plan"].clone()).unwrap();
        record.check().unwrap();
        assert_true(&source, given, &record, &Checkpoint::open(&out).unwrap());

        prop_assert_eq!(&record, &shared.record());
        prop_assert_eq!(&record.pooling.pooler, &own(instead.unwrap_or(planned)).spec());
        prop_assert!(record.groups().eq(plan.groups()));
        let asked_for: Option<Pooling> =
            provenance.get("planned_pooling").map(|p| serde_json::from_value(p.clone()).unwrap());
        prop_assert_eq!(asked_for, Some(pooling).filter(|pooling| *pooling != record.pooling));
    }
}
