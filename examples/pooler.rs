//! A `KvPooler` of one's own: the member of each group that is nearest to its mean, against the mean itself.
//!
//! `cargo run --example pooler`

use ndarray::{Array3, Axis};
use qcqa::heads::{Heads, Pooled, Projection};
use qcqa::partition::Partition;
use qcqa::pooler::MeanPooler;
use qcqa::spec::Spec;
use qcqa::{KvPooler, Result, ndarray};

/// The medoid of each group's keys, and the value of the same head.
#[derive(Debug)]
struct Medoid;

impl KvPooler for Medoid {
    fn spec(&self) -> Spec {
        Spec::new("medoid")
    }

    fn pool(&self, heads: &Heads, partition: &Partition) -> Result<Pooled> {
        let mean = MeanPooler.pool(heads, partition)?;
        let keys = heads.key().weight();
        let chosen = |(g, members): (usize, &Vec<usize>)| {
            let mean = mean.key.weight().index_axis_move(Axis(0), g);
            let distance = |&i: &usize| (&keys.index_axis(Axis(0), i) - &mean).mapv(|x| x * x).sum();
            members.iter().copied().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(members[0])
        };
        let heads_of_groups: Vec<usize> = partition.groups().iter().enumerate().map(chosen).collect();
        let select = |p: &Projection| {
            Projection::new(
                p.weight().select(Axis(0), &heads_of_groups),
                p.bias().map(|b| b.select(Axis(0), &heads_of_groups)),
            )
        };
        Ok(Pooled::new(select(heads.key())?, select(heads.value())?))
    }
}

fn main() -> Result<()> {
    let weight = Array3::from_shape_fn((6, 2, 4), |(i, r, c)| ((5 * i + 7 * r + 3 * c) % 13) as f32);
    let heads = Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)?;
    let partition = Partition::from_groups(6, &[vec![0, 2, 4], vec![1, 3, 5]])?;
    for pooler in [&MeanPooler as &dyn KvPooler, &Medoid] {
        let pooled = pooler.pool(&heads, &partition)?;
        pooled.check(&heads, &partition)?;
        println!("{pooler:?}: first row of each shared key");
        for key in pooled.key.weight().outer_iter() {
            println!("  {:.2}", key.row(0));
        }
    }
    Ok(())
}
