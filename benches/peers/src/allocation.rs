//! The allocation of all budgets of 12 and 32 layers.

use std::hint::black_box;
use std::time::Instant;

use qcqa::{Optimizer, Run};
use qcqa::allocator::{CostScale, ExactAllocation, LayerCosts};
use qcqa::budget::Limits;
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::optimizer::LocalSearch;
use qcqa::partition::SearchSpace;

use crate::instances;
use crate::table::Times;

const REPETITIONS: usize = 300;

/// The costs of as many layers as heads, iid and prototypes in turn.
fn costs(heads: usize, seed: u64) -> LayerCosts {
    let front = |layer: usize| -> Front {
        let make: fn(usize, u64) -> WeightSharingError =
            if layer % 2 == 0 { instances::iid } else { instances::prototypes };
        let fitness = make(heads, seed + layer as u64);
        LocalSearch::default().optimize(&fitness, &SearchSpace::arbitrary(), Run::new(seed)).expect("a front")
    };
    let fronts: Vec<_> = (0..heads).map(front).collect();
    LayerCosts::new(&fronts, CostScale::EnergyShare, &Limits::default()).expect("energies")
}

pub fn report(seed: u64) {
    println!("\n### All budgets, `ExactAllocation`\n");
    println!("| layers × heads | costs alone, ms (median, least) | with every choice written out, ms |");
    println!("|---|---|---|");
    for heads in [12, 32] {
        let costs = costs(heads, seed);
        let mut times = [Times::default(), Times::default()];
        for _ in 0..REPETITIONS {
            let start = Instant::now();
            let all = ExactAllocation.all_budgets(black_box(&costs), Run::new(seed)).expect("not cancelled");
            times[0].add(start.elapsed());
            let choices: Vec<_> = (0..=heads * heads).map(|total| all.choice(total)).collect();
            times[1].add(start.elapsed());
            assert!(choices[heads..].iter().all(Option::is_some));
        }
        println!("| {heads} × {heads} | {} | {} |", times[0], times[1]);
    }
}
