//! The library does what the binary does, to the byte.
#![cfg(feature = "cli")]

mod command;
#[path = "../examples/compress.rs"]
#[allow(dead_code, unreachable_pub, reason = "its main is not called here")]
mod example;
mod models;

use std::fs;
use std::path::{Path, PathBuf};

use command::{done, text};
use models::{novels, snapshot};

#[test]
fn the_example_writes_what_the_binary_writes() {
    let (root, model) = (tempfile::tempdir().unwrap(), novels());
    let [words, by_binary, by_library] =
        ["words.txt", "binary", "library"].map(|name| root.path().join(name));
    let whole = fs::read_to_string(model.join("calibration.txt")).unwrap();
    fs::write(&words, whole.chars().take(12_000).collect::<String>()).unwrap();
    let (model, words) = (text(&model), text(&words));
    let args = ["compress", model, "--kv", "0.5", "--calibration", words, "--calibration-windows", "4"];
    done(&[&args[..], &["--out", text(&by_binary)]].concat());
    example::compress(model, words, 4, text(&by_library)).unwrap();
    let files = |directory: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let files = snapshot(directory).into_iter();
        files.map(|(path, bytes)| (path.strip_prefix(directory).unwrap().to_path_buf(), bytes)).collect()
    };
    assert!(files(&by_binary) == files(&by_library));
}
