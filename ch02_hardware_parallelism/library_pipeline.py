"""The same pipelines by the library: torch.distributed.pipelining on the stages of pipeline_parallel.py.

What one has to know to get the same gradients out of it:

* scale_grads=True, the default, divides the gradients by the number of chunks: right where loss_fn is a mean over a
  chunk and all chunks are equally large. Here loss_fn already divides by the tokens of the whole step: False.
* All chunks of a schedule must have the shape of the first. An uneven batch is filled up with sequences that have no
  targets (cross_entropy ignores -100), another batch size gets a schedule of its own.
* It knows nothing of a weight that lives in two stages, nor of the gradient norm: those stay ours.
* Schedule1F1B wants at least as many chunks as stages; by hand fewer work too, with stages that idle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.pipeline_parallel import GPipe
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy

NO_TARGET = -100  # cross_entropy's ignore_index


def fill_up(batch: Batch, chunks: int) -> Batch:
    """Sequences added at the end, without targets, until the batch divides by the chunks."""
    inputs_bt, targets_bt = batch
    more = -len(inputs_bt) % chunks
    return F.pad(inputs_bt, (0, 0, 0, more)), F.pad(targets_bt, (0, 0, 0, more), value=NO_TARGET)


class LibraryGPipe(GPipe):
    """ScheduleGPipe moves the chunks; the tied weight, the loss and the norm are handled as by hand."""

    schedule_class: type = ScheduleGPipe
    wire_bytes = Strategy.wire_bytes  # unknown: what the library sends is not seen from here

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        self.schedules: dict[torch.Size, Any] = {}  # by the shape of the batch

    def make_schedule(self) -> Any:
        stage = PipelineStage(self.model, self.stage, self.stages, self.like.device, group=self.comm.group)
        return self.schedule_class(stage, self.chunks, loss_fn=self.chunk_loss, scale_grads=False)

    def run_round(self, batch: Batch) -> None:
        self.cut(batch)  # the same error for more chunks than sequences
        inputs_bt, targets_bt = fill_up(batch, self.chunks)
        if inputs_bt.shape not in self.schedules:
            self.schedules[inputs_bt.shape] = self.make_schedule()
        losses: list[torch.Tensor] = []
        self.schedules[inputs_bt.shape].step(
            *([inputs_bt] if self.first else []),
            target=targets_bt if self.last else None,
            losses=losses if self.last else None,
            return_outputs=False,
        )
        for loss in losses:
            self.loss += loss.detach()


class LibraryOneFOneB(LibraryGPipe):
    schedule_class = Schedule1F1B

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:
        if ranks > cls.chunks:
            return f"Schedule1F1B wants a chunk for each of {ranks} stages, not {cls.chunks}; take more chunks"
        return super().why_not(model, ranks)
