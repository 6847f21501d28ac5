//! The parts of the main road: reading a layer into distances, the paper's search, low-rank sharing.
//!
//! `cargo bench --features rayon,linalg --bench spine`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array3;
use ndarray_rand::RandomExt;
use ndarray_rand::rand_distr::StandardNormal;
use qcqa::Allocator;
use qcqa::allocator::{CostScale, LayerCosts, LayerSelection, UniformAllocation};
use qcqa::budget::Limits;
use qcqa::fitness::{LowRankError, WeightSharingError, squared_distances};
use qcqa::front::Front;
use qcqa::heads::{Heads, Projection};
use qcqa::model::Rotation;
use qcqa::optimizer::{LocalSearch, Nsga2};
use qcqa::partition::SearchSpace;
use qcqa::pooler::LowRankPooler;
use qcqa::{KvPooler, Optimizer, Run};
use std::hint::black_box;

fn layer(heads: usize, head_dim: usize, inputs: usize) -> Heads {
    let projection = || {
        let weight = Array3::random((heads, head_dim, inputs), StandardNormal);
        Projection::new(weight, None).expect("a legal shape")
    };
    Heads::new(projection(), projection()).expect("finite weights")
}

/// The bound of anything that looks at every weight once.
fn bare_read(layer: &Heads) -> f32 {
    let sum = |slice: &[f32]| {
        use rayon::prelude::*;
        let sums = slice.par_chunks(1 << 16).map(|chunk| {
            let mut lanes = [0.0f32; 64];
            for piece in chunk.chunks_exact(64) {
                lanes.iter_mut().zip(piece).for_each(|(lane, x)| *lane += x);
            }
            lanes.iter().sum::<f32>()
        });
        sums.sum::<f32>()
    };
    [layer.key(), layer.value()].iter().map(|p| sum(p.weight().as_slice().expect("contiguous"))).sum()
}

fn distances(c: &mut Criterion) {
    let layer = layer(32, 128, 4096);
    let mut group = c.benchmark_group("layer of 32 heads, 128 x 4096");
    group.throughput(Throughput::Bytes(2 * 32 * 128 * 4096 * 4)).sample_size(20);
    group.bench_function("bare read", |b| b.iter(|| black_box(bare_read(&layer))));
    group.bench_function("squared distances", |b| b.iter(|| black_box(squared_distances(&layer))));
    group.finish();
}

fn search(c: &mut Criterion) {
    let mut group = c.benchmark_group("nsga2 100 x 100");
    group.sample_size(20);
    for heads in [12, 32] {
        let fitness = WeightSharingError::new(&layer(heads, 8, 64)).expect("finite weights");
        for (name, space) in [("arbitrary", SearchSpace::arbitrary()), ("equal", SearchSpace::equal())] {
            group.bench_function(format!("{heads} heads, {name}"), |b| {
                b.iter(|| Nsga2::default().optimize(&fitness, &space, Run::new(0)))
            });
        }
    }
    group.finish();
}

fn allocation(c: &mut Criterion) {
    let fronts: Vec<Front> = (0..32)
        .map(|i| {
            let fitness = WeightSharingError::new(&layer(32, 4, 16)).expect("finite weights");
            let short = Nsga2 { generations: 5, ..Nsga2::default() };
            short.optimize(&fitness, &SearchSpace::arbitrary(), Run::new(i)).expect("a front")
        })
        .collect();
    let costs = LayerCosts::new(&fronts, CostScale::EnergyShare, &Limits::default()).expect("energies");
    let mut group = c.benchmark_group("allocation, 32 layers x 32 heads");
    group.sample_size(10);
    group.bench_function("uniform", |b| b.iter(|| UniformAllocation.allocate(&costs, 512, Run::new(0))));
    group.bench_function("selection", |b| {
        b.iter(|| LayerSelection::default().allocate(&costs, 512, Run::new(0)))
    });
    group.finish();
}

/// A layer of a model of 12 heads, weights alone: what the errors of all pairs take, the front of all k, and pooling.
fn low_rank(c: &mut Criterion) {
    let queries = layer(12, 32, 384);
    let output = Array3::random((12, 384, 32), StandardNormal);
    let heads = layer(12, 32, 384).with_queries(queries.key().clone(), output).expect("fitting shapes");
    let heads = heads.with_rotation(Rotation::HalfSplit { dims: 32 }).expect("an even number");
    let fitness = LowRankError::new(&heads).expect("queries and outputs");
    let space = SearchSpace::equal();
    let front = LocalSearch::default().optimize(&fitness, &space, Run::new(0)).expect("a front");
    let half = &front.get(6).expect("six groups").partition;
    let mut group = c.benchmark_group("low-rank, layer of 12 heads, 32 x 384");
    group.sample_size(10);
    group.bench_function("errors of pairs", |b| b.iter(|| LowRankError::new(black_box(&heads))));
    group.bench_function("errors and front of equal groups", |b| {
        // Groups are remembered: a new one each time.
        b.iter(|| LocalSearch::default().optimize(&LowRankError::new(&heads)?, &space, Run::new(0)))
    });
    group.bench_function("pooling into 6", |b| b.iter(|| LowRankPooler::default().pool(&heads, half)));
    group.finish();
}

criterion_group!(benches, distances, search, allocation, low_rank);
criterion_main!(benches);
