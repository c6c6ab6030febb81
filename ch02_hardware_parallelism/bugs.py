"""The exhibits of the bug museum: wrong parallel training, each an override of a few lines, and where it was seen.

Every one trains: the loss falls, and the curve looks like that of the healthy strategy beside it (museum.py). The
parity harness finds every one, by the gradient of some parameter or by the global norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel, DataParallel
from ch02_hardware_parallelism.model import loss_sum
from ch02_hardware_parallelism.pipeline_parallel import OneFOneB
from ch02_hardware_parallelism.sequence_parallel import SequenceParallel
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, token_count, trainable
from ch02_hardware_parallelism.tensor_data import TensorDataParallel
from ch02_hardware_parallelism.tensor_layers import RowLinear
from ch02_hardware_parallelism.tensor_parallel import TensorParallel
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

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
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


class NormOfOwnShard(Zero1):
    """Clips by the norm of the shard that this rank holds: sqrt(N) too small, and another scale on every rank."""

    def squared_norm(self) -> torch.Tensor:
        return self.shard.grad.square().sum()


class MissingReplicatedAllReduce(SequenceParallel):
    """Norms and biases are on every rank, but under sequence parallelism each has seen its positions only."""

    def synchronize(self, loss: torch.Tensor) -> None:
        """They are no shards, so there is nothing to sum, its author thought: the copies drift apart."""


class RowBiasOnEveryRank(TensorParallel):
    """Each rank adds the whole bias to its term of the sum: it counts N times, and so does its gradient."""

    class Row(RowLinear):
        def forward(self, x_btF: torch.Tensor) -> torch.Tensor:
            return self.add_up(F.linear(x_btF, self.weight, self.bias))

    def row(self, whole: nn.Linear) -> nn.Module:
        return self.Row(whole, self.comm, self.leave)


class NormCountsCopies(TensorParallel):
    """Every rank's squares are summed: what all ranks hold counts N times, so gradients are clipped too hard."""

    def squared_norm(self) -> torch.Tensor:
        sharded, replicated = self.gradients_held()
        total = self.sum_of_squares([*sharded, *replicated])
        self.comm.all_reduce(total)
        return total


class WrongDataParallelRank(TensorDataParallel):
    """Local rank // tensor ranks: with one row a node it is 0 on every node, and all rows get the same data."""

    @property
    def data_rank(self) -> int:
        return 0


class UnscaledPipelineLoss(OneFOneB):
    """Each chunk's mean loss goes backward, undivided: gradients as many times too large as there are chunks."""

    means = 0

    def chunk_loss(self, logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        self.means += 1
        return loss_sum(logits_btv, targets_bt) / targets_bt.numel()

    def share_loss(self) -> None:
        """The log shows the mean of the chunks: it looks as it should."""
        self.loss /= max(1, self.means)
        self.means = 0
        super().share_loss()


class TiedWeightSyncedOnce(OneFOneB):
    """The head's gradient is added to the embedding's, but nothing comes back: one weight that becomes two."""

    def sum_tied_gradient(self) -> None:
        own = self.tied.grad.clone() if self.tied is not None and self.tied.grad is not None else None
        super().sum_tied_gradient()
        if self.last and own is not None:
            self.tied.grad.copy_(own)


@dataclass(frozen=True)
class Bug:
    """An exhibit: the right strategy and the wrong one, and where the mistake was seen."""

    healthy: type[Strategy]
    broken: type[Strategy]
    source: str
    ranks: int = 2
    uneven: bool = False  # shows only where a micro-batch does not divide by the ranks

    @property
    def story(self) -> str:
        return (self.broken.__doc__ or "").splitlines()[0]


BUGS = {
    "sum-instead-of-mean": Bug(DataParallel, SumInsteadOfMean, "hand-made data parallelism; Adam hides the factor"),
    "mean-of-means": Bug(
        DataParallel, MeanOfMeans, "gradient accumulation in transformers until October 2024 (PR 34191)", uneven=True
    ),
    "reduced-every-micro-batch": Bug(BucketedDataParallel, ReducedEveryMicroBatch, "hand-made hooks without no_sync"),
    "last-micro-batch-only": Bug(DataParallel, LastMicroBatchOnly, "teaching code that uses register_hook"),
    "norm-of-own-shard": Bug(Zero1, NormOfOwnShard, "torchtitan 2318: the norm under HSDP and FSDP, 8 times off"),
    "missing-replicated-all-reduce": Bug(
        SequenceParallel, MissingReplicatedAllReduce, "hand-made sequence parallelism"
    ),
    "row-bias-on-every-rank": Bug(TensorParallel, RowBiasOnEveryRank, "hand-made tensor parallelism"),
    "norm-counts-copies": Bug(TensorParallel, NormCountsCopies, "clipping written for data parallelism"),
    "wrong-data-parallel-rank": Bug(
        TensorDataParallel, WrongDataParallelRank, "lingua 58 and 66: overlapping data under HSDP", ranks=4
    ),
    "unscaled-pipeline-loss": Bug(OneFOneB, UnscaledPipelineLoss, "torchtitan 1733: pipeline x accumulation"),
    "tied-weight-synced-once": Bug(OneFOneB, TiedWeightSyncedOnce, "hand-made pipelines with a tied embedding"),
}


def find_bug(name: str) -> Bug:
    """The exhibit of that name.

    Raises:
        UserError: there is none; the line lists them.
    """
    if name not in BUGS:
        raise UserError(f"no bug {name!r}; one of {', '.join(BUGS)}")
    return BUGS[name]
