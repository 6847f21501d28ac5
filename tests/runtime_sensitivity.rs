//! The divergence with one layer grouped, and the choice among models, against whole evaluations.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::ops::ControlFlow;

use approx::assert_relative_eq;
use qcqa::budget::Limits;
use qcqa::calibration::{Calibration, Moments};
use qcqa::checkpoint::Checkpoint;
use qcqa::evaluation::{Sensitivity, Trial, choose_model, evaluate, evaluate_against};
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::heads::HeadSource;
use qcqa::optimizer::Nsga2;
use qcqa::partition::{Partition, SearchSpace};
use qcqa::plan::SharedHeads;
use qcqa::pooler::{FirstHead, LowRankPooler, MeanPooler};
use qcqa::runtime::Model;
use qcqa::text::Windows;
use qcqa::{Optimizer, Progress, Run};
use running::{planned, ready};

/// Weights alone, pooled by the mean unless a test says otherwise.
fn trial<'a>(checkpoint: &'a Checkpoint, model: &'a Model, windows: &'a Windows) -> Trial<'a> {
    Trial::new(checkpoint, model, &MeanPooler, windows)
}

fn fronts(checkpoint: &Checkpoint) -> Vec<Front> {
    let front = |i: usize| {
        let fitness = WeightSharingError::new(&checkpoint.heads(i).unwrap()).unwrap();
        Nsga2::default().optimize(&fitness, &SearchSpace::arbitrary(), Run::new(1)).unwrap()
    };
    (0..checkpoint.architecture().n_layers()).map(front).collect()
}

#[test]
fn sensitivity_is_the_divergence_with_one_layer_grouped() {
    let (root, checkpoint, model, windows) = ready(6);
    let (fronts, run) = (fronts(&checkpoint), Run::new(0));
    let trial = trial(&checkpoint, &model, &windows);
    let found = Sensitivity::measure(&trial, &fronts, run).unwrap();
    for (layer, front) in fronts.iter().enumerate() {
        let expected: Vec<usize> = [1, 2, 3, 4].into_iter().filter(|&k| front.get(k).is_some()).collect();
        assert!(found.measured()[layer].iter().map(|&(k, _)| k).eq(expected), "k of 6 heads");
        for &(k, rise) in &found.measured()[layer] {
            let mut groups = vec![Partition::singletons(6).unwrap(); 2];
            groups[layer] = front.get(k).unwrap().partition.clone();
            let plan = models::plan(&checkpoint, &groups);
            let planned = planned(&checkpoint, &SharedHeads::new(&plan, &checkpoint).unwrap());
            let (_, after) = evaluate_against(&model, &[&planned], &windows, run).unwrap();
            assert_relative_eq!(rise, after[0].divergence.unwrap().kl, epsilon = 1e-9, max_relative = 1e-5);
            assert!(rise > 0.0);
            assert_eq!(found.rise(layer, k), Some(rise));
        }
        // k = 5 lies half way from 4 to 6, where nothing is lost.
        let four = found.measured()[layer].iter().find(|(k, _)| *k == 4).unwrap().1;
        assert_relative_eq!(found.rise(layer, 5).unwrap(), four / 2.0, epsilon = 1e-12);
        assert_eq!((found.rise(layer, 6), found.rise(layer, 7)), (Some(0.0), None));
    }
    let costs = found.costs(&fronts, &Limits::default()).unwrap();
    assert_eq!(costs.get(1, 2), found.rise(1, 2));
    assert_eq!(costs.get(0, 6), Some(0.0));
    let equal = Limits { space: SearchSpace::equal(), fixed: [(1, 3)].into(), ..Limits::default() };
    let mut equal_fronts = fronts.clone();
    for front in &mut equal_fronts {
        for k in [1, 2, 3] {
            let labels: Vec<usize> = (0..6).map(|head| head * k / 6).collect();
            front.offer(&Partition::from_labels(&labels).unwrap(), 0.0).unwrap();
        }
    }
    let costs = found.costs(&equal_fronts, &equal).unwrap();
    assert!(costs.choices(0).map(|(k, _)| k).eq([1, 2, 3, 6]), "what divides 6");
    assert!(costs.choices(1).eq([(3, found.rise(1, 3).unwrap())]), "what is fixed");

    // The file is used while everything is the same, and only then.
    let cache = root.path().join("sensitivity.json");
    let idle = |_: &Progress<'_>| ControlFlow::Break(());
    let never = run.with_observer(&idle);
    assert_eq!(Sensitivity::cached(&cache, &trial, &fronts, run).unwrap(), found);
    assert_eq!(Sensitivity::cached(&cache, &trial, &fronts, never).unwrap(), found);
    let (moments, two) = (Moments::measure(&model, &windows, run).unwrap(), windows.clone().first(2));
    let calibration = Calibration::new(&checkpoint, moments).unwrap();
    for other in [
        Trial::new(&checkpoint, &model, &FirstHead, &windows),
        Trial::new(&checkpoint, &model, &MeanPooler, &two),
        Trial::new(&calibration, &model, &MeanPooler, &windows),
    ] {
        let again = Sensitivity::cached(&cache, &other, &fronts, never);
        models::says(&again.unwrap_err().to_string(), &["cancelled"]);
    }
    std::fs::write(&cache, "not ours").unwrap();
    let broken = Sensitivity::cached(&cache, &trial, &fronts, run);
    models::says(&broken.unwrap_err().to_string(), &["sensitivity.json"]);
    assert_eq!(std::fs::read_to_string(&cache).unwrap(), "not ours");
}

