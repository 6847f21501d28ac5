//! What is measured through caches: predictions, recall, heads, and mixtures within a budget.
#![cfg(feature = "cli")]

mod command;
mod models;
mod running;

use std::fs;
use std::sync::Arc;

use approx::assert_relative_eq;
use command::{done, fails, json};
use qcqa::Run;
use qcqa::evaluation::{Items, Preparation, Reference, evaluate, head_importance, recall};
use qcqa::pipeline::{Mixer, Mixture, Mixtures};
use qcqa::plan::SharedHeads;
use qcqa::runtime::{CachePolicy, KvCache, Model, POLICIES, Probe, Steps};
use qcqa::text::{Texts, Vocabulary, WholeText, Windows};
use running::{calibration_text, evaluation_text, neighbours, novels, windows};

fn made(spec: &str) -> Arc<dyn CachePolicy> {
    POLICIES.make(&spec.parse().unwrap()).unwrap().into()
}

/// Loss and divergence through `full` are those of the plain pass, in all and by stretches; less bytes are further away.
#[test]
fn what_is_read_through_a_cache_is_scored_as_all_else() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &source, &evaluation_text()).first(3);
    let reference = Reference::new(&source, &text, Run::new(0)).unwrap();
    let whole = evaluate(&source, &text, Run::new(0)).unwrap();
    let read =
        |spec: &str| reference.compare_through(&source, &made(spec), Steps::default(), Run::new(0)).unwrap();
    let full = read("full");
    assert_relative_eq!(full.evaluation.loss, whole.loss, epsilon = 1e-5);
    assert!(full.evaluation.divergence.unwrap().kl < 1e-6);
    assert_eq!(
        (full.bytes, full.most_bytes),
        ((256 * source.kv_bytes_per_token()) as f64, 256 * source.kv_bytes_per_token())
    );
    let (mut sum, mut n) = (0.0, 0);
    for stretch in &full.stretches {
        let predicted = stretch.places.len() - usize::from(stretch.places.start == 0);
        sum += stretch.loss * predicted as f64;
        n += predicted;
    }
    assert_eq!((n, full.stretches.len()), (255, 2));
    assert_relative_eq!(sum / 255.0, full.evaluation.loss, max_relative = 1e-9);
    let [more, less] = ["window:recent=60", "window:recent=12"].map(read);
    assert!(less.bytes < more.bytes && more.bytes < full.bytes / 2.0);
    assert!(less.evaluation.divergence.unwrap().kl > more.evaluation.divergence.unwrap().kl);
    // On one thread as on several.
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let [one, three] = [1, 3].map(|n| pool(n).install(|| read("corm:window=20:threshold=2")));
    assert_eq!((one.evaluation.loss, one.bytes), (three.evaluation.loss, three.bytes));
}

#[test]
fn items_ask_for_what_was_said() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &source, &evaluation_text()).first(12);
    for twins in [false, true] {
        let items = Items::needles(&text, 9, twins, Run::new(3)).unwrap();
        assert_eq!(items.all().len(), 9);
        for item in items.all() {
            assert_eq!(item.tokens.len(), 256);
            assert_eq!(item.answers, (248..256).collect::<Vec<_>>());
            // The needle, cue and all, is there twice, and the second time at the end.
            let (cue, before) = (item.answers[0] - 8, item.before[0] - 8);
            assert_eq!(item.tokens[cue..], item.tokens[before..before + 16]);
            assert!(before + 16 <= cue);
            let last_of_cue = &item.tokens[cue + 4..cue + 8];
            let places = item.tokens.windows(4).filter(|passage| *passage == last_of_cue).count();
            assert!(places >= if twins { 3 } else { 2 });
        }
        assert_eq!(items, Items::needles(&text, 9, twins, Run::new(3)).unwrap());
        assert_ne!(items, Items::needles(&text, 9, twins, Run::new(4)).unwrap());
    }
    let names = Items::names(&text, &Vocabulary::open(&checkpoint).unwrap()).unwrap();
    for item in names.all() {
        for (&answer, &before) in item.answers.iter().zip(&item.before) {
            assert_eq!(item.tokens[answer], item.tokens[before]);
            assert!(answer >= before + 64 && !item.tokens[before + 1..answer].contains(&item.tokens[answer]));
        }
    }
    let found = recall(&source, None, &names, Steps::default(), Run::new(0)).unwrap();
    let again = recall(&source, Some(&made("full")), &names, Steps::default(), Run::new(0)).unwrap();
    assert_eq!((found.share, found.asked), (again.share, again.asked));
    let short = Windows::new((0..200).collect(), 100).unwrap().first(1);
    models::says(&Items::needles(&short, 2, false, Run::new(0)).unwrap_err().to_string(), &["at least 2"]);
}

