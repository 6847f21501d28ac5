//! Where families keep things, by name, and what their layers differ in.

use crate::checkpoint::{Config, TensorIndex};
use crate::files::FileError;

/// Keys of config.json, each with its other names: the first that is there counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys {
    pub(super) layers: &'static [&'static str],
    pub(super) hidden: &'static [&'static str],
    pub(super) query_heads: &'static [&'static str],
    pub(super) positions: &'static [&'static str],
}

impl Keys {
    pub(super) const USUAL: Self = Self {
        layers: &["num_hidden_layers"],
        hidden: &["hidden_size"],
        query_heads: &["num_attention_heads"],
        positions: &["max_position_embeddings"],
    };
    /// Those of GPT-2 and what followed it.
    pub(super) const SHORT: Self = Self {
        layers: &["n_layer", "num_hidden_layers"],
        hidden: &["n_embd", "hidden_size"],
        query_heads: &["n_head", "num_attention_heads"],
        positions: &["n_positions", "max_position_embeddings"],
    };
}

/// The name under which a number is given; the first where it is not.
pub(super) fn given(config: &Config, names: &'static [&'static str]) -> &'static str {
    names.iter().copied().find(|name| config.get(name).is_some()).unwrap_or(names[0])
}

/// That the text part of a model with pictures is of this type.
pub(super) fn only(config: &Config, nested: bool, model_type: &str) -> Result<(), FileError> {
    match config.get("model_type").filter(|_| nested) {
        Some(found) if found != model_type => {
            let what = format!("a text part of the type {found} (`text_config`)");
            Err(config.unsupported(what, format!("{model_type} is")))
        }
        _ => Ok(()),
    }
}

/// Names of tensors, without `.weight`; those of a layer without its prefix.
#[derive(Debug, Clone)]
pub(super) struct Names {
    /// Of the stack: `model.layers`.
    pub(super) layers: String,
    pub(super) attention: &'static str,
    pub(super) heads: HeadNames,
    pub(super) output: &'static str,
    /// Conv1D: every matrix of a layer is stored as (in, out).
    pub(super) transposed: bool,
    pub(super) attention_norm: Option<&'static str>,
    pub(super) attention_output_norm: Option<&'static str>,
    pub(super) mlp_norm: Option<&'static str>,
    pub(super) mlp_output_norm: Option<&'static str>,
    /// Behind the sums of the stream with what attention and MLP give.
    pub(super) sum_norms: Option<[&'static str; 2]>,
    pub(super) mlp: MlpNames,
    pub(super) head_norms: [&'static str; 2],
    /// Of query heads, in the attention.
    pub(super) sinks: Option<&'static str>,
    pub(super) embedding: String,
    pub(super) token_types: Option<String>,
    pub(super) embedding_norm: Option<String>,
    pub(super) norm: Option<String>,
    pub(super) head: String,
}

/// Where queries, keys and values are.
#[derive(Debug, Clone, Copy)]
pub(super) enum HeadNames {
    /// In three tensors.
    Split([&'static str; 3]),
    /// In one, all queries, then all keys, then all values.
    Joined(&'static str),
    /// In one, query, key and value of each head side by side.
    ByHead(&'static str),
}

/// Where an MLP is.
#[derive(Debug, Clone, Copy)]
pub(super) enum MlpNames {
    /// Gate, up, down.
    Gated([&'static str; 3]),
    /// Gate over up in one tensor, and down.
    Joined([&'static str; 2]),
    /// Up and down, without a gate.
    Plain([&'static str; 2]),
}

/// Which projections may have a bias: one that is not stored is 0, one that is stored elsewhere is nobody's.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Biases {
    pub(super) queries_keys_values: bool,
    pub(super) outputs: bool,
    pub(super) mlp: bool,
    pub(super) head: bool,
    /// Of norms that have none, although layer norms may.
    pub(super) no_norms: bool,
}

/// What layers differ in.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerKinds {
    /// The window of each layer; empty: none has one.
    pub(super) windows: Vec<Option<usize>>,
    /// Whether each layer turns; empty: all do.
    pub(super) turned: Vec<bool>,
    /// The kind of each layer for rotary positions; empty: all are of one.
    pub(super) ropes: Vec<&'static str>,
}

impl Names {
    /// Llama's, of the text part where a model has others.
    pub(super) fn found(tensors: &dyn TensorIndex) -> Self {
        let at = |root: &str| tensors.shape(&format!("{root}embed_tokens.weight")).is_some();
        match ["model.language_model.", "language_model.model."].into_iter().find(|root| at(root)) {
            None => Self::llama("model."),
            Some(root) => {
                let own = "language_model.lm_head.weight";
                let head = if tensors.shape(own).is_some() { own } else { "lm_head.weight" };
                Self { head: head.to_string(), ..Self::llama(root) }
            }
        }
    }

    /// Llama's, of a stack with this prefix.
    pub(super) fn llama(prefix: &str) -> Self {
        Self {
            layers: format!("{prefix}layers"),
            attention: "self_attn",
            heads: HeadNames::Split(["q_proj", "k_proj", "v_proj"]),
            output: "o_proj",
            transposed: false,
            attention_norm: Some("input_layernorm"),
            attention_output_norm: None,
            mlp_norm: Some("post_attention_layernorm"),
            mlp_output_norm: None,
            sum_norms: None,
            mlp: MlpNames::Gated(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
            head_norms: ["q_norm", "k_norm"],
            sinks: None,
            embedding: format!("{prefix}embed_tokens.weight"),
            token_types: None,
            embedding_norm: None,
            norm: Some(format!("{prefix}norm")),
            head: "lm_head.weight".to_string(),
        }
    }

    /// With norms behind attention and MLP, and none before.
    pub(super) fn normed_behind(self) -> Self {
        Self {
            attention_norm: None,
            attention_output_norm: Some("post_attention_layernorm"),
            mlp_norm: None,
            mlp_output_norm: Some("post_feedforward_layernorm"),
            ..self
        }
    }

    /// Modules of queries, keys and values.
    pub(super) fn heads(&self) -> Vec<&'static str> {
        match self.heads {
            HeadNames::Split(names) => names.to_vec(),
            HeadNames::Joined(name) | HeadNames::ByHead(name) => vec![name],
        }
    }

    /// What a name says of a tensor of an attention: what comes after the module.
    pub(super) fn of_attention<'n>(&self, name: &'n str) -> Option<&'n str> {
        let (_, rest) = name.strip_prefix(&*self.layers)?.strip_prefix('.')?.split_once('.')?;
        rest.strip_prefix(self.attention)?.strip_prefix('.')
    }
}