#[test]
fn sensitivity_needs_a_front_for_every_layer() {
    let (_root, checkpoint, model, windows) = ready(6);
    let fronts = fronts(&checkpoint);
    let trial = trial(&checkpoint, &model, &windows);
    let measure =
        |fronts: &[Front]| Sensitivity::measure(&trial, fronts, Run::new(0)).unwrap_err().to_string();
    models::says(&measure(&fronts[..1]), &["fronts", "2", "1"]);
    let (_other_root, other, ..) = ready(3);
    let small = WeightSharingError::new(&other.heads(0).unwrap()).unwrap();
    let small = Front::new(&small).unwrap();
    models::says(&measure(&[fronts[0].clone(), small]), &["6", "3"]);
}

/// Against whole evaluations of each.
#[test]
fn models_are_chosen_by_their_loss() {
    let (_root, checkpoint, model, windows) = ready(6);
    let (trial, run) = (trial(&checkpoint, &model, &windows), Run::new(0));
    let groups = |labels: [[usize; 6]; 2]| labels.map(|l| Partition::from_labels(&l).unwrap());
    let loss = |groups: &[Partition]| evaluate(&trial.grouped(groups).unwrap(), &windows, run).unwrap().loss;
    let one = groups([[0, 0, 0, 0, 0, 0], [0, 1, 2, 2, 1, 0]]);
    let others = [groups([[0, 1, 2, 0, 1, 2]; 2]), groups([[0, 1, 2, 3, 4, 5]; 2])];
    for other in others {
        let candidates = [one.clone(), other];
        let losses = [loss(&candidates[0]), loss(&candidates[1])];
        let models = candidates.map(|groups| trial.grouped(&groups).unwrap());
        let (chosen, found) = choose_model(&models, &windows, run).unwrap();
        assert_eq!(chosen, usize::from(losses[1] < losses[0]));
        for (found, expected) in found.into_iter().zip(losses) {
            assert_relative_eq!(found, expected, max_relative = 1e-6);
        }
    }
    models::says(&choose_model(&[], &windows, run).unwrap_err().to_string(), &["models", "1", "0"]);
    models::says(&trial.grouped(&[]).unwrap_err().to_string(), &["partitions", "2", "0"]);
}

