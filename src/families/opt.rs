use super::decoder::Decoder;
use super::names::{Biases, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, Learned, NormKind, Unsupported};

/// OPT: learned positions, layer norms, biases, ReLU; always as many KV heads as query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opt;

impl Family for Opt {
    fn model_types(&self) -> &'static [&'static str] {
        &["opt"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let hidden = config.required("hidden_size")?;
        let biased = config.given_flag("enable_bias")?.unwrap_or(true);
        let before = config.given_flag("do_layer_norm_before")?.unwrap_or(true);
        let projected = config.count("word_embed_proj_dim")?.is_some_and(|width| width != hidden);
        // Files of the model without its head have no prefix.
        let root = if tensors.shape("decoder.embed_tokens.weight").is_some() {
            "decoder."
        } else {
            "model.decoder."
        };
        let decoder = Decoder {
            names: Names {
                output: "out_proj",
                attention_norm: before.then_some("self_attn_layer_norm"),
                mlp_norm: before.then_some("final_layer_norm"),
                sum_norms: (!before).then_some(["self_attn_layer_norm", "final_layer_norm"]),
                mlp: MlpNames::Plain(["fc1", "fc2"]),
                norm: before.then(|| format!("{root}final_layer_norm")),
                ..Names::llama(root)
            },
            kv_heads_at: None,
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp: biased, ..Biases::default() },
            rope: None,
            norms: NormRule { kind: NormKind::Layer, epsilon: ("", 1e-5), offset: 0.0 },
            learned: Some(Learned::new(format!("{root}embed_positions.weight"), 2)),
            tied: true,
            ..Decoder::llama(config, tensors)
        };
        let mut decoder = decoder.acting(&["activation_function"], Activation::Relu);
        if projected {
            let what = "embeddings of another width (`word_embed_proj_dim`)";
            decoder.unsupported = Some(Unsupported::new(what, "OPT of 125M and from 1.3B on is"));
        }
        decoder.architecture()
    }
}
