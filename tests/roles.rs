//! Calibration texts in their roles: what fits, what chooses, and that neither does the other's work.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::collections::BTreeSet;
use std::sync::Arc;

use models::says;
use qcqa::budget::Budget;
use qcqa::calibration::{Calibration, Extent, TextSource, read_texts};
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{Reference, evaluate_against};
use qcqa::files::WriteOptions;
use qcqa::fitness::LowRankSharing;
use qcqa::grouping::UniformGqa;
use qcqa::heads::{HeadSource, Pooled};
use qcqa::optimizer::LocalSearch;
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Compressed, Preset, Search};
use qcqa::plan::{Pooling, Refit, SharedHeads};
use qcqa::pooler::LowRankPooler;
use qcqa::refit::apply;
use qcqa::runtime::Model;
use qcqa::targets::Stock;
use qcqa::text::{Texts, WholeText, Windows};
use qcqa::{KvPooler, Run};
use running::{calibration_text, evaluation_text, neighbours, novels, planned, windows};

/// `n` windows of four tokens, all different, from `from` on.
fn numbered(n: usize, from: u32) -> Windows {
    Windows::new((4 * from..4 * (from + n as u32)).collect(), 4).unwrap()
}

/// The first tokens of windows, which tell them apart.
fn firsts(windows: &Windows) -> Vec<u32> {
    windows.tokens().iter().copied().step_by(windows.length()).collect()
}

#[test]
fn an_eighth_validates_and_fits_nothing() {
    for n in (1..70).chain([95, 128, 500]) {
        let texts = Texts::new(&[WholeText::new("a", numbered(n, 0))], 1000).unwrap();
        let [text] = texts.each() else { panic!("one text") };
        let fit = firsts(text.fit());
        let chosen = text.validation().map(firsts).unwrap_or_default();
        assert_eq!(chosen.len(), (n / 8).max(8).min(n / 2), "of {n}");
        assert!(fit.is_sorted() && chosen.is_sorted());
        let all: BTreeSet<u32> = fit.iter().chain(&chosen).copied().collect();
        assert!(all.len() == n && fit.len() + chosen.len() == n, "every window has one role");
        assert_eq!((text.read(), text.distinct()), (n, n));
        assert_eq!((texts.fit(), texts.validation()), (text.fit(), text.validation()));
        // One in the middle of each of as many stretches.
        for (i, window) in chosen.iter().enumerate() {
            let at = (window / 4) as f64 / n as f64 * chosen.len() as f64;
            assert!((at - i as f64 - 0.5).abs() <= 0.5, "window {window} of {n}");
        }
    }
}

#[test]
fn windows_are_spaced_over_the_whole_of_each_text_by_share() {
    let spaced = numbered(10, 0).spaced(4);
    assert_eq!(firsts(&spaced), [0, 8, 20, 28], "windows 0, 2, 5, 7");
    assert_eq!(numbered(3, 0).spaced(8), numbered(3, 0));
    assert_eq!(numbered(3, 0).spaced(0), numbered(1, 0));

    let whole = |name: &str, n, from, share| WholeText::new(name, numbered(n, from)).with_share(share);
    let counts = |texts: &[WholeText], most| -> Vec<usize> {
        Texts::new(texts, most).unwrap().each().iter().map(|text| text.read()).collect()
    };
    let [a, b, c] = [whole("a", 500, 0, 1), whole("b", 500, 1000, 1), whole("c", 500, 2000, 1)];
    assert_eq!(counts(&[a.clone(), b.clone()], 128), [64, 64]);
    assert_eq!(counts(&[a.clone().with_share(3), b.clone()], 128), [96, 32]);
    assert_eq!(counts(&[a.clone(), b.clone(), c.clone()], 128).iter().sum::<usize>(), 128);
    assert_eq!(counts(&[a.clone(), b.clone(), c], 1), [1, 1, 1], "at least one of each");
    assert_eq!(counts(&[a.clone(), whole("short", 5, 1000, 1)], 128), [64, 5], "what there is");

    // One text after the other, and the last windows of each are reached.
    let texts = Texts::new(&[a.clone(), b.clone()], 100).unwrap();
    let together: Vec<u32> = texts.each().iter().flat_map(|text| firsts(text.fit())).collect();
    assert_eq!(firsts(texts.fit()), together);
    assert!(
        together.iter().any(|t| (4 * 480..4 * 500).contains(t)) && together.iter().any(|t| *t > 4 * 1480)
    );

    let refused = |texts: &[WholeText]| Texts::new(texts, 8).unwrap_err().to_string();
    says(&refused(&[]), &["number of texts is 0"]);
    for share in [0, (1 << 31) + 1, usize::MAX] {
        let texts = [a.clone().with_share(share), b.clone()];
        says(&refused(&texts), &["share", "from 1 to 2147483648", &share.to_string()]);
    }
    Texts::new(&[a.clone().with_share(1 << 31), b], usize::MAX).unwrap();
    let other = WholeText::new("b", Windows::new((0..90).collect(), 9).unwrap());
    says(&refused(&[a, other]), &["window is 9", "as long in every text"]);
}

