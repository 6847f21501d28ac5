//! What a model does besides its layers.

use candle_core::Tensor;

use super::RuntimeError;
use super::layer::{Normed, Weights, normed};
use super::ops::times;
use crate::model::{Forward, Learned, Norm};

/// What a model does before its first and after its last layer, the embeddings left out.
#[derive(Debug)]
pub(super) struct Ends {
    embedding_scale: f64,
    /// Learned positions, a row each, (positions, d).
    learned: Option<Tensor>,
    /// The embedding of the first token type, (1, d).
    token_type: Option<Tensor>,
    embedding_norm: Option<Normed>,
    pub(super) norm: Option<Normed>,
    /// (vocabulary).
    pub(super) head_bias: Option<Tensor>,
    pub(super) logit_scale: f64,
    pub(super) logit_cap: Option<f64>,
}

impl Ends {
    pub(super) fn load(weights: &Weights<'_>, forward: &Forward) -> Result<Self, RuntimeError> {
        let d = weights.width;
        let norm = |norm: &Option<Norm>| norm.as_ref().map(|norm| Normed::load(weights, norm, d)).transpose();
        let learned = |Learned { tensor, first, .. }: &Learned| {
            let rows = weights.take(tensor, &[first.saturating_add(forward.positions), d])?;
            Ok::<_, RuntimeError>(rows.narrow(0, *first, forward.positions)?)
        };
        let bias = forward.head_bias.as_ref();
        Ok(Self {
            embedding_scale: forward.embedding_scale,
            learned: forward.learned.as_ref().map(learned).transpose()?,
            token_type: forward.token_types.as_ref().map(|name| weights.first_row(name)).transpose()?,
            embedding_norm: norm(&forward.embedding_norm)?,
            norm: norm(&forward.norm)?,
            head_bias: bias.map(|bias| weights.take(bias, &[forward.vocabulary])).transpose()?,
            logit_scale: forward.logit_scale,
            logit_cap: forward.logit_cap,
        })
    }

    /// What enters the first layer, from the embeddings (B·T, d) of tokens at these T positions.
    pub(super) fn enter(&self, embedded: Tensor, positions: &[usize]) -> Result<Tensor, RuntimeError> {
        let mut x = times(embedded, self.embedding_scale)?;
        if let Some(learned) = &self.learned {
            let rows = x.dim(0)?;
            let places: Vec<u32> = positions.iter().cycle().take(rows).map(|&t| t as u32).collect();
            x = (x + learned.index_select(&Tensor::from_vec(places, rows, learned.device())?, 0)?)?;
        }
        if let Some(token_type) = &self.token_type {
            x = x.broadcast_add(token_type)?;
        }
        Ok(normed(&self.embedding_norm, &x)?)
    }
}
