//! A `Grouping` of one's own: heads dealt out in turn, against neighbouring heads (GQA).
//!
//! `cargo run --example grouping`

use ndarray::Array3;
use qcqa::{
    FitnessFn, Grouping, Heads, Partition, Projection, Result, Run, Search, SearchSpace, UniformGqa,
    WeightSharingError, ndarray,
};

/// Every k-th head together.
#[derive(Debug)]
struct Strided;

impl Grouping for Strided {
    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>> {
        let labels: Vec<usize> = (0..heads.n_heads()).map(|head| head % k).collect();
        Partition::from_labels(&labels).map(Some)
    }
}

fn main() -> Result<()> {
    // Eight heads of which i and i + 4 are nearly alike.
    let weight = Array3::from_shape_fn((8, 2, 6), |(i, r, c)| {
        ((i % 4 + 1) * (7 * r + 3 * c + 1) % 11) as f32 + 0.1 * i as f32
    });
    let heads = Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)?;
    let fitness = WeightSharingError::new(&heads)?;
    for grouping in [&UniformGqa as &dyn Grouping, &Strided] {
        let front = Search::Grouping(grouping).front(&heads, &fitness, &SearchSpace::equal(), Run::new(0))?;
        for point in front.iter() {
            println!(
                "{grouping:?} k = {}: {:8.2}  {:?}",
                point.partition.n_groups(),
                point.error,
                point.partition
            );
        }
    }
    println!("energy of the layer: {:.2}", fitness.energy().unwrap_or(0.0));
    Ok(())
}