/// Equal windows count once, wherever they stand.
#[test]
fn text_that_repeats_itself_is_too_little() {
    let repeated = |n: usize| Windows::new([7, 8, 9, 10].repeat(n), 4).unwrap();
    let refused = |texts: &[WholeText]| Texts::new(texts, 64).unwrap_err().to_string();
    says(&refused(&[WholeText::new("drum.txt", repeated(40))]), &["drum.txt", "40 windows read", "1 is new"]);
    let twice = [WholeText::new("a", numbered(20, 0)), WholeText::new("again", numbered(20, 0))];
    says(&refused(&twice), &["again", "20 windows read", "0 are new"]);

    let mut tokens = numbered(12, 0).tokens().to_vec();
    tokens.extend_from_slice(numbered(9, 0).tokens());
    let texts = Texts::new(&[WholeText::new("a", Windows::new(tokens, 4).unwrap())], 64).unwrap();
    let text = &texts.each()[0];
    assert_eq!((text.read(), text.distinct(), text.fit().count()), (21, 12, 6));
    let (fit, chosen) = (firsts(text.fit()), firsts(text.validation().unwrap()));
    assert!(chosen.iter().all(|window| !fit.contains(window)), "what fits validates nothing");
    assert_eq!((texts.known(&numbered(40, 5)), texts.known(&numbered(9, 12))), (7, 0));

    // A single window fits; nothing is left to choose by.
    let one = Texts::new(&[WholeText::new("one", numbered(1, 0))], 64).unwrap();
    assert_eq!((one.fit().count(), one.validation()), (1, None));
}

#[test]
fn names_tell_texts_shares_and_roles_apart() {
    let id = novels().id().unwrap();
    let name = |texts: &[WholeText], most| Texts::new(texts, most).unwrap().fingerprint(&id);
    let [a, b] = [WholeText::new("a", numbered(40, 0)), WholeText::new("b", numbered(40, 100))];
    let names = BTreeSet::from([
        name(&[a.clone(), b.clone()], 32),
        name(&[b.clone(), a.clone()], 32),
        name(&[a.clone(), b.clone().with_share(3)], 32),
        name(&[a.clone(), b.clone()], 31),
        name(std::slice::from_ref(&a), 32),
        // The same windows in other roles: as one text.
        {
            let tokens = [numbered(16, 0).tokens(), numbered(16, 100).tokens()].concat();
            name(&[WholeText::new("ab", Windows::new(tokens, 4).unwrap())], 32)
        },
        numbered(32, 0).fingerprint(&id),
    ]);
    assert_eq!(names.len(), 7);
    // What a text is called is nobody's business.
    assert_eq!(name(std::slice::from_ref(&a), 32), name(&[WholeText::new("z", numbered(40, 0))], 32));
}

/// A calibration of novels-1m on these windows.
fn calibrated<'a>(checkpoint: &'a Checkpoint, windows: Vec<Windows>) -> Calibration<'a> {
    let whole: Vec<_> =
        windows.into_iter().enumerate().map(|(i, w)| WholeText::new(format!("text {i}"), w)).collect();
    let texts = Texts::new(&whole, 1000).unwrap();
    Calibration::measured(checkpoint, Model::load(checkpoint).unwrap(), texts, Run::new(0)).unwrap()
}

