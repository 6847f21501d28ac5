//! An `Optimizer` of one's own: the best of a thousand random partitions, against the paper's NSGA-II.
//!
//! `cargo run --example optimizer`

use ndarray::Array3;
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::heads::{Heads, Projection};
use qcqa::optimizer::Nsga2;
use qcqa::partition::{Partition, SearchSpace};
use qcqa::spec::Spec;
use qcqa::{FitnessFn, Optimizer, Result, Run, ndarray};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Draws, and keeps the best for every k.
#[derive(Debug)]
struct RandomSearch {
    draws: u64,
}

impl Optimizer for RandomSearch {
    fn spec(&self) -> Spec {
        Spec::new("random").with("draws", self.draws)
    }

    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front> {
        let n = fitness.n_heads();
        let mut rng = ChaCha8Rng::seed_from_u64(run.seed());
        let mut front = Front::new(fitness)?;
        for draw in 0..self.draws {
            run.step("random search", draw, self.draws)?;
            let labels: Vec<usize> = (0..n).map(|_| rng.random_range(0..n)).collect();
            let partition = Partition::from_labels(&labels)?;
            if space.admits(&partition) {
                front.offer(&partition, fitness.evaluate(&partition)?)?;
            }
        }
        Ok(front)
    }
}

fn main() -> Result<()> {
    let weight = Array3::from_shape_fn((12, 2, 8), |(i, r, c)| ((5 * i * i + 7 * r + 3 * c) % 17) as f32);
    let heads = Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)?;
    let fitness = WeightSharingError::new(&heads)?;
    for optimizer in [&RandomSearch { draws: 1000 } as &dyn Optimizer, &Nsga2::default()] {
        let front = optimizer.optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0))?;
        let errors: Vec<_> =
            front.iter().map(|p| format!("{}: {:.0}", p.partition.n_groups(), p.error)).collect();
        println!("{optimizer:?}\n  {}", errors.join("  "));
    }
    Ok(())
}
