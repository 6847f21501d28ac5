//! A `Grouping` of one's own: heads dealt out in turn, against neighbouring heads (GQA).
//!
//! `cargo run --example grouping`

use std::sync::Arc;

use ndarray::Array3;
use qcqa::fitness::{WeightSharing, WeightSharingError};
use qcqa::grouping::UniformGqa;
use qcqa::heads::{Heads, InMemory, Projection};
use qcqa::partition::Partition;
use qcqa::pipeline::{Compress, Search};
use qcqa::pooler::MeanPooler;
use qcqa::spec::Spec;
use qcqa::{FitnessFn, Grouping, Result, Run, ndarray};

/// Every k-th head together.
#[derive(Debug)]
struct Strided;

impl Grouping for Strided {
    fn spec(&self) -> Spec {
        Spec::new("strided")
    }

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
    let energy = WeightSharingError::new(&heads)?.energy();
    let model = InMemory::new(vec![heads])?;
    let groupings: [Arc<dyn Grouping>; 2] = [Arc::new(UniformGqa), Arc::new(Strided)];
    for grouping in groupings {
        let search = Search::Grouping(Arc::clone(&grouping));
        let compress = Compress::custom(search, Arc::new(WeightSharing), Arc::new(MeanPooler));
        for point in compress.search(&model, Run::new(0))?.layers()[0].iter() {
            println!(
                "{grouping:?} k = {}: {:8.2}  {:?}",
                point.partition.n_groups(),
                point.error,
                point.partition
            );
        }
    }
    println!("energy of the layer: {:.2}", energy.unwrap_or(0.0));
    Ok(())
}
