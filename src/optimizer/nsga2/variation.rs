//! Operators on partitions. All of them act on groups, never on label values, and stay in the search space.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::Result;
use crate::partition::{Cardinality, Partition, SearchSpace};

/// A search space of one layer, with what its operators need.
#[derive(Debug)]
pub(super) struct Variation {
    n_heads: usize,
    cardinality: Cardinality,
    /// The numbers of groups to search, ascending.
    counts: Vec<usize>,
    max_groups: usize,
    /// `max_sizes[k]`: the most heads of a group among k; falls with k.
    max_sizes: Vec<usize>,
}

impl Variation {
    /// Operators of a space that holds more than the partition without sharing.
    pub(super) fn new(space: &SearchSpace, n_heads: usize) -> Result<Self> {
        let mut counts = space.group_counts(n_heads)?;
        let max_groups = space.groups_at_most(n_heads);
        counts.retain(|&k| k <= max_groups);
        let max_sizes = (0..=n_heads).map(|k| space.size_at_most(n_heads, k.max(1))).collect();
        Ok(Self { n_heads, cardinality: space.cardinality, counts, max_groups, max_sizes })
    }

    /// The numbers of groups that the operators produce.
    pub(super) fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// A random partition into k groups.
    pub(super) fn random(&self, k: usize, rng: &mut ChaCha8Rng) -> Partition {
        let mut heads: Vec<u16> = (0..self.n_heads as u16).collect();
        heads.shuffle(rng);
        let mut labels = vec![0; self.n_heads].into_boxed_slice();
        let size = self.n_heads / k;
        for (at, &head) in heads.iter().enumerate() {
            labels[usize::from(head)] = match self.cardinality {
                Cardinality::Equal => (at / size) as u16,
                // The first k heads open the groups, the others go anywhere.
                Cardinality::Arbitrary if at < k => at as u16,
                Cardinality::Arbitrary => below(k, rng),
            };
        }
        self.finish(labels, k, rng)
    }

    /// Some of `b`'s groups whole, and of `a` what they leave; then one small change.
    pub(super) fn child(&self, a: &Partition, b: Option<&Partition>, rng: &mut ChaCha8Rng) -> Partition {
        match self.cardinality {
            Cardinality::Arbitrary => {
                self.mutate(b.map_or_else(|| a.clone(), |b| self.inject(a, b, rng)), rng)
            }
            Cardinality::Equal => {
                let labels = b.map_or_else(|| a.labels().into(), |b| self.interleave(a, b, rng));
                self.mutate_equal(labels, a.n_groups(), rng)
            }
        }
    }

    /// A head moves, two heads change places, two groups merge or a group splits.
    fn mutate(&self, partition: Partition, rng: &mut ChaCha8Rng) -> Partition {
        let k = partition.n_groups();
        let mut labels = partition.into_labels();
        match rng.random_range(0..8u32) {
            0 => swap(&mut labels, rng),
            1 => merge(&mut labels, k, rng),
            2 => split(&mut labels, k, rng),
            _ => labels[usize::from(below(self.n_heads, rng))] = below(k, rng),
        }
        self.finish(labels, k + 1, rng)
    }

    /// Two heads of k equal groups change places, or the groups become others.
    fn mutate_equal(&self, mut labels: Box<[u16]>, k: usize, rng: &mut ChaCha8Rng) -> Partition {
        if k == 1 || k == self.n_heads || rng.random_bool(0.1) {
            return self.regroup(&labels, k, rng);
        }
        swap(&mut labels, rng);
        Partition::canonical(labels, k)
    }

    /// Each group of `b` enters with probability ½; the fragments of `a` it cuts through shrink.
    fn inject(&self, a: &Partition, b: &Partition, rng: &mut ChaCha8Rng) -> Partition {
        let offset = a.n_groups() as u16;
        let enters = toss(b.n_groups(), rng);
        let pairs = a.labels().iter().zip(b.labels());
        let labels = pairs.map(|(&a, &b)| either(enters[usize::from(b)], a, offset + b)).collect();
        self.finish(labels, a.n_groups() + b.n_groups(), rng)
    }

    /// Each group of `a` opens with probability ½; its heads fill the open groups anew in the order of
    /// `b`'s groups, so that neighbours in `b` stay together. As many groups as `a`, all of one size.
    fn interleave(&self, a: &Partition, b: &Partition, rng: &mut ChaCha8Rng) -> Box<[u16]> {
        let (k, size) = (a.n_groups(), self.n_heads / a.n_groups());
        let opens = toss(k, rng);
        let first = usize::from(below(b.n_groups(), rng));
        // The open groups, each as often as it has heads; one seat more, which nobody takes.
        let open = (0..k).filter(|&group| opens[group] == 1);
        let mut seats = Vec::with_capacity(self.n_heads + 1);
        open.for_each(|group| seats.resize(seats.len() + size, group as u16));
        seats.push(0);
        let heads = || a.labels().iter().zip(b.labels()).map(|(&own, &group)| (own, usize::from(group)));
        // How many free heads each of `b`'s groups has; then the seat of the next of them.
        let mut next = vec![0; b.n_groups()];
        heads().for_each(|(own, group)| next[group] += opens[usize::from(own)]);
        let mut taken = 0;
        for group in (first..b.n_groups()).chain(0..first) {
            taken += std::mem::replace(&mut next[group], taken);
        }
        let seated = |(own, group): (u16, usize)| {
            let (is_free, seat) = (opens[usize::from(own)], seats[usize::from(next[group])]);
            next[group] += is_free;
            either(is_free, own, seat)
        };
        heads().map(seated).collect()
    }

