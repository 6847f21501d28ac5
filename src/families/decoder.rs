//! What most families have in common: a stack of alike layers of which config.json gives the numbers. A family says in which it
//! differs from Llama.

use std::collections::BTreeSet;

use super::checks::heads_and_norms;
use super::experts::Mixture;
use super::names::{Biases, HeadNames, Keys, LayerKinds, MlpNames, Names, given};
use super::norms::NormRule;
use super::rope::{self, RopeRule};
use crate::checkpoint::{Config, TensorIndex};
use crate::files::FileError;
use crate::model::{
    Activation, Alibi, Architecture, AttentionSpec, Axis, Block, Forward, Learned, Linear, Mask, Mlp,
    NormKind, NormOver, Stored, StoredHeads, Unsupported,
};

/// A family's model. Made by [`Decoder::llama`], changed where the family differs, and turned into an [`Architecture`].
pub(super) struct Decoder<'a> {
    pub(super) config: &'a Config,
    /// That of the whole model, where the stack is a part of one.
    pub(super) outer: Option<&'a Config>,
    pub(super) tensors: &'a dyn TensorIndex,
    pub(super) names: Names,
    pub(super) keys: Keys,
    /// Query heads where config.json says nothing.
    pub(super) query_heads: Option<usize>,
    /// KV heads where config.json says nothing; `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
    /// Where config.json has their number, as a JSON pointer; `None`: nowhere.
    pub(super) kv_heads_at: Option<&'static str>,
    /// Width of a head where config.json says nothing; `None`: of the model over query heads.
    pub(super) head_dim: Option<usize>,
    pub(super) biases: Biases,
    /// `None` for models whose heads do not turn.
    pub(super) rope: Option<RopeRule>,
    pub(super) layers: LayerKinds,
    pub(super) head_norms: Option<NormOver>,
    pub(super) norms: NormRule,
    /// Whether norms have no weights.
    pub(super) bare_norms: bool,
    pub(super) activation: Activation,
    /// In the place of MLPs.
    pub(super) mixture: Option<Mixture>,
    /// Besides `1/√h`.
    pub(super) scale: Option<f64>,
    pub(super) cap: Option<f64>,
    pub(super) parallel: bool,
    pub(super) residual: f64,
    pub(super) embedding_scale: f64,
    pub(super) learned: Option<Learned>,
    /// The slopes of so many heads.
    pub(super) alibi: Option<fn(usize) -> Alibi>,
    pub(super) logit_scale: f64,
    pub(super) logit_cap: Option<f64>,
    /// An encoder: every token looks at the whole text, and none is predicted.
    pub(super) encoder: bool,
    /// Whether embeddings are tied where config.json says nothing.
    pub(super) tied: bool,
    /// What keeps the model from being run.
    pub(super) unsupported: Option<Unsupported>,
}

