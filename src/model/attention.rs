use std::collections::BTreeSet;

use super::{HeadNorm, Rotary, Rotation};

/// The attention of one layer: how many heads, where they lie, and how a score comes about.
///
/// Query head q reads KV head `q / (query_heads / kv_heads)`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AttentionSpec {
    /// Query heads, H·r.
    pub query_heads: usize,
    /// KV heads, H; divides the query heads.
    pub kv_heads: usize,
    /// Dimensions of a head, h.
    pub head_dim: usize,
    /// Where the heads lie in the files; `None` for heads that come from elsewhere.
    pub stored: Option<StoredHeads>,
    /// How positions turn queries and keys; `None` where they do not.
    pub rotary: Option<Rotary>,
    /// Which keys a query may look at.
    pub mask: Mask,
    /// What products of queries and keys are multiplied by before the softmax.
    pub scale: f64,
    /// c, where scores are then bounded to `c tanh(x / c)` (Gemma 2, arXiv 2408.00118).
    pub cap: Option<f64>,
    /// What scores get for the distance of a key, where they do.
    pub alibi: Option<Alibi>,
    /// The norms of queries and of keys, between projection and rotation; their biases come before.
    pub norms: [Option<HeadNorm>; 2],
    /// Name of the sinks, (query_heads), where there are any: a score of each query head that takes its share of the softmax and
    /// reads nothing (Xiao et al. 2024, arXiv 2309.17453; learned in gpt-oss, arXiv 2508.10925).
    pub sinks: Option<String>,
    /// Where the layer has no keys and values of its own: for each of its KV heads the head of the layer below that it is, as that
    /// layer computed and caches it (Brandon et al. 2024, arXiv 2405.12981). Its [`StoredHeads`] say where those lie.
    pub below: Option<Vec<usize>>,
}

/// Linear biases (ALiBi, Press et al. 2022, arXiv 2108.12409): a score of query head q for the key at position p gets
/// `slopes[q]·p`, to which the softmax is the same as to `−slopes[q]·(t − p)`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Alibi {
    /// One for each query head.
    pub slopes: Vec<f32>,
    /// Whether biases are rounded to bf16 before they are added, as transformers has it for Falcon.
    pub rounded: bool,
    /// What they are multiplied by.
    pub factor: f64,
}

impl Alibi {
    /// These slopes.
    pub fn new(slopes: Vec<f32>) -> Self {
        Self { slopes, rounded: false, factor: 1.0 }
    }

    /// Says that biases are rounded to bf16, then multiplied.
    pub fn rounded(self, factor: f64) -> Self {
        Self { rounded: true, factor, ..self }
    }

    /// The usual slopes of so many heads: powers of `2^(−8/n)`, where n is the largest power of 2 up to their number, and those
    /// between for the others.
    pub fn usual(heads: usize) -> Vec<f32> {
        let most = if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 };
        let power = |of: usize, i: usize| (-8.0 * i as f64 / of as f64).exp2() as f32;
        let between = (0..heads - most).map(|i| power(2 * most, 2 * i + 1));
        (1..=most).map(|i| power(most, i)).chain(between).collect()
    }
}

/// Which keys a query at position t may look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Mask {
    /// Those at positions up to t.
    #[default]
    Causal,
    /// The last `window` of these, the one at t included.
    Sliding {
        /// Positions that a query may look back at, its own included.
        window: usize,
    },
    /// Those of the whole text, what follows included: encoders.
    Whole,
}

impl Mask {
    /// Positions that a query may look back at, its own included; `usize::MAX` for all.
    pub fn reach(self) -> usize {
        match self {
            Self::Causal | Self::Whole => usize::MAX,
            Self::Sliding { window } => window,
        }
    }
}

/// The four projections of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// (H·r heads of h, d).
    Query,
    /// (H heads of h, d).
    Key,
    /// (H heads of h, d).
    Value,
    /// (d, H·r heads of h).
    Output,
}

impl Part {
    /// All four, in this order.
    pub const ALL: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];
}

/// The dimension of a stored matrix along which heads follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// The first: rows, as `nn.Linear` stores queries, keys and values, (heads·h, d).
    Rows,
    /// The second: columns, as `nn.Linear` stores the output projection, (d, heads·h).
    Columns,
}

/// Where the heads of one projection lie in a tensor: head i takes h places from `first + i·stride` on.
///
/// Split projections have `stride` h and `first` 0; in a fused `[Q; K; V]` keys begin after the queries; where each head's
/// query, key and value lie side by side the stride is 3h.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stored {
    /// Name of the matrix.
    pub tensor: String,
    /// Name of the bias. That of queries, keys and values is laid out as the matrix is; that of the output is one vector (d).
    pub bias: Option<String>,
    /// Along which dimension the heads follow one another.
    pub axis: Axis,
    /// Where head 0 begins along it.
    pub first: usize,
    /// From one head to the next.
    pub stride: usize,
    /// Length of that dimension, whatever else it holds.
    pub extent: usize,
}

