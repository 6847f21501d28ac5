//! What README and docs tell people to type, typed: every command of their `sh` blocks runs on the model of this repository.
#![cfg(feature = "cli")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Starts of lines that are for other tools or other machines, with the reason why they are not run here.
const ELSEWHERE: [(&str, &str); 6] = [
    ("cargo test", "this is one of its tests"),
    ("cargo bench", "takes an hour, and its figures are for people"),
    ("cargo run --release --example", "examples are run by CI"),
    ("cargo run --release --features", "examples are run by CI"),
    ("python", "needs an environment with torch"),
    ("cd benches", "a crate of its own"),
];

/// Characters of each text that commands are given: that they work does not rest on how much they read, and these are windows enough
/// that some fit and some validate.
const READ: usize = 14_000;

/// How a command of ours begins.
const OURS: [&str; 2] = ["cargo run --release --features cli -- ", "qcqa "];

fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = docs.filter(|path| path.extension().is_some_and(|e| e == "md")).collect();
    all.extend([root.join("README.md"), root.join("CONTRIBUTING.md")]);
    all.sort();
    all
}

/// The lines of the `sh` blocks, continued ones in one.
fn commands(text: &str) -> Vec<String> {
    let (mut inside, mut found, mut pending) = (false, Vec::new(), String::new());
    for line in text.lines() {
        match (inside, line.trim()) {
            (false, "```sh") => inside = true,
            (true, "```") => inside = false,
            (true, line) if !line.is_empty() && !line.starts_with('#') => {
                // A comment may follow.
                let line = line.split("  #").next().unwrap().trim();
                match line.strip_suffix('\\') {
                    Some(begun) => pending += begun,
                    None => found.push(std::mem::take(&mut pending) + line),
                }
            }
            _ => {}
        }
    }
    found
}

/// What a document leaves open: a model, texts, a directory.
fn filled_in(word: &str) -> &str {
    match word {
        "MODEL" => "tests/data/novels-1m",
        "DIR" => "target/dir",
        "calibration.txt" | "TEXT" => "tests/data/novels-1m/calibration.txt",
        "evaluation.txt" | "FILE" => "tests/data/novels-1m/evaluation.txt",
        word => word,
    }
}

#[test]
fn every_command_of_the_documents_works() {
    // A desk that looks like the repository, so that nothing is written to it.
    let (root, desk) = (Path::new(env!("CARGO_MANIFEST_DIR")), tempfile::tempdir().unwrap());
    fs::create_dir(desk.path().join("target")).unwrap();
    let data = desk.path().join("tests/data/novels-1m");
    fs::create_dir_all(&data).unwrap();
    for entry in fs::read_dir(root.join("tests/data/novels-1m")).unwrap() {
        let path = entry.unwrap().path();
        let here = data.join(path.file_name().unwrap());
        if path.extension().is_some_and(|e| e == "txt") {
            let start: String = fs::read_to_string(&path).unwrap().chars().take(READ).collect();
            fs::write(here, start).unwrap();
        } else {
            fs::copy(&path, here).unwrap();
        }
    }
    let mut done = BTreeSet::new();
    for document in documents() {
        for command in commands(&fs::read_to_string(&document).unwrap()) {
            let name = document.file_name().unwrap().to_string_lossy().into_owned();
            let ours = OURS.iter().find_map(|start| command.strip_prefix(start));
            let Some(arguments) = ours else {
                let known = ELSEWHERE.iter().any(|(start, _)| command.starts_with(start));
                assert!(known, "{name}: nobody runs `{command}`");
                continue;
            };
            // Two documents may show one command.
            if !done.insert(arguments.to_string()) {
                continue;
            }
            // Many commands write their result there, and nothing is written over.
            if arguments.contains("--out DIR") {
                drop(fs::remove_dir_all(desk.path().join("target/dir")));
            }
            let output = Command::new(env!("CARGO_BIN_EXE_qcqa"))
                .args(arguments.split_whitespace().map(filled_in))
                .current_dir(desk.path())
                .output()
                .unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}: `{command}`: {errors}");
        }
    }
    assert!(done.len() >= 4, "{done:?}");
}
