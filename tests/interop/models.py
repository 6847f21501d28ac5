"""Small random models of every family, as stock transformers makes them."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# Heads whose numbers hide no transposition: 6 query heads on 2 KV heads, unless a family says otherwise.
SMALL = dict(
    vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
GPT2 = dict(n_embd=48, n_layer=3, n_head=6, n_positions=64, n_inner=64)


def llama3(factor=4.0):
    return dict(rope_type="llama3", rope_theta=1e4, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=16)


def yarn(**more):
    return dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, **more)


def longrope(pairs):
    return dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32,
                short_factor=[1.0 + 0.1 * i for i in range(pairs)], long_factor=[2.0 + 0.5 * i for i in range(pairs)])


def alternating(n=3, every=2):
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]


def rope(theta=1e4, **more):
    return dict(rope_type="default", rope_theta=theta, **more)


# name -> (model_type, what differs from SMALL)
MODELS = {
    # Its sizes are an eighth of Llama 3.2 1B's; its tokenizer is that of novels-1m, so that it can be calibrated on a text.
    "llama 3.2 shape": ("llama", dict(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_attention_heads=32, num_key_value_heads=8, head_dim=8,
        max_position_embeddings=128, tie_word_embeddings=True, rope_parameters=dict(llama3(32.0), original_max_position_embeddings=64))),
    "llama": ("llama", dict()),
    "llama, MHA, biases, tied": ("llama", dict(num_key_value_heads=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama 3 (llama3)": ("llama", dict(rope_parameters=llama3(), tie_word_embeddings=True)),
    "llama, linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama, dynamic": ("llama", dict(max_position_embeddings=32, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "llama, yarn": ("llama", dict(rope_parameters=yarn())),
    "llama, yarn, not truncated": ("llama", dict(rope_parameters=yarn(truncate=False, mscale=0.7, mscale_all_dim=0.4, beta_fast=8.0, beta_slow=2.0))),
    "mistral, window": ("mistral", dict(sliding_window=16, head_dim=12)),
    "qwen2": ("qwen2", dict()),
    "qwen2, yarn": ("qwen2", dict(rope_parameters=yarn(attention_factor=1.3))),
    "qwen2, windows": ("qwen2", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3, biases, windows": ("qwen3", dict(head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=16, max_window_layers=2)),
    "olmo": ("olmo", dict(num_key_value_heads=6)),
    "olmo, grouped": ("olmo", dict(tie_word_embeddings=True)),
    "olmo2": ("olmo2", dict(num_key_value_heads=6)),
    "olmo2, grouped": ("olmo2", dict()),
    "olmo3, yarn by kind": ("olmo3", dict(sliding_window=16, layer_types=alternating(), rope_parameters=dict(
        sliding_attention=rope(5e3), full_attention=yarn()))),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, tie_word_embeddings=True)),
    "phi3": ("phi3", dict(num_key_value_heads=6)),
    "phi3, original by default": ("phi3", dict(rope_parameters=dict(longrope(4), original_max_position_embeddings=4096))),
    "phi3, longrope, partial, window": ("phi3", dict(sliding_window=48, hidden_size=96, rope_parameters=dict(longrope(4), partial_rotary_factor=0.5),
                                                      original_max_position_embeddings=32)),
    "phi": ("phi", dict(num_key_value_heads=6)),
    "phi, normed": ("phi", dict(num_key_value_heads=2, qk_layernorm=True)),
    "gemma": ("gemma", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
                              final_logit_softcapping=5.0, tie_word_embeddings=True)),
    "gemma3": ("gemma3_text", dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=24, layer_types=alternating(),
                                   rope_parameters=dict(sliding_attention=rope(1e3), full_attention=dict(
                                       rope_type="linear", rope_theta=1e5, factor=8.0)), tie_word_embeddings=True)),
    "granite": ("granite", dict(attention_multiplier=0.2, residual_multiplier=0.4, embedding_multiplier=6.0, logits_scaling=3.0)),
    "stablelm": ("stablelm", dict(hidden_size=96, use_qkv_bias=True, rope_parameters=rope(partial_rotary_factor=0.25))),
    "stablelm, parallel": ("stablelm", dict(hidden_size=96, num_key_value_heads=6, use_parallel_residual=True,
                                             rope_parameters=rope(partial_rotary_factor=0.25))),
    "stablelm, norms of heads": ("stablelm", dict(hidden_size=96, qk_layernorm=True, rope_parameters=rope(partial_rotary_factor=0.25))),
    "gpt_neox": ("gpt_neox", dict(rope_parameters=rope(partial_rotary_factor=0.5))),
    "gpt_neox, in sequence": ("gpt_neox", dict(use_parallel_residual=False, hidden_act="gelu_new", rope_parameters=rope(partial_rotary_factor=1.0))),
    "starcoder2": ("starcoder2", dict(sliding_window=16, tie_word_embeddings=True)),
    "nemotron": ("nemotron", dict(attention_bias=True, rope_parameters=rope(partial_rotary_factor=0.5))),
    "cohere": ("cohere", dict(logit_scale=0.4, tie_word_embeddings=True)),
    "cohere, norms of heads": ("cohere", dict(logit_scale=0.4, use_qk_norm=True, attention_bias=True, tie_word_embeddings=True)),
    "cohere2": ("cohere2", dict(logit_scale=0.4, sliding_window=16, layer_types=alternating(), tie_word_embeddings=True)),
    "glm": ("glm", dict(head_dim=8, rope_parameters=rope(partial_rotary_factor=0.5))),
    "glm4": ("glm4", dict(head_dim=16, rope_parameters=rope(partial_rotary_factor=0.5))),
    "exaone4": ("exaone4", dict(sliding_window=16, sliding_window_pattern=2, layer_types=alternating())),
    "exaone4, no window": ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 3)),
    "arcee": ("arcee", dict(hidden_act="relu2", mlp_bias=True)),
    "seed_oss": ("seed_oss", dict(head_dim=16)),
    "ernie4_5": ("ernie4_5", dict(head_dim=16, use_bias=True, tie_word_embeddings=True)),
    "helium": ("helium", dict(head_dim=8)),
    "olmoe": ("olmoe", dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=6)),
    "olmoe, grouped": ("olmoe", dict(num_experts=5, num_experts_per_tok=3, norm_topk_prob=True)),
    "opt": ("opt", dict(ffn_dim=64, word_embed_proj_dim=48, tie_word_embeddings=True)),
    "opt, norms behind": ("opt", dict(ffn_dim=64, word_embed_proj_dim=48, do_layer_norm_before=False, tie_word_embeddings=True)),
    "gpt2": ("gpt2", dict(GPT2, tie_word_embeddings=True)),
    "gpt2, scores as they are": ("gpt2", dict(GPT2, scale_attn_weights=False)),
    "gptj": ("gptj", dict(GPT2, rotary_dim=4)),
    "bloom": ("bloom", dict(n_layer=3, n_head=6, tie_word_embeddings=True)),
    "falcon-rw": ("falcon", dict(alibi=True, multi_query=False, parallel_attn=False, bias=True, ffn_hidden_size=64,
                                 tie_word_embeddings=True)),
    "falcon, rotary, parallel": ("falcon", dict(alibi=False, multi_query=False, parallel_attn=True, ffn_hidden_size=64)),
    "mpt": ("mpt", dict(d_model=48, n_heads=6, n_layers=3, expansion_ratio=2, max_seq_len=64, tie_word_embeddings=True)),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, norm_topk_prob=True)),
    "qwen3_moe, windows": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16,
                                             use_sliding_window=True, sliding_window=16)),
    "qwen3_moe, some dense": ("qwen3_moe", dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=32, head_dim=16, decoder_sparse_step=2)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=16, rope_parameters=yarn(truncate=False))),
    "gpt_oss, all full": ("gpt_oss", dict(num_local_experts=5, num_experts_per_tok=3, head_dim=8, attention_bias=False,
                                         layer_types=["full_attention"] * 3, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "mistral3, with pictures": ("mistral3", dict(
        text_config=dict(SMALL, model_type="mistral", head_dim=8, sliding_window=None),
        vision_config=dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           head_dim=16, image_size=28, patch_size=14), image_token_index=92, tie_word_embeddings=False)),
    "gemma3, with pictures": ("gemma3", dict(
        text_config=dict({**SMALL, "num_attention_heads": 8}, head_dim=16, sliding_window=16, layer_types=alternating(),
                         rope_parameters=dict(sliding_attention=rope(1e3), full_attention=rope(1e5))),
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
        boi_token_index=90, eoi_token_index=91, image_token_index=92, tie_word_embeddings=True)),
}


# How published files spell what transformers 5 writes otherwise.
BEFORE = {
    "bloom": {"n_head": "num_attention_heads", "hidden_size": "n_embed"},
    "gpt2": {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}


def spell_as_before(path):
    """Writes a config.json as transformers 4 did; False where nothing is spelled otherwise."""
    config = json.loads(path.read_text())
    before = dict(config)
    rope = config.get("rope_parameters")
    if rope and not any(isinstance(value, dict) for value in rope.values()):
        config.pop("rope_parameters")
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                config[key] = rope.pop(key)
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {("type" if key == "rope_type" and rope[key] == "linear" else key): value for key, value in rope.items()}
    for key, other in BEFORE.get(config["model_type"], {}).items():
        if key in config:
            config[other] = config.pop(key)
    path.write_text(json.dumps(config))
    return config != before


def config_of(name):
    model_type, differs = MODELS[name]
    if "text_config" in differs:
        return AutoConfig.for_model(model_type, **differs)
    settings = {**SMALL, **differs}
    if model_type in ("gpt2", "gptj", "bloom", "mpt"):
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                    "num_key_value_heads", "intermediate_size"):
            settings.pop(key)
        if model_type == "bloom":
            settings["hidden_size"] = 48
    if model_type in ("gpt_neox", "opt", "falcon"):
        settings.pop("num_key_value_heads")
    return AutoConfig.for_model(model_type, **settings)


def make(name, seed=0):
    """A model whose every tensor matters: norms of 0.5 to 2, biases that are not 0, heads that look at one another."""
    kind = AutoModelForImageTextToText if "with pictures" in name else AutoModelForCausalLM
    return made(kind, config_of(name), seed)


def made(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1 or "_norm." in key:
                norm = "norm" in key.lower() or "ln_" in key
                if norm and key.endswith("weight"):
                    value.uniform_(0.5, 2.0)
                    if model.config.model_type in ("gemma", "gemma2", "gemma3_text", "gemma3", "nemotron"):
                        value -= 1
                else:
                    value.normal_(0, 0.2)
            elif "embed" in key or "wte" in key or "wpe" in key:
                value.normal_(0, 0.5)
            else:
                value.normal_(0, 1.2 / value.shape[-1] ** 0.5)
    return model.eval()


def share_heads(model):
    """Makes KV heads of a model equal two by two, so that half of them lose nothing."""
    weights = dict(model.named_parameters())
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads

    def pair(rows):
        by_head = rows.view(-1, width, *rows.shape[1:])
        by_head[1::2] = by_head[0::2]

    with torch.no_grad():
        for key, value in model.named_parameters():
            if any(part in key for part in ("k_proj", "v_proj", "k_norm", "self.key", "self.value")) and value.shape[0] == heads * width:
                pair(value)
            if "k_norm" in key and value.shape == (heads, width):
                value[1::2] = value[0::2]
            if "k_layernorm.norms." in key:
                before, head, after = key.rpartition("norms.")[0], *key.rpartition("norms.")[2].split(".")
                value.copy_(weights[f"{before}norms.{int(head) // 2 * 2}.{after}"])
            if "qkv_proj" in key:
                for first in (queries, queries + heads):
                    pair(value[first * width : (first + heads) * width])
            if "query_key_value" in key:
                by_head = value.view(queries, 3, width, *value.shape[1:])
                by_head[1::2, 1:] = by_head[0::2, 1:]
            if "c_attn" in key or "Wqkv" in key:
                turned = value.t() if value.dim() == 2 and "c_attn" in key else value
                for first in (queries, 2 * queries):
                    pair(turned[first * width : (first + queries) * width])
    return model
