//! A `FitnessFn` of one's own, a sum over groups: keys alone, by their largest difference. Every optimizer takes it.
//!
//! `cargo run --example fitness`

use ndarray::{Array2, Array3, Axis};
use qcqa::fitness::SeparableFitness;
use qcqa::heads::{Heads, Projection};
use qcqa::optimizer::{Exact, LocalSearch};
use qcqa::partition::{Partition, SearchSpace};
use qcqa::{Error, FitnessFn, Optimizer, Result, Run, ndarray};

/// The largest distance between two keys of a group, summed over the groups.
#[derive(Debug)]
struct KeyDiameter {
    distances: Array2<f64>,
}

impl KeyDiameter {
    fn new(heads: &Heads) -> Self {
        let keys = heads.key().weight();
        let distance = |(i, j)| {
            let difference = &keys.index_axis(Axis(0), i) - &keys.index_axis(Axis(0), j);
            difference.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
        };
        Self { distances: Array2::from_shape_fn((heads.n_heads(), heads.n_heads()), distance) }
    }
}

impl FitnessFn for KeyDiameter {
    fn n_heads(&self) -> usize {
        self.distances.nrows()
    }

    fn evaluate(&self, partition: &Partition) -> Result<f64> {
        if partition.n_heads() != self.n_heads() {
            return Err(Error::PartitionSize { expected: self.n_heads(), found: partition.n_heads() });
        }
        partition.groups().iter().map(|group| self.group_error(group)).sum()
    }

    fn separable(&self) -> Option<&dyn SeparableFitness> {
        Some(self)
    }
}

impl SeparableFitness for KeyDiameter {
    fn group_error(&self, members: &[usize]) -> Result<f64> {
        let pairs = members.iter().flat_map(|&i| members.iter().map(move |&j| (i, j)));
        Ok(pairs.map(|pair| self.distances[pair]).fold(0.0, f64::max))
    }
}

fn main() -> Result<()> {
    let weight = Array3::from_shape_fn((8, 2, 6), |(i, r, c)| ((5 * i + 7 * r + 3 * c) % 13) as f32);
    let heads = Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)?;
    let fitness = KeyDiameter::new(&heads);
    for optimizer in [&LocalSearch::default() as &dyn Optimizer, &Exact::default()] {
        let front = optimizer.optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0))?;
        for point in front.iter() {
            println!("{optimizer:?} k = {}: {:6.2}", point.partition.n_groups(), point.error);
        }
    }
    Ok(())
}
