//! Rules of the source tree that no compiler checks: rooms know nothing of higher ones, only families know model types and
//! tensor names, messages of the library name no flags, files stay short.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The rooms, from the lowest to the highest: each may import from those before it.
const ROOMS: [&str; 31] = [
    "error",
    "run",
    "spec",
    "partition",
    "model",
    "budget",
    "heads",
    "low_rank",
    "cross_layer",
    "fitness",
    "front",
    "evolution",
    "grouping",
    "optimizer",
    "allocator",
    "pooler",
    "files",
    "plan",
    "checkpoint",
    "families",
    "text",
    "runtime",
    "descent",
    "evaluation",
    "calibration",
    "refit",
    "distil",
    "output",
    "targets",
    "pipeline",
    "testing",
];

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Path below src/ and text of every source file of the library.
fn library() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root).into_iter().map(|path| {
        let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        (name, fs::read_to_string(&path).unwrap())
    });
    files.filter(|(name, _)| !name.starts_with("bin")).collect()
}

/// The code of a file, without its tests and comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    let body = text.split("#[cfg(test)]").next().unwrap_or_default();
    body.lines().filter(|line| !line.trim_start().starts_with("//"))
}

fn room_of(name: &str) -> &str {
    name.split('/').next().unwrap().trim_end_matches(".rs")
}

#[test]
fn rooms_know_nothing_of_higher_ones() {
    let place: BTreeMap<&str, usize> = ROOMS.iter().enumerate().map(|(i, room)| (*room, i)).collect();
    let mut wrong = Vec::new();
    for (name, text) in library() {
        let own = room_of(&name);
        if own == "lib" {
            continue;
        }
        let Some(&at) = place.get(own) else { panic!("{name}: the room {own} has no place among {ROOMS:?}") };
        for line in code(&text) {
            for used in line.split("crate::").skip(1) {
                let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                match place.get(used.as_str()) {
                    Some(&other) if other > at => wrong.push(format!("{name}: {own} knows {used}")),
                    // What the root re-exports has an owner: import from there.
                    None => wrong.push(format!("{name}: `crate::{used}` is not a room")),
                    _ => {}
                }
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn only_families_know_model_types_and_tensor_names() {
    let words = [
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "embed_tokens",
        "lm_head",
        "inv_freq",
        "input_layernorm",
        "\"llama\"",
        "\"mistral\"",
        "\"qwen2\"",
        "\"qwen3\"",
        "\"gemma",
        "\"gpt",
        "\"olmo",
        "\"phi",
        "\"glm",
        "\"opt\"",
        "\"falcon\"",
        "\"arcee\"",
        "\"bert\"",
        "\"seed_oss\"",
        "\"ernie4_5\"",
        "\"helium\"",
        "LayerNorm",
        "layernorm",
        "ln_1",
        "rope_theta",
        "rope_scaling",
        "rms_norm_eps",
        "sliding_window",
    ];
    let mut wrong = Vec::new();
    for (name, text) in library().into_iter().filter(|(name, _)| room_of(name) != "families") {
        for line in code(&text) {
            wrong.extend(
                words.iter().filter(|w| line.contains(**w)).map(|w| format!("{name}: {w} in {line}")),
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_library_names_no_flags_and_prints_nothing() {
    let mut wrong = Vec::new();
    for (name, text) in library() {
        for line in code(&text) {
            let quoted = line.split('"').skip(1).step_by(2);
            let flag = quoted.filter(|q| q.contains("--") || q.contains("`qcqa ")).count() > 0;
            if flag || ["println!(", "eprintln!(", "dbg!("].iter().any(|macro_| line.contains(macro_)) {
                wrong.push(format!("{name}: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn files_are_short() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let all = ["src", "tests", "benches", "examples", "fuzz"].map(|folder| sources(&root.join(folder)));
    for path in all.into_iter().flatten().filter(|path| !path.to_string_lossy().contains("/target/")) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 400, "{}: {lines} lines", path.display());
    }
}

/// An item of a documentation stands alone: it says what it is, not that it is as the one before.
#[test]
fn docs_stand_alone() {
    for (name, text) in library() {
        let mut before = "";
        for line in text.lines() {
            let opening =
                line.trim_start().strip_prefix("/// ").filter(|_| !before.trim_start().starts_with("///"));
            assert!(!opening.is_some_and(|o| o.starts_with("The same")), "{name}: {line}");
            before = line;
        }
    }
}
