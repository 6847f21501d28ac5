//! The paper's stage 1: NSGA-II over partitions.

mod variation;

use rand_chacha::ChaCha8Rng;

use self::variation::Variation;
use super::Optimizer;
use crate::error::Result;
use crate::evolution::{Problem, Settings, evolve};
use crate::fitness::FitnessFn;
use crate::front::Front;
use crate::grouping::UniformGqa;
use crate::partition::{Cardinality, Partition, SearchSpace};
use crate::run::Run;
use crate::spec::Spec;

/// NSGA-II over the partitions of one layer, objectives (k/H, error): stage 1 of QCQA (arXiv 2406.10247,
/// Algorithm 1; NSGA-II: Deb et al. 2002, doi:10.1109/4235.996017).
///
/// With [`Cardinality::Arbitrary`] it is QCQA-AC, with [`Cardinality::Equal`] QCQA-EC. The best partition
/// seen for **every** k is kept, whatever the population later does with it. The genome is a partition, so
/// relabelled individuals are one individual and all operators act on groups.
///
/// The first population holds the GQA partitions; for arbitrary cardinality also the result of the equal
/// search with the same settings and seed: QCQA-AC ≤ QCQA-EC ≤ GQA at every k.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::{Optimizer, Run};
/// use qcqa::fitness::WeightSharingError;
/// use qcqa::optimizer::Nsga2;
/// use qcqa::partition::SearchSpace;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
/// let fitness = WeightSharingError::from_distances(distances, 62.0)?;
///
/// let search = Nsga2 { generations: 10, ..Nsga2::default() };
/// let front = search.optimize(&fitness, &SearchSpace::equal(), Run::new(0))?;
/// assert_eq!(front.get(2).unwrap().partition.groups(), [[0, 1], [2, 3]]);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nsga2 {
    /// Individuals; 100 in the paper's published experiments.
    pub population: usize,
    /// Generations.
    pub generations: usize,
    /// Probability that a child has two parents; 0.9 in the paper's published experiments.
    pub crossover: f64,
}

impl Default for Nsga2 {
    fn default() -> Self {
        Self { population: 100, generations: 100, crossover: 0.9 }
    }
}

impl Nsga2 {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["population", "generations", "crossover"])?;
        let own = Self::default();
        Ok(Self {
            population: spec.count("population")?.unwrap_or(own.population),
            generations: spec.count("generations")?.unwrap_or(own.generations),
            crossover: spec.number("crossover")?.unwrap_or(own.crossover),
        })
    }
}

impl Optimizer for Nsga2 {
    fn spec(&self) -> Spec {
        let Self { population, generations, crossover } = *self;
        Spec::new("nsga2")
            .with("population", population)
            .with("generations", generations)
            .with("crossover", crossover)
    }

    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front> {
        let mut front = Front::new(fitness)?;
        match space.cardinality {
            Cardinality::Equal => self.search(fitness, space, &mut front, run)?,
            Cardinality::Arbitrary => {
                let equal = SearchSpace { cardinality: Cardinality::Equal, ..*space };
                self.search(fitness, &equal, &mut front, run)?;
                self.search(fitness, space, &mut front, run.fork(1))?;
                fall(&mut front, fitness, space)?;
            }
        }
        Ok(front)
    }
}

impl Nsga2 {
    /// One run of the engine, starting from what the front holds; its finds go into the front.
    fn search(
        &self,
        fitness: &dyn FitnessFn,
        space: &SearchSpace,
        front: &mut Front,
        run: Run<'_>,
    ) -> Result<()> {
        let n_heads = fitness.n_heads();
        if space.group_counts(n_heads)? == [n_heads] {
            return Ok(());
        }
        let problem = Stage1 { fitness, variation: Variation::new(space, n_heads)? };
        let mut rng = run.fork(0).rng();
        let mut first: Vec<_> = front.iter().map(|p| p.partition.clone()).collect();
        for &k in problem.variation.counts() {
            first.extend(UniformGqa::partition(n_heads, k)?);
            first.push(problem.variation.random(k, &mut rng));
        }
        let settings = Settings {
            population: self.population,
            generations: self.generations,
            crossover: self.crossover,
        };
        evolve(&problem, first, settings, "nsga2", run, |partition, [_, error]| {
            front.offer(partition, error).map(drop)
        })
    }
}

/// Partitions as genomes.
struct Stage1<'a> {
    fitness: &'a dyn FitnessFn,
    variation: Variation,
}

impl Problem for Stage1<'_> {
    type Genome = Partition;

    fn random(&self, rng: &mut ChaCha8Rng) -> Partition {
        use rand::seq::IndexedRandom;
        let k = self.variation.counts().choose(rng).copied().unwrap_or(1);
        self.variation.random(k, rng)
    }

    fn child(&self, a: &Partition, b: Option<&Partition>, rng: &mut ChaCha8Rng) -> Partition {
        self.variation.child(a, b, rng)
    }

    fn objectives(&self, partitions: &[Partition]) -> Result<Vec<[f64; 2]>> {
        let n_heads = self.fitness.n_heads() as f64;
        let score = |p: &Partition| Ok([p.n_groups() as f64 / n_heads, self.fitness.evaluate(p)?]);
        // Sums of distances take less time than waking a thread; anything else may be costly.
        #[cfg(feature = "rayon")]
        if self.fitness.separable().and_then(|s| s.pairwise()).is_none() {
            use rayon::prelude::*;
            return partitions.par_iter().map(score).collect();
        }
        partitions.iter().map(score).collect()
    }
}

/// Makes the front fall: where k groups beat k + 1, a group of theirs is split as well as one head can leave.
///
/// Splitting never raises the WSE, so afterwards its front is monotone; other fitness functions are offered
/// the same partitions and keep what is better.
fn fall(front: &mut Front, fitness: &dyn FitnessFn, space: &SearchSpace) -> Result<()> {
    for k in space.group_counts(fitness.n_heads())? {
        let Some(held) = front.get(k) else { continue };
        if front.error(k + 1).is_some_and(|next| next <= held.error)
            || k >= space.groups_at_most(fitness.n_heads())
        {
            continue;
        }
        let (labels, sizes) = (held.partition.labels().to_vec(), held.partition.sizes());
        for head in (0..labels.len()).filter(|&i| sizes[usize::from(labels[i])] > 1) {
            let mut labels = labels.clone().into_boxed_slice();
            labels[head] = k as u16;
            let split = Partition::canonical(labels, k + 1);
            if !space.admits(&split) {
                continue;
            }
            front.offer(&split, fitness.evaluate(&split)?)?;
        }
    }
    Ok(())
}
