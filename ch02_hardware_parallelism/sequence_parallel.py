"""Sequence parallelism beside tensor parallelism: between the parallel regions each rank keeps 1/N of the positions.

Tensor parallelism leaves norms and residuals whole on every rank: N times the same work, N times the same activations.
An all_reduce is a reduce_scatter and an all_gather. Korthikanti et al. ("Reducing Activation Recomputation in Large
Transformer Models", arXiv:2205.05198) put the first where a region ends and the second where the next one begins: in
between there is t / N, for the same bytes.

The price: each rank sees its own positions only, so its gradients of what all ranks hold (norms, positions, biases of
row layers) are one term of a sum. They are added up once a step. Forget it, and after 20 steps the losses still agree
with one process to three digits.

As a script: tensor_parallel.py --sequence-parallel. (The paper also gathers the input of a region once more in backward
instead of keeping it; here autograd keeps it.) The suffix T is a rank's part of the positions, T = t / N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ch02_hardware_parallelism import alpha_beta, tensor_parallel
from ch02_hardware_parallelism import model as models
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.strategy import Batch, sum_in_one_message, token_count, trainable
from ch02_hardware_parallelism.tensor_layers import Boundary
from ch02_hardware_parallelism.tensor_parallel import TensorParallel, indivisible

TIME = 1  # the dimension of t in [b, t, d]


class OwnPositions(nn.Module):
    """The position embedding of this rank's positions: places [t] -> [T, d]. Every rank holds all of its rows."""

    def __init__(self, whole: nn.Embedding, comm: Comm) -> None:
        super().__init__()
        self.weight, self.comm = whole.weight, comm

    def forward(self, places_t: torch.Tensor) -> torch.Tensor:
        if len(places_t) % self.comm.size:
            raise ValueError(f"{len(places_t)} positions do not divide by {self.comm.size} ranks; pad the sequences")
        return F.embedding(places_t.chunk(self.comm.size)[self.comm.rank], self.weight)


def is_replicated(name: str) -> bool:
    """Is this parameter whole on every rank? Norms, positions and the biases of row layers are."""
    return "norm" in name or name.endswith(("position.weight", "out.bias", "down.bias"))


def replicated_bytes(model: nn.Module) -> int:
    """Of the gradients that every rank has of its own."""
    return sum(p.numel() * p.element_size() for name, p in trainable(model) if is_replicated(name))


def wire_bytes(model: models.Transformer, micro_batches: list[Batch], ranks: int) -> int:
    """As in tensor_parallel: each all_reduce there is an all_gather or a reduce_scatter here, and its counterpart
    follows in the next region: forward 2 layers + 1 of each, backward as many: together the same bytes.

    Added is one all_reduce of the replicated parameters' gradients a step, however many micro-batches it has.
    """
    shape, tokens = model.shape, token_count(micro_batches)
    crossings = 2 * (2 * shape.layers + 1) + sum(tensor_parallel.gradients_cross(model))
    itemsize = model.norm.weight.element_size()
    return alpha_beta.total_wire_bytes(
        "all_gather", crossings * tokens * shape.width * itemsize, ranks
    ) + alpha_beta.total_wire_bytes("all_reduce", 3 * tokens * itemsize + replicated_bytes(model), ranks)


class SequenceParallel(TensorParallel):
    """Tensor parallelism with the positions shared out between its regions."""

    wire_bytes = staticmethod(wire_bytes)

    @staticmethod
    def why_not(model: models.Transformer, ranks: int) -> str | None:
        return TensorParallel.why_not(model, ranks) or indivisible(ranks, sequence_length=model.shape.context)

    def shard(self, model: models.Transformer) -> None:
        super().shard(model)
        model.embedding.position = OwnPositions(model.embedding.position, self.comm)

    def enter(self, x_bTd: torch.Tensor) -> torch.Tensor:
        """all_gather forward, reduce_scatter backward: [b, T, d] -> [b, t, d]."""
        return Boundary.apply(x_bTd, self.all_positions, self.own_positions)

    def leave(self, x_btd: torch.Tensor) -> torch.Tensor:
        """reduce_scatter forward, all_gather backward: [b, t, d], one term of a sum -> [b, T, d]."""
        return Boundary.apply(x_btd, self.own_positions, self.all_positions)

    def all_positions(self, x_bTd: torch.Tensor) -> torch.Tensor:
        return self.comm.all_gather(x_bTd, TIME)

    def own_positions(self, x_btd: torch.Tensor) -> torch.Tensor:
        return self.comm.reduce_scatter(x_btd, TIME)

    def synchronize(self, loss: torch.Tensor) -> None:
        """The loss is whole: the head gathers all positions. The copies' gradients are not."""
        _, replicated = self.gradients_held()
        sum_in_one_message(replicated, self.comm)
