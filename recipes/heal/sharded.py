#!/usr/bin/env python3
"""heal.py with sharded weights (FSDP 2) on the CPU, for check.py: accelerate shards on GPUs only, and is told here that these are some."""

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import heal


def sharding():
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


class Sharded(heal.Healing):
    def __init__(self, *given):
        super().__init__(*given)
        for model in (self.theirs.model, self.own.model):
            if not any(isinstance(module, FSDPModule) for module in model.modules()):
                raise heal.Wrong("the weights are not sharded")


heal.Accelerator, heal.Healing = sharding, Sharded
heal.main()
