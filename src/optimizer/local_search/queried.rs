use std::collections::HashMap;

use super::moves::{Groups, Moves, least};
use crate::error::Result;
use crate::fitness::{FitnessFn, SeparableFitness};
use crate::partition::Partition;

/// A set of heads, one bit each.
type Members = Box<[u64]>;

/// A partition scored by questions to the fitness: about groups, whose answers are remembered by their heads,
/// where it is a sum over groups, else about whole partitions, remembered too.
#[derive(Debug)]
pub(super) struct Queried<'a> {
    fitness: &'a dyn FitnessFn,
    separable: Option<&'a dyn SeparableFitness>,
    group_errors: HashMap<Members, f64>,
    partition_errors: HashMap<Partition, f64>,
    /// What the fitness may still be asked for the change of moves, and how much of it now.
    left: u64,
    ration: u64,
    /// Whether a partition is being taken over.
    loading: bool,
    groups: Groups,
    members: Vec<Members>,
    /// Error of each group; all in the first place where only their sum is known.
    errors: Vec<f64>,
}

impl<'a> Queried<'a> {
    pub(super) fn new(fitness: &'a dyn FitnessFn, evaluations: u64) -> Self {
        Self {
            fitness,
            separable: fitness.separable(),
            group_errors: HashMap::new(),
            partition_errors: HashMap::new(),
            left: evaluations,
            ration: evaluations,
            loading: false,
            groups: Groups::default(),
            members: Vec::new(),
            errors: Vec::new(),
        }
    }

    /// D for a start: twice the error of every pair alone, which is D itself where the error is a sum over
    /// pairs.
    pub(super) fn pair_distances(&mut self) -> Result<ndarray::Array2<f64>> {
        let n = self.fitness.n_heads();
        let singletons: Vec<u16> = (0..n).map(|head| head as u16).collect();
        self.load(&singletons, n, n)?;
        let alone = self.error();
        let mut distances = ndarray::Array2::zeros((n, n));
        for i in 0..n {
            for j in 0..i {
                let pair = self.with_both(i, j);
                let error = match self.separable {
                    Some(_) => self.group_error(&pair, true)?,
                    None => self.partition_error(&[(i, pair), (j, self.nobody())], true)? - alone,
                };
                distances[[i, j]] = 2.0 * error.max(0.0);
                distances[[j, i]] = distances[[i, j]];
            }
        }
        Ok(distances)
    }

    fn nobody(&self) -> Members {
        vec![0; self.groups.n_heads().div_ceil(64)].into()
    }

    fn with_both(&self, a: usize, b: usize) -> Members {
        self.members[a].iter().zip(&self.members[b]).map(|(x, y)| x | y).collect()
    }

    /// `group` with and without these heads toggled.
    fn toggled(&self, group: usize, heads: &[usize]) -> Members {
        let mut members = self.members[group].clone();
        heads.iter().for_each(|&head| members[head / 64] ^= 1 << (head % 64));
        members
    }

    /// Takes a question from the budget; the answer to a `needed` one is owed in any case. Scoring a
    /// partition that comes from elsewhere completes the front and is free.
    fn may_ask(&mut self, cost: u64, needed: bool) -> bool {
        let may = needed || self.loading || self.ration.min(self.left) >= cost;
        if may && !self.loading {
            self.left = self.left.saturating_sub(cost);
            self.ration = self.ration.saturating_sub(cost);
        }
        may
    }

    fn group_error(&mut self, members: &Members, needed: bool) -> Result<f64> {
        let heads = listed(members);
        let Some(separable) = self.separable.filter(|_| heads.len() > 1) else { return Ok(0.0) };
        if let Some(&known) = self.group_errors.get(members) {
            return Ok(known);
        }
        if !self.may_ask(separable.group_cost(heads.len()), needed) {
            return Ok(f64::INFINITY);
        }
        let error = separable.group_error(&heads)?;
        self.group_errors.insert(members.clone(), error);
        Ok(error)
    }

    /// The error of the whole with some groups replaced.
    fn partition_error(&mut self, replaced: &[(usize, Members)], needed: bool) -> Result<f64> {
        let mut labels = vec![0; self.groups.n_heads()];
        for group in 0..self.members.len().max(replaced.iter().map(|r| r.0 + 1).max().unwrap_or(0)) {
            let new = replaced.iter().find(|r| r.0 == group).map(|r| &r.1);
            for head in new.or(self.members.get(group)).map(listed).unwrap_or_default() {
                labels[head] = group;
            }
        }
        let partition = Partition::from_labels(&labels)?;
        if let Some(&known) = self.partition_errors.get(&partition) {
            return Ok(known);
        }
        if !self.may_ask(1, needed) {
            return Ok(f64::INFINITY);
        }
        let error = self.fitness.evaluate(&partition)?;
        self.partition_errors.insert(partition, error);
        Ok(error)
    }

    /// The change when two groups become these.
    fn change(&mut self, a: usize, new_a: Members, b: usize, new_b: Members) -> Result<f64> {
        if self.separable.is_none() {
            return Ok(self.partition_error(&[(a, new_a), (b, new_b)], false)? - self.error());
        }
        let old = self.errors[a] + self.errors.get(b).copied().unwrap_or(0.0);
        Ok(self.group_error(&new_a, false)? + self.group_error(&new_b, false)? - old)
    }

    /// The change when two heads of different groups trade places.
    fn exchange(&mut self, i: usize, j: usize) -> Result<f64> {
        let (a, b) = (self.groups.of(i), self.groups.of(j));
        self.change(a, self.toggled(a, &[i, j]), b, self.toggled(b, &[i, j]))
    }

    /// The change when two groups become one.
    fn union(&mut self, a: usize, b: usize) -> Result<f64> {
        self.change(a, self.with_both(a, b), b, self.nobody())
    }

