use serde_json::{Map, Value, json};

use super::decoder::Decoder;
use super::heads::BY_LAYER;
use super::names::Biases;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::error::{Error, Result};
use crate::files::FileError;
use crate::model::{Activation, Architecture};

/// Llamas whose layers have their own numbers of KV heads, as Nemotron-NAS describes them: those that this crate has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeciLm;

/// The type, and those that compute the same with one number for all layers.
pub(super) const TYPE: &str = "nemotron-nas";
const LIKE: [&str; 3] = ["llama", "mistral", "qwen2"];

impl Family for DeciLm {
    fn model_types(&self) -> &'static [&'static str] {
        &[TYPE]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        if config.get(BY_LAYER).is_none() {
            let what = "a model of blocks that differ otherwise than in their KV heads (`block_configs`)";
            return Err(
                config.unsupported(what, format!("those that were written here say `{BY_LAYER}`, too"))
            );
        }
        let biased = config.flag("attention_bias")?;
        let biases = Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() };
        let decoder = Decoder { biases, ..Decoder::llama(config, tensors) };
        decoder.acting(&["hidden_act"], Activation::Silu).architecture()
    }
}

/// config.json of a model whose layers all have so many query heads, and these numbers of KV heads and MLPs of these widths, described
/// block by block. Every number of KV heads divides that of query heads.
///
/// # Errors
/// [`Error::NoForm`] for another type than Llama, Mistral and Qwen2, and for biases in MLPs.
pub fn by_block(
    model: &Architecture,
    config: &Map<String, Value>,
    queries: usize,
    kv_heads: &[usize],
    widths: &[usize],
) -> Result<Map<String, Value>> {
    let refused = |reason: String| Err(Error::NoForm { model: model.model_type.clone(), reason });
    if !LIKE.contains(&model.model_type.as_str()) {
        return refused(format!("blocks are known to hold {}", LIKE.join(", ")));
    }
    if config.get("mlp_bias").is_some_and(|value| *value == true) {
        return refused("blocks have no biases in MLPs (`mlp_bias`)".to_string());
    }
    let mut config = config.clone();
    for key in
        ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "num_key_value_heads"]
    {
        config.shift_remove(key);
    }
    let block = |(&k, &width): (&usize, &usize)| {
        let part =
            |key: &str, value: usize| json!({ "no_op": false, "replace_with_linear": false, key: value });
        json!({ "attention": part("n_heads_in_group", queries / k), "ffn": part("intermediate_size", width) })
    };
    let blocks: Vec<Value> = kv_heads.iter().zip(widths).map(block).collect();
    let biased =
        model.layers.iter().filter_map(|layer| layer.stored.as_ref()).any(|stored| stored.key.bias.is_some());
    let heads: Vec<_> = kv_heads.iter().map(|&k| [queries, k]).collect();
    for (key, value) in [
        ("model_type", json!(TYPE)),
        ("architectures", json!(["DeciLMForCausalLM"])),
        ("auto_map", json!({ "AutoConfig": "configuration_decilm.DeciLMConfig" })),
        ("num_attention_heads", json!(queries)),
        ("head_dim", json!(model.layers.first().map_or(0, |layer| layer.head_dim))),
        ("attention_bias", json!(biased)),
        ("block_configs", json!(blocks)),
        (BY_LAYER, json!(heads)),
    ] {
        config.insert(key.to_string(), value);
    }
    Ok(config)
}
