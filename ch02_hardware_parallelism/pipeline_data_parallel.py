"""Pipelines side by side: data parallelism between replicas of a pipeline."""

from __future__ import annotations

from torch import nn

from ch02_hardware_parallelism import stages
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.pipeline_parallel import OneFOneB
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, share


class PipelineDataParallel(OneFOneB):
    """Two stages, and as many replicas of that pipeline as the ranks allow: neighbouring ranks are one pipeline."""

    chunks = 3

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.data, pipeline = comm.grid(comm.size // 2, 2)
        super().__init__(model, pipeline, make_optimizer)

    @classmethod
    def why_not(cls, model: nn.Module, ranks: int) -> str | None:
        return f"{ranks} ranks are not pairs of stages; take an even number" if ranks % 2 else super().why_not(model, 2)

    @staticmethod
    def wire_bytes(model: nn.Module, micro_batches: list[Batch], ranks: int) -> int:
        return stages.wire_bytes(model, micro_batches, 2, replicas=ranks // 2)

    def run_round(self, batch: Batch) -> None:
        super().run_round(share(batch, self.data.rank, self.data.size))

    def synchronize(self) -> None:
        super().synchronize()
        for gradient in self.gradients().values():  # not once a round: sums of earlier rounds would be summed again
            self.data.all_reduce(gradient)

    def share_loss(self) -> None:
        super().share_loss()
        self.data.all_reduce(self.loss)
