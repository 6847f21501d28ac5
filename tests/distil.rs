//! Distillation: gradients by the definition, what it never loses, and that it goes on as if it had not ended.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{Array1, Array2};
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::descent::Descent;
use qcqa::distil::{Distill, Distilled, Effort, Gradient, gradient};
use qcqa::evaluation::evaluate_against;
use qcqa::heads::{HeadSource, Heads, Pooled, Projection};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::{SharedHeads, Trained};
use qcqa::pooler::{LowRankPooler, MeanPooler};
use qcqa::runtime::Model;
use qcqa::text::Windows;
use qcqa::{Progress, Run};
use running::{Given, Slow, calibration_text, neighbours, novels, opened, runnable, shared_by, short_texts};
use safetensors::Dtype;

fn layers(shared: &SharedHeads<'_>) -> Vec<Pooled> {
    (0..shared.plan().layers.len()).map(|i| shared.layer(i).unwrap().1).collect()
}

/// Every tensor of a layer, with its numbers.
fn parts(pooled: &Pooled) -> Vec<(&'static str, Array1<f32>)> {
    let flat = |numbers: &mut dyn Iterator<Item = f32>| Array1::from_iter(numbers);
    let mut parts = Vec::new();
    let projections =
        [("keys", Some(&pooled.key)), ("values", Some(&pooled.value)), ("queries", pooled.query.as_ref())];
    for (what, projection) in projections {
        let projection = projection.unwrap();
        parts.push((what, flat(&mut projection.weight().iter().copied())));
        parts.extend(projection.bias().map(|bias| (what, flat(&mut bias.iter().copied()))));
    }
    parts.push(("outputs", flat(&mut pooled.output.as_ref().unwrap().iter().copied())));
    parts.extend(pooled.output_bias.as_ref().map(|bias| ("output bias", flat(&mut bias.iter().copied()))));
    parts
}

/// A layer with `step · direction` added to part number `part`.
fn moved(pooled: &Pooled, part: usize, direction: &Array1<f32>, step: f32) -> Pooled {
    let (mut at, mut pooled) = (0, pooled.clone());
    let mut add = |numbers: &mut dyn Iterator<Item = &mut f32>| {
        if at == part {
            numbers.zip(direction).for_each(|(n, d)| *n += step * d);
        }
        at += 1;
    };
    let mut projection = |p: &Projection| {
        let (mut weight, mut bias) = p.clone().into_parts();
        add(&mut weight.iter_mut());
        if let Some(bias) = &mut bias {
            add(&mut bias.iter_mut());
        }
        Projection::new(weight, bias).unwrap()
    };
    pooled.key = projection(&pooled.key);
    pooled.value = projection(&pooled.value);
    pooled.query = pooled.query.as_ref().map(&mut projection);
    add(&mut pooled.output.iter_mut().flatten());
    if let Some(bias) = &mut pooled.output_bias {
        add(&mut bias.iter_mut());
    }
    pooled
}

/// The mean KL(source ‖ shared) over all tokens by its definition, in f64.
fn divergence(checkpoint: &Checkpoint, shared: &SharedHeads<'_>, windows: &Windows) -> f64 {
    let log_softmax = |logits: Array2<f64>| {
        let sums = logits.map_axis(ndarray::Axis(1), |row| row.mapv(f64::exp).sum().ln());
        logits - sums.insert_axis(ndarray::Axis(1))
    };
    let of = |tokens: &[u32]| {
        let run = |shared| log_softmax(Slow { checkpoint, shared }.run(tokens).0);
        let (p, q) = (run(None), run(Some(shared)));
        (p.mapv(f64::exp) * (p - q)).sum()
    };
    let sum: f64 = windows.tokens().chunks(windows.length()).map(of).sum();
    sum / windows.tokens().len() as f64
}

