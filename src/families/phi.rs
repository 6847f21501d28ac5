use super::decoder::Decoder;
use super::kinds::same_window;
use super::names::{Biases, HeadNames, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, NormKind, NormOver};

/// Phi-1, Phi-1.5, Phi-2: attention and MLP in parallel behind one layer norm, biases everywhere, heads that turn in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phi;

impl Family for Phi {
    fn model_types(&self) -> &'static [&'static str] {
        &["phi"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let normed = config.flag("qk_layernorm")?;
        let decoder = Decoder {
            names: Names {
                output: "dense",
                mlp_norm: Some("input_layernorm"),
                mlp: MlpNames::Plain(["mlp.fc1", "mlp.fc2"]),
                head_norms: ["q_layernorm", "k_layernorm"],
                norm: Some("model.final_layernorm".to_string()),
                ..Names::llama("model.")
            },
            biases: Biases {
                queries_keys_values: true,
                outputs: true,
                mlp: true,
                head: true,
                ..Biases::default()
            },
            head_norms: normed.then_some(NormOver::Head),
            norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_eps", 1e-5), offset: 0.0 },
            parallel: true,
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::GeluTanh);
        decoder
            .with_rope(|rope| (rope.partial, rope.partial_key) = (0.5, Some("partial_rotary_factor")))
            .architecture()
    }
}

/// Phi-3, Phi-3.5, Phi-4: as Llama, with queries, keys and values in one tensor, gate and up in another, and LongRoPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phi3;

impl Family for Phi3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["phi3"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let window = config.count("sliding_window")?;
        let decoder = Decoder {
            names: Names {
                heads: HeadNames::Joined("qkv_proj"),
                mlp: MlpNames::Joined(["mlp.gate_up_proj", "mlp.down_proj"]),
                ..Names::llama("model.")
            },
            layers: same_window(config, tensors, window)?,
            norms: NormRule { kind: NormKind::Rms, epsilon: ("rms_norm_eps", 1e-5), offset: 0.0 },
            ..Decoder::llama(config, tensors)
        };
        let decoder = decoder.acting(&["hidden_act"], Activation::Silu);
        decoder
            .with_rope(|rope| {
                (rope.positions, rope.partial_key) = (4096, Some("partial_rotary_factor"));
                (rope.original, rope.yarn_is_longrope) = (Some(4096), true);
            })
            .architecture()
    }
}
