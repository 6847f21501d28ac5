use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::Architecture;

/// Kinds of models that people have and that cannot be dealt with, each with its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Others;

/// Attention whose cache holds latents.
const LATENT: [&str; 5] = ["deepseek_v2", "deepseek_v3", "kimi_k2", "minicpm3", "longcat_flash"];
/// Some layers have a state in the place of a cache.
const STATES: [&str; 16] = [
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "zamba",
    "zamba2",
];
/// Queries of one text on keys of another.
const CROSSED: [&str; 9] =
    ["bart", "m2m_100", "marian", "mbart", "mllama", "mt5", "pegasus", "t5", "whisper"];
/// Models that read a whole text at once.
const ENCODERS: [&str; 13] = [
    "albert",
    "clip",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "siglip",
    "vit",
    "xlm-roberta",
    "xlnet",
];

/// All of them: model types and what keeps them out.
const REASONS: [(&[&str], &str, &str); 4] = [
    (
        &LATENT,
        "latent attention",
        "its cache holds one latent for all heads already, so that there is nothing to share",
    ),
    (
        &STATES,
        "layers of linear attention or state spaces",
        "models all of whose layers are attention are; sharing the attention layers of others is not built",
    ),
    (&CROSSED, "cross-attention", "models of decoder layers alone are"),
    (
        &ENCODERS,
        "an encoder",
        "it keeps no cache that sharing could make smaller; of encoders only those of the type bert are",
    ),
];

impl Family for Others {
    fn model_types(&self) -> &'static [&'static str] {
        const ALL: [&str; 43] = {
            let mut all = [""; 43];
            let (mut at, mut kind) = (0, 0);
            while kind < REASONS.len() {
                let mut i = 0;
                while i < REASONS[kind].0.len() {
                    all[at] = REASONS[kind].0[i];
                    (at, i) = (at + 1, i + 1);
                }
                kind += 1;
            }
            assert!(at == all.len());
            all
        };
        &ALL
    }

    fn describe(&self, config: &Config, _: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let model_type = config.model_type()?;
        let reason = REASONS.iter().find(|(types, ..)| types.contains(&model_type));
        let (what, hint) =
            reason.map_or(("this kind of model", "decoders are"), |&(_, what, hint)| (what, hint));
        Err(config.unsupported(format!("{what} (model_type \"{model_type}\")"), hint))
    }
}
