"""A transformer cut into pipeline stages, and the bytes that cross the cuts.

Shapes: b sequences, t positions, d width, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from ch02_hardware_parallelism.strategy import Batch, token_count


class Stage(nn.Module):
    """Its share of the blocks, with the embedding before the first, norm and head after the last.

    Parameters keep the names they have in the whole model.
    """

    def __init__(self, model: nn.Module, stage: int, stages: int) -> None:
        super().__init__()
        mine = torch.arange(len(model.blocks)).tensor_split(stages)[stage].tolist()
        self.embedding = model.embedding if stage == 0 else nn.Identity()
        self.blocks = nn.ModuleDict({str(number): model.blocks[number] for number in mine})
        if stage == stages - 1:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [b, t] or activations [b, t, d] to activations, or logits in the last stage."""
        x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if hasattr(self, "head") else x


def gradient_flows(model: nn.Module, stages: int) -> list[bool]:
    """Of each stage: does anything up to and in it learn? Only then does its output need a gradient from the next."""
    learns = [any(p.requires_grad for p in Stage(model, s, stages).parameters()) for s in range(stages)]
    return [any(learns[: s + 1]) for s in range(stages)]


def wire_bytes(model: nn.Module, micro_batches: list[Batch], stages: int, replicas: int = 1) -> int:
    """Payload bytes that all ranks together send in a step: not a word about chunks, they only cut the same tensors.

    Each boundary carries every activation [b, t, d] once forward and, where something behind it learns, a gradient of
    that size once back. The two ends of a tied embedding swap gradients [v, d], the last stage tells the loss. Replicas
    all-reduce their gradients, 2 (r-1) times their size, and the loss. Clipping would add an all_reduce of one number.
    """
    weight = model.embedding.token.weight
    size, flows = weight.element_size(), gradient_flows(model, stages)
    activations = token_count(micro_batches) * model.shape.width * size
    total = (stages - 1 + sum(flows[:-1])) * activations
    swapped = 2 * weight.numel() * size * (stages > 1 and model.shape.tied and weight.requires_grad)
    parameters = [p for s in range(stages) for p in Stage(model, s, stages).parameters() if p.requires_grad]
    reduced = 2 * (replicas - 1) * size * (sum(p.numel() for p in parameters) + stages)
    return total + replicas * (swapped + (stages - 1) * size) + reduced
