/// A forward pass besides attention: the tensors that it reads, by name, and what it does with them.
///
/// Tokens are embedded, go through the blocks, are normed, and meet the output embedding.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Forward {
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Tokens that the model has positions for.
    pub positions: usize,
    /// The input embedding, (vocabulary, d).
    pub embedding: String,
    /// What each layer does besides attention.
    pub blocks: Vec<Block>,
    /// The norm after the last layer.
    pub norm: Norm,
    /// The output embedding, (vocabulary, d); that of the input where the two are tied.
    pub head: String,
}

impl Forward {
    /// The parts in the order in which a token meets them.
    pub fn new(
        vocabulary: usize,
        positions: usize,
        embedding: impl Into<String>,
        blocks: Vec<Block>,
        norm: Norm,
        head: impl Into<String>,
    ) -> Self {
        Self { vocabulary, positions, embedding: embedding.into(), blocks, norm, head: head.into() }
    }

    /// Names of all tensors that it reads besides those of the heads.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let outer = [self.embedding.as_str(), self.norm.weight.as_str(), self.head.as_str()];
        outer.into_iter().chain(self.blocks.iter().flat_map(Block::tensors))
    }
}

/// A layer around its attention: `x + attention(norm(x))`, then `y + mlp(norm(y))`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Block {
    /// What the attention reads x through.
    pub attention_norm: Norm,
    /// What the MLP reads y through.
    pub mlp_norm: Norm,
    /// The MLP.
    pub mlp: Mlp,
}

impl Block {
    /// A layer with its two norms and its MLP.
    pub fn new(attention_norm: Norm, mlp_norm: Norm, mlp: Mlp) -> Self {
        Self { attention_norm, mlp_norm, mlp }
    }

    fn tensors(&self) -> impl Iterator<Item = &str> {
        let Mlp { gate, up, down } = &self.mlp;
        let norms = [&self.attention_norm, &self.mlp_norm].map(|norm| norm.weight.as_str());
        let linears = [gate, up, down].into_iter();
        linears.flat_map(|l| [Some(l.weight.as_str()), l.bias.as_deref()]).flatten().chain(norms)
    }
}

/// A root mean square norm, `w ⊙ x / √(mean x² + ε)` (Zhang & Sennrich 2019, arXiv 1910.07467).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Norm {
    /// Name of w, (d).
    pub weight: String,
    /// ε.
    pub epsilon: f64,
}

impl Norm {
    /// The norm with this weight and ε.
    pub fn new(weight: impl Into<String>, epsilon: f64) -> Self {
        Self { weight: weight.into(), epsilon }
    }
}

/// A gated MLP, `down(silu(gate(x)) ⊙ up(x))` (Shazeer 2020, arXiv 2002.05202).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Mlp {
    /// (m, d).
    pub gate: Linear,
    /// (m, d).
    pub up: Linear,
    /// (d, m).
    pub down: Linear,
}

impl Mlp {
    /// The MLP of these three projections.
    pub fn new(gate: Linear, up: Linear, down: Linear) -> Self {
        Self { gate, up, down }
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
}

impl Linear {
    /// The projection of this weight and bias.
    pub fn new(weight: impl Into<String>, bias: Option<String>) -> Self {
        Self { weight: weight.into(), bias }
    }
}
