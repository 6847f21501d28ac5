//! Scores refitted: queries `Q_i' = B_i Q_i` and shared keys, in turn, so that attention looks where it looked.

use faer::Mat;
use ndarray::Array2;
use rayon::prelude::*;

use super::attention::{Positions, centre, product, read};
use super::descent::{Kronecker, descend};
use super::state::{State, add, basis, block, wide};
use super::{RIDGE, Text};
use crate::error::Result;

const ROUNDS: usize = 2;
const ITERATIONS: usize = 4;

/// The source's attention in one window, and what the refitted one may build on.
#[derive(Debug)]
struct Seen<'a> {
    text: &'a Text,
    /// Original queries on the merged model's inputs, (T, h), one for each query head that shares.
    queries: Vec<Array2<f32>>,
    /// The basis of each shared group's keys on the same inputs, (T, b).
    features: Vec<Array2<f32>>,
    /// How much each score counts, (T, T), rows summing to 1, or to 0 where nothing does.
    weights: Vec<Array2<f32>>,
    /// The source's scores, (T, T).
    wanted: Vec<Array2<f32>>,
}

/// The heads of the source that the refit starts from, (n·h, d+1) each.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) query: Array2<f32>,
    pub(super) key: Array2<f32>,
    pub(super) value: Array2<f32>,
    /// `O_qᵀ O_q` of every query head, (h, h).
    pub(super) readers: Vec<Array2<f32>>,
}

/// Everything that one layer's score refit needs.
#[derive(Debug)]
struct Scores<'a> {
    positions: &'a Positions,
    source: &'a Source,
    /// Query heads that share.
    active: Vec<usize>,
    /// Groups that are shared, and the basis of their keys.
    groups: Vec<usize>,
    bases: Vec<Array2<f32>>,
    seen: Vec<Seen<'a>>,
}

/// Refits queries and shared keys of one layer on these windows: least squares of the scores, weighed by how much the
/// source's attention there moves its output, with a free offset for every query (a constant over the keys cancels in the
/// softmax). The error of the scores cannot rise.
pub(super) fn refit_scores(
    state: &mut State,
    source: &Source,
    texts: &[&Text],
    positions: &Positions,
) -> Result<()> {
    let groups: Vec<usize> = (0..state.groups.len()).filter(|&g| state.shared(g)).collect();
    let bases = groups.iter().map(|&g| {
        let members: Vec<_> = state.groups[g].iter().map(|&i| block(&source.key, i, state.h)).collect();
        basis(block(&state.key, g, state.h), &members, 4 * state.h)
    });
    let mut scores = Scores {
        positions,
        source,
        active: (0..state.n_queries()).filter(|&q| state.shared(state.group_of[q])).collect(),
        groups: groups.clone(),
        bases: bases.collect::<Result<_>>()?,
        seen: Vec::new(),
    };
    scores.seen = texts.par_iter().map(|&text| scores.look(state, text)).collect();
    let mut error = scores.error(state);
    for side in [Side::Queries, Side::Keys].repeat(ROUNDS) {
        error = scores.step(state, side, error);
    }
    Ok(())
}

/// Queries (of all active heads) and keys (of all shared groups) of one window as they are, turned and scaled, (T, h) each.
type Turned = (Vec<Array2<f32>>, Vec<Array2<f32>>);

/// What a step changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

