//! MLPs, forward and backward.

use candle_core::{DType, Result as Candle, Tensor};

use super::RuntimeError;
use super::experts::Mixture;
use super::layer::{Weights, biased, narrow, wide};
use super::ops::{activated, activated_backward, gated, gated_apart, gated_apart_backward, gated_backward};
use crate::files::FileError;
use crate::model::{Activation, Experts, FeedForward, Linear, Mlp};

/// What a layer puts its stream through besides attention.
#[derive(Debug, Clone)]
pub(super) enum Hidden {
    Dense(Dense),
    Experts(Mixture),
}

/// An MLP and its weights.
#[derive(Debug, Clone)]
pub(super) struct Dense {
    /// Gate rows where there are any, then up rows, (m or 2m, d).
    pub(super) up: Tensor,
    pub(super) up_bias: Option<Tensor>,
    /// (d, m).
    pub(super) down: Tensor,
    pub(super) down_bias: Option<Tensor>,
    pub(super) activation: Activation,
    pub(super) has_gate: bool,
    /// Whether products with weights in BF16 are of that type.
    rounding: bool,
}

/// What an activation reads.
#[derive(Debug, Clone)]
pub(super) enum Above {
    /// Gates where there are any, then values, (N, m or 2m).
    Whole(Tensor),
    /// Gates and values, (N, m) each: on a GPU parts of rows take several times as long as whole ones.
    Apart([Tensor; 2]),
}

impl Above {
    pub(super) fn tensors(&self) -> &[Tensor] {
        match self {
            Self::Whole(all) => std::slice::from_ref(all),
            Self::Apart(both) => both,
        }
    }
}

impl Hidden {
    pub(super) fn load(weights: &Weights<'_>, of: &FeedForward) -> Result<Self, RuntimeError> {
        let Experts { router, router_bias, chosen, normalised, .. } = match of {
            FeedForward::Mlp(mlp) => return Ok(Self::Dense(Dense::load(weights, mlp)?)),
            FeedForward::Experts(experts) => experts,
        };
        let experts = of.mlps().iter().map(|mlp| Dense::load(weights, mlp)).collect::<Result<Vec<_>, _>>()?;
        let router = weights.take(router, &[experts.len(), weights.width])?;
        let bias = router_bias.as_ref().map(|bias| weights.take(bias, &[experts.len()]));
        let router_bias = bias.transpose()?;
        Ok(Self::Experts(Mixture { router, router_bias, experts, chosen: *chosen, normalised: *normalised }))
    }

    pub(super) fn check(weights: &Weights<'_>, of: &FeedForward) -> Result<(), FileError> {
        if let FeedForward::Experts(Experts { router, router_bias, experts, .. }) = of {
            weights.checkpoint.check_tensor(router, &[experts.len(), weights.width])?;
            let mut bias = router_bias.iter();
            bias.try_for_each(|bias| weights.checkpoint.check_tensor(bias, &[experts.len()]))?;
        }
        of.mlps().iter().try_for_each(|mlp| Dense::check(weights, mlp))
    }

    /// As this, with products in BF16 where the weights are.
    pub(super) fn rounding(self) -> Self {
        let one = |dense: Dense| Dense { rounding: true, ..dense };
        match self {
            Self::Dense(dense) => Self::Dense(one(dense)),
            Self::Experts(mixture) => {
                Self::Experts(Mixture { experts: mixture.experts.into_iter().map(one).collect(), ..mixture })
            }
        }
    }

    /// (N, d) → (N, d).
    pub(super) fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        match self {
            Self::Dense(dense) => dense.forward(x),
            Self::Experts(mixture) => mixture.forward(x),
        }
    }

    /// What the activation of an MLP reads of x (N, d); of experts, each of which reads some tokens, nothing.
    pub(super) fn above(&self, x: &Tensor) -> Candle<Option<Above>> {
        match self {
            Self::Dense(dense) => Ok(Some(dense.above(x, &dense.ready(&dense.up, x)?)?)),
            Self::Experts(_) => Ok(None),
        }
    }

    /// [`Hidden::forward`], from [`Hidden::above`] where that is known.
    pub(super) fn made(&self, x: &Tensor, above: Option<&Above>) -> Candle<Tensor> {
        match (self, above) {
            (Self::Dense(dense), Some(above)) => dense.made(above),
            _ => self.forward(x),
        }
    }

    /// From what it read, (N, d), [`Hidden::above`] where that is known, and the gradient of what it gave to that of what it read and,
    /// where asked for, of the weights of an MLP.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        above: Option<&Above>,
        gradient: &Tensor,
        weights: bool,
    ) -> Candle<(Tensor, Option<Self>)> {
        match self {
            Self::Dense(dense) => {
                let (input, of_weights) = dense.backward(x, above, gradient, weights)?;
                Ok((input, of_weights.map(Self::Dense)))
            }
            Self::Experts(mixture) => Ok((mixture.backward(x, gradient)?, None)),
        }
    }
}

