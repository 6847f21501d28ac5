//! The optimizers, ours and others', behind one call.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use moors::operators::RepairOperator;
use moors::{
    ExactDuplicatesCleaner, GaussianMutation, NoConstraints, Nsga2Builder, RandomSamplingInt,
    SimulatedBinaryCrossover, UniformBinaryCrossover, UniformRealMutation,
};
use ndarray::{Array2, ArrayViewMut1};
use puggles::core::Problem;
use puggles::gatypes::{Integer, SolutionDataTypes};
use puggles::genetic_algorithms_v2::{ExecutionMode, NSGAII};
use qcqa::{FitnessFn, Optimizer, Run};
use qcqa::fitness::WeightSharingError;
use qcqa::front::Front;
use qcqa::optimizer::{Exact, LocalSearch, Nsga2};
use qcqa::partition::{Partition, SearchSpace};

const POPULATION: usize = 100;

/// What is compared; generations where it has some.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    Nsga2(usize),
    MoorsUniform(usize),
    MoorsSbx(usize),
    Puggles(usize),
    Local,
    LocalThorough,
    Exact,
}

pub const ALL: [Method; 11] = [
    Method::Local,
    Method::LocalThorough,
    Method::Exact,
    Method::Nsga2(100),
    Method::MoorsUniform(100),
    Method::MoorsSbx(100),
    Method::Puggles(100),
    Method::Nsga2(500),
    Method::MoorsUniform(500),
    Method::MoorsSbx(500),
    Method::Puggles(500),
];

impl Method {
    pub fn name(self) -> String {
        match self {
            Self::Nsga2(g) => format!("**Nsga2**, {POPULATION} × {g}"),
            Self::MoorsUniform(g) => format!("moors, uniform + reset, {POPULATION} × {g}"),
            Self::MoorsSbx(g) => format!("moors, SBX + Gaussian, {POPULATION} × {g}"),
            Self::Puggles(g) => format!("puggles, {POPULATION} × {g}"),
            Self::Local => "**LocalSearch**".into(),
            Self::LocalThorough => "**LocalSearch**, thorough".into(),
            Self::Exact => "**Exact**".into(),
        }
    }

    pub fn serves(self, heads: usize) -> bool {
        self != Self::Exact || heads <= Exact::default().max_heads
    }

    /// Timed calls in a row, so that short ones fill the clock.
    pub fn calls(self) -> usize {
        if self == Self::Local { 50 } else { 1 }
    }

    /// Whether one call takes a good part of a second.
    pub fn is_slow(self) -> bool {
        matches!(self, Self::Nsga2(500) | Self::MoorsUniform(500) | Self::MoorsSbx(500) | Self::Puggles(500))
    }

    /// One search; the partitions that it hands back.
    pub fn search(self, layer: &Rc<WeightSharingError>, seed: u64) -> Found {
        let ours = |optimizer: &dyn Optimizer| {
            let front = optimizer.optimize(layer.as_ref(), &SearchSpace::arbitrary(), Run::new(seed));
            Found::Front(front.expect("a front"))
        };
        match self {
            Self::Nsga2(generations) => {
                ours(&Nsga2 { population: POPULATION, generations, ..Nsga2::default() })
            }
            Self::Local => ours(&LocalSearch::default()),
            Self::LocalThorough => ours(&LocalSearch::thorough()),
            Self::Exact => ours(&Exact::default()),
            Self::MoorsUniform(generations) => moors_uniform(layer, generations, seed),
            Self::MoorsSbx(generations) => moors_sbx(layer, generations, seed),
            Self::Puggles(generations) => puggles(layer, generations, seed),
        }
    }
}

/// What a search hands back: a front, or genomes.
pub enum Found {
    Front(Front),
    Genomes(Vec<Vec<f64>>),
}

impl Found {
    /// As a front, outside of the clock.
    pub fn into_front(self, layer: &WeightSharingError) -> Front {
        match self {
            Self::Front(front) => front,
            Self::Genomes(genomes) => {
                let mut front = Front::new(layer).expect("a front");
                for genome in genomes {
                    let partition = partition(&genome);
                    let error = layer.evaluate(&partition).expect("a partition of this layer");
                    front.offer(&partition, error).expect("a finite error");
                }
                front
            }
        }
    }
}

thread_local! {
    /// The layer at hand: puggles takes a plain function.
    static LAYER: RefCell<Option<Rc<WeightSharingError>>> = const { RefCell::new(None) };
    /// The best of all that was evaluated, where that is asked for.
    static SEEN: RefCell<Option<Front>> = const { RefCell::new(None) };
}

