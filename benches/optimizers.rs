//! Time of the optimizers, their bounds and the allocation, on one thread.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ndarray::Array2;
use qcqa::allocator::{ExactAllocation, LayerCosts};
use qcqa::fitness::WeightSharingError;
use qcqa::optimizer::{Exact, LocalSearch, attach_bounds, nearest_bounds};
use qcqa::partition::SearchSpace;
use qcqa::{Optimizer, Run, ndarray};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

const SIZES: [usize; 3] = [12, 16, 32];

/// Heads of 256 uniform numbers (`prototypes` 0), or `scale · (prototype + noise / 2)` with a scale of 0.3 to 1.7.
fn instance(n: usize, prototypes: usize) -> WeightSharingError {
    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
    let mut draw = |rows: usize| Array2::from_shape_simple_fn((rows, 256), || rng.random_range(-1.0..1.0));
    let (noise, centres) = (draw(n), draw(prototypes.max(1)));
    let mut heads = noise;
    if prototypes > 0 {
        for (i, mut head) in heads.rows_mut().into_iter().enumerate() {
            let scale = 0.3 + 1.4 * (i as f64 * 0.618).fract();
            head.zip_mut_with(&centres.row(i % prototypes), |x, c| *x = scale * (c + *x / 2.0));
        }
    }
    let square = |i: usize, j: usize| (&heads.row(i) - &heads.row(j)).mapv(|x| x * x).sum();
    let distances = Array2::from_shape_fn((n, n), |(i, j)| square(i.min(j), i.max(j)));
    let energy = heads.iter().map(|x| x * x).sum();
    WeightSharingError::from_distances(distances, energy).expect("distances of points")
}

fn optimizers(c: &mut Criterion) {
    let spaces = [("arbitrary", SearchSpace::arbitrary()), ("equal", SearchSpace::equal())];
    for (kind, per_prototype) in [("iid", None), ("prototypes", Some(4))] {
        for (space_name, space) in spaces {
            let mut group = c.benchmark_group(format!("{kind}, {space_name}"));
            group.sample_size(20);
            for n in SIZES {
                let fitness = instance(n, per_prototype.map_or(0, |heads| n / heads));
                let mut bench = |name: &str, optimizer: &dyn Optimizer| {
                    group.bench_function(BenchmarkId::new(name, n), |b| {
                        b.iter(|| optimizer.optimize(black_box(&fitness), &space, Run::new(7)));
                    });
                };
                bench("local", &LocalSearch::default());
                bench("local thorough", &LocalSearch::thorough());
                if n <= Exact::default().max_heads {
                    bench("exact", &Exact::default());
                }
            }
        }
    }
}

fn bounds(c: &mut Criterion) {
    let mut group = c.benchmark_group("bounds");
    let space = SearchSpace::arbitrary();
    for n in SIZES {
        let fitness = instance(n, n / 4);
        let front = LocalSearch::default().optimize(&fitness, &space, Run::new(7)).expect("a front");
        group.bench_function(BenchmarkId::new("attach", n), |b| {
            b.iter(|| attach_bounds(&mut front.clone(), black_box(&fitness), &space));
        });
        group.bench_function(BenchmarkId::new("nearest", n), |b| {
            b.iter(|| nearest_bounds(black_box(fitness.distances()), &space));
        });
        #[cfg(feature = "linalg")]
        group.bench_function(BenchmarkId::new("spectral", n), |b| {
            b.iter(|| qcqa::optimizer::spectral_bounds(black_box(fitness.distances())));
        });
    }
}

fn allocation(c: &mut Criterion) {
    let mut group = c.benchmark_group("allocation, all budgets");
    for n in SIZES {
        let cost = |layer: usize, k: usize| Some((n - k) as f64 * (1.0 + (layer * 7 % 5) as f64) / k as f64);
        let table = (0..n).map(|layer| (1..=n).map(|k| cost(layer, k)).collect()).collect();
        let costs = LayerCosts::from_table(table, false).expect("finite costs");
        group.bench_function(BenchmarkId::new("exact", format!("{n}x{n}")), |b| {
            b.iter(|| {
                ExactAllocation.all_budgets(black_box(&costs), Run::new(7)).map(|all| all.cost(n * n / 2))
            });
        });
    }
}

criterion_group!(benches, optimizers, bounds, allocation);
criterion_main!(benches);
