use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::error::Error;
use crate::evaluation::{Cached, Preparation, Reference};
use crate::run::Run;
use crate::runtime::{CachePolicy, KvCache, Model, POLICIES, Steps};
use crate::spec::Spec;
use crate::text::{RuntimeError, Windows};

/// Bits of a number at rest that are tried.
const BITS: [usize; 6] = [16, 8, 6, 4, 3, 2];
/// Of the context, one token of so many is kept.
const ONE_OF: [usize; 5] = [1, 2, 4, 8, 16];
/// Mixtures that read the whole validation text.
const FINALISTS: usize = 6;

/// A search for the best way to spend the bytes of a KV cache: on heads, layers, tokens or bits.
///
/// Heads and layers are what plans share; tokens and bits what [policies](CachePolicy) keep. Every plan with every policy of a grid is
/// a mixture; along each axis of it, more cannot be worse, so that of those within the budget only the ones are read of which no axis has
/// room left. All of these read one window of the validation text, and the best the whole of it.
#[derive(Debug)]
pub struct Mixer<'a> {
    source: &'a Model,
    models: Vec<&'a Model>,
    windows: &'a Windows,
    probe: &'a Windows,
    steps: Steps,
}

/// A plan and a policy, and how a model reads a text with both.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mixture {
    /// Which of the models it is.
    pub model: usize,
    /// What is kept of tokens, and in how many bits.
    pub cache: Arc<dyn CachePolicy>,
    /// Whether it spends the budget on one thing: fewer heads, fewer tokens, or fewer bits.
    pub single: bool,
    /// What it did, on validation text.
    pub cached: Cached,
}

/// Mixtures within a budget.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mixtures {
    /// The budget: bytes for a window.
    pub bytes: f64,
    /// Those that read the whole validation text, the nearest to the source first: the first one is the best mixture, and the first that is
    /// `single` the best of its kind.
    pub read: Vec<Mixture>,
    /// Mixtures of the grid, those that were within the budget, and those of them that could not be ruled out.
    pub considered: [usize; 3],
}

impl Mixtures {
    /// Which of those that were read are the best, and the best of those that spend the budget on one thing.
    pub fn told(&self) -> Vec<usize> {
        let single = self.read.iter().position(|mixture| mixture.single);
        [0].into_iter().chain(single.filter(|&i| i > 0)).collect()
    }
}

/// A point of the grid.
#[derive(Debug, Clone)]
struct Point {
    model: usize,
    /// Name of the policy, and how much of the other axes is left: the more, the larger.
    system: &'static str,
    tokens: usize,
    bits: usize,
    spec: Spec,
}

impl Point {
    /// Whether another of its system is as large along every axis, and larger along one.
    fn within(&self, other: &Self) -> bool {
        let (own, theirs) = ([self.model, self.tokens, self.bits], [other.model, other.tokens, other.bits]);
        self.system == other.system && own != theirs && own.iter().zip(&theirs).all(|(a, b)| a <= b)
    }

    /// The policies whose bytes tell what it holds: its own where bits are its own affair, else its own in 16 bits, and everything in
    /// its bits and in 16.
    fn told_by(&self) -> Vec<Spec> {
        let full = |bits: usize| Spec::new("full").with("bits", bits);
        match self.system {
            "qaq" => vec![self.spec.clone()],
            _ => vec![self.spec.clone().with("bits", 16usize), full(self.bits), full(16)],
        }
    }
}

impl<'a> Mixer<'a> {
    /// Mixes these models, made of `source` by plans, from the smallest cache to the largest, and the source itself. `windows` decide, and are of
    /// as many tokens as the context is to have; `probe` are other ones, on which policies learn what they have to know of heads.
    pub fn new(
        source: &'a Model,
        models: impl IntoIterator<Item = &'a Model>,
        windows: &'a Windows,
        probe: &'a Windows,
        steps: Steps,
    ) -> Self {
        let models = models.into_iter().chain([source]).collect();
        Self { source, models, windows, probe, steps }
    }

    /// Bytes of a window's cache with all heads, in 16 bits.
    pub fn whole(&self) -> f64 {
        (self.source.kv_bytes_per_token() / 2 * self.windows.length()) as f64
    }

