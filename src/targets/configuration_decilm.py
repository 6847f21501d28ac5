"""The configuration of a Llama whose layers have their own numbers of KV heads, in the words of Nemotron-NAS.

vLLM's `DeciLMForCausalLM` reads what each block says by attributes: `block_configs[i].attention.n_heads_in_group` query heads share a
KV head, and `block_configs[i].ffn.intermediate_size` is the width of its MLP. All else is as in a Mistral without windows, whose heads
have the width that `head_dim` says, however many there are.
"""

from transformers import MistralConfig


class Block(dict):
    """A dictionary whose keys are attributes, too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return Block(self[name]) if isinstance(self[name], dict) else self[name]


class DeciLMConfig(MistralConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **others):
        self.block_configs = [Block(block) for block in block_configs]
        # What a Llama takes for granted.
        usual = {"sliding_window": None, "max_position_embeddings": 2048, "num_key_value_heads": others.get("num_attention_heads", 32)}
        super().__init__(**{**usual, **others})
