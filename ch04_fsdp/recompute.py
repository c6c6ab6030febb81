"""Activation checkpointing: which activations are kept for backward, and which are computed a second time.

none        all are kept: fastest, and most memory
block       of each layer only its input; its whole forward pass runs again in backward (a third more compute)
every-2     the same for every second layer (or every-3 ...)
mlp         only the MLPs, which hold most of a layer's activations
ops         inside each layer matrix products and attention are kept, what lies between them is computed again: cheap
"""

from __future__ import annotations

import functools
import re

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from common.script import UserError

CHOICES = ("none", "block", "every-2", "mlp", "ops")
KEPT = {  # the results of these are worth their memory: each costs a matrix product
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def check(choice: str) -> None:
    """
    Raises:
        UserError: `choice` is not one of the above.
    """
    if choice not in CHOICES and not re.fullmatch(r"every-[1-9]\d*", choice):
        raise UserError(f"cannot recompute {choice!r}; one of {', '.join(CHOICES)}")


def wrap(model: nn.Module, choice: str) -> None:
    """Make the chosen modules of a transformers decoder recompute. Their names and parameters stay as they are."""
    layers = list(model.model.layers)
    context = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    for module in {
        "none": [],
        "block": layers,
        "mlp": [layer.mlp for layer in layers],
        "ops": layers,
    }.get(choice, layers[:: int(choice[6:] or 1)] if choice.startswith("every-") else []):
        more = {"context_fn": context} if choice == "ops" else {}
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, **more)


def _keep_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