/// Every genome that the search evaluates, as a front.
pub fn seen(method: Method, layer: &Rc<WeightSharingError>, seed: u64) -> Front {
    SEEN.set(Some(Front::new(layer.as_ref()).expect("a front")));
    let found = method.search(layer, seed).into_front(layer);
    let mut seen = SEEN.take().expect("set above");
    for point in found.iter() {
        seen.offer(&point.partition, point.error).expect("a finite error");
    }
    seen
}

fn partition(genome: &[f64]) -> Partition {
    let last = genome.len() - 1;
    let labels: Vec<usize> = genome.iter().map(|&gene| (gene as usize).min(last)).collect();
    Partition::from_labels(&labels).expect("as many labels as heads")
}

/// The objectives (k/H, WSE): the same evaluation as everybody's.
fn objectives(genome: &[f64]) -> [f64; 2] {
    let partition = partition(genome);
    let error = LAYER.with_borrow(|layer| {
        layer.as_ref().expect("set by the search").evaluate(&partition).expect("a partition of this layer")
    });
    SEEN.with_borrow_mut(|seen| {
        if let Some(seen) = seen {
            seen.offer(&partition, error).expect("a finite error");
        }
    });
    [partition.n_groups() as f64 / genome.len() as f64, error]
}

fn scores(genomes: &Array2<f64>) -> Array2<f64> {
    let mut scores = Array2::zeros((genomes.nrows(), 2));
    for (genome, mut score) in genomes.outer_iter().zip(scores.outer_iter_mut()) {
        let [share, error] = objectives(genome.as_slice().expect("rows lie together"));
        (score[0], score[1]) = (share, error);
    }
    scores
}

/// Labels are whole numbers below H.
#[derive(Debug)]
struct Whole;

impl RepairOperator for Whole {
    fn repair(&self, mut genome: ArrayViewMut1<'_, f64>) {
        let most = genome.len() as f64 - 1.0;
        genome.mapv_inplace(|gene| gene.floor().clamp(0.0, most));
    }
}

macro_rules! moors_search {
    ($name:ident, $crossover:expr, $mutation:expr) => {
        fn $name(layer: &Rc<WeightSharingError>, generations: usize, seed: u64) -> Found {
            LAYER.set(Some(Rc::clone(layer)));
            let heads = layer.n_heads();
            let mut search = Nsga2Builder::default()
                .fitness_fn(scores)
                .constraints_fn(NoConstraints)
                .sampler(RandomSamplingInt::new(0, heads as i32))
                .crossover($crossover)
                .mutation($mutation(heads as f64))
                .repair(Whole)
                .duplicates_cleaner(ExactDuplicatesCleaner::new())
                .num_vars(heads)
                .population_size(POPULATION)
                .num_offsprings(POPULATION)
                .num_iterations(generations)
                .crossover_rate(0.9)
                .mutation_rate(1.0)
                .seed(seed)
                .build()
                .expect("legal settings");
            search.run().expect("a run");
            let population = search.population.expect("a population");
            Found::Genomes(population.genes.outer_iter().map(|genome| genome.to_vec()).collect())
        }
    };
}

moors_search!(moors_uniform, UniformBinaryCrossover::new(), |heads: f64| {
    UniformRealMutation::new(1.0 / heads, 0.0, heads)
});
moors_search!(moors_sbx, SimulatedBinaryCrossover::new(15.0), |heads: f64| {
    GaussianMutation::new(1.0 / heads, heads / 4.0)
});

fn puggles(layer: &Rc<WeightSharingError>, generations: usize, seed: u64) -> Found {
    LAYER.set(Some(Rc::clone(layer)));
    let heads = layer.n_heads();
    let label = SolutionDataTypes::Integer(Integer::new(Some(0), Some(heads as i64 - 1)));
    fn pair(genome: &Vec<f64>) -> Vec<f64> {
        objectives(genome).to_vec()
    }
    let problem = Problem::new(
        heads,
        2,
        None,
        None,
        Some(vec![-1, -1]),
        vec![label; heads],
        pair as fn(&Vec<f64>) -> Vec<f64>,
    );
    let mut search = NSGAII::new(Arc::new(problem), POPULATION, ExecutionMode::Sequential).with_seed(seed);
    search.run(POPULATION * (generations + 1));
    let all = search.take_archive().into_iter().chain(search.population);
    Found::Genomes(all.map(|solution| solution.solution).collect())
}