    /// Other equal groups: the heads, group by group in random order, are cut into another number of pieces.
    fn regroup(&self, labels: &[u16], groups: usize, rng: &mut ChaCha8Rng) -> Partition {
        let k = self.counts[usize::from(below(self.counts.len(), rng))];
        let size = self.n_heads / groups;
        let mut places: Vec<usize> = (0..groups).map(|rank| rank * size).collect();
        places.shuffle(rng);
        let regrouped = labels.iter().map(|&label| {
            let place = &mut places[usize::from(label)];
            *place += 1;
            ((*place - 1) * k / self.n_heads) as u16
        });
        Partition::canonical(regrouped.collect(), k)
    }

    /// Brings labels below `bound` back into the space and makes a partition of them.
    fn finish(&self, mut labels: Box<[u16]>, bound: usize, rng: &mut ChaCha8Rng) -> Partition {
        if self.max_groups == self.n_heads && self.max_sizes[self.n_heads] == self.n_heads {
            return Partition::canonical(labels, bound);
        }
        let bound = bound.max(self.max_groups);
        self.repair(&mut labels, bound, rng);
        Partition::canonical(labels, bound)
    }

    /// Heads leave groups that are too large, then the smallest groups dissolve while there are too many.
    ///
    /// Both always find room, because the space holds a partition of every k: H ≤ k · max_sizes[k].
    fn repair(&self, labels: &mut [u16], bound: usize, rng: &mut ChaCha8Rng) {
        let mut sizes = vec![0; bound];
        for &label in labels.iter() {
            sizes[usize::from(label)] += 1;
        }
        let mut k = sizes.iter().filter(|&&s| s > 0).count();
        while let Some(full) = sizes.iter().position(|&s| s > self.max_sizes[k]) {
            let empty = sizes.iter().position(|&s| s == 0);
            let Some(to) = self.roomy(&sizes, full, self.max_sizes[k], rng).or(empty) else { break };
            k += usize::from(sizes[to] == 0);
            move_one(labels, &mut sizes, full, to, rng);
        }
        while k > self.max_groups {
            let occupied = sizes.iter().enumerate().filter(|(_, s)| **s > 0);
            let Some((least, _)) = occupied.min_by_key(|(_, s)| **s) else { break };
            while sizes[least] > 0 {
                let Some(to) = self.roomy(&sizes, least, self.max_sizes[k - 1], rng) else { return };
                move_one(labels, &mut sizes, least, to, rng);
            }
            k -= 1;
        }
    }

    /// A random group besides `from` that has members and room for one more.
    fn roomy(&self, sizes: &[usize], from: usize, most: usize, rng: &mut ChaCha8Rng) -> Option<usize> {
        let rooms: Vec<_> =
            (0..sizes.len()).filter(|&g| g != from && (1..most).contains(&sizes[g])).collect();
        (!rooms.is_empty()).then(|| rooms[usize::from(below(rooms.len(), rng))])
    }
}

/// A random number below `n`.
fn below(n: usize, rng: &mut ChaCha8Rng) -> u16 {
    rng.random_range(0..n as u32) as u16
}

/// Fair coins, 0 or 1; 64 to the draw.
fn toss(n: usize, rng: &mut ChaCha8Rng) -> Vec<u16> {
    let mut coins = vec![0; n];
    for coins in coins.chunks_mut(64) {
        let bits: u64 = rng.random();
        coins.iter_mut().enumerate().for_each(|(at, coin)| *coin = (bits >> at & 1) as u16);
    }
    coins
}

/// `a` where the coin shows 0, else `b`. A branch would be guessed wrong every other time: with one, the
/// search took a seventh longer.
fn either(coin: u16, a: u16, b: u16) -> u16 {
    a.wrapping_add(b.wrapping_sub(a).wrapping_mul(coin))
}

/// Two heads of different groups, where there are such, change places.
fn swap(labels: &mut [u16], rng: &mut ChaCha8Rng) {
    let n = labels.len();
    let first = usize::from(below(n, rng));
    let start = usize::from(below(n, rng));
    let other = (start..n).chain(0..start).find(|&i| labels[i] != labels[first]);
    if let Some(other) = other {
        labels.swap(first, other);
    }
}

/// Two of k groups, where there are two, become one.
fn merge(labels: &mut [u16], k: usize, rng: &mut ChaCha8Rng) {
    if k < 2 {
        return;
    }
    let from = below(k, rng);
    let to = (from + 1 + below(k - 1, rng)) % k as u16;
    for label in labels.iter_mut().filter(|l| **l == from) {
        *label = to;
    }
}

/// Some members of a random head's group leave it for a new one, label k.
fn split(labels: &mut [u16], k: usize, rng: &mut ChaCha8Rng) {
    let group = labels[usize::from(below(labels.len(), rng))];
    for label in labels.iter_mut().filter(|l| **l == group) {
        if rng.random_bool(0.5) {
            *label = k as u16;
        }
    }
}

/// A random member of group `from` goes to group `to`.
fn move_one(labels: &mut [u16], sizes: &mut [usize], from: usize, to: usize, rng: &mut ChaCha8Rng) {
    let nth = usize::from(below(sizes[from], rng));
    if let Some(label) = labels.iter_mut().filter(|l| usize::from(**l) == from).nth(nth) {
        *label = to as u16;
        sizes[from] -= 1;
        sizes[to] += 1;
    }
}
