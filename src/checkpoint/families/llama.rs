use super::Family;

/// Llama, CodeLlama, SmolLM, and what follows them: split projections, RoPE half-split over the whole head.
pub(super) const LLAMA: Family = Family {
    model_type: "llama",
    default_kv_heads: |query_heads| query_heads,
    before_layer: "model.layers.",
    modules: [".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.o_proj"],
};
