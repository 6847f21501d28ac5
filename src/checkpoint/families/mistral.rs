use super::{Family, llama};

/// Mistral: as Llama, but 8 KV heads unless config.json says otherwise.
pub(super) const MISTRAL: Family = Family { model_type: "mistral", default_kv_heads: |_| 8, ..llama::LLAMA };
