//! Models as large as they come: measures a search of one in parts (`made_up.rs` writes them).
//!
//! ```sh
//! cargo run --release --features cli --example scale -- measure target/7b
//! cargo run --release --features cli --example scale -- low-rank       # one layer of a 7B model, calibrated
//! ```

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use ndarray::{Array2, Array3};
use ndarray_rand::RandomExt;
use ndarray_rand::rand_distr::Normal;
use qcqa::allocator::{CostScale, LayerCosts, UniformAllocation};
use qcqa::budget::Limits;
use qcqa::checkpoint::Checkpoint;
use qcqa::fitness::{FitnessKind, LowRankError, WeightSharing};
use qcqa::heads::{Heads, Moment, Projection};
use qcqa::model::Rotation;
use qcqa::optimizer::{LocalSearch, attach_bounds};
use qcqa::partition::SearchSpace;
use qcqa::pipeline::{Compress, Preset};
use qcqa::pooler::LowRankPooler;
use qcqa::{Allocator, FitnessFn, HeadSource, KvPooler, Optimizer, Run};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["measure", model] => measure(Path::new(model)),
        ["low-rank"] => low_rank(),
        _ => Err("usage: scale measure DIR, or scale low-rank".into()),
    }
}

/// Times a search part by part, each round beside a bare read of the same bytes: medians of the rounds.
fn measure(model: &Path) -> Outcome<()> {
    const ROUNDS: usize = 7;
    let names = [
        "bare read",
        "open, fingerprint",
        "distances",
        "search",
        "allocation, plan",
        "all but the bare read",
    ];
    let mut times: Vec<Vec<Duration>> = names.iter().map(|_| Vec::new()).collect();
    let mut bytes = 0;
    // The first round warms the page cache and does not count.
    for round in 0..=ROUNDS {
        let mut laps = Vec::new();
        let mut last = Instant::now();
        let mut lap = |laps: &mut Vec<Duration>| {
            laps.push(last.elapsed());
            last = Instant::now();
        };
        let mapped = Checkpoint::open(model)?;
        let layers = mapped.architecture().n_layers();
        let stored = (0..layers).map(|i| mapped.stored_bytes(i)).collect::<Result<Vec<_>, _>>()?;
        lap(&mut Vec::new());
        bytes = stored.iter().map(|parts| bare_read(parts)).sum::<usize>();
        lap(&mut laps);

        let checkpoint = Checkpoint::open(model)?;
        checkpoint.id()?;
        lap(&mut laps);
        let distances = |i| WeightSharing.of(&checkpoint, i);
        let fitness = (0..layers).map(distances).collect::<Result<Vec<_>, _>>()?;
        lap(&mut laps);
        let space = SearchSpace::arbitrary();
        let search = |(i, fitness): (usize, &dyn FitnessFn)| {
            let mut front = LocalSearch::default().optimize(fitness, &space, Run::new(i as u64))?;
            attach_bounds(&mut front, fitness, &space).map(|()| front)
        };
        let fronts =
            fitness.par_iter().map(|f| f.as_ref()).enumerate().map(search).collect::<Result<Vec<_>, _>>()?;
        lap(&mut laps);
        let costs = LayerCosts::new(&fronts, CostScale::EnergyShare, &Limits::default())?;
        let half = checkpoint.architecture().kv_heads().iter().sum::<usize>() / 2;
        let ks = UniformAllocation.allocate(&costs, half, Run::new(0))?;
        lap(&mut laps);
        // The same by the pipeline, which keeps to no lap.
        if round == 0 {
            let compress = Compress::new(Preset::QcqaAc).optimizer(LocalSearch::default());
            assert_eq!(compress.plan(&checkpoint, Run::new(0))?.group_counts(), ks);
        }
        laps.push(laps[1..].iter().sum());
        if round > 0 {
            times.iter_mut().zip(laps).for_each(|(times, lap)| times.push(lap));
        }
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2].as_secs_f64()
    };
    let medians: Vec<f64> = times.iter_mut().map(median).collect();
    println!("{:.2} GB of keys and values, {} threads", bytes as f64 / 1e9, rayon::current_num_threads());
    for (name, time) in names.iter().zip(&medians) {
        println!("{name:22} {:8.1} ms  {:5.1} x bare read", 1e3 * time, time / medians[0]);
    }
    print_memory();
    Ok(())
}