#[test]
fn gradients_are_those_of_the_definition() {
    for (family, kv_heads, bias, groups) in [
        ("llama", 6, false, vec![vec![0, 2, 3], vec![1], vec![4, 5]]),
        ("llama", 6, true, vec![vec![0, 1], vec![2, 3], vec![4, 5]]),
        ("mistral", 3, false, vec![vec![0, 2], vec![1]]),
        ("qwen2", 6, true, vec![vec![0, 5, 2], vec![1, 3], vec![4]]),
    ] {
        let (_root, checkpoint) = opened(&runnable(family, Dtype::F32, kv_heads, bias));
        let source = Model::load(&checkpoint).unwrap();
        let partition = Partition::from_groups(kv_heads, &groups).unwrap();
        let plan = models::plan(&checkpoint, &vec![partition; 2]);
        let mean = shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
        let model = source.with_shared(&mean).unwrap();
        let windows = Windows::new((0..24u32).map(|t| (t * t * 5 + t) % 16).collect(), 8).unwrap();
        let Gradient { divergence: found, heads: gradients, .. } =
            gradient(&source, &model, &windows, Trained::Attention).unwrap();
        assert!((found - divergence(&checkpoint, &mean, &windows)).abs() < 1e-5 * found, "{family}: {found}");
        // Mean pooling leaves queries and outputs as they are: say so.
        let start: Vec<Pooled> =
            (0..2).map(|i| whole(&checkpoint.heads(i).unwrap(), &mean.layer(i).unwrap().1)).collect();
        for layer in 0..2 {
            let of_layer = parts(&gradients[layer]);
            let (names, own): (Vec<_>, Vec<_>) =
                parts(&start[layer]).into_iter().map(|(n, p)| (n, p.len())).unzip();
            assert!(of_layer.iter().map(|(n, g)| (*n, g.len())).eq(names.into_iter().zip(own)), "{family}");
            for (part, (what, gradient)) in of_layer.iter().enumerate() {
                let norm = gradient.dot(gradient).sqrt();
                // A key bias moves all scores of a query alike; nothing follows from it but by rotation.
                let direction = if norm > 1e-7 { gradient / norm } else { gradient.mapv(|_| 1.0) };
                let at = |step: f32| {
                    let mut layers = start.clone();
                    layers[layer] = moved(&layers[layer], part, &direction, step);
                    let shared =
                        SharedHeads::with_pooler(&plan, &checkpoint, Box::new(Given(layers))).unwrap();
                    divergence(&checkpoint, &shared, &windows)
                };
                const STEP: f32 = 1e-3;
                let slope = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
                let expected = f64::from(gradient.dot(&direction));
                let close = (slope - expected).abs() < 5e-3 * expected.abs() + 1e-5;
                assert!(close, "{family}, {what} of layer {layer}: {slope} by differences, {expected} found");
            }
        }
    }
}

/// Shared heads with queries and outputs spelled out.
fn whole(heads: &Heads, pooled: &Pooled) -> Pooled {
    let mut pooled = pooled.clone();
    pooled.query = pooled.query.or_else(|| heads.query().cloned());
    pooled.output = pooled.output.or_else(|| heads.output().map(|o| o.to_owned()));
    pooled.output_bias = pooled.output_bias.or_else(|| heads.output_bias().map(|b| b.to_owned()));
    pooled
}

fn distil<'a>(
    distill: &Distill,
    source: &Model,
    shared: SharedHeads<'a>,
    (fit, validation): (&Windows, &Windows),
) -> Distilled<'a> {
    distill.run(source, shared, fit, Some(validation), Run::new(5)).unwrap()
}