    /// The change when `head` leaves its group for one of its own.
    fn isolation(&mut self, head: usize) -> Result<f64> {
        let (from, mut alone) = (self.groups.of(head), self.nobody());
        alone[head / 64] |= 1 << (head % 64);
        self.change(from, self.toggled(from, &[head]), self.groups.n_groups(), alone)
    }

    /// Scores the groups `a` and `b` anew, or the whole.
    fn rescore(&mut self, a: usize, b: usize) -> Result<()> {
        if self.separable.is_none() {
            self.errors.fill(0.0);
            self.errors[0] = self.partition_error(&[], true)?;
            return Ok(());
        }
        for group in [a, b] {
            let members = self.members[group].clone();
            self.errors[group] = self.group_error(&members, true)?;
        }
        Ok(())
    }
}

fn listed(members: &Members) -> Vec<usize> {
    let heads = |(word, &bits): (usize, &u64)| {
        (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| 64 * word + bit).collect::<Vec<_>>()
    };
    members.iter().enumerate().flat_map(heads).collect()
}

impl Moves for Queried<'_> {
    fn groups(&self) -> &Groups {
        &self.groups
    }

    fn load(&mut self, labels: &[u16], n_groups: usize, cap: usize) -> Result<()> {
        self.groups.load(labels, n_groups, cap);
        self.members = vec![self.nobody(); n_groups];
        for (head, &label) in labels.iter().enumerate() {
            self.members[usize::from(label)][head / 64] |= 1 << (head % 64);
        }
        self.errors = vec![0.0; n_groups];
        self.loading = true;
        let scored =
            (0..n_groups).step_by(2).try_for_each(|group| self.rescore(group, (group + 1).min(n_groups - 1)));
        self.loading = false;
        scored
    }

    fn error(&self) -> f64 {
        self.errors.iter().sum()
    }

    fn tolerance(&self) -> f64 {
        1e-12 * self.error()
    }

    fn exhausted(&self) -> bool {
        let dearest = self.separable.map_or(1, |s| s.group_cost(self.fitness.n_heads()));
        self.left < dearest
    }

    fn ration(&mut self, courses: usize) {
        self.ration = self.left / courses as u64;
    }

    fn relocation(&mut self, head: usize, to: usize) -> Result<f64> {
        let from = self.groups.of(head);
        self.change(from, self.toggled(from, &[head]), to, self.toggled(to, &[head]))
    }

    fn best_relocation(&mut self, head: usize) -> Result<(f64, usize)> {
        let (groups, from) = (&self.groups, self.groups.of(head));
        let free = |to: &usize| groups.sizes[from] > 1 && *to != from && groups.has_room(*to);
        let rooms: Vec<usize> = (0..groups.n_groups()).filter(free).collect();
        Ok(least(rooms, |to| self.relocation(head, to))?.unwrap_or((f64::INFINITY, from)))
    }

    fn best_exchange(&mut self, i: usize, first: usize) -> Result<(f64, usize)> {
        let labels = &self.groups.labels;
        let others: Vec<usize> = (first..labels.len()).filter(|&j| labels[j] != labels[i]).collect();
        Ok(least(others, |j| self.exchange(i, j))?.unwrap_or((f64::INFINITY, i)))
    }

    fn best_union(&mut self) -> Result<(f64, usize, usize)> {
        let Groups { sizes, cap, .. } = &self.groups;
        let pairs = (0..sizes.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
        let allowed: Vec<_> = pairs.filter(|&(a, b)| sizes[a] + sizes[b] <= *cap).collect();
        let (change, (a, b)) = least(allowed, |(a, b)| self.union(a, b))?.unwrap_or((f64::INFINITY, (0, 0)));
        Ok((change, a, b))
    }

    /// One head: what others would gain by following it is not known.
    fn best_split(&mut self) -> Result<Vec<usize>> {
        let groups = &self.groups;
        let heads: Vec<usize> =
            (0..groups.n_heads()).filter(|&head| groups.sizes[groups.of(head)] > 1).collect();
        Ok(least(heads, |head| self.isolation(head))?.map(|(_, head)| head).into_iter().collect())
    }

    fn relocate(&mut self, head: usize, to: usize) -> Result<()> {
        let from = self.groups.of(head);
        for group in [from, to] {
            self.members[group] = self.toggled(group, &[head]);
        }
        self.groups.relocate(head, to);
        self.rescore(from, to)
    }

    fn swap(&mut self, i: usize, j: usize) -> Result<()> {
        let (a, b) = (self.groups.of(i), self.groups.of(j));
        for group in [a, b] {
            self.members[group] = self.toggled(group, &[i, j]);
        }
        self.groups.relocate(i, b);
        self.groups.relocate(j, a);
        self.rescore(a, b)
    }

    fn isolate(&mut self, head: usize) -> Result<()> {
        self.groups.open_group();
        self.members.push(self.nobody());
        self.errors.push(0.0);
        self.relocate(head, self.groups.n_groups() - 1)
    }

    fn merge(&mut self, from: usize, to: usize) -> Result<()> {
        self.members[to] = self.with_both(from, to);
        self.members[from] = self.nobody();
        for head in listed(&self.members[to]) {
            if self.groups.of(head) == from {
                self.groups.relocate(head, to);
            }
        }
        self.rescore(from, to)?;
        self.drop_empty(from);
        Ok(())
    }

    fn drop_empty(&mut self, group: usize) {
        self.groups.drop_empty(group);
        self.members.swap_remove(group);
        let whole = self.error();
        self.errors.swap_remove(group);
        if self.separable.is_none() {
            self.errors.fill(0.0);
            self.errors[0] = whole;
        }
    }
}
