"""The training step of train_deepspeed.py as strategies of chapter 2's parity harness: ZeRO 1 to 3, and its options.

A name is the stage and what differs from configs/zeroN.json, as in zero-3+cpu or zero-2+overlap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, trainable
from ch03_ddp.strategies import RaggedLlama, token_count
from ch04_fsdp import zero_peers
from ch05_deepspeed_megatron import engine
from common import dist

__all__ = ["OPTIONS", "RaggedLlama", "Zero", "option"]

SMALL = {"reduce_bucket_size": 2000, "stage3_prefetch_bucket_size": 2000}  # many messages, though the model is tiny
MORE: dict[str, dict[str, Any]] = {
    "overlap": {"overlap_comm": True},
    "one-bucket": {"reduce_bucket_size": 500_000_000},
    "all-reduce": {"reduce_scatter": False},
    "whole": {"stage3_param_persistence_threshold": 10**9},  # nothing is sharded though the stage is 3
    "free-at-once": {"stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0},
    "cpu": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "cpu-params": {
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
    },
}
OPTIONS = [
    "zero-1", "zero-2", "zero-3",
    *(f"zero-{stage}+{more}" for stage in (1, 2) for more in ("overlap", "one-bucket", "all-reduce", "cpu")),
    *(f"zero-3+{more}" for more in ("overlap", "one-bucket", "whole", "free-at-once", "cpu", "cpu-params")),
]  # fmt: skip


class Zero(Strategy):
    """Each rank has a share of every micro-batch. Clipping, which is DeepSpeed's, has a bound that nothing reaches."""

    stage = 1
    more: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.comm = comm
        zero = {"stage": self.stage} | (SMALL if self.stage else {})
        for name in self.more:
            zero |= MORE[name]
        if self.stage < 3:
            zero = {key: value for key, value in zero.items() if not key.startswith("stage3_")}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # only counted
            "gradient_clipping": 1e9,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # SGD
            "zero_force_ds_cpu_optimizer": False,
        }
        device = next(model.parameters()).device
        deepspeed = zero_peers.join(dist.read_launch(), device)
        optimizer = make_optimizer(p for _, p in trainable(model))
        self.zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model = self.zero.module

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        mine = [share(batch, self.comm.rank, self.comm.size) for batch in micro_batches]
        self.zero.set_train_batch_size(len(mine) * self.comm.size)
        loss = zero_peers.backward(self.zero, mine, token_count(micro_batches), self.comm.size)
        self.found = {name: grad.clone() for name, grad in zero_peers.gradients(self.zero) if grad is not None}
        self.comm.all_reduce(loss)
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        return self.found

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole.clone() for name, whole in engine.whole_weights(self.zero)}

    def grad_norm(self) -> torch.Tensor:
        """DeepSpeed finds the norm in its step, after which there are no gradients."""
        return torch.as_tensor(float(zero_peers.update(self.zero)))

    def update(self) -> None:
        """Done with the norm."""


class Averaged:
    """A planted fault: engine.backward divides by the micro-batches, as it does unless told otherwise."""

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        right = self.zero.backward
        self.zero.backward = lambda loss, **_: right(loss, scale_wrt_gas=True)
        return super().backward(micro_batches)


def option(name: str, *faults: type) -> type[Zero]:
    """The class of an option, under its own name in this module, so that other processes find it."""
    known = "+".join([name, *(fault.__name__.lower() for fault in faults)])
    if known not in globals():
        stage, *more = name.removeprefix("zero-").split("+")
        body = {"stage": int(stage), "more": tuple(more), "__module__": __name__}
        globals()[known] = type(known, (*faults, Zero), body)
    return globals()[known]


for _name in OPTIONS:
    option(_name)
    option(_name, Averaged)
