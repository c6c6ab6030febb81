"""Data parallelism from scratch (draft)."""

from __future__ import annotations

import torch
from torch import nn

from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.model import loss_sum
from ch02_hardware_parallelism.strategy import Batch, MakeOptimizer, Strategy, share, token_count, trainable


class DataParallel(Strategy):
    """Each rank holds the whole model and takes a share of every micro-batch; the gradients are summed at the end."""

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        super().__init__(model, comm, make_optimizer)
        with torch.no_grad():  # all start from rank 0's weights
            flat = nn.utils.parameters_to_vector(model.parameters())
            comm.broadcast(flat)
            nn.utils.vector_to_parameters(flat, model.parameters())

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        tokens = token_count(micro_batches)
        loss = next(self.model.parameters()).new_zeros(())
        for batch in micro_batches:
            inputs_bt, targets_bt = share(batch, self.comm.rank, self.comm.size)
            part = loss_sum(self.model(inputs_bt), targets_bt) / tokens
            part.backward()
            loss += part.detach()
        self.synchronize()
        self.comm.all_reduce(loss)
        return loss

    def synchronize(self) -> None:
        gradients = [parameter.grad for _, parameter in trainable(self.model)]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message instead of one a tensor
        self.comm.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))
