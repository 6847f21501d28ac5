mod together;

use ndarray::ArrayView2;

use super::moves::{Groups, Moves};
use crate::error::Result;

/// A partition scored by squared distances D: every change in O(1) from maintained sums.
///
/// With `W_g = Σ_{i<j∈g} D_ij` and `s_ig = Σ_{j∈g} D_ij`, group g costs `c_|g| W_g`, `c_m = 1/m` where D is
/// exact; head i joining it makes that `c_{|g|+1} (W_g + s_ig)`, leaving it `c_{|g|−1} (W_g − s_ig)`.
#[derive(Debug)]
pub(super) struct Pairs {
    n: usize,
    distances: Vec<f64>,
    largest: f64,
    groups: Groups,
    /// s as (head, group) and as (group, head): each loop reads along its rows.
    sums: Vec<f64>,
    by_group: Vec<f64>,
    /// `c_|g|` of each group.
    shares: Vec<f64>,
    /// W of each group.
    within: Vec<f64>,
    /// `c_|g| W_g`.
    errors: Vec<f64>,
    /// What joining gives back: `−c_|g| W_g`, or infinite for a full group.
    credit: Vec<f64>,
    /// `c_{|g|+1}`.
    joined: Vec<f64>,
    /// `c_m` for m = 0…H+1; 0 for m = 0, whose sums are 0.
    scale: Vec<f64>,
    /// `Σ_{i∈a,j∈b} D_ij`, (a, b), made when a union is sought.
    across: Vec<f64>,
    /// Work space of `together`.
    members: Vec<usize>,
    staying: Vec<usize>,
    to_leaving: Vec<f64>,
    tolerance: f64,
}

impl Pairs {
    /// `scale` is `c_m` for m ≥ 1.
    pub(super) fn new(distances: ArrayView2<'_, f64>, scale: impl Fn(usize) -> f64) -> Self {
        let n = distances.nrows();
        let distances: Vec<f64> = distances.iter().copied().collect();
        let scale = (0..n + 2).map(|m| if m == 0 { 0.0 } else { scale(m) }).collect();
        let zeros = || vec![0.0; n];
        Self {
            n,
            largest: distances.iter().copied().fold(0.0, f64::max),
            distances,
            groups: Groups::default(),
            sums: vec![0.0; n * n],
            by_group: vec![0.0; n * n],
            shares: zeros(),
            across: vec![0.0; n * n],
            within: zeros(),
            errors: zeros(),
            credit: zeros(),
            joined: zeros(),
            scale,
            members: Vec::with_capacity(n),
            staying: Vec::with_capacity(n),
            to_leaving: zeros(),
            tolerance: 0.0,
        }
    }

    fn row(&self, head: usize) -> &[f64] {
        &self.distances[head * self.n..][..self.n]
    }

    fn sum(&self, head: usize, group: usize) -> f64 {
        self.sums[head * self.n + group]
    }

    /// What a group saves when `head` leaves it.
    fn saved(&self, head: usize, from: usize) -> f64 {
        let rest = self.scale[self.groups.sizes[from] - 1];
        self.errors[from] - (self.within[from] - self.sum(head, from)) * rest
    }

    /// s and W from the definition.
    fn sum_up(&mut self, labels: &[u16], n_groups: usize) {
        let n = self.n;
        self.by_group[..n_groups * n].fill(0.0);
        for (&label, row) in labels.iter().zip(self.distances.chunks_exact(n)) {
            let sums = &mut self.by_group[usize::from(label) * n..][..n];
            sums.iter_mut().zip(row).for_each(|(sum, distance)| *sum += distance);
        }
        self.within.fill(0.0);
        for (group, sums) in self.by_group.chunks_exact(n).enumerate().take(n_groups) {
            self.sums.iter_mut().skip(group).step_by(n).zip(sums).for_each(|(t, &s)| *t = s);
        }
        for (head, &label) in labels.iter().enumerate() {
            self.within[usize::from(label)] += 0.5 * self.sum(head, usize::from(label));
        }
    }

    fn refresh(&mut self, group: usize) {
        let size = self.groups.sizes[group];
        if size <= 1 {
            self.within[group] = 0.0;
        }
        self.shares[group] = self.scale[size];
        self.errors[group] = self.within[group] * self.scale[size];
        self.credit[group] = if size < self.groups.cap { -self.errors[group] } else { f64::INFINITY };
        self.joined[group] = self.scale[size + 1];
    }
}

impl Moves for Pairs {
    fn groups(&self) -> &Groups {
        &self.groups
    }

    fn load(&mut self, labels: &[u16], n_groups: usize, cap: usize) -> Result<()> {
        // What was found last is often what comes next: its sums are there.
        let known = self.groups.n_groups() == n_groups && self.groups.labels == labels;
        self.groups.load(labels, n_groups, cap);
        if !known {
            self.sum_up(labels, n_groups);
        }
        (0..n_groups).for_each(|group| self.refresh(group));
        self.tolerance = 1e-12 * self.error() + 1e-15 * self.largest;
        Ok(())
    }

    fn restore(&mut self, labels: &[u16]) -> Result<()> {
        for (head, &label) in labels.iter().enumerate() {
            if self.groups.labels[head] != label {
                self.relocate(head, usize::from(label))?;
            }
        }
        Ok(())
    }

    fn error(&self) -> f64 {
        self.errors[..self.groups.n_groups()].iter().sum()
    }

    fn tolerance(&self) -> f64 {
        self.tolerance
    }

