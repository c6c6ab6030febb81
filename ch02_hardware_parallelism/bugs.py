"""The exhibits of the bug museum: wrong parallel training as it was really shipped, each an override of a few lines.

Every one trains: the loss falls, and the curve looks like that of the healthy strategy beside it (museum.py). The
parity harness finds every one, by the gradient of some parameter or by the global norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel, DataParallel
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, token_count, trainable
from ch02_hardware_parallelism.zero1 import Zero1
from common.script import UserError


class SumInsteadOfMean(DataParallel):
    """Each rank averages over its own tokens, and the averages are summed: gradients N times too large."""

    def divisor(self, micro_batches: list[Batch]) -> int:
        return token_count(self.share(batch) for batch in micro_batches)


class MeanOfMeans(DataParallel):
    """Each rank averages over its own tokens, and the averages are averaged: right only while all have equally many."""

    def divisor(self, micro_batches: list[Batch]) -> int:
        return token_count(self.share(batch) for batch in micro_batches) * self.comm.size


class ReducedEveryMicroBatch(BucketedDataParallel):
    """Buckets leave after every micro-batch, with what was summed before in them: that is summed again, N times."""

    def begin(self, *, last: bool) -> None:
        if self.next:
            self.synchronize()  # the sums of the micro-batch before are in .grad now, on every rank
        self.last = True


class LastMicroBatchOnly(DataParallel):
    """A hook reduces the gradient that it is given: the last micro-batch's, not what the others left in .grad."""

    def __init__(self, model: torch.nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        self.last = False
        self.hooks = [p.register_hook(self.reduce) for _, p in trainable(model)]

    def begin(self, *, last: bool) -> None:
        self.last = last

    def reduce(self, gradient: torch.Tensor) -> torch.Tensor:
        if not self.last:
            return gradient
        summed = gradient.clone(memory_format=torch.contiguous_format)
        self.comm.all_reduce(summed)
        return summed

    def synchronize(self) -> None:
        """Nothing left to do, its author thought."""

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class SameDataOnAllRanks(DataParallel):
    """The sampler is given the local rank, and there is one rank a node: each node trains on the same share."""

    def share(self, batch: Batch) -> Batch:
        return share(batch, 0, self.comm.size)


class NormOfOwnShard(Zero1):
    """Clips by the norm of the shard that this rank holds: sqrt(N) too small, and another scale on every rank."""

    def squared_norm(self) -> torch.Tensor:
        return self.shard.grad.square().sum()


@dataclass(frozen=True)
class Bug:
    """An exhibit: what was done right and wrong, and where it was seen."""

    healthy: type[Strategy]
    broken: type[Strategy]
    source: str
    ranks: int = 2

    @property
    def story(self) -> str:
        return (self.broken.__doc__ or "").splitlines()[0]


BUGS = {
    "sum-instead-of-mean": Bug(DataParallel, SumInsteadOfMean, "teaching code without number; Adam hides the factor"),
    "mean-of-means": Bug(
        DataParallel, MeanOfMeans, "transformers' gradient accumulation until October 2024 (Unsloth's report)"
    ),
    "reduced-every-micro-batch": Bug(
        BucketedDataParallel, ReducedEveryMicroBatch, "hand-made accumulation without no_sync"
    ),
    "last-micro-batch-only": Bug(DataParallel, LastMicroBatchOnly, "teaching code with register_hook"),
    "same-data-on-all-ranks": Bug(DataParallel, SameDataOnAllRanks, "DistributedSampler given the local rank"),
    "norm-of-own-shard": Bug(Zero1, NormOfOwnShard, "torchtitan #2318: the norm under HSDP and FSDP, 8 times off"),
}


def find_bug(name: str) -> Bug:
    """The exhibit of that name.

    Raises:
        UserError: there is none; the line lists them.
    """
    if name not in BUGS:
        raise UserError(f"no bug {name!r}; one of {', '.join(BUGS)}")
    return BUGS[name]
