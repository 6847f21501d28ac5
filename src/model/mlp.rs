/// What an MLP puts its hidden numbers through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
    /// `x Φ(x)` with the normal distribution's Φ (Hendrycks & Gimpel 2016, arXiv 1606.08415).
    Gelu,
    /// Its approximation by a hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²` (So et al. 2021, arXiv 2109.08668).
    ReluSquared,
    /// `x σ(1.702 x)` of `min(x, 7)`, and behind a gate `1 + v` of values v kept within ±7 (gpt-oss, arXiv 2508.10925).
    Clipped,
}

/// An MLP: `down(a(up(x)))`, or with a gate `down(a(gate(x)) ⊙ up(x))` (Shazeer 2020, arXiv 2002.05202), a the activation.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Mlp {
    /// (m, d); `None` without a gate.
    pub gate: Option<Linear>,
    /// (m, d).
    pub up: Linear,
    /// (d, m).
    pub down: Linear,
    /// a.
    pub activation: Activation,
}

impl Mlp {
    /// The gated MLP of these three projections, with [`Activation::Silu`].
    pub fn new(gate: Linear, up: Linear, down: Linear) -> Self {
        Self { gate: Some(gate), up, down, activation: Activation::Silu }
    }

    /// An MLP without a gate.
    pub fn plain(up: Linear, down: Linear, activation: Activation) -> Self {
        Self { gate: None, up, down, activation }
    }

    /// Replaces the activation.
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// Names of its tensors; one that holds two projections comes twice.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let linears = self.gate.iter().chain([&self.up, &self.down]);
        linears.flat_map(|l| [Some(l.weight.as_str()), l.bias.as_deref()]).flatten()
    }
}

/// What a layer puts its stream through besides attention.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[expect(clippy::large_enum_variant, reason = "a layer has one")]
pub enum FeedForward {
    /// One MLP for all tokens.
    Mlp(Mlp),
    /// Some of many for each token.
    Experts(Experts),
}

impl From<Mlp> for FeedForward {
    fn from(mlp: Mlp) -> Self {
        Self::Mlp(mlp)
    }
}

impl From<Experts> for FeedForward {
    fn from(experts: Experts) -> Self {
        Self::Experts(experts)
    }
}

impl FeedForward {
    /// All MLPs.
    pub fn mlps(&self) -> &[Mlp] {
        match self {
            Self::Mlp(mlp) => std::slice::from_ref(mlp),
            Self::Experts(experts) => &experts.experts,
        }
    }

    /// Names of its tensors; one that holds two projections comes twice.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let experts = match self {
            Self::Mlp(_) => None,
            Self::Experts(experts) => Some(experts),
        };
        let router = experts.map(|experts| [Some(experts.router.as_str()), experts.router_bias.as_deref()]);
        self.mlps().iter().flat_map(Mlp::tensors).chain(router.into_iter().flatten().flatten())
    }
}

/// A mixture of experts: each token goes through those whose scores are the highest, and what they give is added up by their
/// shares (Shazeer et al. 2017, arXiv 1701.06538).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Experts {
    /// Name of the scores' weight, (experts, d).
    pub router: String,
    /// Name of their bias, (experts), where there is one.
    pub router_bias: Option<String>,
    /// The experts.
    pub experts: Vec<Mlp>,
    /// How many a token goes through.
    pub chosen: usize,
    /// Whether shares are the softmax over those chosen, and not over all.
    pub normalised: bool,
}

impl Experts {
    /// These experts, of which each token goes through `chosen`.
    pub fn new(router: impl Into<String>, experts: Vec<Mlp>, chosen: usize, normalised: bool) -> Self {
        Self { router: router.into(), router_bias: None, experts, chosen, normalised }
    }

    /// Adds the name of the scores' bias.
    pub fn with_router_bias(self, router_bias: Option<String>) -> Self {
        Self { router_bias, ..self }
    }
}

/// A projection by its tensors' names: weight (out, in), bias (out).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Linear {
    /// Name of the weight.
    pub weight: String,
    /// Name of the bias, where there is one.
    pub bias: Option<String>,
    /// Which of equally many parts of a fused tensor it is, along its outputs: (number, of how many).
    pub part: (usize, usize),
    /// Whether the tensor is stored the other way round, (in, out), as GPT-2 does.
    pub transposed: bool,
    /// Whether the outputs of its parts take turns in the tensor, and do not follow one another.
    pub interleaved: bool,
    /// Which of the projections it is, (number, of how many), that lie in one tensor along a first dimension of their own.
    pub stacked: Option<(usize, usize)>,
}

impl Linear {
    /// The projection of this weight and bias.
    pub fn new(weight: impl Into<String>, bias: Option<String>) -> Self {
        Self {
            weight: weight.into(),
            bias,
            part: (0, 1),
            transposed: false,
            interleaved: false,
            stacked: None,
        }
    }

    /// Says that it is part number `number` of `of` in its tensors.
    pub fn part(self, number: usize, of: usize) -> Self {
        Self { part: (number, of), ..self }
    }

    /// Says that its weight is stored as (in, out).
    pub fn transposed(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// Says that parts take turns in its tensors.
    pub fn interleaved(self) -> Self {
        Self { interleaved: true, ..self }
    }

    /// Says that it is projection number `number` of the `of` that its tensors hold.
    pub fn stacked(self, number: usize, of: usize) -> Self {
        Self { stacked: Some((number, of)), ..self }
    }

    /// Shapes of its tensors, weight and bias, of so many outputs and inputs.
    pub fn shapes(&self, out: usize, inputs: usize) -> [Vec<usize>; 2] {
        let (stack, out) = (self.stacked.map(|(_, of)| of), self.part.1 * out);
        let matrix = if self.transposed { [inputs, out] } else { [out, inputs] };
        [&matrix[..], &[out]].map(|of| stack.into_iter().chain(of.iter().copied()).collect())
    }
}
