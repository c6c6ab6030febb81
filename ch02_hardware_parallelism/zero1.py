"""ZeRO stage 1 from scratch: every rank keeps the optimizer of one N-th of the parameters.

You learn   why an all_reduce is a reduce_scatter and an all_gather with room in between, and that the optimizer fits
            into that room: the same bytes on the wire, 1/N of the optimizer's memory
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/zero1.py
Counted     torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/zero1.py --by-hand
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/zero1.py --width 768 --layers 12
Cluster     srun python ch02_hardware_parallelism/zero1.py --width 768 --layers 12
You see     the losses of one process, optimizer state of 8 / N bytes a parameter and rank, and the wire bytes of data
            parallelism. Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
            arXiv:1910.02054, stage 1 ("P_os").
"""

from __future__ import annotations

import torch
from torch import nn

from ch02_hardware_parallelism import training
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.data_parallel import DataParallel
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, trainable, trainable_bytes
from common import script


def wire_bytes(model: nn.Module, micro_batches: list[Batch], ranks: int) -> int:
    """Payload that all ranks send in a step: reduce_scatter and all_gather of the padded vector, and all_reduce of
    two numbers for the loss."""
    itemsize = next(model.parameters()).element_size()
    numbers = trainable_bytes(model) // itemsize
    padded = numbers + -numbers % ranks
    return (ranks - 1) * (padded + padded + 2 * 2) * itemsize


class Zero1(DataParallel):
    """Data parallelism whose optimizer works on this rank's shard of one flat vector of all parameters.

    The optimizer must work number by number, as SGD and Adam do: it sees a slice that may begin inside a matrix.
    """

    wire_bytes = staticmethod(wire_bytes)

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        self.names, self.parameters = zip(*trainable(model), strict=True)
        self.sizes = [p.numel() for p in self.parameters]
        padding = -sum(self.sizes) % comm.size  # equal shards
        self.flat = torch.cat([*(p.detach().flatten() for p in self.parameters), self.parameters[0].new_zeros(padding)])
        for parameter, view in zip(self.parameters, self.views(self.flat), strict=True):
            parameter.data = view  # the model now lives in the flat vector
        self.shard = nn.Parameter(self.flat.chunk(comm.size)[comm.rank].clone())
        self.optimizer = make_optimizer([self.shard])  # replaces the whole model's, which has no state yet

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def synchronize(self) -> None:
        """First half of an all_reduce: each rank gets the sum of its own shard only."""
        padding = self.flat.new_zeros(self.flat.numel() - sum(self.sizes))
        flat = torch.cat([*(p.grad.flatten() for p in self.parameters), padding])
        self.shard.grad = self.comm.reduce_scatter(flat)
        for parameter in self.parameters:
            parameter.grad = None

    def update(self) -> None:
        """Each rank updates its shard. Second half of the all_reduce: of new weights instead of gradients."""
        super().update()
        self.flat.copy_(self.comm.all_gather(self.shard.detach()))

    def gradients(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.views(self.comm.all_gather(self.shard.grad)), strict=True))

    def squared_norm(self) -> torch.Tensor:
        squares = self.shard.grad.square().sum()
        self.comm.all_reduce(squares)
        return squares


def main(argv: list[str] | None = None) -> dict:
    args = training.flags(__doc__, by_hand=True).parse_args(argv)
    run = script.start(__file__, args)

    def report(strategy: Strategy) -> dict:
        values = [v for state in strategy.optimizer.state.values() for v in state.values() if v.dim()]  # not the step
        return {"optimizer_state_bytes_per_rank": sum(v.numel() * v.element_size() for v in values)}

    return training.train_beside_one_process(Zero1, args, run, report)


if __name__ == "__main__":
    script.run(main)
