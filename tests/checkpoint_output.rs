//! Writing loses nothing: what is in the way stays, what is not whole does not appear.
#![cfg(feature = "checkpoint")]

mod models;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use models::{attention, convert, convert_by, llama, not_written, ready, says, snapshot};
use qcqa::budget::Limits;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::{FileError, WriteOptions};
use qcqa::heads::{HeadSource, Heads, Pooled};
use qcqa::model::Architecture;
use qcqa::output::{OutputModel, Slot, Target, check_place};
use qcqa::partition::Partition;
use qcqa::plan::Plan;
use qcqa::pooler::MeanPooler;
use qcqa::spec::Spec;
use qcqa::targets::{Expanded, Stock};
use qcqa::{Error, KvPooler, Progress, Run};

/// A target that mixes up its heads.
#[derive(Debug)]
struct Confused(Vec<Slot>, Vec<Slot>);

impl Target for Confused {
    fn name(&self) -> &'static str {
        "confused"
    }
    fn limits(&self, _: &Architecture) -> Limits {
        Limits::default()
    }
    fn output(&self, source: &Checkpoint, _: &Plan) -> Result<OutputModel, FileError> {
        let (model, config) = (source.architecture(), source.config().raw().clone());
        Ok(OutputModel::from_slots(model, config, |_| (self.0.clone(), self.1.clone()))?)
    }
}

#[test]
fn layouts_that_mix_up_heads() {
    let (root, source, plan) = ready();
    let refused = |kv_rows: &[usize], query_order: &[usize]| {
        let [kv, query] = [kv_rows, query_order].map(|all| all.iter().map(|&i| Slot::Head(i)).collect());
        let target = Confused(kv, query);
        not_written(&root, &source, &plan, &target, &root.path().join("out"), false)
    };
    says(
        &refused(&[0, 1], &[0, 1, 3, 2, 4, 5]),
        &["confused", "layer 0", "query head 3 would read group 0 instead of 1"],
    );
    says(&refused(&[0, 1], &[0, 1, 2, 3, 4, 4]), &["no permutation of 6"]);
    says(&refused(&[0, 0, 1, 1], &[0, 1, 2, 3, 4, 5]), &["cannot be shared evenly by 4"]);
    says(&refused(&[], &[0, 1, 2, 3, 4, 5]), &["by 0 KV heads"]);
    says(&refused(&[0, 2], &[0, 1, 2, 3, 4, 5]), &["no group 2 of 2"]);
}

#[test]
fn outputs_in_the_way() {
    let (root, source, plan) = ready();
    let input = root.path().join("in");
    let refused = |out: &Path, force: bool| {
        let message = not_written(&root, &source, &plan, &Stock, out, force);
        assert_eq!(check_place(&source, out, force).unwrap_err().to_string(), message);
        message
    };
    check_place(&source, &root.path().join("out"), false).unwrap();
    for force in [false, true] {
        says(&refused(&input, force), &["must not lie within"]);
        says(&refused(&input.join("extra/../new/out"), force), &["must not lie within"]);
        says(&refused(&root.path().join("new/../in/out"), force), &["cannot write", "`..` below"]);
        says(&refused(&input.join("new/out"), force), &["must not lie within"]);
        says(&refused(root.path(), force), &["must not lie within"]);
        says(&refused(&input.join("config.json/out"), force), &["must not lie within"]);
    }
    let full = root.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("diary.txt"), "dear").unwrap();
    says(&refused(&full, false), &["full exists", "not replaced unless"]);
    says(&refused(&full, true), &["full is no model that qcqa wrote"]);
    says(&refused(&full.join("diary.txt"), true), &["is no model that qcqa wrote"]);
    says(&refused(&full.join("diary.txt/out"), false), &["cannot write"]);
}