#[test]
fn what_is_reported_is_what_an_evaluation_says_and_never_worse() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let plan = neighbours(&checkpoint, 2);
    for (descent, rate) in [(Descent::Muon, 2e-3), (Descent::AdamW, 1e-3), (Descent::AdamW, 30.0)] {
        let shared = shared_by(&plan, &checkpoint, || Box::new(LowRankPooler::default()));
        let distill = Distill::new(Effort::Tokens(3 * 24 * 64)).descent(descent).rate(rate).batch(4);
        let found = distil(&distill, &source, shared, (&fit, &validation));
        let least = found.course.iter().map(|&(_, kl)| kl).fold(f64::INFINITY, f64::min);
        assert!(least <= found.course[0].1);
        assert_eq!(rate < 1.0, least < 0.8 * found.course[0].1, "{:?}", found.course);
        let model = source.with_shared(&found.shared).unwrap();
        let (_, after) = evaluate_against(&source, &[&model], &validation, Run::new(0)).unwrap();
        let kl = after[0].divergence.unwrap().kl;
        // Rounded to the stored type in between.
        assert!((kl - least).abs() < 0.02 * least, "{kl} evaluated, {least} reported");
        let record = found.shared.record().pooling.distilled;
        assert_eq!(rate < 1.0, record.is_some());
        if let Some(record) = record {
            assert_eq!(record.tokens, record.steps * 4 * 64);
            assert_eq!(record.text, fit.fingerprint(source.id()));
        }
    }
}

#[test]
fn copies_merge_to_nothing_lost_and_stay_so() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let alone: Vec<_> = (0..4).map(|_| Partition::singletons(8).unwrap()).collect();
    let shared = shared_by(&models::plan(&checkpoint, &alone), &checkpoint, || Box::new(MeanPooler));
    let before = layers(&shared);
    let found = distil(&Distill::new(Effort::Tokens(1536)), &source, shared, (&fit, &validation));
    assert!(found.course[0].1.abs() < 1e-6);
    assert!(found.shared.record().pooling.distilled.is_none(), "{:?}", found.course);
    assert_eq!(layers(&found.shared), before);
}

#[test]
fn one_seed_one_result_on_any_number_of_threads() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let plan = neighbours(&checkpoint, 4);
    let both = [(Descent::Muon, Trained::All), (Descent::AdamW, Trained::Attention)];
    for (descent, trained) in both {
        let [one, three] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let shared = shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
                let distill =
                    Distill::new(Effort::Tokens(8 * 3 * 64)).batch(3).descent(descent).train(trained);
                let found = distil(&distill, &source, shared, (&fit, &validation));
                (layers(&found.shared), found.shared.others().cloned(), found.course)
            })
        });
        assert!(one == three);
    }
}

/// Validation chooses among what the steps find; it has no part in them.
#[test]
fn validation_changes_no_step() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let poisoned = Windows::new((0..4 * 64).map(|t| t * 7 % 1000).collect(), 64).unwrap();
    let plan = neighbours(&checkpoint, 4);
    let [honest, other] = [&validation, &poisoned].map(|validation| {
        let shared = shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
        let found =
            distil(&Distill::new(Effort::Tokens(16 * 3 * 64)).batch(3), &source, shared, (&fit, validation));
        let best = found.shared.record().pooling.distilled.unwrap().steps;
        (best, layers(&found.shared), found.course)
    });
    assert_eq!(honest.0, other.0, "both keep the last step");
    assert!(honest.2 != other.2 && honest.1 == other.1);
}

fn broken_off<'a>(
    distill: &Distill,
    source: &Model,
    shared: SharedHeads<'a>,
    texts: (&Windows, &Windows),
    after: u64,
) -> Distilled<'a> {
    let observer = |progress: &Progress<'_>| {
        if progress.stage == "distil" && progress.done >= after {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    distill.run(source, shared, texts.0, Some(texts.1), Run::new(5).with_observer(&observer)).unwrap()
}