fn print_memory() {
    if let Ok(status) = fs::read_to_string("/proc/self/status") {
        // VmHWM counts mapped file pages, too; RssAnon is what was allocated.
        status
            .lines()
            .filter(|l| l.starts_with("VmHWM") || l.starts_with("RssAnon"))
            .for_each(|l| println!("{l}"));
    }
}

/// Low-rank sharing of one made-up layer of a 7B model (32 heads of 128, width 4096) under a moment whose spectrum falls
/// like that of real inputs: the errors of all numbers of groups, and pooling at half and at a quarter of the cache.
fn low_rank() -> Outcome<()> {
    const HEADS: usize = 32;
    const HEAD_DIM: usize = 128;
    const WIDTH: usize = HEADS * HEAD_DIM;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut normal =
        |shape| Array3::random_using(shape, Normal::new(0.0f32, 0.02).expect("a deviation"), &mut rng);
    let mut projection = || Projection::new(normal((HEADS, HEAD_DIM, WIDTH)), None);
    let (key, value, query) = (projection()?, projection()?, projection()?);
    let output = normal((HEADS, WIDTH, HEAD_DIM));
    let moment = moment(WIDTH, &mut rng);
    let heads = Heads::new(key, value)?.with_queries(query, output)?;
    let heads =
        heads.with_rotation(Rotation::HalfSplit { dims: HEAD_DIM })?.with_moment(Moment::new(moment)?)?;
    println!("{} threads", rayon::current_num_threads());
    print_memory();
    let mut last = Instant::now();
    let mut lap = |what: &str| {
        println!("{what:32} {:6.1} s", last.elapsed().as_secs_f64());
        last = Instant::now();
    };
    let fitness = LowRankError::new(&heads)?;
    lap("Gram and Hermitian matrices");
    for (what, space) in [("any groups", SearchSpace::arbitrary()), ("equal groups", SearchSpace::equal())] {
        let front = LocalSearch::default().optimize(&fitness, &space, Run::new(0))?;
        lap(&format!("front of all k, {what}"));
        for k in [HEADS / 2, HEADS / 4] {
            let point = front.get(k).ok_or("a front of all k")?;
            LowRankPooler::default().pool(&heads, &point.partition)?;
            lap(&format!("pooling, k = {k}, {what}"));
        }
    }
    print_memory();
    Ok(())
}

/// `diag(1/√i) + Σ u uᵀ` of 32 wide directions, and a mean.
fn moment(width: usize, rng: &mut ChaCha8Rng) -> Array2<f64> {
    let mut wide: Array2<f64> =
        Array2::random_using((width + 1, 32), Normal::new(0.0, 1.0).expect("a deviation"), rng);
    wide.row_mut(width).fill(0.1);
    let mut moment = wide.dot(&wide.t()) / 32.0;
    (0..width).for_each(|i| moment[[i, i]] += 1.0 / (1.0 + i as f64).sqrt());
    moment[[width, width]] = 1.0;
    moment
}

/// Touches every stored byte of a layer's keys and values, on all threads; returns their number.
fn bare_read(parts: &[&[u8]]) -> usize {
    let sum = |bytes: &[u8]| {
        let mut lanes = [0u64; 16];
        for words in bytes.chunks_exact(128) {
            for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
                *lane ^= u64::from_le_bytes(word.try_into().expect("eight bytes"));
            }
        }
        lanes.iter().fold(0, |a, b| a ^ b)
    };
    for bytes in parts {
        std::hint::black_box(bytes.par_chunks(1 << 20).map(sum).reduce(|| 0, |a, b| a ^ b));
    }
    parts.iter().map(|bytes| bytes.len()).sum()
}