/// Neighbours at half of the cache: nothing but the stage is chosen.
fn compressed<'a>(
    checkpoint: &'a Checkpoint,
    calibration: &'a Calibration<'a>,
    refit: Option<Refit>,
) -> Compressed<'a> {
    let (fitness, pooler) = (Arc::new(LowRankSharing::default()), Arc::new(LowRankPooler::default()));
    let compress = Compress::custom(Search::Grouping(Arc::new(UniformGqa)), fitness, pooler);
    let compress = compress.budget(Budget::Fraction(0.5)).refit(refit).calibration(calibration);
    compress.run(checkpoint, Run::new(0)).unwrap()
}

fn layers(shared: &SharedHeads<'_>) -> Vec<Pooled> {
    (0..4).map(|i| shared.layer(i).unwrap().1).collect()
}

/// All numbers, as a conversion writes them.
fn stored(shared: &SharedHeads<'_>) -> Vec<f32> {
    let of_layer = |pooled: Pooled| {
        let query = pooled.query.unwrap();
        let rows =
            [&pooled.key, &pooled.value, &query].map(|p| p.weight().iter().copied().collect::<Vec<_>>());
        rows.concat().into_iter().chain(pooled.output.unwrap()).collect::<Vec<f32>>()
    };
    let all = layers(shared).into_iter().flat_map(of_layer);
    all.map(|number| half::bf16::from_f32(number).to_f32()).collect()
}

/// Other tokens in the windows that validate: no moment and no fitted weight changes, only what is measured.
#[test]
fn windows_that_validate_enter_no_sum() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text()).first(6);
    let roles = Texts::new(&[WholeText::new("text", text.clone())], 1000).unwrap();
    let mut poisoned = text.tokens().to_vec();
    let validation: BTreeSet<&[u32]> = roles.validation().unwrap().tokens().chunks(256).collect();
    for (i, window) in poisoned.chunks_mut(256).enumerate().filter(|(_, w)| validation.contains(&**w)) {
        window.iter_mut().enumerate().for_each(|(t, token)| *token = (t * t + i) as u32 % 1000);
    }
    let poisoned = Windows::new(poisoned, 256).unwrap();
    let [clean, poisoned] = [text, poisoned].map(|text| calibrated(&checkpoint, vec![text]));
    assert_eq!(clean.text().unwrap().1.fit(), poisoned.text().unwrap().1.fit());
    assert_eq!(clean.moments().layers(), poisoned.moments().layers());
    assert_ne!(clean.calibration(), poisoned.calibration());
    let groups: Vec<Partition> = neighbours(&checkpoint, 2).groups().cloned().collect();
    for level in [None, Some(Refit::Output), Some(Refit::Full)] {
        let made = [&clean, &poisoned].map(|calibration| {
            let pooling = Pooling::new(LowRankPooler::default().spec()).with_refit(level);
            let pooling = pooling.with_calibration(calibration.calibration());
            let plan = models::pooled_plan(&checkpoint, &groups, pooling);
            layers(&apply(&plan, calibration, Run::new(0)).unwrap())
        });
        assert!(made[0] == made[1], "{level:?}");
    }
    let measured = [&clean, &poisoned].map(|text| compressed(&checkpoint, text, None).stages[1].kl());
    assert_ne!(measured[0], measured[1]);
}

/// What is printed as "after" is what anybody measures on the windows that fitted nothing, text by text.
#[test]
fn effects_are_evaluations_of_windows_that_fitted_nothing() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let texts = [calibration_text(), evaluation_text()];
    let texts = texts.map(|path| windows(&checkpoint, &model, &path).first(4)).to_vec();
    let calibration = calibrated(&checkpoint, texts);
    let found = compressed(&checkpoint, &calibration, Some(Refit::Output));
    let merged = planned(&checkpoint, &found.shared);
    assert_eq!(found.effects.len(), 2);
    let run = Run::new(0);
    for (text, effect) in calibration.text().unwrap().1.each().iter().zip(&found.effects) {
        assert_eq!(text.name(), effect.name);
        for (windows, effect) in
            [(text.validation().unwrap(), &effect.validation), (text.fit(), &effect.fitted)]
        {
            let (before, after) = evaluate_against(&model, &[&merged], windows, run).unwrap();
            assert_eq!(effect.before.loss, before.loss);
            assert_eq!((effect.after.loss, effect.after.tokens), (after[0].loss, 2 * 255));
            assert_eq!(effect.after.divergence, after[0].divergence);
        }
    }
    // The stages weigh texts by their tokens.
    let kept = found.stages.iter().find(|stage| stage.kept).unwrap();
    let kls = found.effects.iter().map(|e| e.validation.after.divergence.unwrap().kl);
    approx::assert_relative_eq!(kept.kl(), kls.sum::<f64>() / 2.0, max_relative = 1e-12);
}

