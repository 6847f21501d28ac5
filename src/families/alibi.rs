use super::decoder::Decoder;
use super::names::{Biases, HeadNames, Keys, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Alibi, Architecture, NormKind, Unsupported};

/// BLOOM: linear biases for positions, a norm of what is embedded, query, key and value of each head side by side in one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bloom;

impl Family for Bloom {
    fn model_types(&self) -> &'static [&'static str] {
        &["bloom"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let decoder = Decoder {
            keys: Keys { hidden: &["n_embed", "n_embd", "hidden_size"], ..Keys::SHORT },
            alibi: Some(usual),
            unsupported: config.flag("apply_residual_connection_post_layernorm")?.then(|| {
                let what = "sums of what was normed (`apply_residual_connection_post_layernorm`)";
                Unsupported::new(what, "models without are")
            }),
            ..stack(config, tensors)
        };
        let names = Names {
            embedding_norm: Some(format!("{}word_embeddings_layernorm", root(tensors))),
            ..decoder.names.clone()
        };
        Decoder { names, ..decoder }.architecture()
    }
}

/// Falcon-RW: as BLOOM, with linear biases that are scaled, too; other Falcons share one key and one value already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Falcon;

impl Family for Falcon {
    fn model_types(&self) -> &'static [&'static str] {
        &["falcon"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        if config.given_flag("multi_query")?.unwrap_or(true) || config.flag("new_decoder_architecture")? {
            let what =
                "a Falcon whose heads share keys and values (`multi_query`, `new_decoder_architecture`)";
            return Err(config.unsupported(what, "falcon-rw is; the others leave little to share"));
        }
        let heads = config.required("num_attention_heads")?;
        if config.count("num_kv_heads")?.is_some_and(|kv| kv != heads) {
            let what = format!("a Falcon of fewer KV heads (`num_kv_heads`) than its {heads} query heads");
            return Err(config.unsupported(what, "falcon-rw is"));
        }
        let (biased, parallel) = (config.flag("bias")?, config.given_flag("parallel_attn")?.unwrap_or(true));
        let decoder = stack(config, tensors);
        let alibi = config.flag("alibi")?;
        let mlp_norm = if parallel { "input_layernorm" } else { "post_attention_layernorm" };
        let decoder = Decoder {
            names: Names { mlp_norm: Some(mlp_norm), ..decoder.names.clone() },
            keys: Keys::USUAL,
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp: biased, ..Biases::default() },
            alibi: if alibi { Some(rounded) } else { None },
            rope: if alibi { None } else { Decoder::llama(config, tensors).rope },
            parallel,
            ..decoder
        };
        decoder.acting(&["activation"], Activation::Gelu).architecture()
    }
}

/// MPT: linear biases for positions, queries, keys and values in one tensor, no biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mpt;

impl Family for Mpt {
    fn model_types(&self) -> &'static [&'static str] {
        &["mpt"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let of = config.get("attn_config").and_then(serde_json::Value::as_object);
        let value = |key: &str| of.and_then(|of| of.get(key)).filter(|v| !v.is_null());
        let refused = ["clip_qkv", "softmax_scale", "alibi_bias_max"].into_iter().find(|key| {
            // transformers takes 8 whatever stands there.
            value(key).is_some_and(|value| *key != "alibi_bias_max" || value.as_f64() != Some(8.0))
        });
        if value("alibi").is_some_and(|alibi| alibi.as_bool() == Some(false)) {
            return Err(config.unsupported("an MPT without ALiBi (`attn_config`)", "models with it are"));
        }
        let decoder = Decoder {
            names: Names {
                layers: "transformer.blocks".to_string(),
                attention: "attn",
                heads: HeadNames::Joined("Wqkv"),
                output: "out_proj",
                attention_norm: Some("norm_1"),
                mlp_norm: Some("norm_2"),
                mlp: MlpNames::Plain(["ffn.up_proj", "ffn.down_proj"]),
                embedding: "transformer.wte.weight".to_string(),
                norm: Some("transformer.norm_f".to_string()),
                ..Names::llama("transformer.")
            },
            keys: Keys {
                layers: &["n_layers", "num_hidden_layers"],
                hidden: &["d_model", "hidden_size"],
                query_heads: &["n_heads", "num_attention_heads"],
                positions: &["max_seq_len"],
            },
            kv_heads_at: None,
            rope: None,
            norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_epsilon", 1e-5), offset: 0.0 },
            activation: Activation::Gelu,
            alibi: Some(mosaic),
            biases: Biases { no_norms: true, ..Biases::default() },
            tied: true,
            unsupported: refused
                .map(|key| Unsupported::new(format!("`{key}` in `attn_config`"), "its default is")),
            ..Decoder::llama(config, tensors)
        };
        decoder.architecture()
    }
}

/// BLOOM's slopes.
fn usual(heads: usize) -> Alibi {
    Alibi::new(Alibi::usual(heads))
}

/// Falcon's: BLOOM's, rounded on the way.
fn rounded(heads: usize) -> Alibi {
    Alibi::new(Alibi::usual(heads)).rounded(1.0)
}

/// MPT's: all where their number is a power of 2; else of the next power every other one first.
fn mosaic(heads: usize) -> Alibi {
    let power = heads.next_power_of_two();
    let slope = |i: usize| (-8.0 * i as f64 / power as f64).exp2() as f32;
    Alibi::new(match heads == power {
        true => (1..=heads).map(slope).collect(),
        false => (1..=power / 2)
            .map(|i| 2 * i)
            .chain((0..power / 2).map(|i| 2 * i + 1))
            .map(slope)
            .take(heads)
            .collect(),
    })
}

/// Files of the model without its head have no prefix.
fn root(tensors: &dyn TensorIndex) -> &'static str {
    if tensors.shape("word_embeddings.weight").is_some() { "" } else { "transformer." }
}

/// What BLOOM and Falcon have in common.
fn stack<'a>(config: &'a Config, tensors: &'a dyn TensorIndex) -> Decoder<'a> {
    let root = root(tensors);
    Decoder {
        names: Names {
            layers: format!("{root}h"),
            attention: "self_attention",
            heads: HeadNames::ByHead("query_key_value"),
            output: "dense",
            mlp: MlpNames::Plain(["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
            embedding: format!("{root}word_embeddings.weight"),
            norm: Some(format!("{root}ln_f")),
            ..Names::llama(root)
        },
        kv_heads_at: None,
        biases: Biases { queries_keys_values: true, outputs: true, mlp: true, ..Biases::default() },
        rope: None,
        norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_epsilon", 1e-5), offset: 0.0 },
        activation: Activation::GeluTanh,
        tied: true,
        ..Decoder::llama(config, tensors)
    }
}
