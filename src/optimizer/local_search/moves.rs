use crate::error::Result;

/// Heads in groups: labels in no particular order, sizes, and the most heads that a group may hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Groups {
    pub(super) labels: Vec<u16>,
    pub(super) sizes: Vec<usize>,
    pub(super) cap: usize,
}

impl Groups {
    pub(super) fn load(&mut self, labels: &[u16], n_groups: usize, cap: usize) {
        self.labels.clear();
        self.labels.extend_from_slice(labels);
        self.sizes.clear();
        self.sizes.resize(n_groups, 0);
        for &label in labels {
            self.sizes[usize::from(label)] += 1;
        }
        self.cap = cap;
    }

    /// Adds an empty group.
    pub(super) fn open_group(&mut self) {
        self.sizes.push(0);
    }

    pub(super) fn n_heads(&self) -> usize {
        self.labels.len()
    }

    pub(super) fn n_groups(&self) -> usize {
        self.sizes.len()
    }

    pub(super) fn of(&self, head: usize) -> usize {
        usize::from(self.labels[head])
    }

    pub(super) fn has_room(&self, group: usize) -> bool {
        self.sizes[group] < self.cap
    }

    pub(super) fn relocate(&mut self, head: usize, to: usize) {
        let from = self.of(head);
        self.sizes[from] -= 1;
        self.sizes[to] += 1;
        self.labels[head] = to as u16;
    }

    /// Gives the last group the number of an empty one.
    pub(super) fn drop_empty(&mut self, group: usize) {
        let last = self.n_groups() - 1;
        self.sizes.swap_remove(group);
        for label in &mut self.labels {
            if usize::from(*label) == last {
                *label = group as u16;
            }
        }
    }
}

/// A partition under change, with what moves would do to its error.
///
/// Changes are differences of the error; infinite where a change is not known and may not be asked for.
pub(super) trait Moves {
    fn groups(&self) -> &Groups;

    /// Starts from this partition.
    fn load(&mut self, labels: &[u16], n_groups: usize, cap: usize) -> Result<()>;

    /// Goes back to a partition from which the one at hand came by a few moves.
    fn restore(&mut self, labels: &[u16]) -> Result<()> {
        let (k, cap) = (self.groups().n_groups(), self.groups().cap);
        self.load(labels, k, cap)
    }

    fn error(&self) -> f64;

    /// A move must gain more than this: what rounding can feign.
    fn tolerance(&self) -> f64;

    /// Whether asking for further changes is pointless.
    fn exhausted(&self) -> bool {
        false
    }

    /// Keeps what may still be asked for this many courses, of which one begins.
    fn ration(&mut self, _courses: usize) {}

    /// The change when `head` moves to another group.
    fn relocation(&mut self, head: usize, to: usize) -> Result<f64>;

    /// Moves `head` to another group; its own may be left empty.
    fn relocate(&mut self, head: usize, to: usize) -> Result<()>;

    /// Opens a new group for `head`.
    fn isolate(&mut self, head: usize) -> Result<()>;

    /// Puts all heads of `from` into `to` and closes `from`.
    fn merge(&mut self, from: usize, to: usize) -> Result<()>;

    /// Closes an empty group; the last group takes its number.
    fn drop_empty(&mut self, group: usize);

    /// The relocation of `head` with the least change, and where to: a group with room, while its own keeps a
    /// head.
    fn best_relocation(&mut self, head: usize) -> Result<(f64, usize)>;

    /// The exchange of `i` with a head from `first` on that has the least change, and with which.
    fn best_exchange(&mut self, i: usize, first: usize) -> Result<(f64, usize)>;

    /// The union with the least change that the cap allows.
    fn best_union(&mut self) -> Result<(f64, usize, usize)>;

    /// Heads of one group that gain most when they leave it for a new one, together.
    fn best_split(&mut self) -> Result<Vec<usize>>;

    /// Heads of one group that gain when they go to another together, and where they go: none here.
    fn best_migration(&mut self) -> Result<(usize, Vec<usize>)> {
        Ok((0, Vec::new()))
    }

    /// Lets two heads trade places.
    fn swap(&mut self, i: usize, j: usize) -> Result<()> {
        let (a, b) = (self.groups().of(i), self.groups().of(j));
        self.relocate(i, b)?;
        self.relocate(j, a)
    }
}

/// Relocations, then exchanges, each taken when it gains, until none does (Hartigan & Wong 1979,
/// doi:10.2307/2346830).
pub(super) fn descend(moves: &mut impl Moves, exchanges: bool) -> Result<()> {
    let n = moves.groups().n_heads();
    loop {
        let (mut head, mut idle) = (0, 0);
        while idle < n {
            let (change, to) = moves.best_relocation(head)?;
            idle += 1;
            if change < -moves.tolerance() {
                moves.relocate(head, to)?;
                idle = 0;
            }
            head = if head + 1 == n { 0 } else { head + 1 };
        }
        let mut swapped = false;
        for i in 0..if exchanges { n } else { 0 } {
            // Until heads trade places, the earlier ones have seen that they gain nothing with this one.
            let (change, j) = moves.best_exchange(i, if swapped { 0 } else { i + 1 })?;
            if change < -moves.tolerance() {
                moves.swap(i, j)?;
                swapped = true;
            }
        }
        if !swapped {
            return Ok(());
        }
    }
}

/// The first candidate with the least change, and that change.
pub(super) fn least<T: Copy>(
    candidates: Vec<T>,
    mut change: impl FnMut(T) -> Result<f64>,
) -> Result<Option<(f64, T)>> {
    let mut best: Option<(f64, T)> = None;
    for candidate in candidates {
        let change = change(candidate)?;
        if best.is_none_or(|(least, _)| change < least) {
            best = Some((change, candidate));
        }
    }
    Ok(best)
}

/// One group fewer: the cheapest union that the cap allows. Where it allows none, the smallest group is dealt
/// out to those with room.
pub(super) fn fuse(moves: &mut impl Moves) -> Result<()> {
    let k = moves.groups().n_groups();
    let (change, a, b) = moves.best_union()?;
    if change < f64::INFINITY {
        return moves.merge(a, b);
    }
    let smallest = (0..k).min_by_key(|&g| moves.groups().sizes[g]).unwrap_or(0);
    for head in 0..moves.groups().n_heads() {
        if moves.groups().of(head) == smallest {
            let groups = moves.groups();
            let rooms: Vec<usize> = (0..k).filter(|&g| g != smallest && groups.has_room(g)).collect();
            let best = least(rooms, |to| moves.relocation(head, to))?;
            let (_, to) = best.expect("k − 1 groups of at most cap heads hold all heads");
            moves.relocate(head, to)?;
        }
    }
    moves.drop_empty(smallest);
    Ok(())
}

/// One group more: those heads whose leaving gains most get their own.
pub(super) fn split(moves: &mut impl Moves) -> Result<()> {
    let heads = moves.best_split()?;
    let Some((&first, others)) = heads.split_first() else { return Ok(()) };
    moves.isolate(first)?;
    let new = moves.groups().of(first);
    others.iter().try_for_each(|&head| moves.relocate(head, new))
}
