//! Mixtures of MLPs, forward and backward.

use candle_core::{D, Result as Candle, Tensor};
use candle_nn::ops::softmax;

use super::layer::linear;
use super::mlp::Dense;

/// Experts and what chooses among them.
#[derive(Debug, Clone)]
pub(super) struct Mixture {
    /// (E, d).
    pub(super) router: Tensor,
    pub(super) router_bias: Option<Tensor>,
    pub(super) experts: Vec<Dense>,
    pub(super) chosen: usize,
    pub(super) normalised: bool,
}

/// The tokens that go through one expert, and their shares.
struct Visit {
    tokens: Tensor,
    /// (n, 1).
    shares: Tensor,
    /// Where each share stands among those of its token.
    places: Vec<(usize, usize)>,
}

/// What every token chose: experts, and the share of each.
struct Choice {
    experts: Vec<Vec<usize>>,
    shares: Vec<Vec<f32>>,
    /// Of all experts.
    all: Vec<Vec<f32>>,
}

impl Mixture {
    fn choose(&self, x: &Tensor) -> Candle<Choice> {
        let all = softmax(&linear(x, &self.router, &self.router_bias)?, D::Minus1)?.to_vec2::<f32>()?;
        let chosen = self.chosen.min(self.experts.len());
        let best = |row: &Vec<f32>| {
            let mut order: Vec<usize> = (0..row.len()).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            order.truncate(chosen);
            order
        };
        let experts: Vec<Vec<usize>> = all.iter().map(best).collect();
        let shares = experts.iter().zip(&all).map(|(experts, row)| {
            let shares: Vec<f32> = experts.iter().map(|&e| row[e]).collect();
            let sum: f32 = if self.normalised { shares.iter().sum() } else { 1.0 };
            shares.into_iter().map(|share| share / sum).collect()
        });
        Ok(Choice { shares: shares.collect(), experts, all })
    }

    /// Who goes through an expert; `None` where nobody does.
    fn visit(&self, choice: &Choice, expert: usize, x: &Tensor) -> Candle<Option<Visit>> {
        let rows = choice.experts.iter().enumerate();
        let of =
            |(token, chosen): (usize, &Vec<usize>)| Some((token, chosen.iter().position(|&e| e == expert)?));
        let places: Vec<(usize, usize)> = rows.filter_map(of).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let n = places.len();
        let tokens: Vec<u32> = places.iter().map(|&(token, _)| token as u32).collect();
        let shares: Vec<f32> = places.iter().map(|&(token, slot)| choice.shares[token][slot]).collect();
        let tokens = Tensor::from_vec(tokens, n, x.device())?;
        Ok(Some(Visit { tokens, shares: Tensor::from_vec(shares, (n, 1), x.device())?, places }))
    }

    /// (N, d) → (N, d).
    pub(super) fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        let (choice, mut sum) = (self.choose(x)?, x.zeros_like()?);
        for (e, expert) in self.experts.iter().enumerate() {
            let Some(Visit { tokens, shares, .. }) = self.visit(&choice, e, x)? else { continue };
            let made = expert.forward(&x.index_select(&tokens, 0)?)?.broadcast_mul(&shares)?;
            sum = sum.index_add(&tokens, &made, 0)?;
        }
        Ok(sum)
    }

    /// From what it read, (N, d), and the gradient of what it gave to that of what it read.
    pub(super) fn backward(&self, x: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let (choice, mut sum) = (self.choose(x)?, x.zeros_like()?);
        let mut of_shares: Vec<Vec<f32>> =
            choice.shares.iter().map(|shares| vec![0.0; shares.len()]).collect();
        for (e, expert) in self.experts.iter().enumerate() {
            let Some(Visit { tokens, shares, places }) = self.visit(&choice, e, x)? else { continue };
            let (read, of_made) = (x.index_select(&tokens, 0)?, gradient.index_select(&tokens, 0)?);
            let worth = (expert.forward(&read)? * &of_made)?.sum(D::Minus1)?.to_vec1::<f32>()?;
            places.iter().zip(worth).for_each(|(&(token, slot), worth)| of_shares[token][slot] = worth);
            let (back, _) = expert.backward(&read, None, &of_made.broadcast_mul(&shares)?, false)?;
            sum = sum.index_add(&tokens, &back, 0)?;
        }
        sum + self.scores_backward(&choice, &of_shares, x)?.matmul(&self.router)?
    }

    /// From the gradient of shares to that of all scores, (N, E).
    fn scores_backward(&self, choice: &Choice, of_shares: &[Vec<f32>], x: &Tensor) -> Candle<Tensor> {
        let n = self.experts.len();
        let mut scores = vec![0.0f32; choice.all.len() * n];
        for (token, row) in scores.chunks_exact_mut(n).enumerate() {
            let (shares, of) = (&choice.shares[token], &of_shares[token]);
            let mean: f32 = shares.iter().zip(of).map(|(share, of)| share * of).sum();
            // Of a softmax over those chosen, or over all, of which the others' shares count for nothing.
            if !self.normalised {
                row.iter_mut().zip(&choice.all[token]).for_each(|(row, share)| *row = -share * mean);
            }
            for (slot, &expert) in choice.experts[token].iter().enumerate() {
                row[expert] = shares[slot] * (of[slot] - mean);
            }
        }
        Tensor::from_vec(scores, (choice.all.len(), n), x.device())
    }
}