#[cfg(unix)]
#[test]
fn links_hide_nothing() {
    use std::os::unix::fs::symlink;
    let (root, source, plan) = ready();
    let input = root.path().join("in");
    let refused = |source: &Checkpoint, out: &Path| not_written(&root, source, &plan, &Stock, out, true);
    symlink(&input, root.path().join("alias")).unwrap();
    says(&refused(&source, &root.path().join("alias")), &["must not lie within"]);
    says(&refused(&source, &root.path().join("alias/out")), &["must not lie within"]);
    fs::remove_file(root.path().join("alias")).unwrap();

    // A source whose weights lie, by a link, in the old output that would be deleted.
    let (linked, old) = (root.path().join("linked"), root.path().join("old"));
    llama().write(&old);
    let names = snapshot(&old).into_keys().map(|path| path.strip_prefix(&old).unwrap().to_path_buf());
    let names: Vec<_> = names.chain(["qcqa.json".into()]).collect();
    let ours = serde_json::json!({ "qcqa": "0.1.0", "files": names });
    fs::write(old.join("qcqa.json"), ours.to_string()).unwrap();
    fs::create_dir(&linked).unwrap();
    fs::copy(input.join("config.json"), linked.join("config.json")).unwrap();
    symlink(old.join("model.safetensors"), linked.join("model.safetensors")).unwrap();
    let indirect = Checkpoint::open(&linked).unwrap();
    says(&refused(&indirect, &old), &["must not lie within", "old/model.safetensors"]);

    // Elsewhere links are followed, and a loop ends.
    symlink(&linked, linked.join("loop")).unwrap();
    symlink(input.join("tokenizer.json"), linked.join("tokenizer.json")).unwrap();
    let out = root.path().join("out");
    let report = convert(&indirect, &plan, &Stock, &out, WriteOptions::default(), Run::new(0)).unwrap();
    assert_eq!(report.files.len(), 4);
    assert!(out.join("tokenizer.json").symlink_metadata().unwrap().is_file());
    Checkpoint::open(&out).unwrap();
}

#[test]
fn a_cancelled_run_leaves_nothing() {
    let (root, source, plan) = ready();
    let before = snapshot(root.path());
    let convert = |stop_at: u64, seen: &AtomicU64, total: &AtomicU64| {
        let observer = |progress: &Progress<'_>| {
            assert_eq!(progress.stage, "write");
            seen.store(progress.done, Ordering::Relaxed);
            total.store(progress.total, Ordering::Relaxed);
            if progress.done == stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let run = Run::new(0).with_observer(&observer);
        let out = root.path().join("new/out");
        convert(&source, &plan, &Stock, &out, WriteOptions::default(), run)
    };
    let (seen, total) = (AtomicU64::new(0), AtomicU64::new(1));
    let mut stop_at = 0;
    while stop_at <= total.load(Ordering::Relaxed) {
        let error = convert(stop_at, &seen, &total).unwrap_err();
        assert!(matches!(error, FileError::Core(Error::Cancelled)), "{error}");
        assert!(matches!(Error::from(error), Error::Cancelled));
        assert_eq!(seen.load(Ordering::Relaxed), stop_at);
        assert_eq!(snapshot(root.path()), before);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        stop_at += 1;
    }
    assert_eq!(total.load(Ordering::Relaxed), 11 + 2);
    convert(u64::MAX, &seen, &total).unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), total.load(Ordering::Relaxed));
    assert_eq!(fs::read_dir(root.path().join("new")).unwrap().count(), 1);
}

/// Fails at the second layer it is given.
#[derive(Debug)]
struct Fails(AtomicUsize);

impl KvPooler for Fails {
    fn spec(&self) -> Spec {
        Spec::new("fails")
    }
    fn pool(&self, heads: &Heads, partition: &Partition) -> qcqa::Result<Pooled> {
        match self.0.fetch_add(1, Ordering::Relaxed) {
            0 => MeanPooler.pool(heads, partition),
            _ => Err(Error::plugin("no more")),
        }
    }
}

#[test]
fn force_replaces_only_by_what_is_whole() {
    let (root, source, plan) = ready();
    let (input, out) = (snapshot(&root.path().join("in")), root.path().join("out"));
    let forced = WriteOptions::default().force(true);
    convert(&source, &plan, &Stock, &out, forced, Run::new(0)).unwrap();
    let old = snapshot(&out);

    says(&not_written(&root, &source, &plan, &Stock, &out, false), &["out exists", "not replaced unless"]);
    let error = convert_by(Fails(0.into()), &source, &plan, &Expanded, &out, forced).unwrap_err();
    says(&error.to_string(), &["no more"]);
    assert_eq!(snapshot(&out), old);

    convert(&source, &plan, &Expanded, &out, forced, Run::new(0)).unwrap();
    assert_eq!(attention(&Checkpoint::open(&out).unwrap()).kv_heads, 6);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    assert_eq!(snapshot(&root.path().join("in")), input);
}
