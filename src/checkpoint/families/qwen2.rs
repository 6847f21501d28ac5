use super::{Family, llama};

/// Qwen1.5 and Qwen2: as Llama, with biases on query, key and value, and 32 KV heads unless config.json says
/// otherwise.
pub(super) const QWEN2: Family = Family { model_type: "qwen2", default_kv_heads: |_| 32, ..llama::LLAMA };
