#[cfg(feature = "checkpoint")]
use super::Linear;
use super::{FeedForward, Norm};

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
    /// What embedded tokens are multiplied by.
    pub embedding_scale: f64,
    /// Learned positions, added to embedded tokens.
    pub learned: Option<Learned>,
    /// The embedding of token types, where there is one: all tokens are of its first.
    pub token_types: Option<String>,
    /// The norm of what was embedded, where there is one.
    pub embedding_norm: Option<Norm>,
    /// What each layer does besides attention.
    pub blocks: Vec<Block>,
    /// The norm after the last layer, where there is one.
    pub norm: Option<Norm>,
    /// The output embedding, (vocabulary, d); that of the input where the two are tied. `None`: the model predicts no next token, as
    /// encoders do not.
    pub head: Option<String>,
    /// Its bias, (vocabulary), where there is one.
    pub head_bias: Option<String>,
    /// What logits are multiplied by.
    pub logit_scale: f64,
    /// c, where logits are then bounded to `c tanh(x / c)`.
    pub logit_cap: Option<f64>,
}

/// Learned positions: that of token t is row `t + first` of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Learned {
    /// Name of the tensor, (first + positions, d).
    pub tensor: String,
    /// The row of the first position.
    pub first: usize,
}

impl Learned {
    /// The positions of this tensor, from this row on.
    pub fn new(tensor: impl Into<String>, first: usize) -> Self {
        Self { tensor: tensor.into(), first }
    }
}

impl Forward {
    /// The parts in the order in which a token meets them.
    pub fn new(
        vocabulary: usize,
        positions: usize,
        embedding: impl Into<String>,
        blocks: Vec<Block>,
        norm: Option<Norm>,
        head: Option<&str>,
    ) -> Self {
        Self {
            vocabulary,
            positions,
            embedding: embedding.into(),
            embedding_scale: 1.0,
            learned: None,
            token_types: None,
            embedding_norm: None,
            blocks,
            norm,
            head: head.map(str::to_string),
            head_bias: None,
            logit_scale: 1.0,
            logit_cap: None,
        }
    }

    /// Names of all tensors that it reads besides those of the heads.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let outer =
            [Some(&self.embedding), self.token_types.as_ref(), self.head.as_ref(), self.head_bias.as_ref()];
        let outer = outer.into_iter().flatten().map(String::as_str);
        let norms = self.embedding_norm.iter().chain(&self.norm).flat_map(Norm::tensors);
        let learned = self.learned.iter().map(|learned| learned.tensor.as_str());
        outer.chain(learned).chain(norms).chain(self.blocks.iter().flat_map(Block::tensors))
    }
}

/// A layer around its attention.
///
/// One after the other: `y = x + r·after(attention(before(x)))`, then `y + r·after'(mlp(before'(y)))`; in parallel:
/// `x + r·after(attention(before(x))) + r·after'(mlp(before'(x)))`; norms behind the sums, as in the first Transformers:
/// `y = norm(x + r·attention(x))`, then `norm'(y + r·mlp(y))`. A norm that is not there leaves things as they are.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Block {
    /// What the attention reads x through.
    pub attention_norm: Option<Norm>,
    /// What the attention's output goes through before it is added.
    pub attention_output_norm: Option<Norm>,
    /// What the MLP reads through.
    pub mlp_norm: Option<Norm>,
    /// What the MLP's output goes through before it is added.
    pub mlp_output_norm: Option<Norm>,
    /// The MLP, or experts.
    pub mlp: FeedForward,
    /// Whether the MLP reads what the attention reads, instead of what it gives.
    pub parallel: bool,
    /// The norms behind the two sums, where that is their place.
    pub sum_norms: [Option<Norm>; 2],
    /// r, what is added is multiplied by.
    pub residual: f64,
}

impl Block {
    /// A layer with a norm before its attention and one before its MLP.
    pub fn new(attention_norm: Norm, mlp_norm: Norm, mlp: impl Into<FeedForward>) -> Self {
        Self::bare(mlp).with_norms(Some(attention_norm), Some(mlp_norm))
    }

    /// A layer without norms.
    pub fn bare(mlp: impl Into<FeedForward>) -> Self {
        Self {
            attention_norm: None,
            attention_output_norm: None,
            mlp_norm: None,
            mlp_output_norm: None,
            mlp: mlp.into(),
            parallel: false,
            sum_norms: [None, None],
            residual: 1.0,
        }
    }

    /// Replaces the norms that attention and MLP read through.
    pub fn with_norms(self, attention_norm: Option<Norm>, mlp_norm: Option<Norm>) -> Self {
        Self { attention_norm, mlp_norm, ..self }
    }

    /// Replaces the norms of what attention and MLP give.
    pub fn with_output_norms(
        self,
        attention_output_norm: Option<Norm>,
        mlp_output_norm: Option<Norm>,
    ) -> Self {
        Self { attention_output_norm, mlp_output_norm, ..self }
    }

    /// Adds norms behind the sums of the stream with what attention and MLP give.
    pub fn with_sum_norms(self, attention: Norm, mlp: Norm) -> Self {
        Self { sum_norms: [Some(attention), Some(mlp)], ..self }
    }

    /// Says that attention and MLP read the same.
    pub fn in_parallel(self) -> Self {
        Self { parallel: true, ..self }
    }

    /// Says what is added is multiplied by.
    pub fn with_residual(self, residual: f64) -> Self {
        Self { residual, ..self }
    }

    /// All norms that there are.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        let [a, b] = [&self.attention_norm, &self.attention_output_norm];
        let [c, d] = [&self.mlp_norm, &self.mlp_output_norm];
        [a, b, c, d].into_iter().chain(&self.sum_norms).flatten()
    }

    /// Names of tensors that are this layer's and no attention's, and of one use alone: those of norms, and of an MLP; of experts none.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn own_tensors(&self) -> Vec<&str> {
        let norms: Vec<&str> = self.norms().flat_map(Norm::tensors).collect();
        let once = |name: &&str| norms.iter().filter(|other| other == &name).count() == 1;
        let mut own: Vec<&str> = norms.iter().copied().filter(once).collect();
        if let FeedForward::Mlp(mlp) = &self.mlp {
            let linears: Vec<&Linear> = mlp.gate.iter().chain([&mlp.up, &mlp.down]).collect();
            let parts =
                |linear: &Linear| linears.iter().filter(|other| other.weight == linear.weight).count();
            for linear in linears.iter().filter(|of| of.stacked.is_none() && parts(of) == of.part.1) {
                own.extend([Some(linear.weight.as_str()), linear.bias.as_deref()].into_iter().flatten());
            }
        }
        own
    }

    fn tensors(&self) -> impl Iterator<Item = &str> {
        self.mlp.tensors().chain(self.norms().flat_map(Norm::tensors))
    }
}
