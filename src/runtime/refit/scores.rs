//! Scores refitted: queries `Q_i' = B_i Q_i` and shared keys, in turn, so that attention looks where it looked.

use faer::Mat;
use ndarray::Array2;
use rayon::prelude::*;

use super::attention::{Positions, centre, product, read};
use super::descent::{Kronecker, descend};
use super::state::{State, add, basis, block};
use super::{RIDGE, Text};
use crate::Result;

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
    /// How much each score counts, (T, T), rows summing to 1.
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
/// softmax). Says the error before and after, as a share of the scores' own; it cannot rise.
pub(super) fn refit_scores(
    state: &mut State,
    source: &Source,
    texts: &[&Text],
    positions: &Positions,
) -> Result<[f64; 2]> {
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
    let energy = scores.energy();
    let before = scores.error(state);
    for _ in 0..ROUNDS {
        scores.step(state, Side::Queries)?;
        scores.step(state, Side::Keys)?;
    }
    Ok([before, scores.error(state)].map(|error| if energy > 0.0 { error / energy } else { 0.0 }))
}

/// What a step changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

impl Scores<'_> {
    fn look<'a>(&self, state: &State, text: &'a Text) -> Seen<'a> {
        let (h, source) = (state.h, self.source);
        let scale = (h as f32).sqrt().recip();
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

    /// Queries, turned and scaled, of all active heads in one window.
    fn queries(&self, state: &State, seen: &Seen<'_>) -> Vec<Array2<f32>> {
        let scale = (state.h as f32).sqrt().recip();
        let turned =
            |&q: &usize| self.positions.turned(read(&seen.text.merged, &state.query, q, state.h)) * scale;
        self.active.iter().map(turned).collect()
    }

    /// Keys, turned, of all shared groups in one window.
    fn keys(&self, state: &State, seen: &Seen<'_>) -> Vec<Array2<f32>> {
        let turned = |&g: &usize| self.positions.turned(read(&seen.text.merged, &state.key, g, state.h));
        self.groups.iter().map(turned).collect()
    }

    /// Sums over the windows, in their order.
    fn summed(&self, each: impl Fn(&Seen<'_>) -> Vec<Mat<f64>> + Send + Sync) -> Vec<Mat<f64>> {
        let all: Vec<Vec<Mat<f64>>> = self.seen.par_iter().map(each).collect();
        let sum = |mut sum: Vec<Mat<f64>>, next: Vec<Mat<f64>>| {
            sum.iter_mut().zip(next).for_each(|(sum, next)| *sum += next);
            sum
        };
        all.into_iter().reduce(sum).unwrap_or_default()
    }

    fn energy(&self) -> f64 {
        let of = |seen: &Seen<'_>| {
            vec![one(seen.wanted.iter().zip(&seen.weights).map(|(s, w)| spread(s.clone(), w)).sum())]
        };
        self.summed(of).first().map_or(0.0, |sum| sum[(0, 0)])
    }

    fn error(&self, state: &State) -> f64 {
        let of = |seen: &Seen<'_>| {
            let (queries, keys) = (self.queries(state, seen), self.keys(state, seen));
            let error = |a: usize| spread(self.missing(state, seen, &queries, &keys, a), &seen.weights[a]);
            vec![one((0..self.active.len()).map(error).sum())]
        };
        self.summed(of).first().map_or(0.0, |sum| sum[(0, 0)])
    }

    /// What the scores of an active head lack, (T, T).
    fn missing(
        &self,
        state: &State,
        seen: &Seen<'_>,
        queries: &[Array2<f32>],
        keys: &[Array2<f32>],
        a: usize,
    ) -> Array2<f32> {
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
        let gradient = product(moved.t(), over.view());
        Mat::from_fn(gradient.nrows(), gradient.ncols(), |i, j| f64::from(gradient[[i, j]]))
    }

    /// One side refitted with the other held.
    fn step(&self, state: &mut State, side: Side) -> Result<()> {
        let before = self.error(state);
        let kept = state.clone();
        let scale = (state.h as f32).sqrt().recip();
        let place = |state: &State, a: usize| if side == Side::Queries { a } else { self.group(state, a) };
        let unknowns = if side == Side::Queries { self.active.len() } else { self.groups.len() };
        // For each unknown the sum over its heads.
        let gathered = |state: &State, of_heads: Vec<Mat<f64>>| {
            let mut sums: Vec<Option<Mat<f64>>> = (0..unknowns).map(|_| None).collect();
            for (a, of_head) in of_heads.into_iter().enumerate() {
                let sum = &mut sums[place(state, a)];
                *sum = Some(sum.take().map_or(of_head.clone(), |sum| sum + of_head));
            }
            sums.into_iter().flatten().collect::<Vec<_>>()
        };
        let frozen = &kept;
        let gradient = self.summed(|seen| {
            let (queries, keys) = (self.queries(frozen, seen), self.keys(frozen, seen));
            let back = |a: usize| {
                let other = if side == Side::Queries {
                    &keys[self.group(frozen, a)] * scale
                } else {
                    queries[a].clone()
                };
                self.back(frozen, seen, side, a, &other, self.missing(frozen, seen, &queries, &keys, a))
            };
            gathered(frozen, (0..self.active.len()).map(back).collect())
        });
        let metric = self.metric(frozen, side)?;
        let steps = descend(gradient, &metric, RIDGE, ITERATIONS, false, |guess| {
            Ok(self.summed(|seen| {
                let (queries, keys) = (self.queries(frozen, seen), self.keys(frozen, seen));
                let back = |a: usize| {
                    let group = self.group(frozen, a);
                    let moved = |over: &Array2<f32>| {
                        let guess = &guess[place(frozen, a)];
                        let guess = Array2::from_shape_fn((guess.nrows(), guess.ncols()), |(i, j)| {
                            guess[(i, j)] as f32
                        });
                        self.positions.turned(product(over.view(), guess.t()))
                    };
                    let (change, other) = match side {
                        Side::Queries => {
                            let keys = &keys[group] * scale;
                            (product(moved(&seen.queries[a]).view(), keys.t()), keys)
                        }
                        Side::Keys => {
                            (product(queries[a].view(), moved(&seen.features[group]).t()), queries[a].clone())
                        }
                    };
                    self.back(frozen, seen, side, a, &other, change)
                };
                gathered(frozen, (0..self.active.len()).map(back).collect())
            }))
        })?;
        let h = state.h;
        for (place, step) in steps.iter().enumerate() {
            match side {
                Side::Queries => {
                    let q = self.active[place];
                    add(&mut state.query, q, h, step, block(&self.source.query, q, h));
                }
                Side::Keys => add(&mut state.key, self.groups[place], h, step, self.bases[place].view()),
            }
        }
        // In f32 a step that gains nothing may lose a rounding.
        let after = self.error(state);
        if !after.is_finite() || after > before {
            *state = kept;
        }
        Ok(())
    }

    /// Roughly what the scores make of a change: energies of the other side by frequency, times those of what it mixes.
    fn metric(&self, state: &State, side: Side) -> Result<Vec<Kronecker>> {
        let unknowns = if side == Side::Queries { self.active.len() } else { self.groups.len() };
        let h = state.h;
        let heads = |place: usize| -> Vec<usize> {
            (0..self.active.len())
                .filter(|&a| {
                    side == Side::Queries && a == place || side == Side::Keys && self.group(state, a) == place
                })
                .collect()
        };
        let lefts = self.summed(|seen| {
            let (queries, keys) = (self.queries(state, seen), self.keys(state, seen));
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
        let rights = self.summed(|seen| {
            let moment = |rows: &Array2<f32>| {
                let product = product(rows.t(), rows.view());
                Mat::from_fn(product.nrows(), product.ncols(), |i, j| f64::from(product[[i, j]]))
            };
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
/// summing to 1 again: what an error of that score does.
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
        let scale = if sum > 0.0 { sum.recip() } else { 0.0 };
        row.mapv_inplace(|weight| weight * scale);
    }
}

/// `Σ w (v − mean_w v)²`.
fn spread(values: Array2<f32>, weights: &Array2<f32>) -> f64 {
    let mut centred = values.clone();
    centre(&mut centred, weights);
    centred.iter().zip(&values).map(|(c, v)| f64::from(*c) * f64::from(*v)).sum()
}

fn one(value: f64) -> Mat<f64> {
    Mat::from_fn(1, 1, |_, _| value)
}
