use super::decoder::Decoder;
use super::experts::{Mixture, Within};
use super::names::Biases;
use super::norms::NormRule;
use super::olmo::unclipped;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// OLMoE: norms over all queries and all keys of a token, and experts in the place of MLPs, which are run and never changed. Models whose
/// queries, keys and values are clipped (`clip_qkv`) are refused: merged heads would be clipped elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Olmoe;

impl Family for Olmoe {
    fn model_types(&self) -> &'static [&'static str] {
        &["olmoe"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        unclipped(config)?;
        let biased = config.flag("attention_bias")?;
        let decoder = Decoder {
            biases: Biases { queries_keys_values: biased, outputs: biased, ..Biases::default() },
            head_norms: Some(NormOver::Width),
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            mixture: Some(Mixture {
                router: "mlp.gate",
                experts: "mlp.experts",
                within: Within::Each(["gate_proj", "up_proj", "down_proj"]),
                count: config.count("num_experts")?.or(config.count("num_local_experts")?).unwrap_or(64),
                chosen: config.count("num_experts_per_tok")?.unwrap_or(8),
                normalised: config.flag("norm_topk_prob")?,
                dense: Vec::new(),
            }),
            ..Decoder::llama(config, tensors)
        };
        decoder
            .acting(&["hidden_act"], Activation::Silu)
            .with_rope(|rope| rope.positions = 4096)
            .architecture()
    }
}
