use super::Pairs;

/// Heads that change groups together: where the first would lose, those that follow may gain.
impl Pairs {
    /// In every group the head that gains most by leaving, then those that gain by following it, one by one.
    pub(super) fn departure(&mut self) -> Vec<usize> {
        let mut firsts = vec![(f64::NEG_INFINITY, None); self.groups.n_groups()];
        for head in 0..self.n {
            let group = self.groups.of(head);
            let saved = self.saved(head, group);
            if saved >= firsts[group].0 && self.groups.sizes[group] > 1 {
                firsts[group] = (saved, Some(head));
            }
        }
        let (mut best, mut leaving) = ((f64::INFINITY, Vec::new()), Vec::with_capacity(self.n));
        for (from, (_, first)) in firsts.into_iter().enumerate() {
            if let Some(first) = first {
                self.list(from);
                let change = self.follow(from, None, first, &mut leaving);
                if change < best.0 {
                    best = (change, leaving.clone());
                }
            }
        }
        best.1
    }

    /// For every two groups the head that goes from one to the other at the least loss, then those that gain
    /// by following it: the best such heads and where they go, if they gain. Two groups are shared out anew
    /// that way, which takes several relocations of which the first loses.
    pub(super) fn migration(&mut self) -> (usize, Vec<usize>) {
        let k = self.groups.n_groups();
        let (mut best, mut leaving) = ((-self.tolerance, 0, Vec::new()), Vec::with_capacity(self.n));
        for from in 0..k {
            // Of two, one cannot follow: a group keeps a head.
            if self.groups.sizes[from] <= 2 {
                continue;
            }
            self.list(from);
            for to in (0..k).filter(|&to| to != from) {
                let (mut cheapest, mut first) = (f64::INFINITY, (f64::INFINITY, None));
                for &head in &self.members {
                    let paid = (self.within[to] + self.sum(head, to)) * self.joined[to] + self.credit[to];
                    let change = paid - self.saved(head, from);
                    cheapest = cheapest.min(paid);
                    if change < first.0 {
                        first = (change, Some(head));
                    }
                }
                // More heads pay no less, and save at most all.
                if let Some(first) = first.1.filter(|_| cheapest < self.errors[from]) {
                    let change = self.follow(from, Some(to), first, &mut leaving);
                    if change < best.0 {
                        best = (change, to, leaving.clone());
                    }
                }
            }
        }
        (best.1, best.2)
    }

    /// Lists the members of a group, for [`follow`](Self::follow).
    fn list(&mut self, group: usize) {
        self.members.clear();
        self.members.extend((0..self.n).filter(|&head| self.groups.of(head) == group));
    }

