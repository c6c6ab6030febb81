"""A model, spread over the ranks and filled: from a preset's name or from a checkpoint's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ch01_intro import training
from ch04_fsdp import disk, weights
from ch04_fsdp.sharding import Sharding, shard
from common import lm
from common.dist import Context
from common.logs import get_logger
from common.script import UserError

log = get_logger()


def build(
    name: str | Any,
    sharding: Sharding,
    ctx: Context,
    *,
    seq_len: int,
    seed: int = 0,
    dropout: float = 0.0,
    offload_dir: Path | None = None,
) -> nn.Module:
    """A preset with random weights, or a Hugging Face folder or hub id with its own. No rank ever holds it whole.

    Args:
        name: as said, or a transformers config, for random weights.
        offload_dir: where the shards' file goes that offload "disk" needs (default: the system's temporary folder).

    Returns:
        What is to be called: the model itself, or DDP around it for replicate.

    Raises:
        UserError: there is no such model, it is too short for seq_len, its checkpoint does not fit it, or there is no
            room to offload.
    """
    config = lm.config(name, seq_len) if isinstance(name, str) else name
    if seq_len > config.max_position_embeddings:
        raise UserError(
            f"--seq-len {seq_len} is longer than the model's {config.max_position_embeddings} positions; shorten it"
        )
    config.attention_dropout = dropout
    mesh = sharding.mesh(ctx.world_size, ctx.device, ctx.launch.local_world_size)
    model = weights.plan(config)
    home = ctx.device if sharding.offload == "none" else torch.device("cpu")  # where shards wait for their use
    if sharding.strategy == "replicate":  # DDP compares the ranks' weights when it is made: there must be some
        _fill(model, name, home, ctx.device, seed)
        return shard(model, sharding, mesh)
    shard(model, sharding, mesh)
    if sharding.offload == "disk":
        tier = disk.Tier(model, offload_dir or Path(tempfile.gettempdir()))
        log.info("shards are on disk", folder=offload_dir, gib_of_this_rank=round(tier.size / 2**30, 3))
    _fill(model, name, home, ctx.device, seed)
    return model


def _fill(model: nn.Module, name: str | Any, home: torch.device, compute: torch.device, seed: int) -> None:
    weights.allocate(model, home, compute)
    if not isinstance(name, str) or lm.is_preset(name):
        weights.initialize(model, seed)
    else:
        read = weights.load(model, weights.checkpoint_files(name))
        log.info("read the checkpoint", model=name, gib_on_this_rank=round(read / 2**30, 3))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW as in chapter 1, over this rank's shards. Where those are on disk, its state is too."""
    made = training.make_optimizer(model, lr)
    if tier := disk.of(model):
        tier.hold(made)
    return made


def inner(model: nn.Module) -> nn.Module:
    """The transformers model, without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def held_bytes(model: nn.Module) -> dict[str, int]:
    """What this rank holds of the parameters and of their gradients, between two steps."""
    held = {"parameters": 0, "gradients": 0}
    for parameter in model.parameters():
        for kind, tensor in (("parameters", parameter), ("gradients", parameter.grad)):
            if tensor is not None:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                held[kind] += local.numel() * local.element_size()
    return held
