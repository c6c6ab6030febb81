"""One training step of a model with experts: the balancing loss, the right divisor, and a norm that counts each once.

loss, balance = backward(engine, batch.micro_batches, batch.tokens, ctx.world_size, aux_weight=0.01)
norm = update(engine, max_norm=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as td
from torch import nn

from ch03_ddp import step as ddp_step
from ch03_ddp.feed import IGNORE, Batch
from ch05_deepspeed_megatron import moe_model
from common.script import UserError


def losses(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the tokens' losses, and the mean of the layers' balancing losses times those tokens, both 0-d.

    So that divided by all tokens of a step one is the mean loss of a token, the other the mean balance of a pass,
    weighted by its tokens: no different for more ranks or more micro-batches.
    """
    loss = ddp_step.loss_sum(model, inputs, targets)
    auxiliary = torch.stack([layer.auxiliary for layer in moe_model.sparse_layers(model)]).mean()
    return loss, auxiliary * (targets != IGNORE).sum()


def backward(
    engine: Any, micro_batches: Sequence[Batch], tokens: int, world_size: int, aux_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of mean loss + aux_weight x balancing loss, over all tokens of all micro-batches of all ranks.

    Returns:
        This rank's parts of the mean loss and of the mean balancing loss, 0-d; those of all ranks add up to them.

    Raises:
        UserError: the engine was made for another number of micro-batches.
    """
    if len(micro_batches) != (wanted := engine.gradient_accumulation_steps()):
        raise UserError(
            f"a step of {len(micro_batches)} micro-batches in an engine whose config says {wanted}; give it as many"
        )
    parts = []
    for number, (inputs, targets) in enumerate(micro_batches, 1):
        loss, balance = losses(engine, inputs, targets)
        # DeepSpeed divides by the ranks, experts' gradients too, though fewer ranks sum them: see moe_parity.py
        engine.backward((loss + aux_weight * balance) * (world_size / tokens), scale_wrt_gas=False)
        if number < wanted:
            engine.step()  # counts
        parts.append(torch.stack([loss.detach(), balance.detach()]) / tokens)
    loss, balance = torch.stack(parts).sum(0)
    return loss, balance


def update(engine: Any, max_norm: float) -> torch.Tensor:
    """Clip, step, forget the gradients. Returns their norm before, 0-d, the whole model's on every rank."""
    if engine.zero_optimization_stage() == 0:
        norm = clip_without_zero(engine, max_norm)
        engine.step()
        return norm
    engine.step()
    return torch.as_tensor(engine.get_global_grad_norm())


def without_its_clipping(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to initialize with. Without ZeRO we clip, see clip_without_zero, and DeepSpeed must not."""
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    return settings if stage else settings | {"gradient_clipping": 0.0}


def clip_without_zero(engine: Any, max_norm: float) -> torch.Tensor:
    """THE CORRECTION of stage 0: scale gradients so that their norm over all ranks and experts is at most max_norm.

    Without ZeRO, DeepSpeed 0.19.8 clips by the mean over the ranks of what each computes from the gradients that it
    holds (deepspeed.runtime.utils.clip_grad_norm_, its issue 8475): sqrt(shared^2 + own experts^2). The norm is
    sqrt(shared^2 + all experts^2), larger by up to sqrt(ep_size): steps come out too large, and get_global_grad_norm()
    stays None. Stages 1 and 2 add up squares over all ranks, each of which has its own partition: right.

    Args:
        max_norm: 0: the gradients stay as they are.
    """
    norm = norm_without_zero(engine.module)
    if max_norm:
        nn.utils.clip_grads_with_norm_(engine.module.parameters(), max_norm, norm)
    return norm


def wide(gradient: torch.Tensor) -> torch.Tensor:
    """What squares are summed in."""
    return gradient if gradient.dtype == torch.float64 else gradient.float()


def norm_without_zero(model: nn.Module) -> torch.Tensor:
    """The norm of all gradients, each expert's once, 0-d. A collective of an expert-parallel group."""
    shared, own = (
        sum(
            wide(p.grad).square().sum()
            for p in model.parameters()
            if p.grad is not None and moe_model.is_expert(p) is kind
        )
        for kind in (False, True)
    )
    own = torch.as_tensor(own, device=shared.device).clone()
    td.all_reduce(own, group=moe_model.sparse_layers(model)[0].moe.deepspeed_moe.ep_group)
    return (shared + own).sqrt()