/// Importance is a mean of shares, the same on any text with the same seed, and makes a policy ready.
#[test]
fn heads_are_probed() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &source, &calibration_text()).first(20);
    for (probe, name) in [(Probe::Retrieval, "headkv"), (Probe::Reasoning, "headkv-r2")] {
        let importance = head_importance(&source, probe, &text, Run::new(1)).unwrap();
        assert_eq!(importance.iter().map(Vec::len).collect::<Vec<_>>(), [8; 4]);
        assert!(importance.iter().flatten().all(|s| (0.0..=1.0).contains(s)));
        assert!(importance.iter().flatten().any(|&s| s > 0.0), "{importance:?}");
        let ready = Preparation::new(&source, &text).ready(&made(name), Run::new(1)).unwrap();
        let expected = made(name).with_importance(&importance).unwrap();
        assert_eq!((ready.spec(), ready.probe()), (expected.spec(), None));
        KvCache::shared(ready);
    }
}

/// Bytes are kept to and read off; the best mixture is no worse than what spends the budget on one thing.
#[test]
fn mixtures_keep_to_their_budget() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let shared = SharedHeads::new(&neighbours(&checkpoint, 2), &checkpoint).unwrap();
    let half = source.with_shared(&shared).unwrap();
    let text = windows(&checkpoint, &source, &calibration_text());
    let text = Windows::new(text.first(20).tokens().to_vec(), 128).unwrap();
    let (decide, probe) = (text.clone().first(2), text.spaced(6));
    let mixer = Mixer::new(&source, [&half], &decide, &probe, Steps::new(128, 0).unwrap());
    assert_eq!(mixer.whole(), (64 * source.kv_bytes_per_token()) as f64);
    let budget = mixer.whole() / 4.0;
    let both = mixer.within(&[budget, mixer.whole() / 2.0], Run::new(0)).unwrap();
    let [mixtures, larger] = &both[..] else { panic!("one for each budget") };
    // More bytes are no worse, and two budgets together what each is alone.
    let best = |mixtures: &Mixtures| mixtures.read[0].cached.evaluation.divergence.unwrap().kl;
    assert!(best(larger) <= best(mixtures) && larger.bytes == 2.0 * mixtures.bytes);
    let alone = mixer.within(&[budget], Run::new(0)).unwrap();
    let read = |mixtures: &Mixtures| {
        let of = |m: &Mixture| (m.model, m.cache.spec(), m.single, m.cached.evaluation.loss);
        mixtures.read.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!((read(&alone[0]), alone[0].considered), (read(mixtures), mixtures.considered));
    let kl = mixtures.read.iter().map(|mixture| mixture.cached.evaluation.divergence.unwrap().kl);
    let kl: Vec<f64> = kl.collect();
    assert!(kl.is_sorted() && kl.len() > 1, "{kl:?}");
    assert!(mixtures.read.iter().all(|mixture| mixture.cached.bytes <= budget));
    assert!(mixtures.read.iter().any(|mixture| mixture.single));
    let [all, within, read] = mixtures.considered;
    assert!(all > within && within > read && read > mixtures.read.len());
    let reference = Reference::new(&source, &decide, Run::new(0)).unwrap();
    for mixture in &mixtures.read {
        let model = [&half, &source][mixture.model];
        let again = reference
            .compare_through(model, &mixture.cache, Steps::new(128, 0).unwrap(), Run::new(0))
            .unwrap();
        assert_eq!(
            (again.evaluation.loss, again.bytes),
            (mixture.cached.evaluation.loss, mixture.cached.bytes)
        );
    }
    let none = mixer.within(&[100.0], Run::new(0)).unwrap_err().to_string();
    models::says(&none, &["the budget", "some mixture"]);
}

#[test]
fn passages_that_fit_are_known_in_windows_of_any_length() {
    let windows = |length| Windows::new((0..4000).collect(), length).unwrap();
    let texts = Texts::new(&[WholeText::new("text", windows(100))], 4).unwrap();
    let fitted: Vec<u32> = texts.fit().tokens().to_vec();
    for length in [40, 100, 250] {
        let apart = texts.apart(&windows(length)).unwrap();
        let known =
            |window: &&[u32]| window.windows(32).any(|passage| passage.iter().all(|t| fitted.contains(t)));
        let all = windows(length);
        let expected: Vec<&[u32]> = all.tokens().chunks(length).filter(|window| !known(window)).collect();
        assert_eq!(apart.tokens(), expected.concat(), "{length}");
        assert!(apart.count() < all.count());
    }
    assert_eq!(texts.apart(&Windows::new(fitted, 100).unwrap()), None);
}

