//! Iterated local search from Ward's agglomeration.

mod moves;
mod pairs;
mod queried;

use ndarray::ArrayView2;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use self::moves::{Moves, descend, fuse, split};
use self::pairs::Pairs;
use self::queried::Queried;
use super::{Optimizer, matching};
use crate::error::Result;
use crate::fitness::{FitnessFn, SeparableFitness};
use crate::front::Front;
use crate::partition::{Cardinality, Partition, SearchSpace};
use crate::run::Run;
use crate::spec::Spec;

/// Iterated local search that starts from Ward's agglomeration, for all numbers of groups in one go.
///
/// Grouping by an error `Σ_g Σ_{i,j∈g} D_ij / 2|g|` is minimum-sum-of-squares clustering. From single heads the cheapest pair
/// of groups is joined (Ward 1963, doi:10.1080/01621459.1963.10500845) and every partition on the way improved by relocations
/// and exchanges of heads (Hartigan & Wong 1979, doi:10.2307/2346830). Then the best with k groups is split towards k + 1 and
/// joined towards k − 1 and improved again, up and down until neither helps; heads of one group go to another together where
/// the first alone would lose (a chain of moves, as in Kernighan & Lin 1970, doi:10.1002/j.1538-7305.1970.tb01770.x); and,
/// where [`rounds`](LocalSearch::rounds) ask for it, all is shaken and improved again (iterated local search, Lourenço,
/// Martin & Stützle 2003, doi:10.1007/0-306-48056-5_11). Partitions into pairs of heads (equal cardinality, k = H/2) are
/// minimum-weight perfect matchings: exact with the feature `matching`.
///
/// A fitness with [`pairwise`](SeparableFitness::pairwise) distances is never asked during the search: a move takes O(1). Any
/// other starts from its [`pairwise_proxy`](SeparableFitness::pairwise_proxy), or from the errors of all pairs of heads, and
/// is asked for groups (once each), or for whole partitions where it is not a sum over groups.
///
/// ```
/// use qcqa::ndarray::Array2;
/// use qcqa::{Optimizer, Run};
/// use qcqa::fitness::WeightSharingError;
/// use qcqa::optimizer::LocalSearch;
/// use qcqa::partition::SearchSpace;
///
/// // Four heads on a line.
/// let at = [0.0, 1.0, 5.0, 6.0];
/// let distances = Array2::from_shape_fn((4, 4), |(i, j)| f64::powi(at[i] - at[j], 2));
/// let fitness = WeightSharingError::from_distances(distances, 62.0)?;
///
/// let front = LocalSearch::default().optimize(&fitness, &SearchSpace::arbitrary(), Run::new(0))?;
/// assert_eq!(front.get(2).unwrap().partition.groups(), [[0, 1], [2, 3]]);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalSearch {
    /// Rounds of iterated local search for each number of groups; 0: local search alone, with four rounds at
    /// every fourth number of groups where their sizes are arbitrary.
    pub rounds: usize,
    /// The most questions to a fitness without pairwise distances, those aside that complete the front; one
    /// about a group counts as [`group_cost`](SeparableFitness::group_cost) many.
    pub evaluations: u64,
}

impl Default for LocalSearch {
    /// Local search alone: below a millisecond for 32 heads.
    fn default() -> Self {
        Self { rounds: 0, evaluations: 20_000 }
    }
}

impl LocalSearch {
    /// With 200 rounds of iterated local search: a hundred times slower, and nearly always optimal.
    pub fn thorough() -> Self {
        Self { rounds: 200, ..Self::default() }
    }

    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["rounds", "evaluations"])?;
        let own = Self::default();
        Ok(Self {
            rounds: spec.count("rounds")?.unwrap_or(own.rounds),
            evaluations: spec.count("evaluations")?.map_or(own.evaluations, |n| n as u64),
        })
    }
}

impl Optimizer for LocalSearch {
    fn spec(&self) -> Spec {
        Spec::new("local").with("rounds", self.rounds).with("evaluations", self.evaluations)
    }

    fn optimize(&self, fitness: &dyn FitnessFn, space: &SearchSpace, run: Run<'_>) -> Result<Front> {
        let front = Front::new(fitness)?;
        let counts = space.group_counts(fitness.n_heads())?;
        let separable = fitness.separable();
        let exact = separable.and_then(|s| s.pairwise());
        let rounds = if exact.is_some() { self.rounds } else { 0 };
        let mut queried = Queried::new(fitness, self.evaluations);
        let proxy;
        let distances = match exact.or_else(|| separable.and_then(SeparableFitness::pairwise_proxy)) {
            Some(distances) => distances,
            None => {
                proxy = queried.pair_distances()?;
                proxy.view()
            }
        };
        let scale = |size| match separable {
            Some(separable) if exact.is_none() => separable.proxy_scale(size),
            _ => 1.0 / size as f64,
        };
        let mut search = Search::new(Pairs::new(distances, scale), space, &counts, run);
        search.all(rounds)?;
        search.pairs_of_heads(distances)?;
        let Search { best, .. } = search;
        if exact.is_some() {
            return finish(front, fitness, &counts, &best);
        }
        let mut search = Search::new(queried, space, &counts, run);
        search.adopt(&best)?;
        search.all(self.rounds)?;
        finish(front, fitness, &counts, &search.best)
    }
}