#[test]
fn a_reference_reads_as_an_evaluation_does() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &evaluation_text()).first(20);
    let plan = neighbours(&checkpoint, 2);
    let merged = planned(&checkpoint, &SharedHeads::new(&plan, &checkpoint).unwrap());
    let run = Run::new(0);
    let (before, after) = evaluate_against(&model, &[&merged], &text, run).unwrap();
    let reference = Reference::new(&model, &text, run).unwrap();
    assert_eq!((reference.source().loss, reference.source().tokens), (before.loss, before.tokens));
    let found = reference.compare(&merged, run).unwrap();
    assert_eq!((found.loss, found.divergence), (after[0].loss, after[0].divergence));
    assert_eq!(found.windows, 20);
}

/// The least of the stages is kept and written into the plan, however the others end, and the plan makes it again.
#[test]
fn no_stage_ends_above_the_one_before_it() {
    let (checkpoint, run) = (novels(), Run::new(0));
    let model = Model::load(&checkpoint).unwrap();
    let text = windows(&checkpoint, &model, &calibration_text());
    // Two windows are too few for a refit to help; one token over and over is no text to calibrate by.
    let odd = [&[5; 256 * 5][..], &text.tokens()[..256], &[5; 256 * 5]].concat();
    let mut kept_names = BTreeSet::new();
    for windows in [text.first(8), Windows::new(odd, 256).unwrap()] {
        let calibration = calibrated(&checkpoint, vec![windows]);
        for level in [None, Some(Refit::Output), Some(Refit::Full)] {
            let found = compressed(&checkpoint, &calibration, level);
            let names: Vec<_> = found.stages.iter().map(|stage| stage.name()).collect();
            assert_eq!(names[..2], ["weights only", "closed form"]);
            assert_eq!(names.get(2).copied(), level.map(|l| ["output refit", "full refit"][l as usize]));
            let kept: Vec<_> = found.stages.iter().filter(|stage| stage.kept).collect();
            let [kept] = kept[..] else { panic!("one is kept") };
            assert!(found.stages.iter().all(|stage| kept.kl() <= stage.kl()));
            assert_eq!((&found.plan().pooling, found.shared.done()), (&kept.made, &kept.made));
            if level == Some(Refit::Full) && kept.made.refit != level {
                assert_eq!(names.last(), Some(&"output refit"), "tried in its place");
            }
            kept_names.insert(kept.name());
            let again = match kept.made.calibration {
                Some(_) => apply(found.plan(), &calibration, run).unwrap(),
                None => SharedHeads::new(found.plan(), &checkpoint).unwrap(),
            };
            assert_eq!(stored(&again), stored(&found.shared));
        }
    }
    assert!(kept_names.contains("full refit") && kept_names.len() > 1, "{kept_names:?}");
}

/// Where all layers have one k, one budget alone is searched for it, and finds what a search for all finds.
#[test]
fn one_budget_has_the_plan_that_it_has_among_all() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let calibration =
        calibrated(&checkpoint, vec![windows(&checkpoint, &model, &calibration_text()).first(6)]);
    for (share, k) in [(0.5, 4), (0.3, 2), (0.125, 1), (1.0, 8)] {
        for local in [false, true] {
            let (budget, run) = (Budget::Fraction(share), Run::new(3));
            let mut compress = Compress::new(Preset::LowRank).target(&Stock).calibration(&calibration);
            if local {
                compress = compress.optimizer(LocalSearch::default());
            }
            let compress = compress.budget(budget).refit(None);
            let all = compress.search(&calibration, run).unwrap();
            assert_eq!(all.layers()[0].iter().count(), 4);
            assert_eq!(compress.plan(&calibration, run).unwrap(), all.plan(budget, run).unwrap());
            let found = compress.run(&checkpoint, run).unwrap();
            assert!(found.plan().layers.iter().all(|layer| layer.groups.n_groups() == k));
            assert_eq!(found.fronts[0].iter().count(), if k < 8 { 2 } else { 4 });
        }
    }
}

