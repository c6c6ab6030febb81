"""Tensor parallelism inside, data parallelism across: a grid of ranks, each row of it one copy of the model.

Ranks of a row talk twice a layer in both directions, ranks of a column once a step: a row belongs on one node, where
the links are fast (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
arXiv:2104.04473, section 3). As a script: tensor_parallel.py --strategy tensor-x-data on 4 ranks.
"""

from __future__ import annotations

import torch

from ch02_hardware_parallelism import alpha_beta, tensor_parallel
from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.sequence_parallel import replicated_bytes
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, share, sum_in_one_message, trainable_bytes
from ch02_hardware_parallelism.tensor_parallel import TensorParallel


def grid_of(ranks: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square grid, the longer side along the rows: 4 = 2 x 2, 8 = 2 x 4."""
    rows = max(n for n in range(1, int(ranks**0.5) + 1) if ranks % n == 0)
    return rows, ranks // rows


def wire_bytes(model: models.Transformer, micro_batches: list[Batch], ranks: int) -> int:
    """As in tensor_parallel. The rows share the tokens out, so that together they send what one row would for all.

    Added is, in each column, an all_reduce of the gradients that its ranks hold (their slices, and all of what is
    replicated) and of the loss.
    """
    rows, columns = grid_of(ranks)
    copies, loss = replicated_bytes(model), model.norm.weight.element_size()
    in_all_columns = (trainable_bytes(model) - copies) + columns * (copies + loss)
    across = alpha_beta.total_wire_bytes("all_reduce", in_all_columns, rows)
    return tensor_parallel.wire_bytes(model, micro_batches, columns) + across


class TensorDataParallel(TensorParallel):
    """Each row of the grid takes its share of every micro-batch; the columns add the gradients up."""

    wire_bytes = staticmethod(wire_bytes)

    def __init__(self, model: models.Transformer, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.data_comm, tensor_comm = comm.grid(*grid_of(comm.size))
        super().__init__(model, tensor_comm, make_optimizer)

    @staticmethod
    def why_not(model: models.Transformer, ranks: int) -> str | None:
        rows, columns = grid_of(ranks)
        if rows == 1:
            return f"{ranks} ranks are no grid of two rows and two columns at least; take 4, 6, 8 or more"
        return TensorParallel.why_not(model, columns)

    @property
    def data_rank(self) -> int:
        """Which share of the data: the same for all of a row."""
        return self.data_comm.rank

    def my_share(self, batch: Batch) -> Batch:
        return share(batch, self.data_rank, self.data_comm.size)

    def synchronize(self, loss: torch.Tensor) -> None:
        """Along the columns, whose ranks hold the same slices."""
        sharded, replicated = self.gradients_held()
        sum_in_one_message([*sharded, *replicated], self.data_comm)
        self.data_comm.all_reduce(loss)