impl Stored {
    /// `heads` heads of `head_dim` that have a tensor to themselves.
    pub fn split(tensor: impl Into<String>, axis: Axis, heads: usize, head_dim: usize) -> Self {
        let extent = heads * head_dim;
        Self { tensor: tensor.into(), bias: None, axis, first: 0, stride: head_dim, extent }
    }

    /// Heads that lie among others: from `first` on, `stride` apart, in a dimension of `extent`.
    pub fn among(self, first: usize, stride: usize, extent: usize) -> Self {
        Self { first, stride, extent, ..self }
    }

    /// Adds the name of the bias, where there is one.
    pub fn with_bias(self, bias: Option<String>) -> Self {
        Self { bias, ..self }
    }

    /// Shape of the matrix, where the other dimension is `width`.
    pub fn shape(&self, width: usize) -> [usize; 2] {
        match self.axis {
            Axis::Rows => [self.extent, width],
            Axis::Columns => [width, self.extent],
        }
    }
}

/// Where the heads of a layer lie in the files.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredHeads {
    /// Queries.
    pub query: Stored,
    /// Keys.
    pub key: Stored,
    /// Values.
    pub value: Stored,
    /// The output projection.
    pub output: Stored,
}

impl StoredHeads {
    /// The four projections of a layer.
    pub fn new(query: Stored, key: Stored, value: Stored, output: Stored) -> Self {
        Self { query, key, value, output }
    }

    /// One of them.
    pub fn part(&self, part: Part) -> &Stored {
        match part {
            Part::Query => &self.query,
            Part::Key => &self.key,
            Part::Value => &self.value,
            Part::Output => &self.output,
        }
    }

    /// Names of the tensors that hold heads or their biases, each once, sorted.
    pub fn tensors(&self) -> BTreeSet<&str> {
        let all = Part::ALL.into_iter().map(|part| self.part(part));
        all.flat_map(|stored| [Some(stored.tensor.as_str()), stored.bias.as_deref()]).flatten().collect()
    }
}

impl AttentionSpec {
    /// Heads without positions, that look at all tokens before them, with scores divided by √h.
    pub fn new(query_heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let scale = (head_dim as f64).sqrt().recip();
        Self {
            query_heads,
            kv_heads,
            head_dim,
            stored: None,
            rotary: None,
            mask: Mask::Causal,
            scale,
            cap: None,
            alibi: None,
            norms: [None, None],
            sinks: None,
            below: None,
        }
    }

    /// Says where the heads lie.
    pub fn with_stored(self, stored: StoredHeads) -> Self {
        Self { stored: Some(stored), ..self }
    }

    /// Says how positions turn queries and keys.
    pub fn with_rotary(self, rotary: Rotary) -> Self {
        Self { rotary: Some(rotary), ..self }
    }

    /// Says which keys a query may look at.
    pub fn with_mask(self, mask: Mask) -> Self {
        Self { mask, ..self }
    }

    /// Says what scores are multiplied by.
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale, ..self }
    }

    /// Says what scores are bounded to.
    pub fn with_cap(self, cap: Option<f64>) -> Self {
        Self { cap, ..self }
    }

    /// Says what scores get for the distance of a key.
    pub fn with_alibi(self, alibi: Alibi) -> Self {
        Self { alibi: Some(alibi), ..self }
    }

    /// Adds the norms of queries and of keys.
    pub fn with_norms(self, query: HeadNorm, key: HeadNorm) -> Self {
        Self { norms: [Some(query), Some(key)], ..self }
    }

    /// Adds the name of the sinks.
    pub fn with_sinks(self, sinks: Option<String>) -> Self {
        Self { sinks, ..self }
    }

    /// Says which heads of the layer below it reads, in place of keys and values of its own.
    pub fn with_below(self, below: Option<Vec<usize>>) -> Self {
        Self { below, ..self }
    }

    /// KV heads that the layer computes and caches: none where it reads those of the layer below.
    pub fn cached_heads(&self) -> usize {
        if self.below.is_some() { 0 } else { self.kv_heads }
    }

    /// Query heads of each KV head, r.
    pub fn queries_per_head(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Which dimensions turn together.
    pub fn rotation(&self) -> Rotation {
        self.rotary.as_ref().map_or(Rotation::None, |rotary| rotary.rotation)
    }

    /// Heads of a projection.
    pub fn heads(&self, part: Part) -> usize {
        match part {
            Part::Query | Part::Output => self.query_heads,
            Part::Key | Part::Value => self.kv_heads,
        }
    }
}