impl<'a> Decoder<'a> {
    /// Llama with its tensors' names.
    pub(super) fn llama(config: &'a Config, tensors: &'a dyn TensorIndex) -> Self {
        Self {
            config,
            outer: None,
            tensors,
            names: Names::llama("model."),
            keys: Keys::USUAL,
            query_heads: None,
            kv_heads: None,
            kv_heads_at: Some("/num_key_value_heads"),
            head_dim: None,
            biases: Biases::default(),
            rope: Some(RopeRule {
                theta: 10_000.0,
                partial: 1.0,
                partial_key: None,
                theta_key: "rope_theta",
                fixed: None,
                original: None,
                yarn_is_longrope: false,
                pairs: rope::half_split,
                positions: 2048,
                of_kind: None,
            }),
            layers: LayerKinds::default(),
            head_norms: None,
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-6), offset: 0.0 },
            bare_norms: false,
            activation: Activation::Silu,
            mixture: None,
            scale: None,
            cap: None,
            parallel: false,
            residual: 1.0,
            embedding_scale: 1.0,
            learned: None,
            alibi: None,
            logit_scale: 1.0,
            logit_cap: None,
            encoder: false,
            tied: false,
            unsupported: None,
        }
    }

    /// Reads the activation of the MLPs, of the first of these keys that there is.
    pub(super) fn acting(mut self, keys: &[&str], otherwise: Activation) -> Self {
        let found = keys.iter().find_map(|&key| Some((key, self.config.get(key)?)));
        let Some((key, named)) = found else { return Self { activation: otherwise, ..self } };
        let activation = match named.as_str().unwrap_or("?") {
            "silu" | "swish" => Some(Activation::Silu),
            "gelu" => Some(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Some(Activation::GeluTanh),
            "relu" => Some(Activation::Relu),
            "relu2" => Some(Activation::ReluSquared),
            _ => None,
        };
        match activation {
            Some(activation) => self.activation = activation,
            None => {
                let what = format!("the activation {named} (`{key}`)");
                let hint = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu and relu2 are";
                self.unsupported = Some(Unsupported::new(what, hint));
            }
        }
        self
    }

    /// Says that the stack is the text part of this model.
    pub(super) fn within(self, whole: &'a Config) -> Self {
        let kv_heads_at = Some("/text_config/num_key_value_heads");
        Self { kv_heads_at, outer: Some(whole), names: Names::found(self.tensors), ..self }
    }

    /// Replaces what is said of rotary positions.
    pub(super) fn with_rope(mut self, change: impl FnOnce(&mut RopeRule)) -> Self {
        if let Some(rule) = &mut self.rope {
            change(rule);
        }
        self
    }

    /// The model, or why it cannot be dealt with.
    pub(super) fn architecture(self) -> Result<Architecture, FileError> {
        let (config, tensors) = (self.config, self.tensors);
        let (n_layers, hidden) = (
            config.required(given(config, self.keys.layers))?,
            config.required(given(config, self.keys.hidden))?,
        );
        let (query_heads, kv_heads) = self.heads()?;
        let head_dim = self.width_of_heads(hidden, query_heads)?;
        let by_layer = self.heads_by_layer(n_layers, head_dim)?;
        let below = self.below_by_layer(by_layer.as_deref())?;
        let mut notes: Vec<String> = rope::contradicted(config, "rope_theta").into_iter().collect();
        let mut unsupported = self.unsupported.clone();
        let mut layers = Vec::new();
        for layer in 0..n_layers {
            // Ends with the first missing layer, which the reader will name, however many config.json claims.
            let [query_heads, kv_heads] =
                by_layer.as_ref().map_or([query_heads, kv_heads], |heads| heads[layer]);
            let mut stored = self.stored(layer, [query_heads, kv_heads, head_dim])?;
            let below = below.get(layer).cloned().flatten();
            if let (Some(_), Some(heads)) = (&below, &by_layer) {
                let [queries, kv] = heads[layer - 1];
                let lower = self.stored(layer - 1, [queries, kv, head_dim])?;
                (stored.key, stored.value) = (lower.key, lower.value);
            }
            let present = tensors.shape(&stored.key.tensor).is_some();
            let mut spec = AttentionSpec::new(query_heads, kv_heads, head_dim).with_cap(self.cap);
            if let Some(scale) = self.scale {
                spec = spec.with_scale(scale);
            }
            if self.encoder {
                spec = spec.with_mask(Mask::Whole);
            }
            if let Some(window) = self.layers.windows.get(layer).copied().flatten() {
                spec = spec.with_mask(Mask::Sliding { window });
            }
            if let Some(alibi) = self.alibi {
                let alibi = alibi(query_heads);
                let factor = spec.scale;
                spec = spec.with_alibi(if alibi.rounded { alibi.rounded(factor) } else { alibi });
            }
            if let Some(rule) = self.rope.filter(|_| self.layers.turned.get(layer) != Some(&false)) {
                let kind = self.layers.ropes.get(layer).copied();
                let (rotary, refused) = rope::rotary(config, head_dim, kind, rule)?;
                unsupported = unsupported.or(refused);
                spec = spec.with_rotary(rotary);
            }
            if let Some(over) = self.head_norms {
                let [query, key] = [query_heads, kv_heads];
                let [for_query, for_key] = self.names.head_norms;
                let norm = |name, heads| self.head_norm(layer, name, over, heads);
                spec = spec.with_norms(norm(for_query, query)?, norm(for_key, key)?);
            }
            let sinks = self.names.sinks;
            let sinks = sinks.map(|name| self.of_layer(layer, &format!("{}.{name}", self.names.attention)));
            layers.push(spec.with_stored(stored).with_sinks(sinks).with_below(below));
            if !present {
                break;
            }
        }
        self.refuse(&layers)?;
        let tied = self.tied_embeddings(&mut notes)?;
        if let Some(bias) = tensors.names().find(|name| self.strays(name)) {
            notes.push(format!(
                "{bias} is stored, but by config.json the model has no such biases: they are not used"
            ));
        }
        if let Some(name) = tensors.names().find(|name| self.is_beyond(name, n_layers)) {
            notes.push(format!(
                "{name} is stored, but by config.json the model has {n_layers} layers: those beyond are not used"
            ));
        }
        // An explicit null is no yes.
        if config.raw().get("is_causal").is_some_and(|causal| causal.as_bool() != Some(true)) {
            let what = "an attention to what follows (`is_causal` is not true)";
            unsupported = Some(Unsupported::new(what, "causal is"));
        }
        let both = |config: &Config| config.get("use_bidirectional_attention").is_some_and(|v| *v != false);
        if self.outer.into_iter().chain([config]).any(both) {
            let what = "an attention to what follows (`use_bidirectional_attention`)";
            unsupported = Some(Unsupported::new(what, "causal is"));
        }
        let model = Architecture {
            tied_embeddings: tied,
            notes,
            kv_heads_at: self.kv_heads_at.map(str::to_string),
            ..Architecture::new(config.model_type()?, hidden, layers)
        };
        let forward = match unsupported {
            None => self.forward(&model)?,
            Some(unsupported) => Err(unsupported),
        };
        Ok(model.with_forward(forward))
    }

    pub(super) fn of_layer(&self, layer: usize, name: &str) -> String {
        format!("{}.{layer}.{name}", self.names.layers)
    }

    /// Where the heads of a layer lie; biases only where the layer is there.
    fn stored(&self, layer: usize, [queries, kv, h]: [usize; 3]) -> Result<StoredHeads, FileError> {
        let bias = |name: &str, wanted: bool| match wanted {
            true => self.uniform(layer, &format!("{}.{name}.bias", self.names.attention)),
            false => Ok(None),
        };
        let (own, outer) = (Axis::Rows, Axis::Columns);
        let (rows, columns) = if self.names.transposed { (outer, own) } else { (own, outer) };
        let weight = |name: &str| self.of_layer(layer, &format!("{}.{name}.weight", self.names.attention));
        let biased = self.biases.queries_keys_values;
        let [query, key, value] = match self.names.heads {
            HeadNames::Split(names) => {
                let [q, k, v] = names.map(|name| {
                    let heads = if name == names[0] { queries } else { kv };
                    let stored = Stored::split(weight(name), rows, heads, h);
                    Ok::<_, FileError>(stored.with_bias(bias(name, biased)?))
                });
                [q?, k?, v?]
            }
            HeadNames::Joined(name) | HeadNames::ByHead(name) => {
                let bias = bias(name, biased)?;
                let by_head = matches!(self.names.heads, HeadNames::ByHead(_));
                let extent = (queries + 2 * kv) * h;
                let firsts = if by_head { [0, 1, 2] } else { [0, queries, queries + kv] };
                let stride = if by_head { 3 * h } else { h };
                firsts.map(|first| {
                    let stored = Stored::split(weight(name), rows, queries, h);
                    stored.among(first * h, stride, extent).with_bias(bias.clone())
                })
            }
        };
        let output = Stored::split(weight(self.names.output), columns, queries, h);
        let output = output.with_bias(bias(self.names.output, self.biases.outputs)?);
        Ok(StoredHeads::new(query, key, value, output))
    }

    /// The name of a layer's bias, where layers have one: all of them, or none.
    fn uniform(&self, layer: usize, name: &str) -> Result<Option<String>, FileError> {
        let [first, own] = [0, layer].map(|i| self.of_layer(i, name));
        let weight = own.strip_suffix("bias").map(|stem| format!("{stem}weight"));
        if weight.is_none_or(|weight| self.tensors.shape(&weight).is_none()) {
            return Ok(None);
        }
        let found = self.tensors.existing(own.clone());
        if found.is_some() != self.tensors.shape(&first).is_some() {
            let path = self.config.path().parent().unwrap_or(self.config.path()).to_path_buf();
            return Err(FileError::UnevenBias { path, tensor: own });
        }
        Ok(found)
    }

    fn tied_embeddings(&self, notes: &mut Vec<String>) -> Result<bool, FileError> {
        let (head, embedding) = (&self.names.head, &self.names.embedding);
        const KEY: &str = "tie_word_embeddings";
        let said = self.outer.into_iter().chain([self.config]).find(|config| config.get(KEY).is_some());
        let tied = match said {
            None => self.tied,
            Some(config) => config.flag(KEY)?,
        };
        if tied && self.tensors.shape(head).is_some() && !self.tensors.equal(head, embedding) {
            notes
                .push(format!("`tie_word_embeddings` is true, but {head} is stored and another: it is used"));
            return Ok(false);
        }
        Ok(tied)
    }

    /// What the rest of the model does, or why it cannot be run.
    fn forward(&self, model: &Architecture) -> Result<Result<Forward, Unsupported>, FileError> {
        let (config, tensors, names) = (self.config, self.tensors, &self.names);
        let mut blocks = Vec::with_capacity(model.n_layers());
        for layer in 0..model.n_layers() {
            let linear = |name: &str| {
                let bias = tensors.existing(self.of_layer(layer, &format!("{name}.bias")));
                let weight = self.of_layer(layer, &format!("{name}.weight"));
                let linear = Linear::new(weight, bias.filter(|_| self.biases.mlp));
                if names.transposed { linear.transposed() } else { linear }
            };
            let mlp = match names.mlp {
                MlpNames::Gated([gate, up, down]) => Mlp::new(linear(gate), linear(up), linear(down)),
                MlpNames::Joined([both, down]) => {
                    Mlp::new(linear(both).part(0, 2), linear(both).part(1, 2), linear(down))
                }
                MlpNames::Plain([up, down]) => Mlp::plain(linear(up), linear(down), self.activation),
            };
            let norm =
                |name: Option<&str>| name.map(|name| self.norm(&self.of_layer(layer, name))).transpose();
            let mlp = mlp.with_activation(self.activation);
            let block = match self.mixture.as_ref().filter(|m| m.dense.get(layer) != Some(&true)) {
                None => Block::bare(mlp),
                Some(mixture) => Block::bare(self.experts(layer, mixture)),
            };
            let block = block.with_residual(self.residual);
            let block = block.with_norms(norm(names.attention_norm)?, norm(names.mlp_norm)?);
            let block = match names.sum_norms.map(|names| names.map(|name| norm(Some(name)))) {
                Some([attention, mlp]) => Block { sum_norms: [attention?, mlp?], ..block },
                None => block,
            };
            let block =
                block.with_output_norms(norm(names.attention_output_norm)?, norm(names.mlp_output_norm)?);
            blocks.push(if self.parallel { block.in_parallel() } else { block });
        }
        self.same_width()?;
        let rows = tensors.shape(&names.embedding).and_then(|shape| shape.first().copied());
        let vocabulary = config.count("vocab_size")?.or(rows).unwrap_or(0);
        let otherwise = self.rope.map_or(2048, |rule| rule.positions);
        let positions = config.count(given(config, self.keys.positions))?.unwrap_or(otherwise);
        let positions = rope::stretched(positions, model);
        let norm = names.norm.as_ref().map(|name| self.norm(name)).transpose()?;
        let head = if model.tied_embeddings { &names.embedding } else { &names.head };
        let head = (!self.encoder).then_some(&**head);
        let mut forward = Forward::new(vocabulary, positions, &names.embedding, blocks, norm, head);
        forward.token_types = names.token_types.clone();
        forward.embedding_scale = self.embedding_scale;
        forward.learned = self.learned.clone();
        forward.embedding_norm = names.embedding_norm.as_ref().map(|name| self.norm(name)).transpose()?;
        (forward.logit_scale, forward.logit_cap) = (self.logit_scale, self.logit_cap);
        if self.biases.head {
            let stem = names.head.trim_end_matches("weight");
            forward.head_bias = tensors.existing(format!("{stem}bias"));
        }
        // A tied output embedding may be stored twice.
        let read: BTreeSet<&str> = forward.tensors().chain(heads_and_norms(model)).collect();
        let left = tensors.names().find(|name| {
            let known = read.contains(name) || self.harmless(name, model.n_layers()) || *name == names.head;
            // What an encoder's states go to is another's.
            let own = self.owns(name) && (!self.encoder || name.starts_with(&*names.layers));
            own && !known
        });
        if let Some(name) = left {
            let what = if name.contains("norm") { "the norm" } else { "the tensor" };
            let hint = "the forward pass of this family has no place for it; remove it where the model works without";
            return Ok(Err(Unsupported::new(format!("{what} {name}"), hint)));
        }
        Ok(Ok(forward))
    }
}
