"""A few steps of training in one process: what the scripts of this chapter compare their losses with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ch02_hardware_parallelism.model import Shape, build, loss_sum
from ch02_hardware_parallelism.strategy import Batch


def batches(shape: Shape, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Sequences that can be learnt: each token is 5 times the last plus 1, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = [torch.randint(shape.vocab, (size,), generator=generator)]
        for _ in range(shape.context):
            tokens.append((5 * tokens[-1] + 1) % shape.vocab)
        tokens_bt = torch.stack(tokens, dim=1)
        yield tokens_bt[:, :-1].contiguous(), tokens_bt[:, 1:].contiguous()


def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def losses(shape: Shape, data: Iterable[Batch], seed: int, device: torch.device) -> list[float]:
    """What a parallel run on the same data must show: the same weights and optimizer in one process."""
    model = build(shape, seed=seed, device=str(device))
    optimizer = make_optimizer(model.parameters())
    found = []
    for inputs_bt, targets_bt in data:
        loss = loss_sum(model(inputs_bt.to(device)), targets_bt.to(device)) / targets_bt.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
