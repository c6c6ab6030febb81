"""Activation checkpointing by DeepSpeed: a config's section "activation_checkpointing", put to work on a Llama.

    activation_checkpointing.apply(model, settings["activation_checkpointing"])

DeepSpeed reads the section and does nothing by it: the model has to call its checkpoint function. Each layer keeps its
input alone, S bytes, and runs again in backward. On top of that, of T ranks with the same activations (a tensor
parallel group: between layers they all hold the same residual stream):

    key                             a layer keeps   what it costs
    (none of them)                  S               a second forward
    partition_activations           S / T           an all-gather of S before each layer's backward
      contiguous_memory_optimization  S / T         nothing: all layers' buffers are taken in the first, so that
                                                    checkpoints do not lie scattered between short-lived tensors
    cpu_checkpointing               0, or S / T on the host   a copy to the host and back

Without such a group (T = 1) partitioning saves nothing and copies each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as td
from torch import nn

from common.script import UserError


@dataclass(frozen=True)
class ModelParallel:
    """What DeepSpeed asks of Megatron's mpu. Ranks of `group` hold the same activations, those of `data` other data."""

    group: td.ProcessGroup
    data: td.ProcessGroup | None = None

    def get_model_parallel_group(self) -> td.ProcessGroup:
        return self.group

    def get_model_parallel_rank(self) -> int:
        return self.group.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.group.size()

    def get_data_parallel_group(self) -> td.ProcessGroup | None:
        return self.data

    def get_data_parallel_rank(self) -> int:
        return self.data.rank() if self.data else 0

    def get_data_parallel_world_size(self) -> int:
        return self.data.size() if self.data else 1


def check(section: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: DeepSpeed would stop at its first forward, or write behind its buffers.
    """
    if section.get("contiguous_memory_optimization"):
        for key, wanted in (("partition_activations", "true"), ("number_checkpoints", "the number of layers")):
            if not section.get(key):
                raise UserError(
                    f"activation_checkpointing.contiguous_memory_optimization needs {key}; set it to {wanted}"
                )


def apply(model: nn.Module, section: Mapping[str, Any], mpu: ModelParallel | None = None) -> None:
    """Checkpoint each layer of a transformers decoder as the section says, for the whole process: it is global state.

    Call it when DeepSpeed has joined the ranks (zero_peers.join and init_distributed).

    Raises:
        UserError: see check, or there are more layers than number_checkpoints.
    """
    check(section)
    layers = model.model.layers  # type: ignore[union-attr]
    count = section.get("number_checkpoints")
    if section.get("contiguous_memory_optimization") and count < len(layers):
        raise UserError(f"activation_checkpointing.number_checkpoints is {count} for {len(layers)} layers; raise it")
    from deepspeed.runtime.activation_checkpointing import checkpointing

    # On CPU ranks there is no other side; DeepSpeed 0.19.8 would empty the very tensor that it has just put aside.
    on_host = section.get("cpu_checkpointing") and next(model.parameters()).device.type != "cpu"
    checkpointing.configure(
        mpu,
        partition_activations=section.get("partition_activations"),
        contiguous_checkpointing=section.get("contiguous_memory_optimization"),
        num_checkpoints=count,
        checkpoint_in_cpu=bool(on_host),
        synchronize=section.get("synchronize_checkpoint_boundary"),
        profile=section.get("profile"),
    )
    for layer in layers:
        layer.gradient_checkpointing = True  # transformers calls this function for a layer while it trains
        layer._gradient_checkpointing_func = checkpointing.checkpoint
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):  # type: ignore[operator]
        # A checkpoint none of whose inputs needs a gradient has none: layers behind frozen embeddings would not learn.
        model.enable_input_require_grads()  # type: ignore[operator]
