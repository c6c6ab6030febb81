"""The rungs of the optimisation ladder: each is the training before it with one setting changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ch01_intro import training
from ch03_ddp import step, step_profile
from ch03_ddp.feed import Batch, Feed, Prefetched
from common import data
from common.dist import Context
from common.script import UserError

# What may become of the losses: the same but for the order of sums; rounded elsewhere; or those of another batch.
Effect = Literal["exact", "rounding", "batch"]


@dataclass(frozen=True)
class Rung:
    """A way to train, by its settings. The defaults are a plain loop as one writes it first."""

    name: str = "baseline"
    change: str = "fp32, batches made when asked for, AdamW as it comes, one message after backward"
    effect: Effect = "exact"
    prefetch: bool = False  # and on a GPU copied from pinned memory
    dtype: str = "fp32"
    fused: bool = False
    bucket_mib: float | None = None  # None: all gradients in one message
    overlap: bool = False
    compile: bool = False
    accumulation: int = 1


def ladder(*, dtype: str, bucket_mib: float, accumulation: int, ranks: int, without: Sequence[str] = ()) -> list[Rung]:
    """From the plain loop up, one change at a time. Changes that would change nothing here are left out.

    Raises:
        UserError: `without` names what is no rung.
    """
    changes: list[tuple[str, str, Effect, dict[str, Any]]] = [
        ("prefetch", "a thread makes the next batches, in pinned memory", "exact", {"prefetch": True}),
        (dtype, f"matrix products in {dtype}", "rounding", {"dtype": dtype}),
        ("fused", "AdamW in one kernel", "exact", {"fused": True}),
        ("buckets", f"messages of {bucket_mib:.3g} MiB after backward", "exact", {"bucket_mib": bucket_mib}),
        ("overlap", "DDP: each bucket leaves during backward", "exact", {"overlap": True}),
        ("compile", "torch.compile each layer", "exact", {"compile": True}),
        ("accumulation", f"{accumulation} micro-batches a step", "batch", {"accumulation": accumulation}),
    ]
    names = [name for name, *_ in changes]
    if unknown := [name for name in without if name not in names]:
        raise UserError(f"no rung {unknown[0]!r} to leave out; --without takes {', '.join(names)}")
    nothing_to_change = {"fp32"} | ({"buckets", "overlap"} if ranks == 1 else set())
    rungs = [Rung()]
    for name, change, effect, settings in changes:
        if name not in nothing_to_change and name not in without:
            rungs.append(replace(rungs[-1], name=name, change=change, effect=effect, **settings))
    return rungs


class Unpinned(Feed):
    """Copies from pageable memory: Python waits for each, and the device for Python."""

    def _place(self, batch: Batch) -> Batch:
        inputs, targets = batch
        return inputs.to(self.ctx.device), targets.to(self.ctx.device)


class Trainee:
    """One rung being trained: a model, an optimizer and a feed of its own."""

    def __init__(self, rung: Rung, args: Any, rows: data.Blocks, ctx: Context, micro_batch: int | None = None) -> None:
        self.rung, self.args, self.ctx = rung, args, ctx
        micro_batch = micro_batch or args.batch_size
        self.sequences = ctx.world_size * rung.accumulation * micro_batch  # a step
        self.module = training.build_model(args, ctx.device)  # from the seed: alike on all ranks
        self.precision = step.Precision.of(training.DTYPES[rung.dtype], ctx.device)
        self.optimizer = training.make_optimizer(self.module, args.lr, fused=rung.fused)
        if rung.compile:
            step.compile_layers(self.module)
        self.model = step.wrap(self.module, bucket_mib=rung.bucket_mib or 25) if rung.overlap else self.module
        kind = Feed if rung.prefetch else Unpinned
        feed = kind(rows, ctx, global_batch=self.sequences, micro_batch=micro_batch, seed=args.seed)
        self.feed = Prefetched(feed) if rung.prefetch else feed
        self.losses: list[torch.Tensor] = []  # this rank's parts, on the device

    def step(self) -> None:
        batch = next(self.feed)
        world_size = self.ctx.world_size
        loss = step.backward(self.model, batch.micro_batches, batch.tokens, world_size, self.precision)
        if world_size > 1 and not self.rung.overlap:
            average_gradients(self.module, world_size, self.rung.bucket_mib)
        with torch.profiler.record_function(step_profile.OPTIMIZER):
            step.update(self.model, self.optimizer, self.precision, max_norm=1.0)
        self.losses.append(loss)

    def all_losses(self) -> list[float]:
        """The mean loss over all ranks of each step so far."""
        losses = torch.stack(self.losses)
        torch.distributed.all_reduce(losses)
        return losses.tolist()

    def held_bytes(self) -> int:
        """What lives between steps: weights, moments, and DDP's buckets."""
        parameters = list(self.module.parameters())
        moments = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        held = sum(t.nbytes for t in [*parameters, *moments])
        return held + (sum(p.nbytes for p in parameters) if self.model is not self.module else 0)

    def close(self) -> None:
        if isinstance(self.feed, Prefetched):
            self.feed.close()


def average_gradients(model: nn.Module, world_size: int, bucket_mib: float | None) -> None:
    """Chapter 1's, in messages of `bucket_mib`: while one travels, the next is packed."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    buckets: list[list[torch.Tensor]] = [[]]
    for gradient in gradients:
        if bucket_mib and sum(g.nbytes for g in buckets[-1]) >= bucket_mib * 2**20:
            buckets.append([])
        buckets[-1].append(gradient)
    under_way = []
    for bucket in buckets:
        flat = torch.cat([g.flatten() for g in bucket])
        under_way.append((bucket, flat, torch.distributed.all_reduce(flat, async_op=True)))
    for bucket, flat, work in under_way:
        work.wait()
        flat /= world_size
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))