impl Dense {
    fn load(weights: &Weights<'_>, mlp: &Mlp) -> Result<Self, RuntimeError> {
        let (d, m) = (weights.width, weights.intermediate(mlp)?);
        let above: Vec<&Linear> = mlp.gate.iter().chain([&mlp.up]).collect();
        let up = match above[..] {
            // Both halves of one tensor: as it is.
            [gate, up]
                if gate.weight == up.weight
                    && (gate.part, up.part) == ((0, 2), (1, 2))
                    && !gate.interleaved
                    && gate.stacked.is_none() =>
            {
                weights.weight(&gate.clone().part(0, 1), 2 * m, d)?
            }
            [one] => weights.weight(one, m, d)?,
            // Into its place: where layers are read from files this is the most that is there at once.
            _ => {
                let all = Tensor::zeros((above.len() * m, d), DType::F32, weights.device)?;
                for (i, linear) in above.iter().enumerate() {
                    all.slice_set(&weights.weight(linear, m, d)?, 0, i * m)?;
                }
                all
            }
        };
        let biases = above.iter().map(|linear| weights.bias(linear, m));
        let biases: Vec<Option<Tensor>> = biases.collect::<Result<_, _>>()?;
        let up_bias = if biases.iter().all(Option::is_none) {
            None
        } else {
            let zeros = Tensor::zeros(m, DType::F32, weights.device)?;
            let biases: Vec<Tensor> = biases.into_iter().map(|b| b.unwrap_or(zeros.clone())).collect();
            Some(Tensor::cat(&biases, 0)?)
        };
        Ok(Self {
            up: narrow(up)?,
            up_bias,
            down: narrow(weights.weight(&mlp.down, d, m)?)?,
            down_bias: weights.bias(&mlp.down, d)?,
            activation: mlp.activation,
            has_gate: mlp.gate.is_some(),
            rounding: false,
        })
    }

    fn check(weights: &Weights<'_>, mlp: &Mlp) -> Result<(), FileError> {
        let (d, m) = (weights.width, weights.intermediate(mlp)?);
        mlp.gate.iter().chain([&mlp.up]).try_for_each(|linear| weights.check(linear, m, d))?;
        weights.check(&mlp.down, d, m)
    }

    /// A weight as its products take it: in BF16 where these round, else as wide as x.
    fn ready(&self, weight: &Tensor, x: &Tensor) -> Candle<Tensor> {
        if self.rounding && weight.dtype() == DType::BF16 { Ok(weight.clone()) } else { wide(weight, x) }
    }

    /// What the activation reads of x (N, d); `up` is ready.
    fn above(&self, x: &Tensor, up: &Tensor) -> Candle<Above> {
        match self.has_gate && !x.device().is_cpu() {
            true => self.apart(x, up),
            false => Ok(Above::Whole(biased(product(x, &up.t()?)?, &self.up_bias)?)),
        }
    }

    /// [`Dense::above`] on a GPU, of what has gates.
    pub(super) fn apart(&self, x: &Tensor, up: &Tensor) -> Candle<Above> {
        let (up, biases) = (Self::halves(up)?, self.up_bias.as_ref().map(Self::halves).transpose()?);
        let [gates, values] = biases.map_or([None, None], |halves| halves.map(Some));
        Ok(Above::Apart([
            biased(product(x, &up[0].t()?)?, &gates)?,
            biased(product(x, &up[1].t()?)?, &values)?,
        ]))
    }

    /// The rows of gates and those of values, of what has both.
    fn halves(rows: &Tensor) -> Candle<[Tensor; 2]> {
        let m = rows.dim(0)? / 2;
        Ok([rows.narrow(0, 0, m)?, rows.narrow(0, m, m)?])
    }

    /// What the activation makes of what it reads, (N, m).
    fn hidden(&self, above: &Above) -> Candle<Tensor> {
        match above {
            Above::Whole(all) if self.has_gate => gated(self.activation, all),
            Above::Whole(all) => activated(self.activation, all),
            Above::Apart(both) => gated_apart(self.activation, both),
        }
    }

    /// What it gives, (N, d), from what the activation reads.
    fn made(&self, above: &Above) -> Candle<Tensor> {
        let hidden = self.hidden(above)?;
        biased(product(&hidden, &self.ready(&self.down, &hidden)?.t()?)?, &self.down_bias)
    }

