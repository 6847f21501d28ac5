"""A stock decoder whose layers differ in their numbers of heads, as qcqa writes it.

config.json lists the query heads and the KV heads of every layer under `qcqa_heads`. All else is the stock class: each attention is made
anew with the numbers of its layer, so that the cache of a layer holds its own KV heads and no more. Groups of unlike sizes were filled up
with query heads of zeros, whose part of the output projection is zero, too: every attention kernel finds equal groups.
"""

from transformers import StockForCausalLM


class Layer:
    """The configuration of the model with the heads of one layer: whatever is chosen later, the attention kernel above all, holds for all."""

    def __init__(self, config, query_heads, kv_heads):
        self.whole, self.num_attention_heads, self.num_key_value_heads = config, query_heads, kv_heads

    def __getattr__(self, name):
        if name == "whole":  # while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)


class QcqaForCausalLM(StockForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer, heads in enumerate(config.qcqa_heads):
            block = self.model.layers[layer]
            block.self_attn = type(block.self_attn)(Layer(config, *heads), layer)
