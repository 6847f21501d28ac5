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

    /// For every two groups the head that goes from one to the other at the least loss, then those that gain by
    /// following it: the best such heads and where they go, if they gain. Two groups are shared out anew that way,
    /// which takes several relocations of which the first loses.
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

    /// `first` leaves `from`, whose members are listed, for the group `to` or for a new one; then the heads that
    /// gain by following. What the error changes by; `leaving` are those heads.
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
            let now = here * self.inverse[rest] + there * self.inverse[count];
            let (less, more) = (self.inverse[rest.saturating_sub(1)], self.inverse[count + 1]);
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
        let now = here * self.inverse[staying.len()] + there * self.inverse[count];
        (self.staying, self.to_leaving) = (staying, to_leaving);
        now - self.errors[from] - error
    }
}