    /// (N, d) → (N, d).
    pub(super) fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        self.made(&self.above(x, &self.ready(&self.up, x)?)?)
    }

    /// The gradient of what it read, and of its weights, which lie as they do; what the activation reads is computed again unless known.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        above: Option<&Above>,
        gradient: &Tensor,
        weights: bool,
    ) -> Candle<(Tensor, Option<Self>)> {
        // One widening for both products.
        let up = self.ready(&self.up, x)?;
        let of_hidden = product(gradient, &self.ready(&self.down, gradient)?)?;
        let above = above.map_or_else(|| self.above(x, &up), |above| Ok(above.clone()))?;
        let hidden = weights.then(|| self.hidden(&above)).transpose()?;
        let (input, of_above) = match above {
            Above::Apart(both) => {
                let halves = Self::halves(&up)?;
                let [of_gate, of_value] = gated_apart_backward(self.activation, &both, &of_hidden)?;
                let input = (product(&of_gate, &halves[0])? + product(&of_value, &halves[1])?)?;
                (input, vec![of_gate, of_value])
            }
            Above::Whole(all) => {
                let back = if self.has_gate { gated_backward } else { activated_backward };
                let of_above = back(self.activation, &all, &of_hidden)?;
                (product(&of_above, &up)?, vec![of_above])
            }
        };
        let Some(hidden) = hidden else { return Ok((input, None)) };
        let ups = of_above.iter().map(|of| of.t()?.matmul(x)).collect::<Candle<Vec<_>>>()?;
        let biases = of_above.iter().map(|of| of.sum(0)).collect::<Candle<Vec<_>>>()?;
        let of_weights = Self {
            up: Tensor::cat(&ups, 0)?,
            up_bias: self.up_bias.as_ref().map(|_| Tensor::cat(&biases, 0)).transpose()?,
            down: gradient.t()?.matmul(&hidden)?,
            down_bias: self.down_bias.as_ref().map(|_| gradient.sum(0)).transpose()?,
            ..self.clone()
        };
        Ok((input, Some(of_weights)))
    }
}

/// x (N, a) times a weight that is ready, (a, b), in the type of the weight.
fn product(x: &Tensor, weight: &Tensor) -> Candle<Tensor> {
    x.to_dtype(weight.dtype())?.matmul(weight)?.to_dtype(x.dtype())
}

impl Weights<'_> {
    /// The width of an MLP, m, which no configuration need say.
    fn intermediate(&self, mlp: &Mlp) -> Result<usize, FileError> {
        let shape = self.checkpoint.tensors().shape(&mlp.up.weight);
        let place = usize::from(mlp.up.transposed) + usize::from(mlp.up.stacked.is_some());
        let all = shape.and_then(|shape| shape.get(place).copied());
        all.map(|all| all / mlp.up.part.1).ok_or_else(|| self.checkpoint.missing(&mlp.up.weight, &[]))
    }

    /// The weight of a projection, (out, inputs).
    fn weight(&self, linear: &Linear, out: usize, inputs: usize) -> Result<Tensor, RuntimeError> {
        let [shape, _] = linear.shapes(out, inputs);
        let stored = self.one(linear, &linear.weight, &shape)?;
        let whole = if linear.transposed { stored.t()? } else { stored };
        Ok(part(linear, &whole, out)?.contiguous()?)
    }

    /// The bias of a projection, (out).
    fn bias(&self, linear: &Linear, out: usize) -> Result<Option<Tensor>, RuntimeError> {
        let Some(name) = &linear.bias else { return Ok(None) };
        let [_, shape] = linear.shapes(out, 0);
        let whole = self.one(linear, name, &shape)?;
        Ok(Some(part(linear, &whole, out)?.contiguous()?))
    }

    /// A tensor of a projection; where it holds several, no more than its own is read.
    fn one(&self, linear: &Linear, name: &str, shape: &[usize]) -> Result<Tensor, RuntimeError> {
        let Some((number, _)) = linear.stacked else { return self.take(name, shape) };
        self.checkpoint.check_tensor(name, shape)?;
        let own = &shape[1..];
        let rows: usize = own[..own.len() - 1].iter().product();
        let rows: Vec<u32> = (number * rows..(number + 1) * rows).map(|row| row as u32).collect();
        Ok(Tensor::from_vec(self.checkpoint.rows_of(name, &rows)?, own, self.device)?)
    }

    fn check(&self, linear: &Linear, out: usize, inputs: usize) -> Result<(), FileError> {
        let [weight, bias] = linear.shapes(out, inputs);
        self.checkpoint.check_tensor(&linear.weight, &weight)?;
        let named = linear.bias.as_ref();
        named.map_or(Ok(()), |name| self.checkpoint.check_tensor(name, &bias))
    }
}

/// The outputs of a projection among those of all parts, `out` each, along the first dimension.
fn part(linear: &Linear, whole: &Tensor, out: usize) -> Candle<Tensor> {
    let (number, of) = linear.part;
    if !linear.interleaved {
        return whole.narrow(0, number * out, out);
    }
    let places: Vec<u32> = (0..out).map(|i| (i * of + number) as u32).collect();
    whole.contiguous()?.index_select(&Tensor::from_vec(places, out, whole.device())?, 0)
}