    fn relocation(&mut self, head: usize, to: usize) -> Result<f64> {
        let paid = (self.within[to] + self.sum(head, to)) * self.joined[to] - self.errors[to];
        Ok(paid - self.saved(head, self.groups.of(head)))
    }

    fn relocate(&mut self, head: usize, to: usize) -> Result<()> {
        let from = self.groups.of(head);
        self.within[from] -= self.sum(head, from);
        self.within[to] += self.sum(head, to);
        let n = self.n;
        for (row, &distance) in self.sums.chunks_exact_mut(n).zip(&self.distances[head * n..][..n]) {
            row[from] -= distance;
            row[to] += distance;
        }
        let row = &self.distances[head * n..][..n];
        self.by_group[from * n..][..n].iter_mut().zip(row).for_each(|(s, d)| *s -= d);
        self.by_group[to * n..][..n].iter_mut().zip(row).for_each(|(s, d)| *s += d);
        self.groups.relocate(head, to);
        self.refresh(from);
        self.refresh(to);
        Ok(())
    }

    fn isolate(&mut self, head: usize) -> Result<()> {
        let new = self.groups.n_groups();
        self.groups.open_group();
        self.within[new] = 0.0;
        self.sums.chunks_exact_mut(self.n).for_each(|row| row[new] = 0.0);
        self.by_group[new * self.n..][..self.n].fill(0.0);
        self.relocate(head, new)
    }

    fn merge(&mut self, from: usize, to: usize) -> Result<()> {
        for head in 0..self.n {
            if self.groups.of(head) == from {
                self.within[to] += self.sum(head, to);
                self.groups.relocate(head, to);
            }
        }
        self.within[to] += self.within[from];
        for (head, row) in self.sums.chunks_exact_mut(self.n).enumerate() {
            row[to] += row[from];
            self.by_group[to * self.n + head] = row[to];
        }
        self.refresh(to);
        self.drop_empty(from);
        Ok(())
    }

    fn drop_empty(&mut self, group: usize) {
        let last = self.groups.n_groups() - 1;
        self.groups.drop_empty(group);
        if group != last {
            self.sums.chunks_exact_mut(self.n).for_each(|row| row[group] = row[last]);
            self.by_group.copy_within(last * self.n..(last + 1) * self.n, group * self.n);
            self.within[group] = self.within[last];
            self.refresh(group);
        }
    }

    fn best_union(&mut self) -> Result<(f64, usize, usize)> {
        let (n, k) = (self.n, self.groups.n_groups());
        self.across[..k * k].fill(0.0);
        for (&label, sums) in self.groups.labels.iter().zip(self.sums.chunks_exact(n)) {
            let row = &mut self.across[usize::from(label) * k..][..k];
            row.iter_mut().zip(sums).for_each(|(across, sum)| *across += sum);
        }
        let mut best = (f64::INFINITY, 0, 0);
        for (a, row) in self.across[..k * k].chunks_exact(k).enumerate() {
            let most = self.groups.cap - self.groups.sizes[a].min(self.groups.cap);
            for (b, across) in row[..a].iter().enumerate() {
                let size = self.groups.sizes[b];
                let joint =
                    (self.within[a] + self.within[b] + across) * self.scale[self.groups.sizes[a] + size];
                let change = joint - self.errors[a] - self.errors[b];
                if change < best.0 && size <= most {
                    best = (change, a, b);
                }
            }
        }
        Ok(best)
    }

    fn best_relocation(&mut self, head: usize) -> Result<(f64, usize)> {
        let from = self.groups.of(head);
        if self.groups.sizes[from] <= 1 {
            return Ok((f64::INFINITY, from));
        }
        let k = self.groups.n_groups();
        let (sums, within) = (&self.sums[head * self.n..][..k], &self.within[..k]);
        let (joined, credit) = (&self.joined[..k], &self.credit[..k]);
        let paid = |to: usize| (within[to] + sums[to]) * joined[to] + credit[to];
        // The least alone first: that loop has no branches, and its place is wanted only when it gains.
        let least = |groups: std::ops::Range<usize>| {
            groups.fold(f64::INFINITY, |least, to| {
                let paid = paid(to);
                if paid < least { paid } else { least }
            })
        };
        let (below, above) = (least(0..from), least(from + 1..k));
        let least = if below <= above { below } else { above };
        let change = least - self.saved(head, from);
        if change < -self.tolerance {
            let place = (0..k).find(|&to| to != from && paid(to) == least);
            return Ok((change, place.unwrap_or(from)));
        }
        Ok((f64::INFINITY, from))
    }

    fn best_exchange(&mut self, i: usize, first: usize) -> Result<(f64, usize)> {
        let (n, a) = (self.n, self.groups.of(i));
        let (row, in_a) = (&self.distances[i * n..][..n], &self.by_group[a * n..][..n]);
        let (sums, share, own) = (&self.sums[i * n..][..n], self.shares[a], self.sum(i, a));
        let mut best = (-self.tolerance, i);
        for j in first..n {
            let b = self.groups.of(j);
            let change = (in_a[j] - own - row[j]) * share
                + (sums[b] - self.by_group[b * n + j] - row[j]) * self.shares[b];
            if change < best.0 && a != b {
                best = (change, j);
            }
        }
        if best.1 == i { Ok((f64::INFINITY, i)) } else { Ok(best) }
    }

    fn best_split(&mut self) -> Result<Vec<usize>> {
        Ok(self.departure())
    }

    fn best_migration(&mut self) -> Result<(usize, Vec<usize>)> {
        Ok(self.migration())
    }
}
