//! Ranks and crowding distances of points with two objectives.

/// Where an individual stands in its population.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Standing {
    /// Index of its non-dominated front, 0 for the best.
    pub(crate) rank: usize,
    /// Crowding distance within that front; infinite at the ends.
    pub(crate) crowding: f64,
}

impl Standing {
    /// The crowded-comparison operator of NSGA-II: lower rank first, then the lonelier one.
    pub(crate) fn beats(&self, other: &Self) -> bool {
        self.rank < other.rank || (self.rank == other.rank && self.crowding > other.crowding)
    }
}

/// Non-dominated sorting and crowding distance (Deb et al. 2002, doi:10.1109/4235.996017).
///
/// With two objectives a sweep does it in O(n log n) (Jensen 2003, doi:10.1109/TEVC.2003.817234): in
/// lexicographic order a point belongs to the first front whose last member does not dominate it, and every
/// front comes out sorted by both objectives, so that neighbours for the crowding distance lie side by side.
pub(crate) fn standings(points: &[[f64; 2]]) -> Vec<Standing> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_unstable_by(|&a, &b| {
        let ([a0, a1], [b0, b1]) = (points[a], points[b]);
        a0.total_cmp(&b0).then(a1.total_cmp(&b1)).then(a.cmp(&b))
    });
    let mut fronts: Vec<Vec<usize>> = Vec::new();
    for i in order {
        let point = points[i];
        let rank = fronts.partition_point(|front| {
            let last = points[front[front.len() - 1]];
            last[1] < point[1] || (last[1] == point[1] && last[0] < point[0])
        });
        match fronts.get_mut(rank) {
            Some(front) => front.push(i),
            None => fronts.push(vec![i]),
        }
    }
    let mut standings = vec![Standing { rank: 0, crowding: f64::INFINITY }; points.len()];
    for (rank, front) in fronts.iter().enumerate() {
        let (first, last) = (points[front[0]], points[front[front.len() - 1]]);
        // A front whose members agree in an objective is not spread along it: that term is 0, not 0/0.
        let scale = [last[0] - first[0], first[1] - last[1]]
            .map(|range| if range > 0.0 { range.recip() } else { 0.0 });
        for (at, &i) in front.iter().enumerate() {
            standings[i].rank = rank;
            if at > 0 && at + 1 < front.len() {
                let (before, after) = (points[front[at - 1]], points[front[at + 1]]);
                standings[i].crowding = (after[0] - before[0]) * scale[0] + (before[1] - after[1]) * scale[1];
            }
        }
    }
    standings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dominates;
    use proptest::prelude::*;

    /// Ranks from the definition: peel off the points that nothing left dominates.
    fn ranks_by_peeling(points: &[[f64; 2]]) -> Vec<usize> {
        let mut ranks = vec![usize::MAX; points.len()];
        for rank in 0..points.len() {
            let left: Vec<_> = (0..points.len()).filter(|&i| ranks[i] >= rank).collect();
            for &i in &left {
                if !left.iter().any(|&j| dominates(points[j], points[i])) {
                    ranks[i] = rank;
                }
            }
        }
        ranks
    }

    /// Crowding from the definition: one sort an objective.
    fn crowding_by_sorting(points: &[[f64; 2]], ranks: &[usize], i: usize) -> f64 {
        let front: Vec<_> = (0..points.len()).filter(|&j| ranks[j] == ranks[i]).collect();
        (0..2)
            .map(|m| {
                let mut values: Vec<_> = front.iter().map(|&j| points[j][m]).collect();
                values.sort_by(f64::total_cmp);
                let at = values.iter().position(|&v| v == points[i][m]).unwrap();
                if at == 0 || at + 1 == values.len() {
                    return f64::INFINITY;
                }
                (values[at + 1] - values[at - 1]) / (values[values.len() - 1] - values[0])
            })
            .sum()
    }

    proptest! {
        #[test]
        fn ranks_agree_with_peeling(raw in prop::collection::vec((0u8..12, 0u8..12), 1..60)) {
            let points: Vec<_> = raw.iter().map(|&(a, b)| [f64::from(a), f64::from(b)]).collect();
            let ranks: Vec<_> = standings(&points).iter().map(|s| s.rank).collect();
            prop_assert_eq!(ranks, ranks_by_peeling(&points));
        }

        #[test]
        fn crowding_agrees_with_sorting(raw in prop::collection::vec((0f64..1.0, 0f64..1.0), 1..40)) {
            let points: Vec<_> = raw.iter().map(|&(a, b)| [a, b]).collect();
            let found = standings(&points);
            let ranks = ranks_by_peeling(&points);
            for (i, standing) in found.iter().enumerate() {
                let expected = crowding_by_sorting(&points, &ranks, i);
                prop_assert!(standing.crowding == expected || (standing.crowding - expected).abs() < 1e-9);
            }
        }
    }
}
