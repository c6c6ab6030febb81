"""The training step of train_fsdp.py as strategies of chapter 2's parity harness, in every combination of its options.

An option is written strategy+offload+recompute(+more), as in full+cpu+mlp or full+none+none+sync-each.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, trainable
from ch03_ddp.strategies import RaggedLlama, token_count
from ch04_fsdp import disk, recompute, step
from ch04_fsdp.sharding import OFFLOADS, STRATEGIES, Sharding, shard

__all__ = ["OPTIONS", "RaggedLlama", "Sharded", "option"]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Sharded(Strategy):
    """Each rank has a share of every micro-batch. Hybrid: groups of two ranks."""

    sharding = Sharding()
    sync_each = False

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.comm = comm
        device = next(model.parameters()).device
        if self.sharding.compile:  # as in chapter 3: a matrix asks for many variants, and none may go on uncompiled
            torch._dynamo.config.recompile_limit = 100
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.model = shard(model, self.sharding, self.sharding.mesh(comm.size, device))
        if self.sharding.offload == "disk":
            disk.Tier(self.model, Path(tempfile.gettempdir()))
        self.optimizer = make_optimizer(p for _, p in trainable(self.model))
        if tier := disk.of(self.model):
            tier.hold(self.optimizer)

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:  # type: ignore[override]
        group = cls.sharding.shard_ranks
        return f"{ranks} ranks do not divide into groups of {group}" if group and ranks % group else None

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name.removeprefix("module."), p) for name, p in self.model.named_parameters()]

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        mine = [share(batch, self.comm.rank, self.comm.size) for batch in micro_batches]
        loss = step.backward(
            self.model, mine, token_count(micro_batches), self.comm.size, self.sharding, sync_each=self.sync_each
        )
        self.comm.all_reduce(loss)
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: whole(p.grad) for name, p in self.named() if p.grad is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(p.detach()) for name, p in self.named()}

    def grad_norm(self) -> torch.Tensor:
        """As the training script clips by: a bound so high that nothing is clipped."""
        return step.clip(self.model, 1e9)

    def update(self) -> None:
        step.apply(self.model, self.optimizer)


def option(name: str) -> type[Sharded]:
    """The class of a combination, under its own name in this module, so that other processes find it."""
    if name not in globals():
        strategy, offload, again, *more = name.split("+")
        hybrid = 2 if strategy.startswith("hybrid") else None
        sharding = Sharding(
            strategy, hybrid, recompute=again, offload=offload, compile="compile" in more,
            prefetch=2 if "prefetch-2" in more else 1,
        )  # fmt: skip
        body = {"sharding": sharding, "sync_each": "sync-each" in more, "__module__": __name__}
        globals()[name] = type(name, (Sharded,), body)
    return globals()[name]


OPTIONS = [
    "+".join(parts)
    for parts in itertools.product(STRATEGIES, OFFLOADS, recompute.CHOICES)
    if not (parts[0] == "replicate" and parts[1] != "none")
] + [
    f"{strategy}+none+none+{more}" for strategy in ("full", "hybrid") for more in ("sync-each", "prefetch-2", "compile")
]
OPTIONS += [f"full+disk+none+{more}" for more in ("sync-each", "compile")]  # where its hooks meet the others'
for _name in OPTIONS:
    option(_name)
