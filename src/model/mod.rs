//! A model, described once: where its heads lie, what stands between projection and score, what the rest of it does.
//!
//! A [family](crate::checkpoint::Family) makes an [`Architecture`] from a configuration and tensor names; readers, writers, poolers, the
//! runtime and targets read it. Nobody else looks at a model type or a tensor's name.

mod attention;
mod forward;
mod identity;
mod mlp;
mod norm;
mod rotation;

pub use attention::{Alibi, AttentionSpec, Axis, Mask, Part, Stored, StoredHeads};
pub use forward::{Block, Forward, Learned};
pub use identity::{LayerShape, ModelId};
pub use mlp::{Activation, Experts, FeedForward, Linear, Mlp};
pub use norm::{HeadNorm, Norm, NormKind, NormOver};
pub use rotation::{Rotary, Rotation, Stretch};

use std::fmt::{self, Display};

/// What a model computes, and in which tensors it keeps what it needs for that.
///
/// ```
/// use qcqa::model::{Architecture, AttentionSpec};
///
/// // Two layers of raw tensors: 8 query heads on 8 KV heads, then 8 on 4.
/// let layers = vec![AttentionSpec::new(8, 8, 16), AttentionSpec::new(8, 4, 16)];
/// let model = Architecture::new("raw", 128, layers);
/// assert_eq!(model.kv_heads(), [8, 4]);
/// assert_eq!(model.kv_bytes_per_token(2), 2 * (8 + 4) * 16 * 2);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Architecture {
    /// The checkpoint's `model_type`; `"raw"` for tensors without a checkpoint.
    pub model_type: String,
    /// Width of the model, d.
    pub hidden: usize,
    /// The attention of every layer.
    pub layers: Vec<AttentionSpec>,
    /// Where config.json holds the number of KV heads, as a JSON pointer; `None` for models that always have as many as query
    /// heads, and so no grouped form of their own.
    pub kv_heads_at: Option<String>,
    /// Whether the output embedding is the input embedding.
    pub tied_embeddings: bool,
    /// All that a forward pass takes besides attention, or why this crate cannot run the model.
    pub forward: Result<Forward, Unsupported>,
    /// Where the files contradict themselves, and which of their words was taken: that which transformers takes.
    pub notes: Vec<String>,
}

impl Architecture {
    /// A model of which only the attention is known.
    pub fn new(model_type: impl Into<String>, hidden: usize, layers: Vec<AttentionSpec>) -> Self {
        let unknown =
            Unsupported::new("running a model of which only the attention is known", "open its checkpoint");
        Self {
            model_type: model_type.into(),
            hidden,
            layers,
            kv_heads_at: Some("/num_key_value_heads".to_string()),
            tied_embeddings: false,
            forward: Err(unknown),
            notes: Vec::new(),
        }
    }

    /// Says what the rest of the model does, or why it cannot be run.
    pub fn with_forward(self, forward: Result<Forward, Unsupported>) -> Self {
        Self { forward, ..self }
    }

    /// Number of layers, L.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// The first layer that reads the keys and values of the one below.
    pub fn first_below(&self) -> Option<usize> {
        self.layers.iter().position(|layer| layer.below.is_some())
    }

    /// KV heads of every layer, H.
    pub fn kv_heads(&self) -> Vec<usize> {
        self.layers.iter().map(|layer| layer.kv_heads).collect()
    }

    /// Bytes of keys and values that one token takes in the cache, over all layers, at `bytes_per_element` a number.
    pub fn kv_bytes_per_token(&self, bytes_per_element: usize) -> usize {
        let numbers = self.layers.iter().map(|layer| 2 * layer.cached_heads() * layer.head_dim);
        numbers.sum::<usize>() * bytes_per_element
    }

    /// The cache that is left when every layer keeps this many heads, in bytes per token.
    ///
    /// # Panics
    /// When there is no layer for one of them.
    pub fn kv_bytes_with(&self, heads: &[usize], bytes_per_element: usize) -> usize {
        let numbers = heads.iter().enumerate().map(|(i, heads)| 2 * heads * self.layers[i].head_dim);
        numbers.sum::<usize>() * bytes_per_element
    }
}

/// Something about a model that this crate cannot deal with, and what to do instead.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unsupported {
    /// What is not supported.
    pub what: String,
    /// What to do, or what is supported.
    pub hint: String,
}

impl Unsupported {
    /// `what` is not supported; `hint` says what to do.
    pub fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: hint.into() }
    }
}

impl Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not supported; {}", self.what, self.hint)
    }
}