impl Scores<'_> {
    fn look<'a>(&self, state: &State, text: &'a Text) -> Seen<'a> {
        let (h, source) = (state.h, self.source);
        let scale = self.positions.scale;
        let mut seen = Seen {
            text,
            queries: self.active.iter().map(|&q| read(&text.merged, &source.query, q, h)).collect(),
            features: self.bases.iter().map(|b| product(text.merged.view(), b.t())).collect(),
            weights: Vec::new(),
            wanted: Vec::new(),
        };
        for &q in &self.active {
            let query = self.positions.turned(read(&text.original, &source.query, q, h)) * scale;
            let key = self.positions.turned(read(&text.original, &source.key, q / state.r, h));
            let wanted = product(query.view(), key.t());
            let mut weights = wanted.clone();
            self.positions.softmax(&mut weights);
            let value = read(&text.original, &source.value, q / state.r, h);
            by_effect(&mut weights, &value, &source.readers[q]);
            seen.weights.push(weights);
            seen.wanted.push(wanted);
        }
        seen
    }

    fn group(&self, state: &State, a: usize) -> usize {
        self.groups.iter().position(|&g| g == state.group_of[self.active[a]]).expect("active heads share")
    }

    /// What a state makes of one window.
    fn turned(&self, state: &State, seen: &Seen<'_>) -> Turned {
        let turned = |rows, i| self.positions.turned(read(&seen.text.merged, rows, i, state.h));
        let scale = self.positions.scale;
        let queries = self.active.iter().map(|&q| turned(&state.query, q) * scale).collect();
        (queries, self.groups.iter().map(|&g| turned(&state.key, g)).collect())
    }

    /// Sums over the windows, in their order.
    fn summed(
        &self,
        now: &[Turned],
        each: impl Fn(&Seen<'_>, &Turned) -> Vec<Mat<f64>> + Send + Sync,
    ) -> Vec<Mat<f64>> {
        let both = self.seen.par_iter().zip(now);
        let all: Vec<Vec<Mat<f64>>> = both.map(|(seen, now)| each(seen, now)).collect();
        let sum = |mut sum: Vec<Mat<f64>>, next: Vec<Mat<f64>>| {
            sum.iter_mut().zip(next).for_each(|(sum, next)| *sum += next);
            sum
        };
        all.into_iter().reduce(sum).unwrap_or_default()
    }

    fn error(&self, state: &State) -> f64 {
        let of = |seen: &Seen<'_>| {
            let now = self.turned(state, seen);
            let error = |a: usize| spread(self.missing(state, seen, &now, a), &seen.weights[a]);
            (0..self.active.len()).map(error).sum::<f64>()
        };
        // In the order of the text.
        self.seen.par_iter().map(of).collect::<Vec<_>>().into_iter().sum()
    }

    /// What the scores of an active head lack, (T, T).
    fn missing(&self, state: &State, seen: &Seen<'_>, (queries, keys): &Turned, a: usize) -> Array2<f32> {
        &seen.wanted[a] - &product(queries[a].view(), keys[self.group(state, a)].t())
    }

    /// Takes a change of scores (T, T) back to what caused it: to the query head's B, or to its group's keys.
    fn back(
        &self,
        state: &State,
        seen: &Seen<'_>,
        side: Side,
        a: usize,
        other: &Array2<f32>,
        mut change: Array2<f32>,
    ) -> Mat<f64> {
        centre(&mut change, &seen.weights[a]);
        let (moved, over) = match side {
            Side::Queries => (product(change.view(), other.view()), &seen.queries[a]),
            Side::Keys => (product(change.t(), other.view()), &seen.features[self.group(state, a)]),
        };
        let moved = self.positions.turned_back(moved);
        wide(product(moved.t(), over.view()).view())
    }

    /// One side refitted with the other held, and the error then. A step that would raise the error, or that numbers run out
    /// of range in, is not taken.
    fn step(&self, state: &mut State, side: Side, before: f64) -> f64 {
        let now: Vec<Turned> = self.seen.par_iter().map(|seen| self.turned(state, seen)).collect();
        let (h, scale) = (state.h, self.positions.scale);
        let place = |a: usize| if side == Side::Queries { a } else { self.group(state, a) };
        let unknowns = if side == Side::Queries { self.active.len() } else { self.groups.len() };
        // For each unknown the sum over its heads.
        let gathered = |of_heads: Vec<Mat<f64>>| {
            let mut sums: Vec<Option<Mat<f64>>> = (0..unknowns).map(|_| None).collect();
            for (a, of_head) in of_heads.into_iter().enumerate() {
                let sum = &mut sums[place(a)];
                *sum = Some(sum.take().map_or(of_head.clone(), |sum| sum + of_head));
            }
            sums.into_iter().flatten().collect::<Vec<_>>()
        };
        // What the scores are a product with, for the side that changes.
        let other = |(queries, keys): &Turned, a: usize| match side {
            Side::Queries => &keys[self.group(state, a)] * scale,
            Side::Keys => queries[a].clone(),
        };
        let gradient = self.summed(&now, |seen, now| {
            let back =
                |a: usize| self.back(state, seen, side, a, &other(now, a), self.missing(state, seen, now, a));
            gathered((0..self.active.len()).map(back).collect())
        });
        let image = |guess: &[Mat<f64>]| {
            self.summed(&now, |seen, now| {
                let moved = |(place, guess): (usize, &Mat<f64>)| {
                    let over =
                        if side == Side::Queries { &seen.queries[place] } else { &seen.features[place] };
                    let guess = Array2::from_shape_fn((guess.nrows(), guess.ncols()), |at| guess[at] as f32);
                    self.positions.turned(product(over.view(), guess.t()))
                };
                let moved: Vec<Array2<f32>> = guess.iter().enumerate().map(moved).collect();
                let back = |a: usize| {
                    let (moved, other) = (&moved[place(a)], other(now, a));
                    let change = match side {
                        Side::Queries => product(moved.view(), other.t()),
                        Side::Keys => product(other.view(), moved.t()),
                    };
                    self.back(state, seen, side, a, &other, change)
                };
                gathered((0..self.active.len()).map(back).collect())
            })
        };
        let metric = self.metric(state, &now, side);
        let steps = metric.and_then(|metric| descend(gradient, &metric, RIDGE, ITERATIONS, false, image));
        let Some(steps) = steps else { return before };
        let mut next = state.clone();
        for (place, step) in steps.iter().enumerate() {
            match side {
                Side::Queries => {
                    let q = self.active[place];
                    add(&mut next.query, q, h, step, block(&self.source.query, q, h));
                }
                Side::Keys => add(&mut next.key, self.groups[place], h, step, self.bases[place].view()),
            }
        }
        // In f32 a step that gains nothing may lose a rounding.
        let after = self.error(&next);
        if after <= before {
            *state = next;
            return after;
        }
        before
    }

    /// Roughly what the scores make of a change: energies of the other side by frequency, times those of what it mixes.
    fn metric(&self, state: &State, now: &[Turned], side: Side) -> Option<Vec<Kronecker>> {
        let unknowns = if side == Side::Queries { self.active.len() } else { self.groups.len() };
        let h = state.h;
        let heads = |place: usize| -> Vec<usize> {
            (0..self.active.len())
                .filter(|&a| {
                    side == Side::Queries && a == place || side == Side::Keys && self.group(state, a) == place
                })
                .collect()
        };
        let lefts = self.summed(now, |seen, (queries, keys)| {
            let tokens = seen.text.merged.nrows() as f64;
            let squares = |rows: &Array2<f32>| {
                Mat::from_fn(h, 1, |i, _| rows.column(i).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>())
            };
            let of = |place: usize| match side {
                Side::Queries => {
                    squares(&keys[self.group(state, place)]) * faer::Scale(1.0 / tokens / h as f64)
                }
                Side::Keys => {
                    heads(place).iter().fold(Mat::zeros(h, 1), |sum, &a| sum + squares(&queries[a]))
                }
            };
            (0..unknowns).map(of).collect()
        });
        let rights = self.summed(now, |seen, _| {
            let moment = |rows: &Array2<f32>| wide(product(rows.t(), rows.view()).view());
            let over = |place: usize| {
                if side == Side::Queries { &seen.queries[place] } else { &seen.features[place] }
            };
            (0..unknowns).map(|place| moment(over(place))).collect()
        });
        // One of the two sides is a mean over tokens, the other a sum.
        let windows = self.seen.len().max(1) as f64;
        let tokens: f64 = self.seen.iter().map(|seen| seen.text.merged.nrows() as f64).sum();
        let both = lefts.into_iter().zip(rights).map(|(left, right)| {
            let (mean_left, mean_right) =
                if side == Side::Queries { (1.0 / windows, 1.0) } else { (1.0, 1.0 / tokens) };
            let diagonal = self.positions.paired((0..h).map(|i| left[(i, 0)] * mean_left).collect());
            let left = Mat::from_fn(h, h, |i, j| if i == j { diagonal[i] } else { 0.0 });
            Kronecker::new(left, right * faer::Scale(mean_right))
        });
        both.collect()
    }
}

