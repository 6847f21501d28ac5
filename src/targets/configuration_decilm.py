"""The configuration of a Llama whose layers have their own numbers of KV heads, in the words of Nemotron-NAS.

vLLM's `DeciLMForCausalLM` reads what each block says by attributes: `block_configs[i].attention.n_heads_in_group` query heads share a
KV head, and `block_configs[i].ffn.intermediate_size` is the width of its MLP.
"""

from transformers import LlamaConfig


class Block(dict):
    """A dictionary whose keys are attributes, too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return Block(self[name]) if isinstance(self[name], dict) else self[name]


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **others):
        self.block_configs = [Block(block) for block in block_configs]
        super().__init__(**others)
