//! What a layer has besides its attention: norms and an MLP. A distillation of all weights trains them, too.

use candle_core::{DType, Result as Candle, Tensor};

use super::RuntimeError;
use super::layer::{Normed, Weights, normed};
use super::mlp::{Above, Hidden};
use super::model::numbers;
use super::ops::combined;
use crate::files::FileError;
use crate::model::{Block, FeedForward, Linear, Norm};
use crate::plan::Others;

/// A layer without its attention, as [`Block`] has it; or gradients that lie as its weights do.
#[derive(Debug, Clone)]
pub(super) struct Rest {
    pub(super) attention_norm: Option<Normed>,
    pub(super) attention_output_norm: Option<Normed>,
    pub(super) mlp_norm: Option<Normed>,
    pub(super) mlp_output_norm: Option<Normed>,
    pub(super) mlp: Hidden,
    pub(super) parallel: bool,
    pub(super) residual: f64,
    pub(super) sum_norms: [Option<Normed>; 2],
}

/// What files make of a tensor here.
enum Stored<'b> {
    /// Under this name, without what was added.
    Vector(&'b str, f64),
    /// Weights of projections, one under the other.
    Matrices(Vec<&'b Linear>),
    /// Biases of projections, one behind the other.
    Biases(Vec<&'b Linear>),
}

impl Rest {
    pub(super) fn load(weights: &Weights<'_>, block: &Block) -> Result<Self, RuntimeError> {
        let norm = |norm: &Option<Norm>| {
            norm.as_ref().map(|norm| Normed::load(weights, norm, weights.width)).transpose()
        };
        Ok(Self {
            attention_norm: norm(&block.attention_norm)?,
            attention_output_norm: norm(&block.attention_output_norm)?,
            mlp_norm: norm(&block.mlp_norm)?,
            mlp_output_norm: norm(&block.mlp_output_norm)?,
            mlp: Hidden::load(weights, &block.mlp)?,
            parallel: block.parallel,
            residual: block.residual,
            sum_norms: [norm(&block.sum_norms[0])?, norm(&block.sum_norms[1])?],
        })
    }

    /// Whether what [`Rest::load`] reads is there and of its shape.
    pub(super) fn check(weights: &Weights<'_>, block: &Block) -> Result<(), FileError> {
        Hidden::check(weights, &block.mlp)?;
        let names = block.norms().flat_map(Norm::tensors);
        names.into_iter().try_for_each(|name| weights.checkpoint.check_tensor(name, &[weights.width]))
    }

    /// As this, with products in BF16 where the weights of the MLP are.
    pub(super) fn rounding(self) -> Self {
        Self { mlp: self.mlp.rounding(), ..self }
    }

    /// What the attention reads, (N, d), after the norm.
    pub(super) fn attention_input(&self, x: &Tensor) -> Candle<Tensor> {
        normed(&self.attention_norm, x)
    }

    /// x and what the attention makes of it, both (N, d): the layer's output, (N, d).
    pub(super) fn finish(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        let y = self.joined(x, attended)?;
        self.added(&y, if self.parallel { x } else { &y })
    }

    /// The stream with what the attention gives, (N, d).
    pub(super) fn joined(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        self.behind(&self.attention_sum(x, attended)?)
    }

    /// The stream with what the MLP makes of `read`, (N, d).
    pub(super) fn added(&self, stream: &Tensor, read: &Tensor) -> Candle<Tensor> {
        normed(&self.sum_norms[1], &self.mlp_sum(stream, read, None)?)
    }

    /// [`Rest::added`], and what the activation of an MLP reads.
    pub(super) fn added_with_above(&self, stream: &Tensor, read: &Tensor) -> Candle<(Tensor, Option<Above>)> {
        let input = normed(&self.mlp_norm, read)?;
        let above = self.mlp.above(&input)?;
        let sum = self.with_made(stream, &self.mlp.made(&input, above.as_ref())?)?;
        Ok((normed(&self.sum_norms[1], &sum)?, above))
    }

    /// What the norm behind the attention's sum makes of it.
    pub(super) fn behind(&self, sum: &Tensor) -> Candle<Tensor> {
        normed(&self.sum_norms[0], sum)
    }

    pub(super) fn attention_sum(&self, x: &Tensor, attended: &Tensor) -> Candle<Tensor> {
        combined(x, 1.0, &normed(&self.attention_output_norm, attended)?, self.residual)
    }

    /// What the last norm reads; what the MLP's activation reads may be known.
    pub(super) fn mlp_sum(&self, stream: &Tensor, read: &Tensor, above: Option<&Above>) -> Candle<Tensor> {
        self.with_made(stream, &self.mlp.made(&normed(&self.mlp_norm, read)?, above)?)
    }

    fn with_made(&self, stream: &Tensor, made: &Tensor) -> Candle<Tensor> {
        combined(stream, 1.0, &normed(&self.mlp_output_norm, made)?, self.residual)
    }

    /// What is trained of it, always in one order.
    fn places<'r, 'b>(&'r mut self, block: &'b Block) -> Vec<(&'r mut Tensor, Stored<'b>)> {
        let (own, mut places) = (block.own_tensors(), Vec::new());
        let [of_attention, of_mlp] = &mut self.sum_norms;
        let norms = [
            (&mut self.attention_norm, &block.attention_norm),
            (&mut self.attention_output_norm, &block.attention_output_norm),
            (&mut self.mlp_norm, &block.mlp_norm),
            (&mut self.mlp_output_norm, &block.mlp_output_norm),
            (of_attention, &block.sum_norms[0]),
            (of_mlp, &block.sum_norms[1]),
        ];
        for (normed, norm) in
            norms.into_iter().filter_map(|(normed, norm)| normed.as_mut().zip(norm.as_ref()))
        {
            let parts =
                [(&mut normed.weight, &norm.weight, norm.offset), (&mut normed.bias, &norm.bias, 0.0)];
            for (tensor, name, added) in parts {
                let name = name.as_deref().filter(|name| own.contains(name));
                places.extend(name.map(|name| (tensor, Stored::Vector(name, added))));
            }
        }
        if let (Hidden::Dense(dense), FeedForward::Mlp(mlp)) = (&mut self.mlp, &block.mlp) {
            let above: Vec<&Linear> = mlp.gate.iter().chain([&mlp.up]).collect();
            let parts = [
                (&mut dense.up, dense.up_bias.as_mut(), above),
                (&mut dense.down, dense.down_bias.as_mut(), vec![&mlp.down]),
            ];
            for (weight, bias, linears) in parts {
                if linears.iter().all(|linear| own.contains(&&*linear.weight)) {
                    places.push((weight, Stored::Matrices(linears.clone())));
                }
                let named = |linear: &&Linear| linear.bias.as_deref().is_some_and(|name| own.contains(&name));
                let bias = bias.filter(|_| linears.iter().all(named));
                places.extend(bias.map(|bias| (bias, Stored::Biases(linears))));
            }
        }
        places
    }

    /// Its tensors that are trained, in f32.
    pub(super) fn trained(&self, block: &Block) -> Candle<Vec<Tensor>> {
        self.clone().places(block).into_iter().map(|(tensor, _)| tensor.to_dtype(DType::F32)).collect()
    }

    /// This with other tensors in the places of those that are trained.
    pub(super) fn with_trained(&self, block: &Block, tensors: &[Tensor]) -> Self {
        let mut rest = self.clone();
        rest.places(block).into_iter().zip(tensors).for_each(|((place, _), tensor)| *place = tensor.clone());
        rest
    }

    /// Its tensors that are trained as files have them, by name; gradients have nothing added to them.
    pub(super) fn stored(&self, block: &Block, are_gradients: bool) -> Result<Others, RuntimeError> {
        let mut all = Others::new();
        for (tensor, stored) in self.clone().places(block) {
            let tensor = tensor.to_dtype(DType::F32)?;
            match stored {
                Stored::Vector(name, added) => {
                    let added = if are_gradients { 0.0 } else { added };
                    all.insert(name.to_string(), numbers(&tensor.affine(1.0, -added)?)?);
                }
                Stored::Matrices(linears) => {
                    let whole = |linear: &Linear, parts: Vec<Tensor>| {
                        let whole = joined(&parts, linear.interleaved)?;
                        numbers(&if linear.transposed { whole.t()?.contiguous()? } else { whole })
                    };
                    take_apart(&linears, &tensor, |linear| Some(&linear.weight), whole, &mut all)?;
                }
                Stored::Biases(linears) => {
                    let whole =
                        |linear: &Linear, parts: Vec<Tensor>| numbers(&joined(&parts, linear.interleaved)?);
                    take_apart(&linears, &tensor, |linear| linear.bias.as_ref(), whole, &mut all)?;
                }
            }
        }
        Ok(all)
    }
}

/// Of what lies here as one the tensors of files: each name has the parts of all projections that say it.
fn take_apart(
    linears: &[&Linear],
    tensor: &Tensor,
    name: impl Fn(&Linear) -> Option<&String>,
    whole: impl Fn(&Linear, Vec<Tensor>) -> Result<Vec<f32>, RuntimeError>,
    all: &mut Others,
) -> Result<(), RuntimeError> {
    let out = tensor.dim(0)? / linears.len();
    for linear in linears {
        let Some(own) = name(linear).filter(|own| !all.contains_key(*own)) else { continue };
        let mut parts: Vec<(usize, usize)> = Vec::new();
        for (place, other) in linears.iter().enumerate() {
            parts.extend((name(other) == Some(own)).then_some((other.part.0, place)));
        }
        parts.sort_unstable();
        let parts = parts.iter().map(|&(_, place)| tensor.narrow(0, place * out, out));
        all.insert(own.clone(), whole(linear, parts.collect::<Candle<_>>()?)?);
    }
    Ok(())
}

/// The outputs of the parts of a projection, one part after the other or by turns.
fn joined(parts: &[Tensor], interleaved: bool) -> Candle<Tensor> {
    if interleaved { Tensor::stack(parts, 1)?.flatten(0, 1) } else { Tensor::cat(parts, 0) }
}
