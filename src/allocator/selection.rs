use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::{Allocator, LayerCosts};
use crate::error::Result;
use crate::evolution::{Problem, Settings, evolve};
use crate::run::Run;
use crate::spec::Spec;

/// The paper's stage 2 (arXiv 2406.10247, Algorithm 2): every layer either has k groups or stays MHA.
///
/// For each k an NSGA-II over one bit a layer (two-point crossover, bit flips; objectives: KV heads, summed
/// cost) finds what to group; the choice of least summed cost within the budget wins, over all k. A layer
/// that cannot have k groups, or cannot stay MHA (a fixed one), has no bit.
///
/// Every grouped layer saves the same H − k heads, so the least cost for each number of grouped layers is had
/// by grouping the cheapest ones. The first population holds those: stage 2 never ends above them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSelection {
    /// Individuals.
    pub population: usize,
    /// Generations.
    pub generations: usize,
    /// Probability that a child has two parents.
    pub crossover: f64,
}

impl Default for LayerSelection {
    fn default() -> Self {
        Self { population: 100, generations: 100, crossover: 0.9 }
    }
}

impl LayerSelection {
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

impl Allocator for LayerSelection {
    fn spec(&self) -> Spec {
        let Self { population, generations, crossover } = *self;
        Spec::new("selection")
            .with("population", population)
            .with("generations", generations)
            .with("crossover", crossover)
    }

    fn allocate(&self, costs: &LayerCosts, kv_heads: usize, run: Run<'_>) -> Result<Vec<usize>> {
        let settings = Settings {
            population: self.population,
            generations: self.generations,
            crossover: self.crossover,
        };
        settings.check()?;
        let largest = (0..costs.n_layers()).map(|l| costs.n_heads(l)).max().unwrap_or(0);
        let mut best: Option<(f64, f64, Vec<usize>)> = None;
        for k in 1..=largest {
            let Some(problem) = Stage2::new(costs, k) else { continue };
            let run = run.fork(k as u64);
            evolve(
                &problem,
                problem.cheapest_first(),
                settings,
                "layer selection",
                run,
                |bits, [total, cost]| {
                    // At equal cost the smaller cache, then the plan found first.
                    let better = best.as_ref().is_none_or(|(c, t, _)| (cost, total) < (*c, *t));
                    if better && total <= kv_heads as f64 && problem.legal(bits) {
                        best = Some((cost, total, problem.group_counts(bits)));
                    }
                    Ok(())
                },
            )?;
        }
        best.map(|(_, _, ks)| ks).ok_or_else(|| costs.unreachable(kv_heads))
    }
}

/// Which layers have k groups.
struct Stage2 {
    k: usize,
    /// The layers with a bit.
    free: Vec<usize>,
    /// What every layer has while its bit is 0, or always where it has none.
    rest: Vec<usize>,
    /// KV heads and cost while all bits are 0.
    base: [f64; 2],
    /// What each bit adds to them.
    change: Vec<[f64; 2]>,
    same_k: bool,
}

impl Stage2 {
    /// `None` where some layer can neither have k groups nor anything else that is given.
    fn new(costs: &LayerCosts, k: usize) -> Option<Self> {
        let (mut free, mut rest, mut change) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..costs.n_layers() {
            let mha = costs.n_heads(layer);
            let mut choices = costs.choices(layer).map(|(k, _)| k);
            rest.push(match (costs.get(layer, k), costs.get(layer, mha)) {
                (Some(shared), Some(whole)) if k != mha => {
                    free.push(layer);
                    change.push([k as f64 - mha as f64, shared - whole]);
                    mha
                }
                (_, Some(_)) => mha,
                (Some(_), None) => k,
                (None, None) => choices.next().filter(|_| choices.next().is_none())?,
            });
        }
        let base = [rest.iter().sum::<usize>() as f64, costs.total(&rest)?];
        Some(Self { k, free, rest, base, change, same_k: costs.same_k() })
    }

    /// The layers' group counts under these bits.
    fn group_counts(&self, bits: &[bool]) -> Vec<usize> {
        let mut ks = self.rest.clone();
        for (&layer, _) in self.free.iter().zip(bits).filter(|(_, bit)| **bit) {
            ks[layer] = self.k;
        }
        ks
    }

    /// One k for all layers, where that is asked for.
    fn legal(&self, bits: &[bool]) -> bool {
        let ks = self.group_counts(bits);
        !self.same_k || ks.iter().all(|&k| k == ks[0])
    }

    /// No layer grouped, the cheapest one, the two cheapest, …, all of them.
    fn cheapest_first(&self) -> Vec<Box<[bool]>> {
        let mut order: Vec<usize> = (0..self.free.len()).collect();
        order.sort_by(|&a, &b| self.change[a][1].total_cmp(&self.change[b][1]));
        let mut bits = vec![false; self.free.len()].into_boxed_slice();
        let mut first = vec![bits.clone()];
        for at in order {
            bits[at] = true;
            first.push(bits.clone());
        }
        first
    }
}

impl Problem for Stage2 {
    type Genome = Box<[bool]>;

    fn random(&self, rng: &mut ChaCha8Rng) -> Self::Genome {
        (0..self.free.len()).map(|_| rng.random()).collect()
    }

    fn child(&self, a: &Self::Genome, b: Option<&Self::Genome>, rng: &mut ChaCha8Rng) -> Self::Genome {
        let mut bits = a.clone();
        if let Some(b) = b {
            let mut cut = || rng.random_range(0..=a.len() as u32) as usize;
            let (one, two) = (cut(), cut());
            let window = one.min(two)..one.max(two);
            bits[window.clone()].copy_from_slice(&b[window]);
        }
        let rate = 1.0 / bits.len().max(1) as f64;
        bits.iter_mut().for_each(|bit| *bit ^= rng.random_bool(rate));
        bits
    }

    fn objectives(&self, genomes: &[Self::Genome]) -> Result<Vec<[f64; 2]>> {
        let add =
            |[heads, cost]: [f64; 2], (_, change): (&bool, &[f64; 2])| [heads + change[0], cost + change[1]];
        let score =
            |bits: &Self::Genome| bits.iter().zip(&self.change).filter(|(bit, _)| **bit).fold(self.base, add);
        Ok(genomes.iter().map(score).collect())
    }
}
