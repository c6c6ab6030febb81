"""What every parallel strategy of this chapter offers, so that one harness can check them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ch02_hardware_parallelism.comm import Comm

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, int64 [b, t]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def share(batch: Batch, rank: int, size: int) -> Batch:
    """This rank's sequences of a batch that all ranks know. The first ranks get one more where it does not divide."""
    inputs_bt, targets_bt = batch
    return inputs_bt.tensor_split(size)[rank], targets_bt.tensor_split(size)[rank]


def token_count(micro_batches: Iterable[Batch]) -> int:
    """What the loss of a step is divided by: all its tokens, of all micro-batches and all ranks."""
    return sum(targets_bt.numel() for _, targets_bt in micro_batches)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that get a gradient, a tied one once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def trainable_bytes(model: nn.Module) -> int:
    """Of all gradients."""
    return sum(p.numel() * p.element_size() for _, p in trainable(model))


def sum_in_one_message(tensors: list[torch.Tensor], comm: Comm) -> None:
    """All_reduce of them all, in place, as one flat tensor: many small messages would cost their latency each."""
    if not tensors or comm.size == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    comm.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def gather_in_one_message(
    tensors: dict[str, torch.Tensor], shard_dims: dict[str, int], comm: Comm
) -> dict[str, torch.Tensor]:
    """Whole tensors from the ranks' equal shards, cut along shard_dims[name]. The others are returned as they are."""
    parts = {name: tensor for name, tensor in tensors.items() if name in shard_dims}
    if not parts:
        return tensors
    flat = torch.cat([part.flatten() for part in parts.values()])
    of_ranks = [own.split([part.numel() for part in parts.values()]) for own in comm.all_gather(flat).chunk(comm.size)]
    whole = {
        name: torch.cat([shard.view_as(part) for shard in shards], shard_dims[name])
        for (name, part), shards in zip(parts.items(), zip(*of_ranks, strict=True), strict=True)
    }
    return tensors | whole


class Strategy:
    """A model whose training step is spread over the ranks of `comm`.

    A step is `backward` (the gradients are then final), maybe `clip`, and `update`. All ranks are given the same
    micro-batches, those of the whole job, and take their part themselves.

    This base class is for strategies in which each rank holds whole parameters and all gradients of what it holds. One
    that shards overrides gradients, weights and squared_norm.
    """

    def __init__(self, model: nn.Module, comm: Comm, make_optimizer: MakeOptimizer) -> None:
        self.model, self.comm = model, comm
        self.optimizer = make_optimizer(p for _, p in trainable(model))

    @staticmethod
    def why_not(model: nn.Module, ranks: int) -> str | None:
        """Why this model cannot be spread over so many ranks by this strategy; None if it can."""
        return None

    @staticmethod
    def wire_bytes(model: nn.Module, micro_batches: list[Batch], ranks: int) -> int | None:
        """Payload bytes that all ranks together send in a step of `model`, by formula. None: there is no formula.

        Clipping, and whatever only the harness asks for, is not in it.
        """
        return None

    def backward(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Gradients of the mean loss over all tokens of all micro-batches. Returns that loss, 0-d, on every rank."""
        raise NotImplementedError

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by the model's names: of all parameters, or of those that live on this rank (pipeline).

        Shards are gathered, copies are this rank's own: a rank whose copy went astray shows it.
        """
        return {name: p.grad for name, p in trainable(self.model) if p.grad is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        """The same for the parameters themselves, frozen ones too."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def squared_norm(self) -> torch.Tensor:
        """Sum of the squares of all gradients of the whole model, 0-d float, on every rank."""
        return torch.stack([g.square().sum() for g in self.gradients().values()]).sum()

    def grad_norm(self) -> torch.Tensor:
        """The global L2 norm that gradient clipping needs."""
        return self.squared_norm().sqrt()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their norm is at most `max_norm`. Returns the norm before."""
        norm = self.grad_norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad *= scale
        return norm

    def update(self) -> None:
        """Optimizer step, then forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Take down what would outlive the strategy (hooks)."""
