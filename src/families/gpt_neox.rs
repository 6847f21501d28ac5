use super::decoder::Decoder;
use super::names::{Biases, HeadNames, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// GPT-NeoX, Pythia: query, key and value of each head side by side in one tensor, attention and MLP in parallel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptNeoX;

impl Family for GptNeoX {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt_neox"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.given_flag("attention_bias")?.unwrap_or(true);
        let head =
            ["embed_out.weight", "lm_head.weight"].into_iter().find(|head| tensors.shape(head).is_some());
        let decoder = Decoder {
            names: Names {
                layers: "gpt_neox.layers".to_string(),
                attention: "attention",
                heads: HeadNames::ByHead("query_key_value"),
                output: "dense",
                mlp: MlpNames::Plain(["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
                embedding: "gpt_neox.embed_in.weight".to_string(),
                norm: Some("gpt_neox.final_layer_norm".to_string()),
                head: head.unwrap_or("embed_out.weight").to_string(),
                ..Names::llama("gpt_neox.")
            },
            kv_heads_at: None,
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp: true, ..Biases::default() },
            norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_eps", 1e-5), offset: 0.0 },
            parallel: config.given_flag("use_parallel_residual")?.unwrap_or(true),
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Gelu);
        decoder
            .with_rope(|rope| {
                (rope.partial, rope.partial_key) = (0.25, Some("rotary_pct"));
                rope.theta_key = "rotary_emb_base";
            })
            .architecture()
    }
}
