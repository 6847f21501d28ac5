"""A stock decoder whose layers differ in their numbers of heads, as qcqa writes it.

config.json lists the query heads and the KV heads of every layer under `qcqa_heads`. All else is the stock class: each attention is made
anew with the numbers of its layer, so that the cache of a layer holds its own KV heads and no more. Groups of unlike sizes were filled up
with query heads of zeros, whose part of the output projection is zero, too: every attention kernel finds equal groups.
"""

import copy

from transformers import StockForCausalLM


class QcqaForCausalLM(StockForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer, (query_heads, kv_heads) in enumerate(config.qcqa_heads):
            own = copy.copy(config)
            own.num_attention_heads, own.num_key_value_heads = query_heads, kv_heads
            block = self.model.layers[layer]
            block.self_attn = type(block.self_attn)(own, layer)
            # Whatever is chosen for the model later, its attention kernel above all, holds for every layer.
            block.self_attn.config = self.config
