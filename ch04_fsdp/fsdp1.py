"""FSDP1, torch.distributed.fsdp.FullyShardedDataParallel: its names, and a step of it to hold FSDP2's against.

FSDP1 (2022) makes of all parameters of a unit one flat tensor and cuts that; FSDP2 (`fully_shard`) cuts each parameter
by rows, so that it keeps its name, type and optimizer group. Old code, papers and flags speak FSDP1's language:
sharding.FSDP1_NAMES. On a CPU it says that it needs an accelerator, unless it is told the device: then it runs.

A trap (torch 2.13): HYBRID_SHARD with groups of one rank becomes NO_SHARD inside the group, which averages over that
group alone. The copies are never averaged, and drift apart. FSDP2 does it right.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ch03_ddp import step as ddp_step
from ch03_ddp.feed import Batch
from ch04_fsdp import weights
from ch04_fsdp.sharding import FSDP1_NAMES, Sharding
from common import lm
from common.dist import Context


def wrap(preset: str, name: str, sharding: Sharding, ctx: Context, *, seq_len: int, seed: int) -> nn.Module:
    """The same weights as model.build's, under the FSDP1 strategy of this name. The whole model is built first."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    whole = weights.plan(lm.config(preset, seq_len))
    weights.allocate(whole, ctx.device)
    weights.initialize(whole, seed)
    mesh = sharding.mesh(ctx.world_size, ctx.device, ctx.launch.local_world_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NO_SHARD")  # deprecated, or all there is on one rank
        return FullyShardedDataParallel(
            whole,
            sharding_strategy=ShardingStrategy[name],
            device_mesh=mesh,
            auto_wrap_policy=ModuleWrapPolicy({type(whole.model.layers[0])}),
            device_id=ctx.device,
            use_orig_params=True,
        )


def grad_norm(
    preset: str, name: str, ctx: Context, batches: Sequence[Batch], tokens: int, *, shard_ranks: int | None, seed: int
) -> float:
    """The norm of the gradients of one step in float32, of the whole model, under FSDP1's strategy `name`."""
    strategy = FSDP1_NAMES[name]
    sharding = Sharding(strategy, shard_ranks if strategy.startswith("hybrid") else None)
    model = wrap(preset, name, sharding, ctx, seq_len=batches[0][0].shape[1], seed=seed)
    for inputs, targets in batches:
        loss = ddp_step.loss_sum(model, inputs, targets)
        (loss * (ctx.world_size / tokens)).backward()  # FSDP1 too divides by the ranks
    norm = model.clip_grad_norm_(1e9)  # type: ignore[operator]  # its own: torch's would take shards for the whole
    return torch.as_tensor(norm).item()