    /// For each of these budgets, in bytes for a window, the mixtures that keep to it. Progress are stages `"mix"` and `"choose"`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a budget that no mixture keeps to; as [`Reference::compare_through`].
    pub fn within(&self, budgets: &[f64], run: Run<'_>) -> Result<Vec<Mixtures>, RuntimeError> {
        let grid = grid(self.models.len(), self.windows.length());
        let mut heads: Vec<_> = self.models.iter().map(|model| Preparation::new(model, self.probe)).collect();
        let one = self.windows.clone().first(1);
        let held = self.held(&grid, &mut heads, &one, run)?;
        let searches: Vec<Search> = budgets.iter().map(|&bytes| self.search(bytes, &grid, &held)).collect();

        let asked: BTreeSet<usize> = searches.iter().flat_map(|search| search.left.iter().copied()).collect();
        let mut policies = BTreeMap::new();
        for &i in &asked {
            let policy = Arc::from(POLICIES.make(&grid[i].spec)?);
            policies.insert(i, heads[grid[i].model].ready(&policy, run.unwatched())?);
        }
        let first =
            self.read(asked, &grid, &policies, &Reference::new(self.source, &one, run.unwatched())?, run)?;

        let finals: Vec<Vec<usize>> =
            searches.iter().map(|search| self.finals(search, &grid, &first)).collect();
        let reference = Reference::new(self.source, self.windows, run.unwatched())?;
        let asked: Vec<usize> =
            finals.iter().flatten().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let mut whole = BTreeMap::new();
        for (done, &i) in asked.iter().enumerate() {
            run.step("choose", done as u64, asked.len() as u64)?;
            let model = self.models[grid[i].model];
            whole.insert(i, reference.compare_through(model, &policies[&i], self.steps, run.unwatched())?);
        }
        let mixture = |&i: &usize| Mixture {
            model: grid[i].model,
            cache: policies[&i].clone(),
            single: self.is_single(&grid[i]),
            cached: whole[&i].clone(),
        };
        let mixtures = searches.iter().zip(&finals).map(|(search, finals)| {
            let within = finals.iter().map(mixture).filter(|mixture| mixture.cached.bytes <= search.bytes);
            let mut read: Vec<Mixture> = within.collect();
            if read.is_empty() {
                let expected = "as large as what some mixture of the grid holds";
                return Err(Error::setting("the budget", search.bytes, expected).into());
            }
            read.sort_by(|a, b| a.cached.kl().total_cmp(&b.cached.kl()));
            let considered = [grid.len(), search.within, search.left.len()];
            Ok(Mixtures { bytes: search.bytes, read, considered })
        });
        mixtures.collect()
    }

    /// What may be within a budget, and what of that cannot be ruled out.
    fn search(&self, bytes: f64, grid: &[Point], held: &Held) -> Search {
        let heads = |model: usize| self.models[model].kv_bytes_per_token() as f64;
        let share = |point: &Point| heads(point.model) / heads(self.models.len() - 1);
        // A share of exactly the budget is within, however it is rounded.
        let most = bytes * (1.0 + 1e-9);
        let within: Vec<usize> =
            (0..grid.len()).filter(|&i| held.by(&grid[i]) * share(&grid[i]) <= most).collect();
        let no_room = |&i: &usize| !within.iter().any(|&other| grid[i].within(&grid[other]));
        Search { bytes, left: within.iter().copied().filter(no_room).collect(), within: within.len() }
    }

    /// The best points of those that read one window, the best single one among them.
    fn finals(&self, search: &Search, grid: &[Point], first: &BTreeMap<usize, Cached>) -> Vec<usize> {
        let kept = search.left.iter().copied().filter(|i| first[i].bytes <= search.bytes);
        let mut order: Vec<usize> = kept.collect();
        order.sort_by(|a, b| first[a].kl().total_cmp(&first[b].kl()));
        let single = order.iter().position(|&i| self.is_single(&grid[i]));
        let finalist = |&(rank, _): &(usize, usize)| rank < FINALISTS || Some(rank) == single;
        order.into_iter().enumerate().filter(finalist).map(|(_, i)| i).collect()
    }

    /// Points that read one window each, so many at a time as there may be logits.
    fn read(
        &self,
        asked: BTreeSet<usize>,
        grid: &[Point],
        policies: &BTreeMap<usize, Arc<dyn CachePolicy>>,
        reference: &Reference<'_>,
        run: Run<'_>,
    ) -> Result<BTreeMap<usize, Cached>, RuntimeError> {
        let (done, total) = (AtomicU64::new(0), asked.len() as u64);
        let asked: Vec<usize> = asked.into_iter().collect();
        run.step("mix", 0, total)?;
        let read = |&i: &usize| {
            let model = self.models[grid[i].model];
            let cached = reference.compare_through(model, &policies[&i], self.steps, run.unwatched())?;
            run.step("mix", done.fetch_add(1, Ordering::Relaxed) + 1, total)?;
            Ok((i, cached))
        };
        let mut all = BTreeMap::new();
        for some in asked.chunks(self.source.batch(self.windows.length())) {
            all.extend(some.par_iter().map(read).collect::<Result<Vec<_>, RuntimeError>>()?);
        }
        Ok(all)
    }

