//! What belongs to heads besides their projections: norms between projection and rotation, and sinks.

use candle_core::{Result as Candle, Tensor};

use super::RuntimeError;
use super::layer::{Normed, Weights};
use crate::checkpoint::Dtype;
use crate::files::FileError;
use crate::model::{AttentionSpec, HeadNorm, Norm, NormOver, Part};

/// The norms of queries and of keys, and the sinks of query heads, where there are any.
#[derive(Debug, Clone, Default)]
pub(super) struct HeadNorms {
    pub(super) query: Option<HeadNormed>,
    key: Option<HeadNormed>,
    /// One for each query head; empty for none.
    pub(super) sinks: Vec<f32>,
}

/// A norm of heads and its weights: (h), or (heads·h) in the order of the heads.
#[derive(Debug, Clone)]
pub(super) struct HeadNormed {
    norm: Normed,
    over: NormOver,
    /// What the heads are multiplied by afterwards, (heads·h), where each has weights of its own: the norm's are then 1.
    own: Option<Tensor>,
    /// As which its weights are stored, of what was made of them too.
    stored: Dtype,
}

impl HeadNorms {
    /// Of a layer, in the order of the source's heads.
    pub(super) fn load(weights: &Weights<'_>, spec: &AttentionSpec) -> Result<Self, RuntimeError> {
        let [query, key] = sized(spec).map(|(norm, size)| {
            let load = |head_norm: &HeadNorm| {
                let HeadNorm { norm, over, .. } = head_norm;
                let stored = head_norm.tensors().next().map(|name| weights.checkpoint.dtype_of(name));
                let (own, shared) = match over {
                    NormOver::OwnHead => (true, &Norm { weight: None, ..norm.clone() }),
                    _ => (false, norm),
                };
                let all = own.then(|| {
                    let parts = shapes(head_norm, size, spec.head_dim)
                        .map(|(name, shape)| Ok(weights.take(name, &shape)?.flatten_all()?));
                    Ok::<_, RuntimeError>(Tensor::cat(&parts.collect::<Result<Vec<_>, RuntimeError>>()?, 0)?)
                });
                let width = if own { spec.head_dim } else { size };
                Ok::<_, RuntimeError>(HeadNormed {
                    norm: Normed::load(weights, shared, width)?,
                    over: *over,
                    own: all.transpose()?,
                    stored: stored.transpose()?.unwrap_or(Dtype::F32),
                })
            };
            norm.map(load).transpose()
        });
        let sinks = spec.sinks.as_ref().map(|name| weights.checkpoint.tensor_of(name, &[spec.query_heads]));
        let sinks = sinks.transpose()?.map(|sinks| sinks.into_raw_vec_and_offset().0).unwrap_or_default();
        Ok(Self { query: query?, key: key?, sinks })
    }

    /// Whether what [`HeadNorms::load`] reads is there and of its shape.
    pub(super) fn check(weights: &Weights<'_>, spec: &AttentionSpec) -> Result<(), FileError> {
        let mut sinks = spec.sinks.iter();
        sinks.try_for_each(|name| weights.checkpoint.check_tensor(name, &[spec.query_heads]))?;
        sized(spec).into_iter().try_for_each(|(norm, size)| {
            let mut parts = norm.into_iter().flat_map(|norm| shapes(norm, size, spec.head_dim));
            parts.try_for_each(|(name, shape)| weights.checkpoint.check_tensor(name, &shape))
        })
    }

    /// For these query heads of the source, and for keys that each stand for some of its heads.
    pub(super) fn ordered(self, queries: &[usize], groups: &[&[usize]], h: usize) -> Candle<Self> {
        let own = if self.sinks.is_empty() { &[] } else { queries };
        let sinks = own.iter().map(|&query| self.sinks[query]).collect();
        let queries: Vec<&[usize]> = queries.chunks(1).collect();
        let order = |normed: Option<HeadNormed>, groups: &[&[usize]]| {
            normed.map(|normed| normed.ordered(groups, h)).transpose()
        };
        Ok(Self { query: order(self.query, &queries)?, key: order(self.key, groups)?, sinks })
    }