/// The best partitions as a front, scored by the fitness itself.
fn finish(
    mut front: Front,
    fitness: &dyn FitnessFn,
    counts: &[usize],
    best: &[Option<Candidate>],
) -> Result<Front> {
    for found in counts.iter().filter_map(|&k| best[k].as_ref()) {
        let partition = Partition::canonical(found.labels.clone().into(), found.labels.len());
        front.offer(&partition, fitness.evaluate(&partition)?)?;
    }
    Ok(front)
}

/// A partition and its error, as the search keeps it.
#[derive(Debug, Clone)]
struct Candidate {
    error: f64,
    labels: Vec<u16>,
    /// Whether it was fused, and split, already.
    fused: bool,
    split: bool,
}

/// The best found for each number of groups, and what looks for better.
#[derive(Debug)]
struct Search<'a, M> {
    moves: M,
    /// `best[k]`.
    best: Vec<Option<Candidate>>,
    /// The numbers of groups below H that are wanted, ascending.
    counts: Vec<usize>,
    cardinality: Cardinality,
    n_heads: usize,
    /// `caps[k]`: the most heads of a group among k; falls with k.
    caps: Vec<usize>,
    rng: ChaCha8Rng,
    run: Run<'a>,
}

/// Passes up and down the front at most; two or three nearly always do.
const PASSES: usize = 12;

/// Rounds of iterated local search at every such k that belong to the local search of arbitrary groups.
const TASTE: usize = 4;

impl<'a, M: Moves> Search<'a, M> {
    fn new(moves: M, space: &SearchSpace, counts: &[usize], run: Run<'a>) -> Self {
        let n_heads = counts[counts.len() - 1];
        let labels = (0..n_heads).map(|head| head as u16).collect();
        let mut best = vec![None; n_heads + 1];
        best[n_heads] = Some(Candidate { error: 0.0, labels, fused: false, split: false });
        let counts = counts[..counts.len() - 1].to_vec();
        let cap = |k| match space.cardinality {
            Cardinality::Arbitrary => space.size_at_most(n_heads, k),
            Cardinality::Equal => n_heads / k,
        };
        let caps = (0..=n_heads).map(|k| cap(k.max(1))).collect();
        Self { moves, best, counts, cardinality: space.cardinality, n_heads, caps, rng: run.rng(), run }
    }

    fn load(&mut self, k: usize, cap: usize) -> Result<()> {
        match &self.best[k] {
            Some(found) => self.moves.load(&found.labels, k, cap),
            None => Ok(()),
        }
    }

    /// Keeps the partition at hand when it is the best of its k (of fewer groups some may be larger); tells whether it is.
    fn offer(&mut self) -> bool {
        let (k, error) = (self.moves.groups().n_groups(), self.moves.error());
        if self.moves.groups().sizes.iter().any(|&size| size > self.caps[k]) {
            return false;
        }
        let labels = &self.moves.groups().labels;
        let tolerance = self.moves.tolerance();
        match &mut self.best[k] {
            Some(found) if error < found.error - tolerance => {
                (found.error, found.fused, found.split) = (error, false, false);
                found.labels.clone_from(labels);
            }
            Some(_) => return false,
            none => *none = Some(Candidate { error, labels: labels.clone(), fused: false, split: false }),
        }
        true
    }

    /// Takes over partitions found with another measure, improved by this one; each may ask its share.
    fn adopt(&mut self, best: &[Option<Candidate>]) -> Result<()> {
        for (i, k) in self.counts.clone().into_iter().enumerate() {
            if let Some(found) = &best[k] {
                self.moves.ration(self.counts.len() - i);
                self.moves.load(&found.labels, k, self.caps[k])?;
                descend(&mut self.moves, self.cardinality == Cardinality::Equal)?;
                self.offer();
            }
        }
        self.moves.ration(1);
        Ok(())
    }

    /// Everything: local search, then as many rounds of iterated local search.
    fn all(&mut self, rounds: usize) -> Result<()> {
        self.local()?;
        if self.moves.exhausted() {
            return Ok(());
        }
        if self.cardinality == Cardinality::Arbitrary {
            self.migrate()?;
            self.local()?;
            let all = self.counts.clone();
            // What one k finds spreads to its neighbours, so few of them need shaking.
            self.counts = all.iter().copied().skip(1).step_by(TASTE).collect();
            self.shake(TASTE)?;
            self.counts = all;
            self.local()?;
        }
        // In a few courses, so that what one k finds reaches its neighbours.
        let courses = rounds.min(4);
        for course in 0..courses {
            self.shake(rounds * (course + 1) / courses - rounds * course / courses)?;
            if self.cardinality == Cardinality::Arbitrary {
                self.local()?;
            }
            self.run.step("local", course as u64 + 1, courses as u64)?;
        }
        Ok(())
    }

