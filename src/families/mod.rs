//! Families of models: the one place that knows model types, keys of config.json and names of tensors. A new family is a
//! file here and its line in [`FAMILIES`].

mod alibi;
mod arcee;
mod bert;
mod checks;
mod cohere;
mod decilm;
mod decoder;
mod ernie4_5;
mod exaone4;
mod experts;
mod gemma;
mod glm;
mod gpt2;
mod gpt_neox;
mod granite;
mod heads;
mod helium;
mod kinds;
mod llama;
mod llama_cpp;
mod mistral;
mod mixtures;
mod names;
mod nemotron;
mod norms;
mod olmo;
mod olmoe;
mod opt;
mod others;
mod phi;
mod qwen;
mod rope;
mod seed_oss;
mod smollm3;
mod stablelm;
mod starcoder2;

use std::path::Path;

use crate::checkpoint::{Checkpoint, Family};
use crate::files::FileError;

pub use alibi::{Bloom, Falcon, Mpt};
pub use arcee::Arcee;
pub use bert::Bert;
pub use cohere::{Cohere, Cohere2};
pub use decilm::{DeciLm, by_block};
pub use ernie4_5::Ernie45;
pub use exaone4::Exaone4;
pub use gemma::{Gemma, Gemma2, Gemma3};
pub use glm::{Glm, Glm4};
pub use gpt_neox::GptNeoX;
pub use gpt2::{Gpt2, GptJ};
pub use granite::Granite;
pub use heads::{by_layer, takes_queries, takes_queries_by_layer, with_heads};
pub use helium::Helium;
pub use llama::Llama;
pub use llama_cpp::{BYTE_LEVEL, BYTE_LEVEL_WORDS, DIGITS, SENTENCEPIECE, WORDS, architecture};
pub use mistral::Mistral;
pub use mixtures::{GptOss, Mixtral, Qwen3Moe};
pub use nemotron::Nemotron;
pub use olmo::{Olmo, Olmo2, Olmo3};
pub use olmoe::Olmoe;
pub use opt::Opt;
pub use others::Others;
pub use phi::{Phi, Phi3};
pub use qwen::{Qwen2, Qwen3};
pub use seed_oss::SeedOss;
pub use smollm3::SmolLm3;
pub use stablelm::StableLm;
pub use starcoder2::Starcoder2;

/// The families of this crate.
pub static FAMILIES: &[&dyn Family] = &[
    &Llama,
    &Mistral,
    &Qwen2,
    &Qwen3,
    &Mixtral,
    &Qwen3Moe,
    &GptOss,
    &Olmo,
    &Olmo2,
    &Olmo3,
    &Olmoe,
    &SmolLm3,
    &Phi,
    &Phi3,
    &Gemma,
    &Gemma2,
    &Gemma3,
    &Granite,
    &StableLm,
    &GptNeoX,
    &Starcoder2,
    &Nemotron,
    &Cohere,
    &Cohere2,
    &Glm,
    &Glm4,
    &Exaone4,
    &Arcee,
    &SeedOss,
    &Ernie45,
    &Helium,
    &Opt,
    &Gpt2,
    &GptJ,
    &Bloom,
    &Falcon,
    &Mpt,
    &Bert,
    &DeciLm,
    &Others,
];

impl Checkpoint {
    /// Opens a directory with config.json and model.safetensors, or shards and their index, of one of [`FAMILIES`].
    ///
    /// The files must not be shortened or rewritten while the checkpoint is open.
    ///
    /// ```
    /// use qcqa::checkpoint::Checkpoint;
    /// use qcqa::heads::HeadSource;
    ///
    /// let model = Checkpoint::open("tests/data/novels-1m")?;
    /// assert_eq!(model.architecture().kv_heads(), [8, 8, 8, 8]);
    /// assert_eq!(model.heads(3)?.key().weight().dim(), (8, 16, 128));
    /// # Ok::<(), qcqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Checkpoint::open_as`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, FileError> {
        Self::open_as(path, FAMILIES)
    }
}
