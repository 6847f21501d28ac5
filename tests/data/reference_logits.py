"""Logits of transformers, for tests/runtime_logits.rs.

    python reference_logits.py MODEL TEXT OUT.safetensors

Runs MODEL (a Llama directory, MHA) on the first two windows of TEXT in float32: as it is ("source"), with
neighbouring heads mean-pooled two by two as a grouped-query model ("stock"), and with the shared heads copied
back to their groups ("expanded"). Keeps 16 rows of each window. Pooled weights are rounded to bfloat16, as a
converted checkpoint stores them. Needs torch, transformers, tokenizers, safetensors.
"""

import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

model_path, text_path, out_path = sys.argv[1:]
config = AutoConfig.from_pretrained(model_path)
length, heads, dim = min(config.max_position_embeddings, 512), config.num_attention_heads, config.head_dim
ids = Tokenizer.from_file(f"{model_path}/tokenizer.json").encode(open(text_path, encoding="utf-8").read()).ids
ids = torch.tensor(ids[: 2 * length]).reshape(2, length)
rows = torch.arange(16) * (length // 16) + length // 16 - 1

source = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
weights = source.state_dict()


def pooled(weight):
    """(heads * dim, d) -> (heads / 2, dim, d), the means of neighbours."""
    means = weight.double().reshape(heads // 2, 2, dim, -1).mean(1)
    return means.float().bfloat16().float()


def grouped(kv_heads):
    config.num_key_value_heads = kv_heads
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shared = dict(weights)
    for name in weights:
        if ".k_proj." in name or ".v_proj." in name:
            shared[name] = pooled(weights[name]).repeat_interleave(2 * kv_heads // heads, 0).flatten(0, 1)
    model.load_state_dict(shared)
    return model


kept = {"ids": ids.int(), "rows": rows.int()}
with torch.no_grad():
    for name, model in [("source", source), ("stock", grouped(heads // 2)), ("expanded", grouped(heads))]:
        kept[name] = model(ids).logits[:, rows].contiguous()
save_file(kept, out_path)
