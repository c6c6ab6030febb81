"""One training step of a sharded model: what changes against chapter 3's is when gradients travel, and the norm.

loss = backward(model, batch.micro_batches, batch.tokens, ctx.world_size, sharding)
norm = update(model, optimizer, max_norm=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ch03_ddp import step as ddp_step
from ch03_ddp.feed import Batch
from ch04_fsdp import disk
from ch04_fsdp.sharding import Sharding


def backward(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    tokens: int,
    world_size: int,
    sharding: Sharding,
    *,
    sync_each: bool = False,
) -> torch.Tensor:
    """Gradients of the mean loss over all tokens of all micro-batches of all ranks. Each rank must have as many.

    Args:
        sync_each: reduce after each micro-batch, so that gradients are held as shards. Else they add up whole on every
            rank until the last one: one message instead of many, and a whole model's gradients in memory meanwhile.

    Returns:
        This rank's part of that mean, 0-d: the parts of all ranks add up to it.
    """
    if not isinstance(model, FSDPModule):
        precision = ddp_step.Precision.of(sharding.dtype, next(model.parameters()).device)
        return ddp_step.backward(model, micro_batches, tokens, world_size, precision)
    parts = []
    for number, (inputs, targets) in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        model.set_requires_gradient_sync(last or sync_each)
        loss = ddp_step.loss_sum(model, inputs, targets)
        (loss * (world_size / tokens)).backward()  # FSDP, like DDP, divides by the ranks
        parts.append(loss.detach() / tokens)
    return torch.stack(parts).sum()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clip, step, forget the gradients. Returns their norm before, 0-d, the whole model's on every rank."""
    norm = clip(model, max_norm)
    apply(model, optimizer)
    return norm


def apply(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step and forget the gradients; from a disk unit by unit."""
    tier = disk.of(model)
    tier.step(optimizer) if tier else optimizer.step()
    optimizer.zero_grad()


def clip(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all ranks is at most `max_norm`. Returns the norm before.

    On shards clip_grad_norm_ yields a DTensor that is still to be summed over the ranks: .item() of it would be a
    rank's own part, of which each rank has another. full_tensor() sums.
    """
    if tier := disk.of(model):
        return tier.clip(model.parameters(), max_norm)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