#[test]
fn what_was_broken_off_goes_on_to_the_same_end() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let texts = (&fit, &validation);
    let plan = neighbours(&checkpoint, 2);
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("state");
    for (descent, trained) in [(Descent::Muon, Trained::All), (Descent::AdamW, Trained::Attention)] {
        let shared = || shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
        let distill = Distill::new(Effort::Tokens(12 * 4 * 64)).batch(4).descent(descent).train(trained);
        let whole = distil(&distill, &source, shared(), texts);
        let kept = distill.clone().state(file.clone());
        // Twice, so that what is read is written again.
        for after in [5, 8] {
            let part = broken_off(&kept, &source, shared(), texts, after * 4 * 64);
            assert!(part.interrupted && file.is_file());
            assert!(part.course.len() < whole.course.len());
        }
        let of_other = if trained == Trained::All { Trained::Attention } else { Trained::All };
        let other = kept.clone().train(of_other);
        let other = other.run(&source, shared(), &fit, Some(&validation), Run::new(5));
        assert!(other.unwrap_err().to_string().contains("not the state of this distillation"));
        let other = kept.clone().rate(0.5).run(&source, shared(), &fit, Some(&validation), Run::new(5));
        let message = other.unwrap_err().to_string();
        assert!(
            message.contains("state") && message.contains("not the state of this distillation"),
            "{message}"
        );
        // And once more at the end: what was done is there until it is said that it is not needed.
        for _ in 0..2 {
            let resumed = distil(&kept, &source, shared(), texts);
            assert!(!resumed.interrupted && file.is_file());
            assert_eq!((&resumed.course, &resumed.losses), (&whole.course, &whole.losses));
            assert!(layers(&resumed.shared) == layers(&whole.shared));
            assert!(resumed.shared.others() == whole.shared.others());
        }
        kept.forget().unwrap();
        assert!(!file.exists());
        kept.forget().unwrap();
    }
}

#[test]
fn a_damaged_state_is_refused_by_name() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("state");
    for contents in [&b"no tensors"[..], b"", b"\x02\0\0\0\0\0\0\0{}"] {
        std::fs::write(&file, contents).unwrap();
        let shared = shared_by(&neighbours(&checkpoint, 2), &checkpoint, || Box::new(MeanPooler));
        let distill = Distill::new(Effort::Tokens(256)).state(file.clone());
        let error = distill.run(&source, shared, &fit, Some(&validation), Run::new(5)).unwrap_err();
        assert!(error.to_string().contains(&*file.to_string_lossy()), "{error}");
        assert!(file.is_file(), "what was there stays");
    }
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let usual = || Distill::new(Effort::Tokens(256));
    for (distill, word) in [
        (usual().rate(0.0), "rate"),
        (usual().rate(f64::NAN), "rate"),
        (usual().batch(0), "batch"),
        (Distill::new(Effort::Tokens(0)), "tokens"),
        (Distill::new(Effort::Time(std::time::Duration::ZERO)), "time"),
    ] {
        let shared = shared_by(&neighbours(&checkpoint, 2), &checkpoint, || Box::new(MeanPooler));
        let error = distill.run(&source, shared, &fit, Some(&validation), Run::new(5)).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
}

/// So many seconds give some steps, and an end.
#[test]
fn time_ends() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let shared = shared_by(&neighbours(&checkpoint, 2), &checkpoint, || Box::new(MeanPooler));
    let distill = Distill::new(Effort::Time(std::time::Duration::from_millis(300))).batch(2);
    let found = distil(&distill, &source, shared, (&fit, &validation));
    assert!(found.course.len() >= 2 && found.course[1].1 < found.course[0].1, "{:?}", found.course);
    assert!(!found.interrupted);
}

/// Whoever breaks off when all steps are done gets what they made.
#[test]
fn nothing_that_was_learned_is_lost_on_the_last_steps() {
    let checkpoint = novels();
    let calibration = Calibration::from_text(&checkpoint, &calibration_text(), 12, Run::new(0)).unwrap();
    let done = AtomicBool::new(false);
    let watch = |progress: &Progress<'_>| {
        let stop = done.load(Ordering::Relaxed);
        if progress.stage == "distil" && progress.done == progress.total {
            done.store(true, Ordering::Relaxed);
        }
        if stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let compress = Compress::new(Preset::LowRank).refit(None).calibration(&calibration);
    let compress = compress.distil(Distill::new(Effort::Tokens(1024)));
    let found = compress.run(&checkpoint, Run::new(0).with_observer(&watch)).unwrap();
    assert!(done.into_inner() && !found.interrupted && found.course.len() > 1);
    assert_eq!(found.stages.last().unwrap().name(), "distilled");
}