    /// Queries and keys, (N, n·h) each, through their norms.
    pub(super) fn of(&self, [query, key]: [&Tensor; 2]) -> Candle<[Tensor; 2]> {
        let of = |norm: &Option<HeadNormed>, x: &Tensor| match norm {
            Some(norm) => norm.of(x),
            None => Ok(x.clone()),
        };
        Ok([of(&self.query, query)?, of(&self.key, key)?])
    }

    /// What passes back through them, from what they read and the gradients of what they made of it.
    pub(super) fn backward(
        &self,
        [query, key]: [&Tensor; 2],
        [of_query, of_key]: [Tensor; 2],
    ) -> Candle<[Tensor; 2]> {
        let back = |norm: &Option<HeadNormed>, x: &Tensor, of: Tensor| match norm {
            Some(norm) => norm.backward(x, &of),
            None => Ok(of),
        };
        Ok([back(&self.query, query, of_query)?, back(&self.key, key, of_key)?])
    }

    /// Whether there is no norm.
    pub(super) fn is_empty(&self) -> bool {
        self.query.is_none() && self.key.is_none()
    }
}

/// The norms of queries and keys, and the size of their weights.
fn sized(spec: &AttentionSpec) -> [(Option<&HeadNorm>, usize); 2] {
    let [query, key] = &spec.norms;
    [(query, Part::Query), (key, Part::Key)].map(|(norm, part)| {
        let heads = match norm {
            Some(HeadNorm { over: NormOver::Width | NormOver::OwnHead, .. }) => spec.heads(part),
            _ => 1,
        };
        (norm.as_ref(), heads * spec.head_dim)
    })
}

/// The tensors of a norm of heads of width h whose weights have this size together, and their shapes.
fn shapes(norm: &HeadNorm, size: usize, h: usize) -> impl Iterator<Item = (&str, Vec<usize>)> {
    let shape = match norm.over {
        NormOver::OwnHead if norm.heads.is_empty() => vec![size / h, h],
        NormOver::OwnHead => vec![h],
        _ => vec![size],
    };
    norm.tensors().map(move |name| (name, shape.clone()))
}

impl HeadNormed {
    /// Weights of groups of heads: where each head has its own, the mean of its members'.
    fn ordered(self, groups: &[&[usize]], h: usize) -> Candle<Self> {
        let mean = |weights: &Tensor| {
            let numbers: Vec<f32> = weights.to_vec1()?;
            let of = |members: &[usize], r: usize| match members {
                [alone] => numbers[alone * h + r],
                _ => {
                    let sum: f32 = members.iter().map(|head| numbers[head * h + r]).sum();
                    self.stored.round(sum / members.len() as f32)
                }
            };
            let means: Vec<f32> = groups.iter().flat_map(|g| (0..h).map(move |r| of(g, r))).collect();
            Tensor::from_vec(means, groups.len() * h, weights.device())
        };
        match self.over {
            NormOver::Head => Ok(self),
            NormOver::OwnHead => {
                let own = self.own.as_ref().map(mean).transpose()?;
                Ok(Self { own, ..self })
            }
            NormOver::Width => {
                let (weight, bias) = (mean(&self.norm.weight)?, mean(&self.norm.bias)?);
                Ok(Self { norm: Normed { weight, bias, ..self.norm }, ..self })
            }
        }
    }

    /// Heads (N, n·h) → (N, n·h).
    pub(super) fn of(&self, heads: &Tensor) -> Candle<Tensor> {
        let rows = self.rows(heads)?;
        let normed = self.norm.of(&rows)?.reshape(heads.shape())?;
        self.own.as_ref().map_or(Ok(normed.clone()), |own| normed.broadcast_mul(own))
    }

    /// What passes back, (N, n·h).
    pub(super) fn backward(&self, heads: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let gradient = match &self.own {
            Some(own) => gradient.broadcast_mul(own)?,
            None => gradient.clone(),
        };
        let (rows, gradient) = (self.rows(heads)?, self.rows(&gradient)?);
        self.norm.backward(&rows, &gradient)?.reshape(heads.shape())
    }

    /// What the norm is taken over, in rows.
    fn rows(&self, heads: &Tensor) -> Candle<Tensor> {
        heads.contiguous()?.reshape(((), self.norm.weight.elem_count()))
    }
}