#[test]
fn the_command_line_reads_through_caches() {
    let (root, novels) = (tempfile::tempdir().unwrap(), models::novels());
    let file = |name: &str| root.path().join(name).to_str().unwrap().to_string();
    let [text, calibration] =
        [("evaluation.txt", "text"), ("calibration.txt", "calibration")].map(|(of, name)| {
            let whole = fs::read_to_string(novels.join(of)).unwrap();
            fs::write(root.path().join(name), whole.chars().take(30_000).collect::<String>()).unwrap();
            file(name)
        });
    let (model, svg) = (novels.to_str().unwrap(), file("caches.svg"));
    let learning = ["--calibration", &calibration, "--calibration-windows", "16"];
    let reading = ["--text", &text, "--windows", "2"];
    let caches = "full:bits=16,window:recent=60,headkv:tokens=64";
    let compare = ["compare", model, "--kv", "0.5", "--method", "gqa", "--cache", caches, "--plot", &svg];
    let value = json(&[&compare[..], &learning, &reading].concat());
    let lines = value["caches"].as_array().unwrap();
    assert_eq!(lines.len(), 6);
    let number = |i: usize, key: &str| lines[i][key].as_f64().unwrap();
    assert_eq!((number(0, "share"), number(1, "share"), number(3, "share")), (1.0, 0.25, 0.5));
    assert!(number(0, "kl") < 1e-4 && number(3, "kl") > 0.1);
    assert_relative_eq!(number(3, "kl"), value["lines"][0]["kl"].as_f64().unwrap(), max_relative = 1e-2);
    assert!(fs::read_to_string(&svg).unwrap().contains("all × headkv"));

    // Settings of one policy are a curve for every plan; the shares of a plan are one for a policy alone.
    let caches = "full:bits=16,full:bits=8,window:recent=60";
    let compare = [
        "compare", model, "--kv", "0.25,0.5", "--method", "gqa", "--cache", caches, "--plot", &svg, "--force",
    ];
    json(&[&compare[..], &["--text", &text, "--windows", "1"]].concat());
    let drawn = fs::read_to_string(&svg).unwrap();
    for curve in ["gqa 25.0% × full", "gqa 50.0% × full", "gqa × window"] {
        assert!(drawn.contains(curve), "{curve}");
    }

    // A budget, the mixture that it ends with, and the model under that.
    let name = file("best");
    let budget =
        ["budget", model, "--bytes-per-token", "512", "--context", "128", "--kv", "0.5", "--out", &name];
    let value = json(&[&budget[..], &learning, &["--method", "gqa", "--text", &text]].concat());
    let found = &value["budgets"][0];
    assert_eq!(
        (found["bytes"].as_f64(), value["whole_bytes"].as_f64()),
        (Some(512.0 * 128.0), Some(2048.0 * 128.0))
    );
    let best = &found["mixtures"][0];
    assert!(best["bytes"].as_f64().unwrap() <= 512.0 * 128.0);
    // The best one, and the best single one, read a text that decided nothing.
    let all = found["mixtures"].as_array().unwrap();
    let told = all.iter().filter(|mixture| mixture["held_out"].is_object());
    assert_eq!(told.count(), if best["single"] == true { 1 } else { 2 });
    let cache = format!("{name}.cache.json");
    let mut eval = vec!["eval", model, "--cache", &cache];
    let plan = format!("{name}.plan.json");
    if found["plan"].is_object() {
        eval.extend(["--plan", &plan]);
    }
    let read = json(&[&eval[..], &reading, &["--context", "128"]].concat());
    assert_eq!(read["caches"][0]["cache"], best["cache"]);
    assert!(read["caches"][0]["bytes"].as_f64().unwrap() <= 1.05 * 512.0 * 128.0);
    let told = done(&[
        "eval",
        model,
        "--text",
        &text,
        "--windows",
        "2",
        "--cache",
        "corm:window=20",
        "--recall",
        "--context",
        "128",
    ]);
    assert!(told.contains("2 windows of 128 tokens") && told.contains("needles"), "{told}");

    let eval = ["eval", model, "--text", &text, "--cache"];
    for (given, says) in [
        ("widow", "known are full, window"),
        ("window:recent", "NAME=VALUE"),
        ("window:recent=0", "at least 1 token"),
        ("headkv", "--calibration FILE is missing"),
        ("missing.json", "missing.json"),
    ] {
        let message = fails(if given.ends_with("json") { 1 } else { 2 }, &[&eval[..], &[given]].concat());
        models::says(&message, &[says]);
    }
    models::says(
        &fails(2, &[&eval[..], &["full", "--context", "300"]].concat()),
        &["positions for 256 tokens"],
    );
    models::says(&fails(2, &["compare", model, "--kv", "0.5", "--cache", "full"]), &["--text FILE"]);
    models::says(&fails(2, &["budget", model, "--bytes", "100000"]), &["--calibration FILE is missing"]);
    let small =
        [&["budget", model, "--bytes", "10", "--kv", "0.5", "--method", "gqa"][..], &learning].concat();
    models::says(&fails(1, &small), &["the budget is 10"]);
    // What is read is not written over.
    let own = file("own.cache.json");
    fs::copy(&text, &own).unwrap();
    let over = ["budget", model, "--bytes", "100000", "--text", &own, "--out", &file("own"), "--force"];
    models::says(&fails(1, &[&over[..], &learning].concat()), &["own.cache.json", "what is read"]);
    let two = ["budget", model, "--bytes", "1000,2000", "--out", "no"];
    models::says(&fails(2, &[&two[..], &learning].concat()), &["one budget: name one"]);
}