/// One window fits, and chooses nothing.
#[test]
fn without_windows_that_validate_nothing_is_chosen() {
    let checkpoint = novels();
    let model = Model::load(&checkpoint).unwrap();
    let calibration =
        calibrated(&checkpoint, vec![windows(&checkpoint, &model, &calibration_text()).first(1)]);
    let low_rank = || Compress::new(Preset::LowRank).calibration(&calibration);
    let found = low_rank().run(&checkpoint, Run::new(0)).unwrap();
    assert!(found.stages.is_empty() && found.effects.is_empty());
    let plan = found.plan();
    assert_eq!((plan.pooling.refit, plan.method.chosen_by_loss), (Some(Refit::Full), false));
    assert_eq!(plan.method.allocation.name(), "uniform");
    let refused = low_rank().by_sensitivity().plan(&calibration, Run::new(0)).unwrap_err();
    says(&refused.to_string(), &["how much each layer pays"]);
}

#[test]
fn a_model_writes_its_own_text_the_same_every_time() {
    let checkpoint = novels();
    let written = |threads, seed| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let found = Calibration::from_self(&checkpoint, 18, Run::new(seed)).unwrap();
            (found.text().unwrap().1.clone(), found.calibration())
        })
    };
    let (texts, name) = written(1, 3);
    assert_eq!((texts.clone(), name), written(3, 3));
    let [text] = texts.each() else { panic!("one text") };
    assert_eq!((text.name(), text.read(), text.distinct(), text.fit().count()), ("self", 18, 18, 10));
    assert!(firsts(text.fit()).iter().collect::<BTreeSet<_>>().len() > 5, "they begin differently");
    assert_ne!(texts, written(2, 4).0);
    // It is text: the model that wrote it reads it better than any other.
    let model = Model::load(&checkpoint).unwrap();
    let loss = Reference::new(&model, text.fit(), Run::new(0)).unwrap().source().perplexity();
    assert!(loss < 40.0, "{loss}");
}

#[test]
fn windows_are_as_long_as_the_model_will_look_back() {
    let (checkpoint, run) = (novels(), Run::new(3));
    for (source, windows) in [(TextSource::file(calibration_text()), 8), (TextSource::model(), 4)] {
        let read = |extent: Extent| read_texts(&checkpoint, std::slice::from_ref(&source), extent, run);
        let (model, texts) = read(Extent::new(windows).of_tokens(24)).unwrap();
        assert_eq!((texts.fit().length(), texts.fit().count()), (24, windows / 2));
        let (_, usual) = read(windows.into()).unwrap();
        assert_eq!(usual.fit().length(), model.window());
        let most = model.positions();
        let refused = read(Extent::new(windows).of_tokens(most + 1)).unwrap_err().to_string();
        says(&refused, &[&most.to_string(), &(most + 1).to_string()]);
    }
    // Whatever their length, they fit and choose.
    let text = [TextSource::file(calibration_text())];
    let calibration = Calibration::open(&checkpoint, &text, Extent::new(32).of_tokens(64), run).unwrap();
    let compressed = compressed(&checkpoint, &calibration, Some(Refit::Full));
    assert!(compressed.stages.iter().any(|stage| stage.kept && stage.name() == "full refit"));
}

#[test]
fn moments_stand_alone() {
    let (checkpoint, run, root) = (novels(), Run::new(0), tempfile::tempdir().unwrap());
    let path = root.path().join("moments.safetensors");
    let text = Calibration::from_text(&checkpoint, &calibration_text(), 2, run).unwrap();
    text.moments().write(&path, WriteOptions::default()).unwrap();
    let [moments, words] = [TextSource::file(&path), TextSource::file(calibration_text())];
    for sources in [vec![moments.clone(), words.clone()], vec![words, moments.clone()], vec![moments; 2]] {
        let refused = Calibration::open(&checkpoint, &sources, 8, run).unwrap_err().to_string();
        says(&refused, &["moments.safetensors", "stand alone"]);
    }
}
