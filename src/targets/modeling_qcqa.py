"""A stock decoder whose layers differ in their numbers of heads, as qcqa writes it.

config.json lists the query heads and the KV heads of every layer under `qcqa_heads`. All else is the stock class: each attention is made
anew with the numbers of its layer, so that the cache of a layer holds its own KV heads and no more. Groups of unlike sizes were filled up
with query heads of zeros, whose part of the output projection is zero, too: every attention kernel finds equal groups.

Layers for which `qcqa_below` lists heads have no keys and values: they read those heads of the layer below, as that layer has computed and
cached them. Attentions ask their cache for all that they read, so that one which stands in its place is all it takes.
"""

import torch
from transformers import StockForCausalLM


class Layer:
    """The configuration of the model with the heads of one layer: whatever is chosen later, the attention kernel above all, holds for all."""

    def __init__(self, config, query_heads, kv_heads):
        self.whole, self.num_attention_heads, self.num_key_value_heads = config, query_heads, kv_heads

    def __getattr__(self, name):
        if name == "whole":  # while it is copied
            raise AttributeError(name)
        return getattr(self.whole, name)


class Handing:
    """The cache of a layer that hands on what it reads; without a cache that is what it has just computed."""

    def __init__(self, cache, handed):
        self.cache, self.handed = cache, handed

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update(self, keys, values, *rest, **more):
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *rest, **more)
        self.handed[:] = keys, values
        return keys, values


class Reading:
    """What stands in the place of a cache for a layer that reads the one below."""

    def __init__(self, cache, handed, heads):
        self.cache, self.handed, self.heads = cache, handed, heads

    def __getattr__(self, name):
        return getattr(self.cache, name)

    def update(self, keys, values, *rest, **more):
        keys, values = self.handed
        self.handed.clear()
        return keys[:, self.heads], values[:, self.heads]


class Nothing(torch.nn.Module):
    """In the place of a projection whose result nobody reads."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.width)


class InPlaceOfCache:
    """An attention that is given something else in the place of its cache."""

    def forward(self, *args, **kwargs):
        # Its name has changed from one version of transformers to the next.
        named = [name for name in ("cache", "past_key_values", "past_key_value") if name in kwargs]
        if len(named) != 1:
            raise TypeError(f"an attention is given its cache by name, and by one: found {named} among {sorted(kwargs)}")
        return super().forward(*args, **{**kwargs, named[0]: self.in_place(kwargs[named[0]])})


class HandingAttention(InPlaceOfCache):
    def in_place(self, cache):
        return Handing(cache, self.handed)


class ReadingAttention(InPlaceOfCache):
    def in_place(self, cache):
        return Reading(cache, self.handed, self.below)


class QcqaForCausalLM(StockForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer, heads in enumerate(config.qcqa_heads):
            block = self.model.layers[layer]
            block.self_attn = type(block.self_attn)(Layer(config, *heads), layer)
        for layer, heads in enumerate(getattr(config, "qcqa_below", None) or []):
            if heads is not None:
                self.read_below(layer, heads)

    def read_below(self, layer, heads):
        lower, upper = (self.model.layers[i].self_attn for i in (layer - 1, layer))
        width = upper.k_proj.out_features
        upper.k_proj, upper.v_proj = Nothing(width), Nothing(width)
        lower.handed, upper.below = [], heads
        upper.handed = lower.handed
        for attention, kind in ((lower, HandingAttention), (upper, ReadingAttention)):
            stock = type(attention)
            attention.__class__ = type(kind.__name__, (kind, stock), {})
