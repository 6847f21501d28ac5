//! One seed and one input are one output, byte for byte, on any number of threads; and nearly so in other builds.
#![cfg(feature = "cli")]

mod models;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use models::{novels, snapshot, stored};
use safetensors::Dtype;
use serde_json::Value;

/// What `compress` writes: by weights alone, and calibrated with all that reads a text.
fn written(binary: &Path, threads: usize) -> [BTreeMap<PathBuf, Vec<u8>>; 2] {
    let (model, text) = (novels(), novels().join("calibration.txt"));
    let calibrated = ["--refit", "full", "--calibration-windows", "8", "--calibration"].map(Path::new);
    let calibrated = [&calibrated[..], &[&text]].concat();
    [
        vec![Path::new("--method"), Path::new("qcqa-ec"), Path::new("--generations"), Path::new("5")],
        calibrated,
    ]
    .map(|more| {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let mut command = Command::new(binary);
        command.arg("compress").arg(&model).args(["--kv", "0.5", "--seed", "3", "--out"]).arg(&out);
        let output = command.args(more).env("RAYON_NUM_THREADS", threads.to_string()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let name = |(path, bytes): (PathBuf, _)| (path.strip_prefix(&out).unwrap().to_path_buf(), bytes);
        snapshot(&out).into_iter().map(name).collect()
    })
}

#[test]
fn any_number_of_threads() {
    let binary = Path::new(env!("CARGO_BIN_EXE_qcqa"));
    let one = written(binary, 1);
    for threads in [2, 3, 8] {
        let other = written(binary, threads);
        for (a, b) in one.iter().zip(&other) {
            assert!(a.keys().eq(b.keys()));
            let differ: Vec<_> = a.keys().filter(|name| a[*name] != b[*name]).collect();
            assert!(differ.is_empty(), "{threads} threads: {differ:?}");
        }
    }
}

/// The largest difference of a number of the weights, over the largest number of its tensor.
fn off(root: &Path, a: &[u8], b: &[u8]) -> f64 {
    let [a, b] = [("a", a), ("b", b)].map(|(name, bytes)| {
        std::fs::write(root.join(name), bytes).unwrap();
        stored(&root.join(name))
    });
    assert!(a.keys().eq(b.keys()));
    let numbers = |(dtype, _, bytes): &(Dtype, Vec<usize>, Vec<u8>)| -> Vec<f64> {
        assert_eq!(*dtype, Dtype::BF16);
        bytes.chunks(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
    };
    let of = |name: &String| {
        let (a, b) = (numbers(&a[name]), numbers(&b[name]));
        let largest = a.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        a.iter().zip(&b).fold(0.0, |most: f64, (x, y)| most.max((x - y).abs()))
            / largest.max(f64::MIN_POSITIVE)
    };
    a.keys().map(of).fold(0.0, f64::max)
}

/// Builds that QCQA_BINARIES names: the first against the others. The groups are the same; weights differ by a few roundings of
/// the type that they are stored in.
#[test]
fn builds() {
    let Some(binaries) = std::env::var_os("QCQA_BINARIES") else {
        println!("skipped: QCQA_BINARIES names no builds");
        return;
    };
    let binaries: Vec<PathBuf> = std::env::split_paths(&binaries).collect();
    let root = tempfile::tempdir().unwrap();
    let first = written(&binaries[0], 2);
    for binary in &binaries[1..] {
        let other = written(binary, 2);
        for (road, (a, b)) in ["by weights", "calibrated"].iter().zip(first.iter().zip(&other)) {
            let [x, y] =
                [a, b].map(|all| serde_json::from_slice::<Value>(&all[Path::new("qcqa.json")]).unwrap());
            let groups = |v: &Value| -> Vec<Value> {
                v["plan"]["layers"].as_array().unwrap().iter().map(|layer| layer["groups"].clone()).collect()
            };
            assert_eq!(groups(&x), groups(&y), "{}", binary.display());
            let same = a.keys().filter(|name| b.get(*name) == Some(&a[*name])).count();
            let weights = Path::new("model.safetensors");
            let off = off(root.path(), &a[weights], &b[weights]);
            println!(
                "{}, {road}: {same} of {} files are the same, weights are off by {off:.1e}",
                binary.display(),
                a.len()
            );
            assert!(off <= 0.02, "{}: {off}", binary.display());
        }
    }
}
