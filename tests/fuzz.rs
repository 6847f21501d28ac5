//! The targets of `fuzz/` as plain tests: seeds, what was found once, and changes of both, the same in every run. The long form is
//! `.ci/trust fuzz`.
#![cfg(feature = "runtime")]

mod made;
mod models;
#[path = "../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../fuzz/src/seeds.rs"]
mod seeds;
#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

use cap::Cap;
use models::says;
use mutate::mutated;
use qcqa::text::Vocabulary;

/// More memory than any of these inputs backs: what asks for it ends the process.
#[global_allocator]
static MEMORY: Cap<std::alloc::System> = Cap::new(std::alloc::System, 1 << 30);

/// What went wrong once, by target.
fn found(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/found").join(name);
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Runs a target on its seeds, on what was found, and on so many changed inputs.
fn holds(name: &str, changed: u64) {
    let (_, target) = targets::ALL.into_iter().find(|(of, _)| *of == name).unwrap();
    let first: Vec<_> = seeds::of(name).into_iter().chain(found(name)).collect();
    first.iter().for_each(|input| target(input));
    let mut inputs = first.clone();
    for seed in 0..changed {
        let of = seed as usize % inputs.len();
        let input = mutated(&inputs[of], seed);
        target(&input);
        // Some are changed further, for a while.
        match seed % 16 {
            0 => inputs[of].clone_from(&first[of]),
            4 | 8 | 12 if input.len() < 1 << 17 => inputs[of] = input,
            _ => {}
        }
    }
}

/// What the library that reads a tokenizer takes for granted, and panics where it is not so.
#[test]
fn tokenizers_that_are_none_are_told_as_what_they_are() {
    let told: Vec<String> = found("tokenizer")
        .into_iter()
        .map(|text| {
            targets::with(|ground| {
                let path = ground.at("model/tokenizer.json");
                fs::write(&path, text).unwrap();
                let message = Vocabulary::open(&ground.model).unwrap_err().to_string();
                fs::write(path, targets::WORDS).unwrap();
                message
            })
        })
        .collect();
    let parts: [&[&str]; 6] = [
        &["invalid unicode code point at line 1"],
        &["expected value at line 1 column 309"],
        &["`model.merges`", "pairs of tokens that make a token", "found Ġt and Ġt"],
        &["`model.merges`", "found a and b"],
        &["`post_processor.single`", "special_tokens", "found B"],
        &["`post_processor.single`", "special_tokens", "found "],
    ];
    assert_eq!(told.len(), parts.len());
    for (message, parts) in told.iter().zip(parts) {
        says(message, &["tokenizer.json"]);
        says(message, parts);
    }
}

macro_rules! targets {
    ($($name:ident $changed:literal,)*) => {$(
        #[test]
        fn $name() {
            holds(stringify!($name), $changed);
        }
    )*
    #[test]
    fn none_is_forgotten() {
        let mut here = [$(stringify!($name)),*];
        let mut all = targets::ALL.map(|(name, _)| name);
        here.sort();
        all.sort();
        assert_eq!(here, all);
        let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml")).unwrap();
        assert!(all.iter().all(|name| manifest.contains(&format!("name = \"{name}\""))));
    }};
}

targets! {
    config 2000,
    run 600,
    index 1000,
    header 2000,
    plan 1500,
    converted 1000,
    moments 1500,
    tokenizer 500,
    beside 500,
    ids 4000,
    texts 300,
    choices 4000,
    gguf 300,
}
