use super::decoder::Decoder;
use super::kinds::same_window;
use super::names::{Biases, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind};

/// StarCoder 2: as Llama, with layer norms, biases, an MLP without a gate, and 2 KV heads unless config.json says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Starcoder2;

impl Family for Starcoder2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["starcoder2"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.given_flag("use_bias")?.unwrap_or(true);
        let window = config.count("sliding_window")?;
        let decoder = Decoder {
            names: Names { mlp: MlpNames::Plain(["mlp.c_fc", "mlp.c_proj"]), ..Names::llama("model.") },
            kv_heads: Some(2),
            biases: Biases { queries_keys_values: biased, outputs: biased, mlp: biased, ..Biases::default() },
            layers: same_window(config, tensors, window)?,
            norms: NormRule { kind: NormKind::Layer, epsilon: ("norm_epsilon", 1e-5), offset: 0.0 },
            tied: true,
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::GeluTanh);
        decoder.with_rope(|rope| rope.positions = 4096).architecture()
    }
}