/// One pass backward ranks layers and numbers of groups as whole evaluations do; what loses nothing costs nothing; one seed, one
/// estimate on any number of threads.
#[test]
fn an_estimate_ranks_as_measurements_do() {
    let checkpoint = running::novels();
    let model = Model::load(&checkpoint).unwrap();
    let windows = running::windows(&checkpoint, &model, &running::calibration_text());
    let (fit, few) = (windows.clone().first(24), windows.first(8));
    let calibration =
        Calibration::new(&checkpoint, Moments::measure(&model, &fit, Run::new(0)).unwrap()).unwrap();
    let neighbours = |i: usize| {
        let fitness = WeightSharingError::new(&calibration.heads(i).unwrap()).unwrap();
        let mut front = Front::new(&fitness).unwrap();
        for k in [1, 2, 4] {
            let labels: Vec<usize> = (0..8).map(|head| head * k / 8).collect();
            front.offer(&Partition::from_labels(&labels).unwrap(), 1.0 / k as f64).unwrap();
        }
        front
    };
    let fronts: Vec<Front> = (0..4).map(neighbours).collect();
    let pooler = LowRankPooler::default();
    let trial = Trial::new(&calibration, &model, &pooler, &few);
    let [one, three] = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Sensitivity::estimate(&trial, &fronts, Run::new(7)).unwrap())
    });
    assert_eq!(one, three);
    assert_ne!(one, Sensitivity::estimate(&trial, &fronts, Run::new(8)).unwrap(), "labels are drawn");
    let measured = Sensitivity::measure(&trial, &fronts, Run::new(7)).unwrap();
    let logs = |of: &Sensitivity| -> Vec<f64> {
        of.measured().iter().flatten().map(|&(_, rise)| rise.max(1e-6).ln()).collect()
    };
    let (a, b) = (logs(&one), logs(&measured));
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (of_a, of_b) = (mean(&a), mean(&b));
    let product = |x: &[f64], y: &[f64], mx: f64, my: f64| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum()
    };
    let correlation =
        product(&a, &b, of_a, of_b) / (product(&a, &a, of_a, of_a) * product(&b, &b, of_b, of_b)).sqrt();
    assert!(correlation > 0.85, "{correlation}: {:?} against {:?}", one.measured(), measured.measured());
    // Fewer groups lose more, in every layer.
    assert!(one.measured().iter().all(|layer| layer.is_sorted_by(|(_, a), (_, b)| a > b)));
}

/// Makes the third of three KV heads of layer 1 the first, but for `off` of each number.
fn nearly_copied(off: f32) -> (tempfile::TempDir, Checkpoint) {
    let mut made = running::runnable("qwen2", safetensors::Dtype::F32, 3, true);
    for part in ["k", "v"] {
        for kind in ["weight", "bias"] {
            let bytes = &mut made.tensor(&format!("model.layers.1.self_attn.{part}_proj.{kind}")).bytes;
            let head = bytes.len() / 3;
            for i in (0..head).step_by(4) {
                let number = f32::from_le_bytes(bytes[i..i + 4].try_into().unwrap());
                let sign = if i * 7919 % 1009 < 504 { 1.0 } else { -1.0 };
                bytes[2 * head + i..][..4].copy_from_slice(&(number * (1.0 + off * sign)).to_le_bytes());
            }
        }
    }
    running::opened(&made)
}

/// The front of a layer of which the first and the third head are shared.
fn outer_shared(checkpoint: &Checkpoint, layer: usize) -> Front {
    let fitness = WeightSharingError::new(&checkpoint.heads(layer).unwrap()).unwrap();
    let mut front = Front::new(&fitness).unwrap();
    front.offer(&Partition::from_labels(&[0, 1, 0]).unwrap(), 0.0).unwrap();
    front
}

/// Heads that are copies merge to nothing lost, and cost nothing.
#[test]
fn copies_cost_nothing() {
    let (_root, checkpoint) = nearly_copied(0.0);
    let model = Model::load(&checkpoint).unwrap();
    let windows = Windows::new((0..50u32).map(|t| t * t % 11 + t % 5).collect(), 8).unwrap();
    let trial = trial(&checkpoint, &model, &windows);
    let fronts = [0, 1].map(|layer| outer_shared(&checkpoint, layer));
    let found = Sensitivity::estimate(&trial, &fronts, Run::new(0)).unwrap();
    let cost = |layer: usize| found.measured()[layer].iter().find(|(k, _)| *k == 2).unwrap().1;
    assert!(cost(0) > 1e-4 && cost(1) < 1e-9, "{:?}", found.measured());
}

/// Where a block is a whole window the estimate is KL itself, but for higher orders of the change and the noise of what is drawn.
#[test]
fn of_small_changes_in_short_windows_the_estimate_is_the_divergence() {
    let (_root, checkpoint) = nearly_copied(0.1);
    let model = Model::load(&checkpoint).unwrap();
    let windows = Windows::new((0..2048u32).map(|t| t * t % 11 + t % 5).collect(), 8).unwrap();
    let trial = trial(&checkpoint, &model, &windows);
    let fronts = [0, 1].map(|layer| outer_shared(&checkpoint, layer));
    let of = |found: &Sensitivity| found.measured()[1].iter().find(|(k, _)| *k == 2).unwrap().1;
    let measured = of(&Sensitivity::measure(&trial, &fronts, Run::new(0)).unwrap());
    let estimated = of(&Sensitivity::estimate(&trial, &fronts, Run::new(0)).unwrap());
    assert_relative_eq!(estimated, measured, max_relative = 0.15);
}