    fn local(&mut self) -> Result<()> {
        if self.cardinality == Cardinality::Equal {
            for k in self.counts.clone() {
                self.equal(k)?;
            }
            return Ok(());
        }
        let fresh = self.counts.first().is_some_and(|&k| self.best[k].is_none());
        for pass in 0..PASSES {
            if pass == 1 && fresh {
                self.chain()?;
            }
            let found = self.pass(pass % 2 == 0)?;
            if (pass > 0 && !found) || self.moves.exhausted() {
                break;
            }
        }
        Ok(())
    }

    /// From the best with k groups to k − 1, for every k from the top down, or to k + 1 from the bottom up.
    fn pass(&mut self, down: bool) -> Result<bool> {
        let (Some(&least), Some(&most)) = (self.counts.first(), self.counts.last()) else { return Ok(false) };
        // Above the counts that are wanted there is one pass, the first, which only joins.
        let top = if self.best[most].is_some() { most } else { self.n_heads };
        let starts: Vec<usize> =
            if down { (least + 1..=top).rev().collect() } else { (least..most).collect() };
        let mut gained = false;
        for k in starts {
            if self.moves.exhausted() {
                break;
            }
            let Some(found) = &mut self.best[k] else { continue };
            if std::mem::replace(if down { &mut found.fused } else { &mut found.split }, true) {
                continue;
            }
            self.load(k, self.caps[if down { k - 1 } else { k + 1 }])?;
            if down {
                fuse(&mut self.moves)?
            } else {
                split(&mut self.moves)?
            }
            if self.moves.groups().n_groups() <= most {
                descend(&mut self.moves, true)?;
            }
            gained |= self.offer();
            self.run.step("local", 0, 1)?;
        }
        Ok(gained)
    }

    /// Splits from the fewest groups on without looking at what is known: other valleys than joining finds.
    fn chain(&mut self) -> Result<()> {
        let (Some(&least), Some(&most)) = (self.counts.first(), self.counts.last()) else { return Ok(()) };
        self.load(least, self.caps[most])?;
        for _ in least..most {
            split(&mut self.moves)?;
            descend(&mut self.moves, true)?;
            self.offer();
        }
        Ok(())
    }

    /// A balanced start, then exchanges.
    fn equal(&mut self, k: usize) -> Result<()> {
        if self.best[k].is_none() {
            self.load(self.n_heads, self.caps[k])?;
            while self.moves.groups().n_groups() > k {
                fuse(&mut self.moves)?;
            }
            descend(&mut self.moves, true)?;
            self.offer();
        }
        self.run.step("local", 0, 1)
    }

    /// Iterated local search at every k: a few random moves, a descent, back when that is not better.
    fn shake(&mut self, rounds: usize) -> Result<()> {
        for k in self.counts.clone() {
            self.load(k, self.caps[k])?;
            for _ in 0..rounds {
                for _ in 0..self.rng.random_range(2..=4) {
                    self.random_move()?;
                }
                descend(&mut self.moves, true)?;
                if !self.offer() {
                    if let Some(found) = &self.best[k] {
                        self.moves.restore(&found.labels)?;
                    }
                }
                if self.moves.exhausted() {
                    return Ok(());
                }
            }
            self.run.step("local", 0, 1)?;
        }
        Ok(())
    }

    /// Migrations at every k, each followed by a descent, until none gains.
    fn migrate(&mut self) -> Result<()> {
        for k in self.counts.clone() {
            self.load(k, self.caps[k])?;
            loop {
                let (to, heads) = self.moves.best_migration()?;
                if heads.is_empty() {
                    break;
                }
                heads.iter().try_for_each(|&head| self.moves.relocate(head, to))?;
                descend(&mut self.moves, true)?;
                self.offer();
            }
            self.run.step("local", 0, 1)?;
        }
        Ok(())
    }

    /// Moves a random head to a random other group, or to the place of a random head there when it cannot go.
    fn random_move(&mut self) -> Result<()> {
        let head = self.rng.random_range(0..self.n_heads);
        let other = self.rng.random_range(0..self.n_heads);
        let groups = self.moves.groups();
        let (from, to) = (groups.of(head), groups.of(other));
        if from == to {
            return Ok(());
        }
        let free = groups.sizes[from] > 1 && groups.has_room(to);
        if free && self.rng.random::<bool>() {
            self.moves.relocate(head, to)
        } else {
            self.moves.swap(head, other)
        }
    }
}

impl Search<'_, Pairs> {
    /// Equal groups of two are a matching, which has an exact answer.
    fn pairs_of_heads(&mut self, distances: ArrayView2<'_, f64>) -> Result<()> {
        let k = self.n_heads / 2;
        let wanted = self.cardinality == Cardinality::Equal && self.counts.contains(&k);
        if let Some(labels) = wanted.then(|| matching::pairs(distances)).flatten() {
            self.moves.load(&labels, k, 2)?;
            descend(&mut self.moves, true)?;
            self.offer();
        }
        Ok(())
    }
}