    /// `first` leaves `from`, whose members are listed, for the group `to` or for a new one; then the heads
    /// that gain by following. What the error changes by; `leaving` are those heads.
    fn follow(&mut self, from: usize, to: Option<usize>, first: usize, leaving: &mut Vec<usize>) -> f64 {
        let mut staying = std::mem::take(&mut self.staying);
        staying.clone_from(&self.members);
        leaving.clear();
        // The sum of D from each head to those that left.
        let mut to_leaving = std::mem::take(&mut self.to_leaving);
        staying.iter().for_each(|&head| to_leaving[head] = 0.0);
        let lost = |head: usize, to_leaving: &[f64]| self.sum(head, from) - to_leaving[head];
        let added =
            |head: usize, to_leaving: &[f64]| to.map_or(0.0, |to| self.sum(head, to)) + to_leaving[head];
        // W and size of the other side.
        let (mut there, mut count, error) =
            to.map_or((0.0, 0, 0.0), |to| (self.within[to], self.groups.sizes[to], self.errors[to]));
        let mut here = self.within[from];
        let mut next = staying.iter().position(|&head| head == first);
        while let Some(place) = next {
            let head = staying.swap_remove(place);
            here -= lost(head, &to_leaving);
            there += added(head, &to_leaving);
            count += 1;
            leaving.push(head);
            let row = self.row(head);
            staying.iter().for_each(|&other| to_leaving[other] += row[other]);
            let rest = staying.len();
            let now = here * self.scale[rest] + there * self.scale[count];
            let (less, more) = (self.scale[rest.saturating_sub(1)], self.scale[count + 1]);
            let mut least = now - self.tolerance;
            next = None;
            if rest > 1 && count < self.groups.cap {
                for (place, &head) in staying.iter().enumerate() {
                    let then =
                        (here - lost(head, &to_leaving)) * less + (there + added(head, &to_leaving)) * more;
                    if then < least {
                        (least, next) = (then, Some(place));
                    }
                }
            }
        }
        let now = here * self.scale[staying.len()] + there * self.scale[count];
        (self.staying, self.to_leaving) = (staying, to_leaving);
        now - self.errors[from] - error
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;
    use proptest::prelude::*;

    use super::*;
    use crate::optimizer::local_search::moves::{Moves, descend, fuse};

    /// Squared distances of points in the plane.
    fn distances(points: &[(f64, f64)]) -> Array2<f64> {
        let square =
            |i: usize, j: usize| (points[i].0 - points[j].0).powi(2) + (points[i].1 - points[j].1).powi(2);
        Array2::from_shape_fn((points.len(), points.len()), |(i, j)| square(i, j))
    }

    fn error(distances: &Array2<f64>, labels: &[u16], k: usize) -> f64 {
        let mut pairs = Pairs::new(distances.view(), |size| 1.0 / size as f64);
        pairs.load(labels, k, labels.len()).unwrap();
        pairs.error()
    }

    /// No head gains by going elsewhere, no two by trading places, from the definition.
    fn check_settled(pairs: &Pairs, distances: &Array2<f64>) {
        let (labels, k) = (&pairs.groups.labels, pairs.groups.n_groups());
        let least = error(distances, labels, k) - 1e-9;
        for i in 0..labels.len() {
            for to in (0..k as u16).filter(|_| pairs.groups.sizes[pairs.groups.of(i)] > 1) {
                let mut moved = labels.clone();
                moved[i] = to;
                assert!(error(distances, &moved, k) >= least, "{labels:?}: {i} to {to}");
            }
            for j in 0..i {
                let mut swapped = labels.clone();
                swapped.swap(i, j);
                assert!(error(distances, &swapped, k) >= least, "{labels:?}: {i} and {j}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn descents_settle_and_migrations_gain(
            points in prop::collection::vec((0.0..1.0, 0.0..1.0), 4..14), k in 2usize..5,
        ) {
            let (distances, n) = (distances(&points), points.len());
            let mut pairs = Pairs::new(distances.view(), |size| 1.0 / size as f64);
            pairs.load(&(0..n).map(|head| (head % k) as u16).collect::<Vec<_>>(), k, n).unwrap();
            while pairs.groups.n_groups() > 1 {
                descend(&mut pairs, true).unwrap();
                check_settled(&pairs, &distances);
                let before = pairs.error();
                let (to, heads) = pairs.migration();
                heads.iter().for_each(|&head| pairs.relocate(head, to).unwrap());
                prop_assert!(heads.is_empty() || pairs.error() < before);
                descend(&mut pairs, true).unwrap();
                check_settled(&pairs, &distances);
                let (k, labels) = (pairs.groups.n_groups(), &pairs.groups.labels);
                prop_assert!((pairs.error() - error(&distances, labels, k)).abs() < 1e-9);
                pairs.load(&labels.clone(), k, n).unwrap();
                fuse(&mut pairs).unwrap();
            }
        }
    }

    #[test]
    fn heads_move_together_that_lose_alone() {
        // On a line: the pair at 5 belongs to the right, but each of it is held back by the other.
        let points = [0.0, 1.0, 5.0, 5.0, 8.5, 8.5, 8.5].map(|x| (x, 0.0));
        let distances = distances(&points);
        let mut pairs = Pairs::new(distances.view(), |size| 1.0 / size as f64);
        pairs.load(&[0, 0, 0, 0, 1, 1, 1], 2, 7).unwrap();
        descend(&mut pairs, true).unwrap();
        let alone = pairs.groups.labels.clone();
        assert_eq!(alone, [0, 0, 0, 0, 1, 1, 1]);
        let (to, mut heads) = pairs.migration();
        heads.sort_unstable();
        assert_eq!((to, heads), (1, vec![2, 3]));
    }
}
