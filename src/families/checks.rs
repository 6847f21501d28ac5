//! What must hold of a configuration and its tensors, and whose a tensor is.

use super::decilm;
use super::decoder::Decoder;
use super::names::{Biases, MlpNames, given};
use crate::files::FileError;
use crate::model::{Architecture, AttentionSpec, HeadNorm, StoredHeads};
use crate::partition::Partition;

/// Buffers that follow from the configuration, which older checkpoints hold.
const BUFFERS: [&str; 4] = ["rotary_emb.inv_freq", "bias", "masked_bias", "rotary_emb.cos_cached"];

/// Dimensions that a head may have.
const WIDEST: usize = 1 << 16;
/// Endings of tensors in which quantised weights are stored.
const QUANTISED: [&str; 7] =
    [".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax"];
const DEQUANTISE: &str = "dequantise it first, or take the model that it was made of";

impl Decoder<'_> {
    /// What cannot be converted.
    pub(super) fn refuse(&self, layers: &[AttentionSpec]) -> Result<(), FileError> {
        let (config, names) = (self.config, &self.names);
        if config.get("quantization_config").is_some() {
            return Err(config.unsupported("a quantised model (`quantization_config`)", DEQUANTISE));
        }
        if let Some(name) = self.tensors.names().find(|name| QUANTISED.iter().any(|end| name.ends_with(end)))
        {
            let beside = config.path().parent().unwrap_or(config.path());
            let files = ["quantize_config.json", "quant_config.json", "hf_quant_config.json"];
            let by = files.iter().find(|file| beside.join(file).is_file()).map(|file| format!(", {file}"));
            let what = format!("a quantised model (tensor {name}{})", by.unwrap_or_default());
            return Err(config.unsupported(what, DEQUANTISE));
        }
        for key in ["per_layer_config", "num_key_value_heads_per_layer", "block_configs"] {
            // The one type that has blocks reads what it needs of them.
            let own = key == "block_configs" && config.model_type()? == decilm::TYPE;
            if config.get(key).is_some() && !own {
                let what = format!("a description of layers one by one (`{key}`)");
                return Err(config.unsupported(what, "models that one set of numbers describes are"));
            }
        }
        let behind =
            names.sum_norms.and_then(|[norm, _]| norm.strip_prefix(names.attention)?.strip_prefix('.'));
        let normed = layers.iter().any(|spec| spec.norms.iter().any(Option::is_some));
        // Whatever else belongs to heads would be left as it is while they move.
        let known = |rest: &str| {
            let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
            let projection = names.heads().contains(&module) || module == names.output;
            let numbered = module.rsplit_once('.').filter(|(_, head)| head.parse::<usize>().is_ok());
            let norm = normed && names.head_norms.contains(&numbered.map_or(module, |(norms, _)| norms));
            let own = (projection || norm) && ["weight", "bias"].contains(&kind);
            own || BUFFERS.contains(&rest) || names.sinks == Some(rest) || behind == Some(module)
        };
        let other =
            self.tensors.names().find(|name| names.of_attention(name).is_some_and(|rest| !known(rest)));
        match other {
            None => Ok(()),
            Some(name) if name.contains("_norm") || name.contains("_layernorm") => {
                let what = format!("normalised queries or keys (tensor {name})");
                Err(config.unsupported(what, "models of this type have none"))
            }
            Some(name) => {
                let hint = "its heads cannot be moved; merge adapters and dequantise before";
                Err(config.unsupported(format!("an attention with the tensor {name}"), hint))
            }
        }
    }

    /// Query heads and KV heads of a layer.
    pub(super) fn heads(&self) -> Result<(usize, usize), FileError> {
        const KEY: &str = "num_key_value_heads";
        let config = self.config;
        let key = given(config, self.keys.query_heads);
        let query_heads = match (config.count(key)?, self.query_heads) {
            (Some(heads), _) | (None, Some(heads)) => heads,
            (None, None) => return Err(config.missing(key)),
        };
        // As transformers has it: an absent key takes the family's default, an explicit null the query heads.
        let kv_heads = match (self.kv_heads_at, config.raw().get(KEY)) {
            (None, _) => query_heads,
            (Some(_), None) => self.kv_heads.unwrap_or(query_heads),
            (Some(_), Some(_)) => config.count(KEY)?.unwrap_or(query_heads),
        };
        if query_heads % kv_heads != 0 {
            let expected = format!("a divisor of the {query_heads} query heads (`num_attention_heads`)");
            return Err(config.wrong(KEY, expected, kv_heads));
        }
        if kv_heads > Partition::MAX_HEADS {
            return Err(config.wrong(KEY, format!("at most {}", Partition::MAX_HEADS), kv_heads));
        }
        Ok((query_heads, kv_heads))
    }

    /// Dimensions of a head.
    pub(super) fn width_of_heads(&self, hidden: usize, query_heads: usize) -> Result<usize, FileError> {
        let config = self.config;
        let head_dim = match config.count("head_dim")?.or(self.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden % query_heads == 0 => hidden / query_heads,
            None => {
                let expected =
                    format!("a multiple of the {query_heads} query heads where `head_dim` is not given");
                return Err(config.wrong("hidden_size", expected, hidden));
            }
        };
        let all = query_heads.checked_mul(3).and_then(|heads| heads.checked_mul(head_dim));
        if head_dim > WIDEST || all.is_none() {
            return Err(config.wrong("head_dim", format!("at most {WIDEST} dimensions"), head_dim));
        }
        match head_dim % 2 {
            0 => Ok(head_dim),
            _ => Err(config.wrong("head_dim", "an even number of dimensions", head_dim)),
        }
    }

    /// Whether a tensor is a bias that the model does not have.
    pub(super) fn strays(&self, tensor: &str) -> bool {
        let Some(module) = tensor.strip_suffix(".bias") else { return false };
        let (names, Biases { queries_keys_values, outputs, mlp, .. }) = (&self.names, self.biases);
        match names.of_attention(tensor).and_then(|rest| rest.strip_suffix(".bias")) {
            Some(own) if names.heads().contains(&own) => !queries_keys_values,
            Some(own) if own == names.output => !outputs,
            Some(_) => false,
            None => {
                let linears = match names.mlp {
                    MlpNames::Gated(linears) => linears.to_vec(),
                    MlpNames::Joined(linears) | MlpNames::Plain(linears) => linears.to_vec(),
                };
                !mlp && linears.iter().any(|linear| module.ends_with(linear))
            }
        }
    }

    /// Whether a tensor is of a layer that the model does not have.
    pub(super) fn is_beyond(&self, tensor: &str, n_layers: usize) -> bool {
        let rest = tensor.strip_prefix(&*self.names.layers).and_then(|rest| rest.strip_prefix('.'));
        let layer =
            rest.and_then(|rest| rest.split('.').next()).and_then(|layer| layer.parse::<usize>().ok());
        layer.is_some_and(|layer| layer >= n_layers)
    }

    /// Whether nobody misses a tensor that is not read.
    pub(super) fn harmless(&self, name: &str, n_layers: usize) -> bool {
        let buffer = self.names.of_attention(name).is_some_and(|rest| BUFFERS.contains(&rest));
        buffer || name.ends_with("rotary_emb.inv_freq") || self.strays(name) || self.is_beyond(name, n_layers)
    }

    /// That the width of the MLPs is what config.json says.
    pub(super) fn same_width(&self) -> Result<(), FileError> {
        const KEY: &str = "intermediate_size";
        let (MlpNames::Gated([name, ..]), None) = (self.names.mlp, &self.mixture) else { return Ok(()) };
        let name = format!("{}.0.{name}.weight", self.names.layers);
        let stored = self.tensors.shape(&name).and_then(|shape| shape.first());
        match (self.config.count(KEY)?, stored) {
            (Some(given), Some(&stored)) if given != stored => {
                Err(self.config.wrong(KEY, format!("the {stored} rows of {name}"), given))
            }
            _ => Ok(()),
        }
    }

    /// Whether a tensor belongs to the stack, and not to another part of a model of several.
    pub(super) fn owns(&self, name: &str) -> bool {
        let root = self.names.layers.strip_suffix("layers").unwrap_or_default();
        !root.contains("language_model") || name.starts_with(root)
    }
}

/// Names of the tensors of all heads, their biases, norms and sinks.
pub(super) fn heads_and_norms(model: &Architecture) -> impl Iterator<Item = &str> {
    model.layers.iter().flat_map(|layer| {
        let heads = layer.stored.iter().flat_map(StoredHeads::tensors);
        let norms = layer.norms.iter().flatten().flat_map(HeadNorm::tensors);
        heads.chain(norms).chain(layer.sinks.as_deref())
    })
}
