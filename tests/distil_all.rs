//! Distillation of all weights: norms and MLPs beside the attention.
#![cfg(feature = "runtime")]

mod made;
mod models;
mod running;

use std::collections::BTreeMap;

use made::{VOCABULARY, kinds, made};
use qcqa::Run;
use qcqa::checkpoint::Checkpoint;
use qcqa::distil::{Distill, Distilled, Effort};
use qcqa::evaluation::evaluate_against;
use qcqa::files::WriteOptions;
use qcqa::output::{Target, convert, read_back};
use qcqa::partition::Partition;
use qcqa::plan::{SharedHeads, Trained};
use qcqa::pooler::{LowRankPooler, MeanPooler};
use qcqa::runtime::Model;
use qcqa::targets::{Expanded, Stock};
use qcqa::text::Windows;
use running::{neighbours, novels, shared_by, short_texts};

type Tensors = BTreeMap<String, Vec<f32>>;

fn distilled<'a>(
    source: &Model,
    shared: SharedHeads<'a>,
    trained: Trained,
    (fit, validation): (&Windows, &Windows),
) -> Distilled<'a> {
    let distill = Distill::new(Effort::Tokens(3 * 24 * 64)).batch(4).rate(1e-3).train(trained);
    distill.run(source, shared, fit, Some(validation), Run::new(5)).unwrap()
}

/// What was learned is what is reported, run, written and read back, in whichever form; and stays where attention alone goes on.
#[test]
fn all_weights_are_written_and_read_back() {
    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let (fit, validation) = short_texts(&checkpoint, &source);
    let texts = (&fit, &validation);
    let shared =
        || shared_by(&neighbours(&checkpoint, 2), &checkpoint, || Box::new(LowRankPooler::default()));
    let found = distilled(&source, shared(), Trained::All, texts);
    let least = found.course.iter().map(|&(_, kl)| kl).fold(f64::INFINITY, f64::min);
    assert!(least < 0.9 * found.course[0].1, "{:?}", found.course);
    let others = found.shared.others().unwrap();
    // Of four layers gate, up, down and two norms each.
    assert_eq!(others.len(), 4 * 5);
    // A norm's numbers around 1 need not have moved by as much as 16 bits can say.
    let moved = |(name, numbers): (&String, &Vec<f32>)| {
        checkpoint.tensor(name).unwrap().into_iter().zip(numbers).any(|(stored, found)| stored != *found)
    };
    assert!(others.iter().all(|of| of.0.contains("norm") || moved(of)));
    assert_eq!(found.shared.record().pooling.distilled.unwrap().trained, Trained::All);
    let kl = |model: &Model| {
        let (_, of) = evaluate_against(&source, &[model], &validation, Run::new(0)).unwrap();
        of[0].divergence.unwrap().kl
    };
    let held = source.with_shared(&found.shared).unwrap();
    // As stored: in 16 bits.
    assert!((kl(&held) - least).abs() < 0.02 * least, "{} {least}", kl(&held));
    let root = tempfile::tempdir().unwrap();
    for target in [&Stock as &dyn Target, &Expanded] {
        let out = root.path().join(target.name());
        convert(&checkpoint, &found.shared, target, &out, WriteOptions::default(), Run::new(0)).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let model = Model::load(&written).unwrap();
        assert!((kl(&model) - kl(&held)).abs() < 1e-4 * kl(&held), "{}", target.name());
        let back = read_back(&checkpoint, &written, &found.shared.record(), target).unwrap();
        assert!(back.others() == found.shared.others(), "{}", target.name());
        assert!((kl(&source.with_shared(&back).unwrap()) - kl(&held)).abs() < 1e-6);
        if target.name() == "stock" {
            let further = distilled(&source, back, Trained::Attention, texts);
            assert!(further.course.last().unwrap().1 < further.course[0].1);
            assert!(further.shared.others() == found.shared.others());
            assert_eq!(further.shared.record().pooling.distilled.unwrap().trained, Trained::All);
        }
    }
    // Attention alone leaves the rest as it was.
    assert!(distilled(&source, shared(), Trained::Attention, texts).shared.others().is_none());
}

#[test]
fn what_cannot_be_is_refused() {
    let differs = kinds().into_iter().find(|(kind, _)| *kind == "mixtral").unwrap().1;
    let checkpoint = made("mixtral", &differs, 6);
    let source = Model::load(&checkpoint).unwrap();
    let plan = models::plan(&checkpoint, &vec![Partition::from_labels(&[0, 0, 1, 1, 2, 2]).unwrap(); 2]);
    let shared = shared_by(&plan, &checkpoint, || Box::new(MeanPooler));
    let windows = Windows::new((0..24).map(|t| t % VOCABULARY as u32).collect(), 12).unwrap();
    let distill = Distill::new(Effort::Tokens(48)).train(Trained::All);
    let error = distill.run(&source, shared, &windows, None, Run::new(0)).unwrap_err().to_string();
    models::says(&error, &["train", "all", "attention", "experts"]);

    let checkpoint = novels();
    let source = Model::load(&checkpoint).unwrap();
    let shared = shared_by(&neighbours(&checkpoint, 2), &checkpoint, || Box::new(MeanPooler));
    let name = "model.layers.1.mlp.up_proj.weight";
    let root = tempfile::tempdir().unwrap();
    for (name, says) in [("model.embed_tokens.weight", "model.embed_tokens.weight"), (name, name)] {
        let other = shared.clone().with_others(Some(Tensors::from([(name.to_string(), vec![0.0; 3])])));
        let error = source.with_shared(&other).unwrap_err().to_string();
        models::says(&error, &[says]);
        let out = root.path().join("out");
        let written = convert(&checkpoint, &other, &Stock, &out, WriteOptions::default(), Run::new(0));
        models::says(&written.unwrap_err().to_string(), &[says]);
        assert!(!out.exists());
    }
}
