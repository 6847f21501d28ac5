use super::decoder::Decoder;
use super::names::{Biases, HeadNames, Keys, MlpNames, Names, given};
use super::norms::NormRule;
use super::rope;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, Learned, NormKind, Unsupported};

/// GPT-2: learned positions, layer norms, all matrices stored as (in, out), queries, keys and values in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpt2;

impl Family for Gpt2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let root = if tensors.shape("wte.weight").is_some() { "" } else { "transformer." };
        let decoder = Decoder {
            names: Names {
                heads: HeadNames::Joined("c_attn"),
                output: "c_proj",
                transposed: true,
                mlp_norm: Some("ln_2"),
                mlp: MlpNames::Plain(["mlp.c_fc", "mlp.c_proj"]),
                ..names(root)
            },
            rope: None,
            scale: (config.given_flag("scale_attn_weights")? == Some(false)).then_some(1.0),
            learned: Some(Learned::new(format!("{root}wpe.weight"), 0)),
            tied: true,
            ..gpt(config, tensors)
        };
        let mut decoder = decoder.acting(&["activation_function"], Activation::GeluTanh);
        for key in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
            if config.flag(key)? {
                decoder.unsupported = Some(Unsupported::new(format!("`{key}`"), "models without it are"));
            }
        }
        decoder.architecture()
    }
}

/// GPT-J: attention and MLP in parallel behind one layer norm, heads that turn in part, interleaved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptJ;

impl Family for GptJ {
    fn model_types(&self) -> &'static [&'static str] {
        &["gptj"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let decoder = Decoder {
            names: Names {
                output: "out_proj",
                mlp_norm: Some("ln_1"),
                mlp: MlpNames::Plain(["mlp.fc_in", "mlp.fc_out"]),
                ..names("transformer.")
            },
            biases: Biases { mlp: true, head: true, ..Biases::default() },
            parallel: true,
            ..gpt(config, tensors)
        };
        let decoder = decoder.acting(&["activation_function"], Activation::GeluTanh);
        // All where that is null.
        let (heads, hidden) = (decoder.heads()?.0, config.required(given(config, decoder.keys.hidden))?);
        let h = decoder.width_of_heads(hidden, heads)?;
        let dims = match config.raw().get("rotary_dim") {
            Some(value) if value.is_null() => h,
            _ => config.count("rotary_dim")?.unwrap_or(64),
        };
        if dims > h || dims % 2 != 0 {
            return Err(config.wrong("rotary_dim", format!("an even number up to the {h} of a head"), dims));
        }
        decoder.with_rope(|rope| (rope.pairs, rope.fixed) = (rope::interleaved, Some(dims))).architecture()
    }
}

fn names(root: &str) -> Names {
    Names {
        layers: format!("{root}h"),
        attention: "attn",
        attention_norm: Some("ln_1"),
        embedding: format!("{root}wte.weight"),
        norm: Some(format!("{root}ln_f")),
        ..Names::llama(root)
    }
}

fn gpt<'a>(config: &'a Config, tensors: &'a dyn TensorIndex) -> Decoder<'a> {
    Decoder {
        keys: Keys::SHORT,
        kv_heads_at: None,
        biases: Biases { queries_keys_values: true, outputs: true, mlp: true, ..Biases::default() },
        norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_epsilon", 1e-5), offset: 0.0 },
        ..Decoder::llama(config, tensors)
    }
}