/// Probabilities times how far each value is from the mean that attention makes of them, seen through the output, rows
/// summing to 1 again, or to 0 where all values are that mean: what an error of that score does.
fn by_effect(weights: &mut Array2<f32>, value: &Array2<f32>, reader: &Array2<f32>) {
    let mean = product(weights.view(), value.view());
    let (seen, seen_mean) = (product(value.view(), reader.view()), product(mean.view(), reader.view()));
    let squares = |a: &Array2<f32>, b: &Array2<f32>| (a * b).sum_axis(ndarray::Axis(1));
    let (of_value, of_mean) = (squares(value, &seen), squares(&mean, &seen_mean));
    let crossed = product(mean.view(), seen.t());
    for (t, mut row) in weights.rows_mut().into_iter().enumerate() {
        for (s, weight) in row.iter_mut().enumerate() {
            if *weight > 0.0 {
                *weight *= (of_value[s] + of_mean[t] - 2.0 * crossed[[t, s]]).max(0.0).sqrt();
            }
        }
        let sum: f32 = row.sum();
        // Where attention is one token's to f32, what is left may be too little to divide by.
        let scale = if sum >= f32::MIN_POSITIVE { sum.recip() } else { 0.0 };
        row.mapv_inplace(|weight| weight * scale);
    }
}

/// `Σ w (v − mean_w v)²`.
fn spread(values: Array2<f32>, weights: &Array2<f32>) -> f64 {
    let mut centred = values.clone();
    centre(&mut centred, weights);
    centred.iter().zip(&values).map(|(c, v)| f64::from(*c) * f64::from(*v)).sum()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn weights_are_shares_or_nothing() {
        let value = array![[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]];
        let reader = array![[2.0, 0.5], [0.5, 1.0]];
        // One token alone; all but one token; enough of several.
        let mut weights = array![[1.0, 0.0, 0.0], [(-95.0f32).exp(), 1.0, 0.0], [0.25, 0.25, 0.5]];
        by_effect(&mut weights, &value, &reader);
        let sums: Vec<f32> = weights.rows().into_iter().map(|row| row.sum()).collect();
        assert_eq!(sums[..2], [0.0, 0.0]);
        assert!((sums[2] - 1.0).abs() < 1e-6 && weights.iter().all(|w| (0.0..=1.0).contains(w)));
        let mean = array![1.875, 0.25];
        let distance = |s: usize| {
            let off = &value.row(s) - &mean;
            off.dot(&reader.dot(&off)).sqrt()
        };
        let effects = [0.25 * distance(0), 0.25 * distance(1), 0.5 * distance(2)];
        let all: f32 = effects.iter().sum();
        for (weight, effect) in weights.row(2).iter().zip(effects) {
            assert!((weight - effect / all).abs() < 1e-6);
        }
    }
}
