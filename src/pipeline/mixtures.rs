use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::Error;
use crate::evaluation::{Cached, Preparation, Reference};
use crate::run::Run;
use crate::runtime::{CachePolicy, Model, POLICIES, Steps};
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

impl Mixture {
    /// Its KL(source ‖ model), which decides: what is further from its source may still read one text better.
    fn kl(&self) -> f64 {
        self.cached.evaluation.divergence.map_or(f64::INFINITY, |divergence| divergence.kl)
    }
}

/// Mixtures within a budget.
#[derive(Debug)]
#[non_exhaustive]
pub struct Mixtures {
    /// Those that read the whole validation text, the nearest to the source first: the first one is the best mixture, and the first that is
    /// `single` the best of its kind.
    pub read: Vec<Mixture>,
    /// Mixtures of the grid, those that were within the budget, and those of them that could not be ruled out.
    pub considered: [usize; 3],
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

    /// The mixtures of at most `bytes` bytes for a window. Progress is stage `"mix"`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a budget that no mixture keeps to; as
    /// [`Reference::compare_through`].
    pub fn within(&self, bytes: f64, run: Run<'_>) -> Result<Mixtures, RuntimeError> {
        let one = self.windows.clone().first(1);
        let reference = Reference::new(self.source, &one, run.unwatched())?;
        let grid = grid(self.models.len(), self.windows.length());
        let models = self.models.iter().map(|model| Preparation::new(model, self.probe)).collect();
        let mut ready = Ready { mixer: self, models, policies: BTreeMap::new(), held: BTreeMap::new() };
        let mut within: Vec<&Point> = Vec::new();
        for point in &grid {
            if ready.bytes(point, &reference, run)? <= bytes {
                within.push(point);
            }
        }
        let left: Vec<&Point> =
            within.iter().copied().filter(|point| !within.iter().any(|other| point.within(other))).collect();
        let considered = [grid.len(), within.len(), left.len()];
        let mut first = Vec::with_capacity(left.len());
        for (i, point) in left.into_iter().enumerate() {
            run.step("mix", i as u64, considered[2] as u64)?;
            let mixture =
                self.read(point, &ready.policy(point.model, &point.spec, run)?, &reference, run.unwatched())?;
            if mixture.cached.bytes <= bytes {
                first.push((point, mixture));
            }
        }
        first.sort_by(|a, b| a.1.kl().total_cmp(&b.1.kl()));
        let single = first.iter().position(|(_, mixture)| mixture.single);
        let finalists = (0..first.len()).filter(|&i| i < FINALISTS || Some(i) == single);
        let reference = Reference::new(self.source, self.windows, run.unwatched())?;
        let mut read = Vec::new();
        for point in finalists.map(|i| first[i].0) {
            run.step("mix", considered[2] as u64, considered[2] as u64)?;
            let mixture =
                self.read(point, &ready.policy(point.model, &point.spec, run)?, &reference, run.unwatched())?;
            if mixture.cached.bytes <= bytes {
                read.push(mixture);
            }
        }
        if read.is_empty() {
            return Err(Error::setting(
                "the budget",
                bytes,
                "as large as what some mixture of the grid holds",
            )
            .into());
        }
        read.sort_by(|a, b| a.kl().total_cmp(&b.kl()));
        Ok(Mixtures { read, considered })
    }

    fn read(
        &self,
        point: &Point,
        policy: &Arc<dyn CachePolicy>,
        reference: &Reference<'_>,
        run: Run<'_>,
    ) -> Result<Mixture, RuntimeError> {
        let spent = [point.model + 1 < self.models.len(), point.tokens < ONE_OF.len(), point.bits < 16];
        Ok(Mixture {
            model: point.model,
            cache: policy.clone(),
            single: spent.iter().filter(|&&spent| spent).count() <= 1,
            cached: reference.compare_through(self.models[point.model], policy, self.steps, run)?,
        })
    }
}

/// Policies that were made ready, and what they held.
struct Ready<'m, 'a> {
    mixer: &'m Mixer<'a>,
    /// With what they know of the heads of a model.
    policies: BTreeMap<(usize, String), Arc<dyn CachePolicy>>,
    /// Of each model, what is known of its heads.
    models: Vec<Preparation<'a>>,
    /// Bytes of a window with all heads.
    held: BTreeMap<String, f64>,
}

impl Ready<'_, '_> {
    /// A policy, for the heads of a model.
    fn policy(
        &mut self,
        model: usize,
        spec: &Spec,
        run: Run<'_>,
    ) -> Result<Arc<dyn CachePolicy>, RuntimeError> {
        let key = (model, spec.to_string());
        if let Some(known) = self.policies.get(&key) {
            return Ok(known.clone());
        }
        let policy = Arc::from(POLICIES.make(spec)?);
        let policy = self.models[model].ready(&policy, run.unwatched())?;
        self.policies.insert(key, policy.clone());
        Ok(policy)
    }

    /// About what a point holds: what its policy holds with all heads in 16 bits, by the shares of its heads and bits. What it
    /// does hold is read off when it reads.
    fn bytes(&mut self, point: &Point, reference: &Reference<'_>, run: Run<'_>) -> Result<f64, RuntimeError> {
        let full = |bits: usize| Spec::new("full").with("bits", bits);
        let held = match point.system {
            "qaq" => self.held(&point.spec, reference, run)?,
            _ => {
                let rounded =
                    self.held(&full(point.bits), reference, run)? / self.held(&full(16), reference, run)?;
                rounded * self.held(&point.spec.clone().with("bits", 16usize), reference, run)?
            }
        };
        let heads = |model: usize| self.mixer.models[model].kv_bytes_per_token() as f64;
        Ok(held * heads(point.model) / heads(self.mixer.models.len() - 1))
    }

    /// What a policy holds of a window with all heads.
    fn held(&mut self, spec: &Spec, reference: &Reference<'_>, run: Run<'_>) -> Result<f64, RuntimeError> {
        let key = spec.to_string();
        if let Some(&held) = self.held.get(&key) {
            return Ok(held);
        }
        run.step("mix", 0, 1)?;
        let policy = self.policy(self.mixer.models.len() - 1, spec, run)?;
        let (source, steps) = (self.mixer.source, self.mixer.steps);
        let held = reference.compare_through(source, &policy, steps, run.unwatched())?.bytes;
        self.held.insert(key, held);
        Ok(held)
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
