//! Operators on partitions. All of them act on groups, never on label values, and stay in the search space.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::{Cardinality, Partition, Result, SearchSpace};

/// A search space of one layer, with what its operators need.
#[derive(Debug)]
pub(super) struct Variation {
    n_heads: usize,
    cardinality: Cardinality,
    /// The numbers of groups to search, ascending.
    counts: Vec<usize>,
    max_groups: usize,
    max_size: usize,
}

impl Variation {
    /// Operators of a space that holds more than the partition without sharing.
    pub(super) fn new(space: &SearchSpace, n_heads: usize) -> Result<Self> {
        let mut counts = space.group_counts(n_heads)?;
        let max_groups = space.groups_at_most(n_heads);
        counts.retain(|&k| k <= max_groups);
        let max_size = space.size_at_most(n_heads);
        Ok(Self { n_heads, cardinality: space.cardinality, counts, max_groups, max_size })
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

    /// Some of `b`'s groups whole, and of `a` what they leave.
    pub(super) fn cross(&self, a: &Partition, b: &Partition, rng: &mut ChaCha8Rng) -> Partition {
        match self.cardinality {
            Cardinality::Arbitrary => self.inject(a, b, rng),
            Cardinality::Equal => self.interleave(a, b, rng),
        }
    }

    /// One small change: a head moves, two heads change places, two groups merge, a group splits.
    pub(super) fn mutate(&self, partition: Partition, rng: &mut ChaCha8Rng) -> Partition {
        let k = partition.n_groups();
        let trivial = k == 1 || k == self.n_heads;
        if self.cardinality == Cardinality::Equal && (trivial || rng.random_bool(0.1)) {
            return self.regroup(&partition, rng);
        }
        let mut labels = partition.into_labels();
        match (self.cardinality, rng.random_range(0..8u32)) {
            (Cardinality::Equal, _) | (_, 0) => swap(&mut labels, rng),
            (_, 1) => merge(&mut labels, k, rng),
            (_, 2) => split(&mut labels, k, rng),
            _ => labels[usize::from(below(self.n_heads, rng))] = below(k, rng),
        }
        self.finish(labels, k + 1, rng)
    }

    /// Each group of `b` enters with probability ½; the fragments of `a` it cuts through shrink.
    fn inject(&self, a: &Partition, b: &Partition, rng: &mut ChaCha8Rng) -> Partition {
        let offset = a.n_groups() as u16;
        let enters = coins(b.n_groups(), rng);
        let pairs = a.labels().iter().zip(b.labels());
        let labels = pairs.map(|(&a, &b)| if enters.heads_up(b) { offset + b } else { a }).collect();
        self.finish(labels, a.n_groups() + b.n_groups(), rng)
    }

    /// Each group of `a` stays with probability ½; the other heads fill its remaining groups in the order of
    /// `b`'s groups, so that neighbours in `b` stay together. As many groups as `a`, all of one size.
    fn interleave(&self, a: &Partition, b: &Partition, rng: &mut ChaCha8Rng) -> Partition {
        let (k, groups) = (a.n_groups(), b.n_groups());
        let stays = coins(k, rng);
        let before_first = usize::from(below(groups, rng));
        let mut order = lined_up(b, (0..groups).map(|g| (g + groups - 1 - before_first) % groups));
        let mut labels = a.labels().to_vec().into_boxed_slice();
        let mut free = 0;
        for at in 0..order.len() {
            // Written in any case and kept where it is free: a branch here could not be predicted.
            let head = order[at];
            order[free] = head;
            free += usize::from(!stays.heads_up(labels[usize::from(head)]));
        }
        let open = (0..k as u16).filter(|&g| !stays.heads_up(g));
        for (group, heads) in open.zip(order[..free].chunks(self.n_heads / k)) {
            heads.iter().for_each(|&head| labels[usize::from(head)] = group);
        }
        Partition::canonical(labels, k)
    }

    /// Other equal groups: the heads, group by group in random order, are cut into another number of pieces.
    fn regroup(&self, partition: &Partition, rng: &mut ChaCha8Rng) -> Partition {
        let k = self.counts[usize::from(below(self.counts.len(), rng))];
        let mut ranks: Vec<usize> = (0..partition.n_groups()).collect();
        ranks.shuffle(rng);
        let mut labels = vec![0; self.n_heads].into_boxed_slice();
        for (at, &head) in lined_up(partition, ranks.into_iter()).iter().enumerate() {
            labels[usize::from(head)] = (at * k / self.n_heads) as u16;
        }
        Partition::canonical(labels, k)
    }

    /// Brings labels below `bound` back into the space and makes a partition of them.
    fn finish(&self, mut labels: Box<[u16]>, bound: usize, rng: &mut ChaCha8Rng) -> Partition {
        if self.max_groups == self.n_heads && self.max_size == self.n_heads {
            return Partition::canonical(labels, bound);
        }
        let bound = bound.max(self.max_groups);
        self.repair(&mut labels, bound, rng);
        Partition::canonical(labels, bound)
    }

    /// Heads leave groups that are too large, then the smallest groups dissolve while there are too many.
    ///
    /// Both always find room, because the space holds a partition: H ≤ max_groups · max_size.
    fn repair(&self, labels: &mut [u16], bound: usize, rng: &mut ChaCha8Rng) {
        let mut sizes = vec![0; bound];
        for &label in labels.iter() {
            sizes[usize::from(label)] += 1;
        }
        let mut k = sizes.iter().filter(|&&s| s > 0).count();
        while let Some(full) = sizes.iter().position(|&s| s > self.max_size) {
            let empty = sizes.iter().position(|&s| s == 0);
            let Some(to) = self.roomy(&sizes, full, rng).or(empty) else { break };
            k += usize::from(sizes[to] == 0);
            move_one(labels, &mut sizes, full, to, rng);
        }
        while k > self.max_groups {
            let occupied = sizes.iter().enumerate().filter(|(_, s)| **s > 0);
            let Some((least, _)) = occupied.min_by_key(|(_, s)| **s) else { break };
            while sizes[least] > 0 {
                let Some(to) = self.roomy(&sizes, least, rng) else { return };
                move_one(labels, &mut sizes, least, to, rng);
            }
            k -= 1;
        }
    }

    /// A random group besides `from` that has members and room for one more.
    fn roomy(&self, sizes: &[usize], from: usize, rng: &mut ChaCha8Rng) -> Option<usize> {
        let rooms: Vec<_> =
            (0..sizes.len()).filter(|&g| g != from && (1..self.max_size).contains(&sizes[g])).collect();
        (!rooms.is_empty()).then(|| rooms[usize::from(below(rooms.len(), rng))])
    }
}

/// A random number below `n`.
fn below(n: usize, rng: &mut ChaCha8Rng) -> u16 {
    rng.random_range(0..n as u32) as u16
}

/// A fair coin for each group, 64 to the word.
struct Coins {
    first: u64,
    others: Vec<u64>,
}

impl Coins {
    /// How the coin of group `g` fell.
    fn heads_up(&self, g: u16) -> bool {
        let word = if g < 64 { self.first } else { self.others[usize::from(g) / 64 - 1] };
        word >> (g % 64) & 1 == 1
    }
}

/// Tosses a coin for each of n groups.
fn coins(n: usize, rng: &mut ChaCha8Rng) -> Coins {
    Coins { first: rng.random(), others: (1..n.div_ceil(64)).map(|_| rng.random()).collect() }
}

/// The heads of equal groups, group by group: those of group g come at the place that `ranks` gives as its g-th.
fn lined_up(partition: &Partition, ranks: impl Iterator<Item = usize>) -> Vec<u16> {
    let size = partition.n_heads() / partition.n_groups();
    let mut places: Vec<usize> = ranks.map(|rank| rank * size).collect();
    // A copy is made faster than zeros are allocated; all of it is written over.
    let mut order = partition.labels().to_vec();
    for (head, &label) in partition.labels().iter().enumerate() {
        let place = &mut places[usize::from(label)];
        order[*place] = head as u16;
        *place += 1;
    }
    order
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
