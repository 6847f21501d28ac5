//! MLPs and mixtures of them, forward and backward.

use candle_core::{D, DType, Result as Candle, Tensor};
use candle_nn::ops::softmax;

use super::RuntimeError;
use super::layer::{Weights, biased, linear, narrow, wide};
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

/// Experts and what chooses among them.
#[derive(Debug, Clone)]
pub(super) struct Mixture {
    /// (E, d).
    router: Tensor,
    router_bias: Option<Tensor>,
    experts: Vec<Dense>,
    chosen: usize,
    normalised: bool,
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

    /// From what it read, (N, d), and the gradient of what it gave to that of what it read and, where asked for, of the weights of an
    /// MLP.
    pub(super) fn backward(
        &self,
        x: &Tensor,
        gradient: &Tensor,
        weights: bool,
    ) -> Candle<(Tensor, Option<Self>)> {
        match self {
            Self::Dense(dense) => {
                let (input, of_weights) = dense.backward(x, gradient, weights)?;
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
        let rows = match above[..] {
            // Both halves of one tensor: as it is.
            [gate, up]
                if gate.weight == up.weight
                    && (gate.part, up.part) == ((0, 2), (1, 2))
                    && !gate.interleaved
                    && gate.stacked.is_none() =>
            {
                vec![weights.weight(&gate.clone().part(0, 1), 2 * m, d)?]
            }
            _ => above.iter().map(|linear| weights.weight(linear, m, d)).collect::<Result<_, _>>()?,
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
            up: narrow(Tensor::cat(&rows, 0)?)?,
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

    /// What the activation reads, (N, d) → (N, m or 2m); `up` is ready.
    fn widened(&self, x: &Tensor, up: &Tensor) -> Candle<Tensor> {
        biased(product(x, &up.t()?)?, &self.up_bias)
    }

    /// The rows of gates and those of values, of what has both.
    fn halves(rows: &Tensor) -> Candle<[Tensor; 2]> {
        let m = rows.dim(0)? / 2;
        Ok([rows.narrow(0, 0, m)?, rows.narrow(0, m, m)?])
    }

    /// [`Dense::widened`], gates and values apart, (N, m) each: on a GPU parts of rows take several times as long as whole ones.
    fn widened_apart(&self, x: &Tensor, up: &[Tensor; 2]) -> Candle<[Tensor; 2]> {
        let biases = self.up_bias.as_ref().map(Self::halves).transpose()?;
        let [gates, values] = biases.map_or([None, None], |halves| halves.map(Some));
        Ok([biased(product(x, &up[0].t()?)?, &gates)?, biased(product(x, &up[1].t()?)?, &values)?])
    }

    /// (N, d) → (N, d).
    pub(super) fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        let up = self.ready(&self.up, x)?;
        let hidden = match (self.has_gate, x.device().is_cpu()) {
            (true, true) => gated(self.activation, &self.widened(x, &up)?)?,
            (true, false) => gated_apart(self.activation, &self.widened_apart(x, &Self::halves(&up)?)?)?,
            (false, _) => activated(self.activation, &self.widened(x, &up)?)?,
        };
        biased(product(&hidden, &self.ready(&self.down, x)?.t()?)?, &self.down_bias)
    }

    /// The gradient of what it read, and of its weights, which lie as they do.
    fn backward(&self, x: &Tensor, gradient: &Tensor, weights: bool) -> Candle<(Tensor, Option<Self>)> {
        let up = self.ready(&self.up, x)?;
        let of_hidden = product(gradient, &self.ready(&self.down, gradient)?)?;
        let (input, hidden, of_above) = if self.has_gate && !x.device().is_cpu() {
            let halves = Self::halves(&up)?;
            let above = self.widened_apart(x, &halves)?;
            let [of_gate, of_value] = gated_apart_backward(self.activation, &above, &of_hidden)?;
            let input = (product(&of_gate, &halves[0])? + product(&of_value, &halves[1])?)?;
            let hidden = weights.then(|| gated_apart(self.activation, &above)).transpose()?;
            (input, hidden, vec![of_gate, of_value])
        } else {
            let above = self.widened(x, &up)?;
            let (forward, back): (fn(_, &_) -> _, fn(_, &_, &_) -> _) =
                if self.has_gate { (gated, gated_backward) } else { (activated, activated_backward) };
            let of_above = back(self.activation, &above, &of_hidden)?;
            let hidden = weights.then(|| forward(self.activation, &above)).transpose()?;
            (product(&of_above, &up)?, hidden, vec![of_above])
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

    fn forward(&self, x: &Tensor) -> Candle<Tensor> {
        let (choice, mut sum) = (self.choose(x)?, x.zeros_like()?);
        for (e, expert) in self.experts.iter().enumerate() {
            let Some(Visit { tokens, shares, .. }) = self.visit(&choice, e, x)? else { continue };
            let made = expert.forward(&x.index_select(&tokens, 0)?)?.broadcast_mul(&shares)?;
            sum = sum.index_add(&tokens, &made, 0)?;
        }
        Ok(sum)
    }

    fn backward(&self, x: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let (choice, mut sum) = (self.choose(x)?, x.zeros_like()?);
        let mut of_shares: Vec<Vec<f32>> =
            choice.shares.iter().map(|shares| vec![0.0; shares.len()]).collect();
        for (e, expert) in self.experts.iter().enumerate() {
            let Some(Visit { tokens, shares, places }) = self.visit(&choice, e, x)? else { continue };
            let (read, of_made) = (x.index_select(&tokens, 0)?, gradient.index_select(&tokens, 0)?);
            let worth = (expert.forward(&read)? * &of_made)?.sum(D::Minus1)?.to_vec1::<f32>()?;
            places.iter().zip(worth).for_each(|(&(token, slot), worth)| of_shares[token][slot] = worth);
            let (back, _) = expert.backward(&read, &of_made.broadcast_mul(&shares)?, false)?;
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
