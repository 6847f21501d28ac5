use super::decoder::Decoder;
use super::kinds::{window, windows};
use super::names::{Biases, LayerKinds, Names, only};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// Gemma: as Llama, with embeddings times √d, norms that store w − 1, and GELU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemma;

impl Family for Gemma {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let mut decoder = gemma(config, tensors, 16)?.acting(&["hidden_act"], Activation::GeluTanh);
        if decoder.activation == Activation::Gelu {
            decoder.activation = Activation::GeluTanh;
        }
        decoder.architecture()
    }
}

/// Gemma 2: as Gemma, with norms before and behind attention and MLP, bounded scores and logits, and a window in every other layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemma2;

impl Family for Gemma2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let layers = windows(config, tensors, window(config, 4096)?, |layer| (layer + 1) % 2 != 0)?;
        sandwich(gemma(config, tensors, 4)?, layers, [Some(50.0), Some(30.0)])?.architecture()
    }
}

/// The text part of Gemma 3: as Gemma 2, with norms on each head's queries and keys, and a window in five of six layers, which turn by frequencies of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gemma3;

impl Family for Gemma3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma3_text", "gemma3"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        // With pictures the text part has a configuration of its own.
        let (inner, whole) = (config.inner("text_config"), config);
        let (config, nested) = (inner.as_ref().unwrap_or(whole), inner.is_some());
        only(config, nested, "gemma3_text")?;
        let every = config.count("sliding_window_pattern")?.unwrap_or(6);
        let slides = |layer: usize| (layer + 1) % every != 0;
        let mut layers = windows(config, tensors, window(config, 4096)?, slides)?;
        layers.ropes_by_kind(config, tensors, slides)?;
        let mut decoder = Decoder { head_norms: Some(NormOver::Head), ..gemma(config, tensors, 4)? };
        decoder.query_heads = Some(8);
        if nested {
            decoder = decoder.within(whole);
        }
        let mut decoder = sandwich(decoder, layers, [None, None])?;
        // Read, and never used.
        decoder.cap = None;
        let local = config.positive("rope_local_base_freq")?.unwrap_or(10_000.0);
        decoder
            .with_rope(|rope| {
                (rope.theta, rope.positions) = (1_000_000.0, 131_072);
                rope.of_kind = Some(("sliding_attention", local));
            })
            .architecture()
    }
}

fn gemma<'a>(
    config: &'a Config,
    tensors: &'a dyn TensorIndex,
    kv_heads: usize,
) -> Result<Decoder<'a>, FileError> {
    let biased = config.flag("attention_bias")?;
    let decoder = Decoder {
        kv_heads: Some(kv_heads),
        head_dim: Some(256),
        biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
        norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-6), offset: 1.0 },
        embedding_scale: (config.required("hidden_size")? as f64).sqrt(),
        tied: true,
        ..Decoder::llama(config, tensors)
    };
    let decoder = decoder.acting(&["hidden_activation"], Activation::GeluTanh);
    Ok(decoder.with_rope(|rope| rope.positions = 8192))
}

/// Norms on both sides, and the bounds of scores and of logits, where config.json does not say otherwise.
fn sandwich(
    decoder: Decoder<'_>,
    layers: LayerKinds,
    [scores, logits]: [Option<f64>; 2],
) -> Result<Decoder<'_>, FileError> {
    let config = decoder.config;
    // An explicit null is none.
    let cap = |key: &'static str, otherwise: Option<f64>| match config.raw().contains_key(key) {
        true => config.positive(key),
        false => Ok(otherwise),
    };
    let scalar = config.count("query_pre_attn_scalar")?.unwrap_or(256);
    Ok(Decoder {
        names: Names {
            attention_output_norm: Some("post_attention_layernorm"),
            mlp_norm: Some("pre_feedforward_layernorm"),
            mlp_output_norm: Some("post_feedforward_layernorm"),
            ..decoder.names
        },
        layers,
        scale: Some((scalar as f64).sqrt().recip()),
        cap: cap("attn_logit_softcapping", scores)?,
        logit_cap: cap("final_logit_softcapping", logits)?,
        ..decoder
    })
}
