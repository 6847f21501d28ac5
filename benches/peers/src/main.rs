//! Our optimizers and other people's NSGA-II, on the same layers and seeds, in one process and on one thread.
//!
//! See README.md for the command and how to read the tables.

mod allocation;
mod instances;
mod methods;
mod table;

use std::hint::black_box;
use std::rc::Rc;
use std::time::Instant;

use qcqa::{FitnessFn, Optimizer, Run};
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::optimizer::LocalSearch;
use qcqa::partition::SearchSpace;

use crate::instances::Set;
use crate::methods::{ALL, Method};
use crate::table::{Quality, Times};

/// What the command line asks for.
struct Asked {
    heads: Vec<usize>,
    kinds: Vec<String>,
    ours: bool,
    quick: bool,
    first_seed: u64,
}

const USAGE: &str =
    "peers [--heads 12,16,32,40] [--kinds iid,prototypes,models,allocation] [--ours] [--quick] [--seed 100]";

fn asked() -> Result<Asked, String> {
    let mut asked = Asked {
        heads: vec![12, 16, 32, 40],
        kinds: ["models", "iid", "prototypes", "allocation"].map(String::from).into(),
        ours: false,
        quick: false,
        first_seed: 100,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--heads" => {
                let number = |n: &str| n.parse().map_err(|_| format!("{n:?} is no number of heads"));
                asked.heads = value()?.split(',').map(number).collect::<Result<_, _>>()?;
            }
            "--kinds" => asked.kinds = value()?.split(',').map(String::from).collect(),
            "--seed" => asked.first_seed = value()?.parse().map_err(|_| "--seed needs a number")?,
            "--ours" => asked.ours = true,
            "--quick" => asked.quick = true,
            _ => return Err(format!("{word:?} is not known")),
        }
    }
    Ok(asked)
}

fn main() {
    let asked = match asked() {
        Ok(asked) => asked,
        Err(message) => {
            eprintln!("{message}\n{USAGE}");
            std::process::exit(2);
        }
    };
    let wants = |kind: &str| asked.kinds.iter().any(|k| k == kind);
    let seeds = asked.first_seed..asked.first_seed + if asked.quick { 2 } else { 5 };
    if wants("models") {
        for set in instances::models(asked.first_seed) {
            compare(&set, &asked);
        }
    }
    let made: [(&str, fn(usize, u64) -> WeightSharingError); 2] =
        [("iid", instances::iid), ("prototypes", instances::prototypes)];
    for (kind, make) in made.into_iter().filter(|(kind, _)| wants(kind)) {
        for &heads in &asked.heads {
            let layers = seeds.clone().map(|seed| (seed, make(heads, seed))).collect();
            compare(&Set { name: kind.to_string(), heads, layers }, &asked);
        }
    }
    if wants("allocation") {
        allocation::report(asked.first_seed);
    }
}

/// The least error of every k: by `Exact`, or by all runs and a `LocalSearch` of many rounds from three seeds.
fn best_known(layer: &WeightSharingError, fronts: &[Front], quick: bool) -> Vec<f64> {
    let heads = layer.n_heads();
    let mut best = vec![f64::INFINITY; heads + 1];
    let mut take = |front: &Front| {
        for point in front.iter() {
            let k = point.partition.n_groups();
            best[k] = point.error.min(best[k]);
        }
    };
    fronts.iter().for_each(&mut take);
    if !Method::Exact.serves(heads) {
        for seed in 0..if quick { 1 } else { 3 } {
            let search = LocalSearch { rounds: 3000, ..LocalSearch::default() };
            let run = Run::new(1 << 32 | seed);
            take(&search.optimize(layer, &SearchSpace::arbitrary(), run).expect("a front"));
        }
    }
    best
}

fn compare(set: &Set, asked: &Asked) {
    let ours = [Method::Local, Method::LocalThorough, Method::Exact, Method::Nsga2(100), Method::Nsga2(500)];
    let methods: Vec<Method> = ALL
        .into_iter()
        .filter(|m| m.serves(set.heads) && (!asked.ours || ours.contains(m)) && !(asked.quick && m.is_slow()))
        .collect();
    let mut times: Vec<Times> = methods.iter().map(|_| Times::default()).collect();
    let mut returned: Vec<Vec<Quality>> = vec![Vec::new(); methods.len()];
    let mut seen = returned.clone();
    for (seed, layer) in &set.layers {
        let layer = Rc::new(layer.clone());
        // In turns, so that a slow moment of the machine hits all of them.
        for round in 0..if asked.quick { 3 } else { 5 } {
            for (method, times) in methods.iter().zip(&mut times).filter(|(m, _)| round < 1 || !m.is_slow()) {
                for _ in 0..method.calls() {
                    let start = Instant::now();
                    black_box(method.search(&layer, *seed));
                    times.add(start.elapsed());
                }
            }
        }
        let fronts: Vec<_> = methods.iter().map(|m| m.search(&layer, *seed).into_front(&layer)).collect();
        let all: Vec<_> = methods.iter().map(|m| methods::seen(*m, &layer, *seed)).collect();
        let best = best_known(&layer, &[fronts.as_slice(), &all].concat(), asked.quick);
        for (qualities, fronts) in [(&mut returned, &fronts), (&mut seen, &all)] {
            for (qualities, front) in qualities.iter_mut().zip(fronts) {
                qualities.push(Quality::of(front, &best, &layer));
            }
        }
    }
    let reference = if Method::Exact.serves(set.heads) { "the optimum" } else { "the best known" };
    println!("\n### {}, H = {}: gap to {reference}, {} layers\n", set.name, set.heads, set.layers.len());
    println!(
        "| method | ms (median, least) | mean gap | worst k | k had | hypervolume | of all seen: gap | k had | hypervolume |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (((method, times), returned), seen) in methods.iter().zip(&times).zip(&returned).zip(&seen) {
        let (front, all) = (Quality::mean(returned), Quality::mean(seen));
        println!(
            "| {} | {times} | {:.4} % | {:.2} % | {:.0} % | {:.5} | {:.4} % | {:.0} % | {:.5} |",
            method.name(),
            100.0 * front.gap,
            100.0 * front.worst,
            100.0 * front.covered,
            front.hypervolume,
            100.0 * all.gap,
            100.0 * all.covered,
            all.hypervolume,
        );
    }
}
