//! What cannot be dealt with, and whose a tensor is.

use super::decoder::Decoder;
use super::names::{Biases, MlpNames};
use crate::files::FileError;
use crate::model::{Architecture, AttentionSpec, Norm, StoredHeads};

/// Buffers that follow from the configuration, which older checkpoints hold.
const BUFFERS: [&str; 4] = ["rotary_emb.inv_freq", "bias", "masked_bias", "rotary_emb.cos_cached"];

impl Decoder<'_> {
    /// What cannot be converted.
    pub(super) fn refuse(&self, layers: &[AttentionSpec]) -> Result<(), FileError> {
        let (config, names) = (self.config, &self.names);
        if config.get("quantization_config").is_some() {
            return Err(config.unsupported(
                "a quantised model (`quantization_config`)",
                "dequantise it, or convert the model before it is quantised",
            ));
        }
        for key in ["per_layer_config", "num_key_value_heads_per_layer", "block_configs"] {
            if config.get(key).is_some() {
                let what = format!("a description of layers one by one (`{key}`)");
                return Err(config.unsupported(what, "models that one set of numbers describes are"));
            }
        }
        let normed = layers.iter().any(|spec| spec.norms.iter().any(Option::is_some));
        // Whatever else belongs to heads would be left as it is while they move.
        let known = |rest: &str| {
            let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
            let projection = names.heads().contains(&module) || module == names.output;
            let norm = normed && names.head_norms.contains(&module);
            ((projection || norm) && ["weight", "bias"].contains(&kind)) || BUFFERS.contains(&rest)
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

    /// Whether nobody misses a tensor that is not read.
    pub(super) fn harmless(&self, name: &str) -> bool {
        let buffer = self.names.of_attention(name).is_some_and(|rest| BUFFERS.contains(&rest));
        buffer || name.ends_with("rotary_emb.inv_freq") || self.strays(name)
    }

    /// Whether a tensor belongs to the stack, and not to another part of a model of several.
    pub(super) fn owns(&self, name: &str) -> bool {
        let root = self.names.layers.strip_suffix("layers").unwrap_or_default();
        !root.contains("language_model") || name.starts_with(root)
    }
}

/// Names of the tensors of all heads, their biases and their norms.
pub(super) fn heads_and_norms(model: &Architecture) -> impl Iterator<Item = &str> {
    model.layers.iter().flat_map(|layer| {
        let heads = layer.stored.iter().flat_map(StoredHeads::tensors);
        heads.chain(layer.norms.iter().flatten().flat_map(|norm| Norm::tensors(&norm.norm)))
    })
}
