//! An `Allocator` of one's own: take from the layer that minds least, one group at a time, against the exact choice.
//!
//! `cargo run --example allocator`

use ndarray::Array3;
use qcqa::allocator::{CostScale, ExactAllocation, LayerCosts, LayerSelection, UniformAllocation};
use qcqa::budget::Limits;
use qcqa::fitness::WeightSharingError;
use qcqa::heads::{Heads, InMemory, Projection};
use qcqa::pipeline::{Compress, Preset};
use qcqa::spec::Spec;
use qcqa::{Allocator, Error, FitnessFn, Result, Run, ndarray};

/// Starts without sharing and lowers the k whose cost rises least.
#[derive(Debug)]
struct Greedy;

impl Allocator for Greedy {
    fn spec(&self) -> Spec {
        Spec::new("greedy")
    }

    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, _: Run<'_>) -> Result<Vec<usize>> {
        let mut ks: Vec<usize> = (0..costs.n_layers()).map(|layer| costs.n_heads(layer)).collect();
        while ks.iter().sum::<usize>() > kv_heads {
            let rise = |layer: usize| Some(costs.get(layer, ks[layer] - 1)? - costs.get(layer, ks[layer])?);
            let rises = (0..ks.len()).filter_map(|layer| Some((layer, rise(layer)?)));
            let least = rises.min_by(|a, b| a.1.total_cmp(&b.1));
            let Some((layer, _)) = least else {
                return Err(Error::BudgetUnreachable { asked: kv_heads, reachable: costs.reachable() });
            };
            ks[layer] -= 1;
        }
        Ok(ks)
    }
}

fn main() -> Result<()> {
    // Layer i has i + 1 kinds of heads: the first layers can share more.
    let layer = |i: usize| -> Result<Heads> {
        let weight = Array3::from_shape_fn((8, 2, 6), |(h, r, c)| {
            ((h % (2 * i + 2) + 1) * (7 * r + 3 * c + 1) % 11) as f32
        });
        Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)
    };
    let model = InMemory::new((0..4).map(layer).collect::<Result<_>>()?)?;
    let compress = Compress::new(Preset::QcqaAc);
    let searched = compress.search(&model, Run::new(0))?;
    let costs = LayerCosts::new(searched.layers(), CostScale::EnergyShare, &Limits::default())?;
    let allocators: [&dyn Allocator; 4] =
        [&UniformAllocation, &LayerSelection::default(), &Greedy, &ExactAllocation];
    for allocator in allocators {
        let ks = allocator.allocate(&costs, 16, Run::new(0))?;
        println!("{allocator:?}: {ks:?} costs {:.4}", costs.total(&ks).unwrap_or(f64::NAN));
    }
    let energy = WeightSharingError::new(&layer(0)?)?.energy();
    println!("(shares of each layer's own energy; the first layer's is {:.0})", energy.unwrap_or(0.0));
    Ok(())
}
