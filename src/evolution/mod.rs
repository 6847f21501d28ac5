//! NSGA-II over any genome with two objectives (Deb et al. 2002, doi:10.1109/4235.996017): the engine that
//! the search over partitions and the selection of layers share.

mod sort;

use std::collections::HashSet;
use std::hash::{BuildHasher, Hash};

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rustc_hash::FxBuildHasher;

use self::sort::{Standing, standings};
use crate::error::{Error, Result};
use crate::run::Run;

/// What evolves: a genome with its operators, and two objectives to minimise.
pub(crate) trait Problem {
    type Genome: Hash;

    /// An individual from anywhere in the search space.
    fn random(&self, rng: &mut ChaCha8Rng) -> Self::Genome;

    /// A child that takes after both parents, or after the one that it has, and differs a little.
    fn child(&self, a: &Self::Genome, b: Option<&Self::Genome>, rng: &mut ChaCha8Rng) -> Self::Genome;

    /// The objectives of each genome, in order.
    fn objectives(&self, genomes: &[Self::Genome]) -> Result<Vec<[f64; 2]>>;
}

/// The knobs of NSGA-II.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) population: usize,
    pub(crate) generations: usize,
    pub(crate) crossover: f64,
}

impl Settings {
    pub(crate) fn check(&self) -> Result<()> {
        let Self { population, crossover, .. } = *self;
        if population < 2 {
            return Err(Error::Setting {
                name: "population",
                value: population.to_string(),
                expected: "at least 2",
            });
        }
        if !(0.0..=1.0).contains(&crossover) {
            return Err(Error::Setting {
                name: "crossover",
                value: crossover.to_string(),
                expected: "a probability, 0 to 1",
            });
        }
        Ok(())
    }
}

/// Draws for one new individual before a generation does with fewer: small spaces run out of new ones.
const TRIES: usize = 2;

/// All individuals that were ever evaluated, by a 64-bit hash: nothing is evaluated twice.
struct Known(HashSet<u64, FxBuildHasher>);

impl Known {
    /// With room for as many, or for the first of very many.
    fn with_room(individuals: usize) -> Self {
        Self(HashSet::with_capacity_and_hasher(individuals.min(1 << 16), FxBuildHasher))
    }

    fn is_new(&mut self, genome: &impl Hash) -> bool {
        self.0.insert(FxBuildHasher.hash_one(genome))
    }
}

/// Evolves `first`, filled up with random individuals, and shows every individual to `visit` once evaluated.
///
/// Variation is serial and evaluation may be parallel, so the threads do not change what is found. Only
/// offspring are evaluated, and only ones that never were before; it ends early when none are left to be
/// found.
pub(crate) fn evolve<P: Problem>(
    problem: &P,
    first: Vec<P::Genome>,
    settings: Settings,
    stage: &str,
    run: Run<'_>,
    mut visit: impl FnMut(&P::Genome, [f64; 2]) -> Result<()>,
) -> Result<()> {
    settings.check()?;
    let Settings { population, generations, crossover } = settings;
    let mut rng = run.rng();
    let mut known = Known::with_room(population.saturating_mul(generations.saturating_add(1)));
    let mut genomes = first;
    genomes.retain(|genome| known.is_new(genome));
    fill(&mut genomes, &mut known, population, || problem.random(&mut rng));
    let mut points = problem.objectives(&genomes)?;
    for (genome, &point) in genomes.iter().zip(&points) {
        visit(genome, point)?;
    }
    let mut standing = survive(&mut genomes, &mut points, population);

    for generation in 0..generations {
        run.step(stage, generation as u64, generations as u64)?;
        let mut offspring = Vec::with_capacity(population);
        fill(&mut offspring, &mut known, population, || {
            let a = tournament(&standing, &mut rng);
            let b = tournament(&standing, &mut rng);
            let other = (a != b && rng.random_bool(crossover)).then(|| &genomes[b]);
            problem.child(&genomes[a], other, &mut rng)
        });
        if offspring.is_empty() {
            break;
        }
        let scores = problem.objectives(&offspring)?;
        for (genome, &point) in offspring.iter().zip(&scores) {
            visit(genome, point)?;
        }
        genomes.append(&mut offspring);
        points.extend(scores);
        standing = survive(&mut genomes, &mut points, population);
    }
    run.step(stage, generations as u64, generations as u64)
}

/// Draws until `genomes` has `wanted` members, all of them new, or nothing new comes any more.
fn fill<G: Hash>(genomes: &mut Vec<G>, known: &mut Known, wanted: usize, mut draw: impl FnMut() -> G) {
    for _ in 0..TRIES * wanted {
        if genomes.len() >= wanted {
            break;
        }
        let genome = draw();
        if known.is_new(&genome) {
            genomes.push(genome);
        }
    }
}

/// Keeps the `population` best by rank, of the last front that fits in part the loneliest; the order stays.
fn survive<G>(genomes: &mut Vec<G>, points: &mut Vec<[f64; 2]>, population: usize) -> Vec<Standing> {
    let mut standing = standings(points);
    if genomes.len() <= population {
        return standing;
    }
    let mut sizes = vec![0; standing.iter().map(|s| s.rank + 1).max().unwrap_or(0)];
    for s in &standing {
        sizes[s.rank] += 1;
    }
    // The fronts that fit whole, and how many they are.
    let (mut whole, mut kept) = (0, 0);
    while kept + sizes[whole] <= population {
        kept += sizes[whole];
        whole += 1;
    }
    let mut last: Vec<usize> = (0..points.len()).filter(|&i| standing[i].rank == whole).collect();
    last.sort_unstable_by(|&i, &j| standing[j].crowding.total_cmp(&standing[i].crowding).then(i.cmp(&j)));
    let mut stays: Vec<bool> = standing.iter().map(|s| s.rank < whole).collect();
    last.iter().take(population - kept).for_each(|&i| stays[i] = true);
    let mut flags = stays.iter().cycle();
    let mut keep = || flags.next().copied().unwrap_or(false);
    genomes.retain(|_| keep());
    points.retain(|_| keep());
    standing.retain(|_| keep());
    standing
}

/// Binary tournament: the better of two, the first on a draw.
fn tournament(standing: &[Standing], rng: &mut ChaCha8Rng) -> usize {
    let draw = |rng: &mut ChaCha8Rng| rng.random_range(0..standing.len() as u32) as usize;
    let (a, b) = (draw(rng), draw(rng));
    if standing[b].beats(&standing[a]) { b } else { a }
}
