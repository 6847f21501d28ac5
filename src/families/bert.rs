use super::decoder::Decoder;
use super::names::{Biases, HeadNames, MlpNames, Names};
use super::norms::NormRule;
use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{Activation, Architecture, Learned, NormKind};

/// BERT, MiniLM: encoders with learned positions, biases, and layer norms behind the sums. They keep no cache; heads that are shared make their
/// key and value projections smaller, and no runtime has a grouped form of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bert;

impl Family for Bert {
    fn model_types(&self) -> &'static [&'static str] {
        &["bert"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        if config.flag("is_decoder")? {
            return Err(config.unsupported("a BERT that decodes (`is_decoder`)", "encoders of this type are"));
        }
        const PLACES: &str = "position_embedding_type";
        if config.get(PLACES).is_some_and(|places| *places != "absolute") {
            let what = format!("positions that are not learned for each token (`{PLACES}`)");
            return Err(config.unsupported(what, "absolute ones are"));
        }
        // Models with something behind their states have a prefix.
        let own = tensors.shape("embeddings.word_embeddings.weight").is_some();
        let root = if own { "" } else { "bert." };
        let embedding = |name: &str| format!("{root}embeddings.{name}.weight");
        let decoder = Decoder {
            names: Names {
                layers: format!("{root}encoder.layer"),
                attention: "attention",
                heads: HeadNames::Split(["self.query", "self.key", "self.value"]),
                output: "output.dense",
                attention_norm: None,
                mlp_norm: None,
                sum_norms: Some(["attention.output.LayerNorm", "output.LayerNorm"]),
                mlp: MlpNames::Plain(["intermediate.dense", "output.dense"]),
                embedding: embedding("word_embeddings"),
                token_types: Some(embedding("token_type_embeddings")),
                embedding_norm: Some(format!("{root}embeddings.LayerNorm")),
                norm: None,
                ..Names::llama(root)
            },
            kv_heads_at: None,
            biases: Biases { queries_keys_values: true, outputs: true, mlp: true, ..Biases::default() },
            rope: None,
            norms: NormRule { kind: NormKind::Layer, epsilon: ("layer_norm_eps", 1e-12), offset: 0.0 },
            learned: Some(Learned::new(embedding("position_embeddings"), 0)),
            encoder: true,
            tied: true,
            ..Decoder::llama(config, tensors)
        };
        decoder.acting(&["hidden_act"], Activation::Gelu).architecture()
    }
}
