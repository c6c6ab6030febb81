"""The layers of tensor parallelism: each holds one rank's slice of a whole layer's weight.

Y = X A is cut in two ways (Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3). By columns of A, each rank has
all of X and makes some columns of Y: nothing to send. By rows of A, each rank has some columns of X and makes one term
of a sum: the terms must be added up. Columns first and rows second need one sum for the two products, and what lies
between them (attention of some heads, GELU of some hidden units) needs no other rank.

Shapes as in model.py. On N ranks a suffix in capitals is this rank's part of that dimension: F = f / N, V = v / N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ch02_hardware_parallelism.comm import Comm

Change = Callable[[torch.Tensor], torch.Tensor]


class Boundary(torch.autograd.Function):
    """Where a parallel region begins or ends: one operation on the activations, its opposite on their gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Change, backward: Change) -> torch.Tensor:
        ctx.change = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.change(grad), None, None


def unchanged(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def slice_of(whole: nn.Parameter, dim: int, comm: Comm) -> nn.Parameter:
    """A copy of this rank's slice: a view would keep the whole one in memory. A frozen parameter stays frozen."""
    part = whole.detach().chunk(comm.size, dim)[comm.rank].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(part, requires_grad=whole.requires_grad)


class ColumnLinear(nn.Module):
    """Some of a linear layer's outputs: x [b, t, d] -> [b, t, F]. Its input must come through a Boundary."""

    shard_dims = {"weight": 0, "bias": 0}  # noqa: RUF012  torch stores a weight [out, in]: columns of A are its rows

    def __init__(self, whole: nn.Linear, comm: Comm) -> None:
        super().__init__()
        self.weight = slice_of(whole.weight, 0, comm)
        self.bias = None if whole.bias is None else slice_of(whole.bias, 0, comm)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        return F.linear(x_btd, self.weight, self.bias)


class RowLinear(nn.Module):
    """Some of a linear layer's inputs: x [b, t, F] -> [b, t, d], added up. The bias is whole on every rank."""

    shard_dims = {"weight": 1}  # noqa: RUF012

    def __init__(self, whole: nn.Linear, comm: Comm, add_up: Change) -> None:
        super().__init__()
        self.weight = slice_of(whole.weight, 1, comm)
        self.bias = whole.bias
        self.add_up = add_up

    def forward(self, x_btF: torch.Tensor) -> torch.Tensor:
        return self.add_up(F.linear(x_btF, self.weight)) + self.bias  # after the sum, or it would count N times


class VocabEmbedding(nn.Module):
    """Some rows of an embedding: tokens [b, t] -> [b, t, d]. Zero for the others' tokens, then added up."""

    shard_dims = {"weight": 0}  # noqa: RUF012

    def __init__(self, whole: nn.Embedding, comm: Comm, add_up: Change) -> None:
        super().__init__()
        self.weight = slice_of(whole.weight, 0, comm)
        self.first = comm.rank * len(self.weight)
        self.add_up = add_up

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        row_bt, elsewhere_bt = own_rows(tokens_bt, self.first, len(self.weight))
        x_btd = F.embedding(row_bt, self.weight).masked_fill(elsewhere_bt[..., None], 0)  # no gradient to row 0 either
        return self.add_up(x_btd)


def own_rows(tokens_bt: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as rows of this rank's shard of the vocabulary (0 where they are another's), and where that is so."""
    row_bt = tokens_bt - first
    elsewhere_bt = (row_bt < 0) | (row_bt >= count)
    return row_bt.masked_fill(elsewhere_bt, 0), elsewhere_bt


class VocabCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits [b, t, V] that each rank has for its own part of the vocabulary; targets [b, t].

    -log softmax needs three numbers a token from the other ranks: the largest logit, the sum of exponentials and the
    target's logit. Gathering the logits would send v numbers a token instead, and hold them on every rank.
    """

    @staticmethod
    def forward(ctx: Any, logits_btV: torch.Tensor, targets_bt: torch.Tensor, comm: Comm) -> torch.Tensor:
        """Loss [b, t] in nats, the same on every rank."""
        count = logits_btV.shape[-1]
        row_bt, elsewhere_bt = own_rows(targets_bt, comm.rank * count, count)
        largest_bt = comm.max(logits_btV.amax(-1))  # taken off first: exp(1e4) is infinite
        shifted_btV = logits_btV - largest_bt[..., None]
        target_bt = shifted_btV.gather(-1, row_bt[..., None])[..., 0].masked_fill(elsewhere_bt, 0)
        softmax_btV = shifted_btV.exp_()
        both_2bt = torch.stack([target_bt, softmax_btV.sum(-1)])
        comm.all_reduce(both_2bt)  # in one message
        target_bt, sum_bt = both_2bt
        ctx.save_for_backward(softmax_btV.div_(sum_bt[..., None]), row_bt, elsewhere_bt)
        return sum_bt.log() - target_bt

    @staticmethod
    def backward(ctx: Any, grad_bt: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """softmax - 1[target], each rank for its own logits: nothing to send."""
        softmax_btV, row_bt, elsewhere_bt = ctx.saved_tensors
        one_bt1 = (~elsewhere_bt).to(softmax_btV.dtype)[..., None]
        grad_btV = softmax_btV.scatter_add(-1, row_bt[..., None], -one_bt1)
        return grad_btV * grad_bt[..., None], None, None
