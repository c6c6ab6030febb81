"""One training step under DDP: accumulation, mixed precision, the right divisor, clipping. parity.py proves it.

ddp = wrap(model, bucket_mib=25)
loss = backward(ddp, batch.micro_batches, batch.tokens, ctx.world_size, precision)
norm = update(ddp, optimizer, precision, max_norm=1.0)
"""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp.feed import IGNORE, Batch


@dataclass(frozen=True)
class Precision:
    """The type of the matrix products; the weights stay float32.

    float16 has five bits of exponent: gradients below 6e-8 would be 0, hence the loss is scaled up and the gradients
    down again, by a factor that is halved whenever one overflows. bfloat16 has float32's exponent and needs none of it.
    """

    dtype: torch.dtype
    device: torch.device
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Precision:
        return cls(dtype, device, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))

    def whole_step(self) -> torch.autocast:
        """Around all micro-batches of a step: autocast's low-precision copies of the weights live until its outermost
        context ends. This one casts nothing, and keeps them from one micro-batch to the next."""
        return torch.autocast(self.device.type, self.dtype, enabled=False)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16))


def wrap(
    model: nn.Module, *, bucket_mib: float = 25, static_graph: bool = False, bucket_view: bool = True
) -> nn.Module:
    """DDP over all ranks; the model itself where there is one.

    Args:
        bucket_mib: gradients travel in buckets of this size; the first is 1 MiB, so that messages begin early.
        static_graph: promises that each step uses the same parameters in the same way.
        bucket_view: gradients are views into the buckets, which saves a copy and as much memory as the gradients take.
    """
    if dist.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        bucket_cap_mb=bucket_mib,
        static_graph=static_graph,
        gradient_as_bucket_view=bucket_view,
        forward_sync_buffers=False,  # they hold rotary angles, no statistics: a message a forward pass saved
    )


def compile_layers(model: nn.Module) -> None:
    """torch.compile each layer by itself: one layer's code serves all, and DDP's buckets still leave between layers.

    Compiled as a whole, backward would be one graph, and no gradient ready before its end: for that case dynamo cuts
    the graph at the buckets' borders, which a single layer does not need (and which fails for buckets below 1 MiB).
    """
    torch._dynamo.config.optimize_ddp = False
    if " " in torch.__file__:
        _quote_library_folders()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.compile()


def _quote_library_folders() -> None:
    """torch 2.13 quotes the folders of headers in the compiler's command line, and forgets those of libraries."""
    from torch._inductor.cpp_builder import BuildOptionsBase

    plain = BuildOptionsBase.get_libraries_dirs
    if not hasattr(plain, "__wrapped__"):
        quoted = functools.wraps(plain)(lambda self: [shlex.quote(folder) for folder in plain(self)])
        BuildOptionsBase.get_libraries_dirs = quoted


def loss_sum(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of all tokens that are not padding, 0-d float32 (float64 for a float64 model)."""
    logits = model(input_ids=inputs, use_cache=False).logits  # [b, t, vocab]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def backward(
    model: nn.Module, micro_batches: Sequence[Batch], tokens: int, world_size: int, precision: Precision
) -> torch.Tensor:
    """Gradients of the mean loss over all tokens of all micro-batches of all ranks.

    Returns:
        This rank's part of that mean, 0-d: the parts of all ranks add up to it.
    """
    parts = []
    with precision.whole_step():
        for number, (inputs, targets) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            # Before the last one gradients only add up here. The forward pass decides it, so it stands inside too.
            with contextlib.nullcontext() if last else no_sync(model):
                with precision.autocast():
                    loss = loss_sum(model, inputs, targets)
                # Not loss.mean(): ranks and micro-batches hold unequal numbers of tokens. DDP divides by the ranks.
                precision.scaler.scale(loss * (world_size / tokens)).backward()
            parts.append(loss.detach() / tokens)
    return torch.stack(parts).sum()


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """In this context gradients stay on their rank.

    A static graph is recorded in the first backward pass, which must be a synchronised one (else torch 2.13 fails with
    an internal assert). That costs a message and changes nothing: to average a mean again leaves it as it is.
    """
    if not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    if model.static_graph and not model._static_graph_delay_allreduce_enqueued:
        return contextlib.nullcontext()
    return model.no_sync()


def update(model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, max_norm: float) -> torch.Tensor:
    """Clip, step, forget the gradients. Returns their norm before, 0-d; inf where the scaler skips the step."""
    precision.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # all ranks hold all gradients: no message
    precision.scaler.step(optimizer)
    precision.scaler.update()
    optimizer.zero_grad()
    return norm
