"""The same by the library: DistributedDataParallel, for the harness and the benchmarks to lay beside ours."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.model import loss_sum
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, token_count


class LibraryDDP(Strategy):
    """torch.nn.parallel.DistributedDataParallel. It averages over the ranks, whatever they hold: hence the factor."""

    bucket_mib: float = 1

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        device = next(model.parameters()).device
        ids = [device.index] if device.type == "cuda" else None
        self.ddp = nn.parallel.DistributedDataParallel(
            model, device_ids=ids, process_group=comm.group, gradient_as_bucket_view=True, bucket_cap_mb=self.bucket_mib
        )

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        tokens = token_count(micro_batches)
        loss = next(self.model.parameters()).new_zeros(())
        for number, batch in enumerate(micro_batches):
            inputs_bt, targets_bt = share(batch, self.comm.rank, self.comm.size)
            last = number == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.ddp.no_sync():
                part = loss_sum(self.ddp(inputs_bt), targets_bt) / tokens
                (part * self.comm.size).backward()
            loss += part.detach()
        self.comm.all_reduce(loss)
        return loss