    /// Whether it spends a budget on one thing: fewer heads, fewer tokens, or fewer bits.
    fn is_single(&self, point: &Point) -> bool {
        let spent = [point.model + 1 < self.models.len(), point.tokens < ONE_OF.len(), point.bits < 16];
        spent.iter().filter(|&&spent| spent).count() <= 1
    }

    /// What the policies of a grid hold of a window with all heads, as far as that tells what its points hold.
    fn held(
        &self,
        grid: &[Point],
        heads: &mut [Preparation<'_>],
        one: &Windows,
        run: Run<'_>,
    ) -> Result<Held, RuntimeError> {
        let specs = grid.iter().flat_map(Point::told_by);
        let specs: BTreeMap<String, Spec> = specs.map(|spec| (spec.to_string(), spec)).collect();
        let source = &mut heads[self.models.len() - 1];
        let mut policies: Vec<(String, Arc<dyn CachePolicy>)> = Vec::new();
        for (name, spec) in specs {
            policies.push((name, source.ready(&Arc::from(POLICIES.make(&spec)?), run.unwatched())?));
        }
        let (done, total) = (AtomicU64::new(0), policies.len() as u64);
        let hold = |(name, policy): (String, Arc<dyn CachePolicy>)| {
            let mut bytes = 0;
            let cache = KvCache::shared(policy);
            self.source.row_by_cache(one.tokens(), self.steps, cache, |held| bytes = held)?;
            run.step("mix", done.fetch_add(1, Ordering::Relaxed) + 1, total)?;
            Ok((name, bytes as f64))
        };
        Ok(Held(policies.into_par_iter().map(hold).collect::<Result<_, RuntimeError>>()?))
    }
}

/// One budget, what may be within it, how many points, and those of them that cannot be ruled out.
struct Search {
    bytes: f64,
    left: Vec<usize>,
    within: usize,
}

/// Bytes of a window with all heads, by policy.
struct Held(BTreeMap<String, f64>);

impl Held {
    /// About what a point would hold with all heads: what its policy holds in 16 bits, by the share of its bits. What it does hold
    /// is read off when it reads.
    fn by(&self, point: &Point) -> f64 {
        match &point.told_by()[..] {
            [own, rounded, halves] => self.of(own) * self.of(rounded) / self.of(halves),
            specs => specs.iter().map(|spec| self.of(spec)).sum(),
        }
    }

    fn of(&self, spec: &Spec) -> f64 {
        self.0.get(&spec.to_string()).copied().unwrap_or(f64::INFINITY)
    }
}

/// Every model with every policy: how many tokens of a context, in how many bits.
fn grid(models: usize, context: usize) -> Vec<Point> {
    let mut points = Vec::new();
    for model in 0..models {
        let mut add = |system, tokens, bits, spec: Spec| {
            points.push(Point { model, system, tokens, bits, spec });
        };
        for (rank, &n) in ONE_OF.iter().enumerate() {
            let (tokens, kept) = (ONE_OF.len() - rank, context / n);
            for bits in BITS {
                match n {
                    1 => add("full", tokens, bits, Spec::new("full").with("bits", bits)),
                    _ if kept > 16 => {
                        let window = Spec::new("window").with("recent", kept - 4);
                        add("window", tokens, bits, window.with("bits", bits));
                        for headkv in ["headkv", "headkv-r2"] {
                            add(
                                headkv,
                                tokens,
                                bits,
                                Spec::new(headkv).with("tokens", kept).with("bits", bits),
                            );
                        }
                        // An even share is the paper's threshold; higher ones drop more.
                        let corm =
                            Spec::new("corm").with("window", kept / 2).with("threshold", n as f64 / 2.0);
                        add("corm", tokens, bits, corm.with("bits", bits));
                    }
                    _ => {}
                }
            }
        }
        for (bits, (key, value)) in [(0.05, 0.2), (0.01, 0.05), (0.002, 0.01)].into_iter().enumerate() {
            let qaq = Spec::new("qaq").with("key_error", key).with("value_error", value);
            add("qaq", ONE_OF.len(), 16, qaq.with("least", 2 + bits));
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_no_room_left_is_read() {
        let point =
            |system, model, tokens, bits| Point { model, system, tokens, bits, spec: Spec::new(system) };
        let small = point("window", 0, 2, 4);
        assert!(small.within(&point("window", 0, 3, 4)) && small.within(&point("window", 1, 2, 8)));
        for other in [point("window", 1, 1, 8), point("corm", 1, 3, 16), small.clone()] {
            assert!(!small.within(&other));
        }
        let grid = grid(2, 512);
        assert!(grid.iter().all(|point| POLICIES.make(&point.spec).is_ok()));
        assert!(grid.iter().any(|point| point.system == "headkv-r2" && point.model == 1 && point.bits == 3));
    }
}
