"""One training step by Megatron-Core: its pipeline schedule (1F1B), the right divisor, clipping.

ddp, optimizer = megatron_model.wrap(model, ctx, lr=2e-3)
loss = backward(ddp, batch.micro_batches, batch.tokens)      # this rank's part of the mean loss
norm = update(optimizer)                                     # of the whole model's gradients, before clipping
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ch03_ddp.feed import IGNORE, Batch


def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """True where a position must not look, bool [1, 1, t, t]."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)


def forward(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """On the last stage the loss of each token, [b, t], or without targets this rank's logits, [b, t, vocab / tp]; on
    the others what goes to the next one."""
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model(inputs, positions, causal_mask(inputs.shape[1], inputs.device), labels=targets)


def loss_sum(targets: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What Megatron's schedules want: the sum of the losses, the number of tokens it is over, and what to hand back."""
    wanted = targets != IGNORE
    total = (losses.float() * wanted).sum()
    return total, wanted.sum().to(torch.int), total.detach()


def forward_step(batches: Iterator[Batch], model: nn.Module) -> tuple[torch.Tensor, Any]:
    inputs, targets = next(batches)
    return forward(model, inputs, targets), partial(loss_sum, targets)


def even(micro_batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Each filled up to `rows` sequences with some that have no targets: stages send tensors of one agreed shape."""
    made = []
    for inputs, targets in micro_batches:
        more = (0, 0, 0, max(0, rows - len(inputs)))
        made.append((F.pad(inputs, more), F.pad(targets, more, value=IGNORE)))
    return made


def run(model: nn.Module, micro_batches: Sequence[Batch], *, forward_only: bool = False) -> torch.Tensor:
    """All micro-batches through all stages. Gradients end in each parameter's main_grad.

    Returns:
        The sum of this replica's losses on the last stage's first tensor-parallel rank, else 0: 0-d, so that the sum
        over all ranks counts each once.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    inputs, _ = micro_batches[0]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(micro_batches), model=[model],
        num_microbatches=len(micro_batches), seq_length=inputs.shape[1], micro_batch_size=len(inputs),
        forward_only=forward_only,
    )  # fmt: skip
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        return torch.stack(losses).sum()
    return torch.zeros((), device=inputs.device)


def backward(model: nn.Module, micro_batches: Sequence[Batch], tokens: int) -> torch.Tensor:
    """Gradients of the mean loss over all tokens of all micro-batches of all replicas.

    Args:
        tokens: how many those are. Only the returned value is divided by it: Megatron counts for itself.

    Returns:
        This rank's part of that mean, 0-d: the parts of all ranks add up to it.
    """
    model.zero_grad_buffer()
    return run(model, micro_batches) / tokens


def update(optimizer: Any) -> float:
    """Clip, step, forget the gradients. Returns their norm before, the whole model's on every rank."""
    _, norm, _ = optimizer.step()
    optimizer.zero_grad()
    return norm
