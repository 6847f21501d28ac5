use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::fitness::{FitnessFn, FitnessKind};
use crate::front::Front;
use crate::grouping::Grouping;
use crate::heads::{HeadSource, Needs};
use crate::optimizer::{Optimizer, attach_bounds};
use crate::partition::SearchSpace;
use crate::run::{Run, map_ordered};
use crate::spec::Spec;

/// How the partitions of a layer come about.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Search {
    /// By searching for the least error.
    Optimizer(Arc<dyn Optimizer>),
    /// By a rule, for every k of the space for which it has a partition.
    Grouping(Arc<dyn Grouping>),
}

impl Search {
    /// Name and settings of the optimizer or the rule.
    pub fn spec(&self) -> Spec {
        match self {
            Self::Optimizer(optimizer) => optimizer.spec(),
            Self::Grouping(grouping) => grouping.spec(),
        }
    }

    /// What proposing makes use of besides keys and values.
    pub(super) fn needs(&self) -> Needs {
        match self {
            Self::Optimizer(_) => Needs::NOTHING,
            Self::Grouping(grouping) => grouping.needs(),
        }
    }

    /// The front of one layer, with lower bounds where the fitness has them.
    fn front(
        &self,
        source: &dyn HeadSource,
        layer: usize,
        fitness: &dyn FitnessFn,
        job: Job<'_>,
    ) -> Result<Front> {
        match self {
            Self::Optimizer(optimizer) => searched(optimizer.as_ref(), layer, fitness, job),
            Self::Grouping(grouping) => ruled(grouping.as_ref(), source, layer, fitness, job.space),
        }
    }
}

/// What the search of every layer shares.
#[derive(Debug, Clone, Copy)]
struct Job<'a> {
    space: &'a SearchSpace,
    run: Run<'a>,
}

fn searched(optimizer: &dyn Optimizer, layer: usize, fitness: &dyn FitnessFn, job: Job<'_>) -> Result<Front> {
    let mut front = optimizer.optimize(fitness, job.space, job.run.fork(layer as u64))?;
    attach_bounds(&mut front, fitness, job.space)?;
    Ok(front)
}

/// The partitions of a rule, one for each k of the space for which it has one.
fn ruled(
    grouping: &dyn Grouping,
    source: &dyn HeadSource,
    layer: usize,
    fitness: &dyn FitnessFn,
    space: &SearchSpace,
) -> Result<Front> {
    let (mut front, heads) = (Front::new(fitness)?, source.heads(layer)?);
    for k in space.group_counts(heads.n_heads())? {
        if let Some(partition) = grouping.group(&heads, k)?.filter(|p| space.admits(p)) {
            front.offer(&partition, fitness.evaluate(&partition)?)?;
        }
    }
    attach_bounds(&mut front, fitness, space)?;
    Ok(front)
}

/// The fronts of a model, by both roads.
#[derive(Debug, Default)]
pub(super) struct BothFronts {
    /// One a layer.
    pub(super) searched: Vec<Front>,
    /// By the rule that stands beside the search, where one does.
    pub(super) ruled: Vec<Front>,
}

/// Layers of costly fitness that are searched side by side: each holds what it computed of its layer.
const ABREAST: usize = 16;

/// Layers that are read side by side where what is computed of them takes longer than reading: what one thread does of one
/// goes on beside what all do of another.
const READ_ABREAST: usize = 4;

/// The front of every layer. One layer or a few are read at a time; several are searched side by side afterwards, all of them where their
/// fitness is no more than distances of heads, and one where a rule has groups. Layer i is searched with `run.fork(i)`, so that its front depends neither on the
/// others nor on the number of threads.
pub(super) fn fronts(
    search: &Search,
    beside: Option<&dyn Grouping>,
    kind: &dyn FitnessKind,
    source: &dyn HeadSource,
    space: &SearchSpace,
    run: Run<'_>,
) -> Result<BothFronts> {
    let job = Job { space, run };
    let total = source.architecture().n_layers();
    let (mut fronts, mut waiting) = (BothFronts::default(), Vec::new());
    let done = AtomicU64::new(0);
    let together = if kind.needs().moment { READ_ABREAST } else { 1 };
    for first in (0..total).step_by(together) {
        run.step("layers", first as u64, total as u64)?;
        let read = map_ordered(together.min(total - first), |n| kind.of(source, first + n));
        for (n, fitness) in read.into_iter().enumerate() {
            waiting.push((first + n, fitness?));
        }
        let is_light = |fitness: &dyn FitnessFn| fitness.separable().is_some_and(|s| s.pairwise().is_some());
        let most = match search {
            Search::Grouping(_) => 1,
            Search::Optimizer(_) if waiting.iter().all(|(_, fitness)| is_light(fitness.as_ref())) => total,
            Search::Optimizer(_) => ABREAST,
        };
        if first + together < total && waiting.len() < most {
            continue;
        }
        let all = map_ordered(waiting.len(), |n| -> Result<_> {
            let (layer, fitness) = (waiting[n].0, waiting[n].1.as_ref());
            let ruled = beside.map(|rule| ruled(rule, source, layer, fitness, space)).transpose()?;
            let front = search.front(source, layer, fitness, job)?;
            if most > 1 {
                run.step("search", done.fetch_add(1, Ordering::Relaxed) + 1, total as u64)?;
            }
            Ok((ruled, front))
        });
        waiting.clear();
        for found in all {
            let (ruled, front) = found?;
            fronts.ruled.extend(ruled);
            fronts.searched.push(front);
        }
    }
    run.step("layers", total as u64, total as u64)?;
    Ok(fronts)
}
