use serde_json::Value;

use super::decoder::Decoder;
use super::experts::{Mixture, Within};
use super::kinds::{same_window, window, windows};
use super::names::{Biases, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver, Unsupported};

/// Mixtral: as Mistral, with experts in the place of MLPs. Experts are run, never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mixtral;

impl Family for Mixtral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mixtral"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let window = config.count("sliding_window")?;
        let decoder = Decoder {
            kv_heads: Some(8),
            layers: same_window(config, tensors, window)?,
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            mixture: Some(Mixture {
                router: "block_sparse_moe.gate",
                experts: "block_sparse_moe.experts",
                within: Within::Each(["w1", "w3", "w2"]),
                count: config.count("num_local_experts")?.unwrap_or(8),
                chosen: config.count("num_experts_per_tok")?.unwrap_or(2),
                normalised: true,
                dense: Vec::new(),
            }),
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder.with_rope(|rope| (rope.theta, rope.positions) = (1e6, 131_072)).architecture()
    }
}

/// Qwen3-MoE: as Qwen3, with experts in the place of most MLPs, and windows in all layers or in none. Experts are run, never changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qwen3Moe;

impl Family for Qwen3Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3_moe"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.flag("attention_bias")?;
        let every = config.count("decoder_sparse_step")?.unwrap_or(1);
        let listed: Vec<u64> = match config.get("mlp_only_layers").and_then(Value::as_array) {
            Some(list) => list.iter().filter_map(Value::as_u64).collect(),
            None => Vec::new(),
        };
        // Unlike Qwen3's, all layers slide or none does.
        let window = if config.flag("use_sliding_window")? { config.count("sliding_window")? } else { None };
        let layers = same_window(config, tensors, window)?;
        let dense = |layer: usize| listed.contains(&(layer as u64)) || (layer + 1) % every != 0;
        let decoder = Decoder {
            kv_heads: Some(4),
            biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
            head_norms: Some(NormOver::Head),
            mixture: Some(Mixture {
                router: "mlp.gate",
                experts: "mlp.experts",
                within: Within::Each(["gate_proj", "up_proj", "down_proj"]),
                count: config.count("num_experts")?.or(config.count("num_local_experts")?).unwrap_or(128),
                chosen: config.count("num_experts_per_tok")?.unwrap_or(8),
                normalised: config.flag("norm_topk_prob")?,
                dense: (0..layers.windows.len()).map(dense).collect(),
            }),
            layers,
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder.with_rope(|rope| rope.positions = 32_768).architecture()
    }
}

/// gpt-oss, its weights in BF16, F16 or F32: query heads with sinks, windows in every other layer, YaRN. Experts are run, never
/// changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptOss;

impl Family for GptOss {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt_oss"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.given_flag("attention_bias")?.unwrap_or(true);
        let slides = |layer: usize| (layer + 1) % 2 != 0;
        // Without them transformers takes a YaRN of its own.
        if config.get("rope_parameters").or(config.get("rope_scaling")).is_none() {
            return Err(config.missing("rope_scaling"));
        }
        let mut decoder = Decoder {
            names: Names { sinks: Some("sinks"), ..Names::llama("model.") },
            kv_heads: Some(8),
            head_dim: Some(64),
            biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
            layers: windows(config, tensors, window(config, 128)?, slides)?,
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            activation: Activation::Clipped,
            mixture: Some(Mixture {
                router: "mlp.router",
                experts: "mlp.experts",
                within: Within::Stacked(["gate_up_proj", "down_proj"]),
                count: config.count("num_local_experts")?.or(config.count("num_experts")?).unwrap_or(128),
                chosen: config.count("num_experts_per_tok")?.unwrap_or(4),
                normalised: true,
                dense: Vec::new(),
            }),
            ..Decoder::llama(config, tensors)
        };
        for (key, built) in [("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)] {
            if let Some(found) = config.get(key).filter(|found| found.as_f64() != Some(built)) {
                let what = format!("experts with another activation (`{key}` {found})");
                decoder.unsupported = Some(Unsupported::new(what, format!("{built} is")));
            }
        }
        decoder.with_rope(|rope| (rope.theta, rope.positions) = (150_000.0, 131_072)).architecture()
    }
}
