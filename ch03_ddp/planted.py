"""The faults of faults.py, each a small training with one bug in the open, and its fix in the comment beside it.

Each is called on every rank, inside a watched block: fault(ctx, watch, guilty). Those that hang or crash end in the
watch's Fault; those that only do harm return the Verdict of the question that finds them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp import diagnose
from ch03_ddp.diagnose.watcher import Watch
from common.dist import Context

STEPS = 6
WIDTH = 16


class Model(nn.Module):
    """Two layers and an optional third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, extra: bool = True) -> torch.Tensor:
        hidden = self.first(x).relu()
        return self.last(self.extra(hidden) if extra else hidden).square().mean()


def replica(ctx: Context, watch: Watch) -> DistributedDataParallel:
    """The model under DDP, in buckets so small that several are under way during one backward."""
    torch.manual_seed(0)
    ids = [ctx.device.index] if ctx.device.type == "cuda" else None
    model = Model().to(ctx.device)
    return watch.model(DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=1e-4, gradient_as_bucket_view=True))


def batch(ctx: Context) -> torch.Tensor:
    return torch.randn(8, WIDTH, device=ctx.device)


def train(ctx: Context, watch: Watch, ddp: DistributedDataParallel, steps: int = STEPS) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        ddp(batch(ctx)).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
    return optimizer


def none(ctx: Context, watch: Watch, guilty: int) -> diagnose.Verdict | None:
    """Nothing is wrong: whatever is asked, nobody is blamed."""
    ddp = replica(ctx, watch)
    trial = diagnose.unused(ctx, ddp, lambda: ddp(batch(ctx)))
    optimizer = train(ctx, watch, ddp, 3 * STEPS)
    return trial or watch.straggler() or diagnose.desync(ctx, ddp, optimizer)


def deadlock(ctx: Context, watch: Watch, guilty: int) -> None:
    for step in range(STEPS):
        loss = batch(ctx).mean()
        if not (ctx.rank == guilty and step == 3):  # BUG: a branch that depends on the rank, around a collective
            td.all_reduce(loss)  #                    fix: all ranks call it, and the branch is around what they print
        ctx.barrier(f"after step {step}")
        loss.item()


def order(ctx: Context, watch: Watch, guilty: int) -> None:
    loss, flag = batch(ctx).mean(), torch.ones(1, device=ctx.device)
    if ctx.rank == guilty:  # BUG: the same calls in another order, as over a dict or a set filled by rank
        td.broadcast(flag, src=0)
        td.all_reduce(loss)
    else:  #                  fix: one order for all: sorted(names)
        td.all_reduce(loss)
        td.broadcast(flag, src=0)
    flag.item()


def shape(ctx: Context, watch: Watch, guilty: int) -> None:
    tokens = 2**18 - (ctx.rank == guilty)
    losses = torch.ones(tokens, device=ctx.device)  # BUG: one loss a token, and one rank has a token less
    td.all_reduce(losses)  #                          fix: reduce sum and count, whose shapes are the same everywhere
    losses.sum().item()


def uneven(ctx: Context, watch: Watch, guilty: int, *, join: bool = False) -> None:
    ddp = replica(ctx, watch)
    batches = STEPS - 2 if ctx.rank == guilty else STEPS  # BUG: the last shard of the data is shorter
    with Join([ddp]) if join else contextlib.nullcontext():  # fix: Join: who is through sends zeros along
        train(ctx, watch, ddp, batches)


def joined(ctx: Context, watch: Watch, guilty: int) -> None:
    """uneven, with its fix: as many batches too few, and nobody hangs."""
    uneven(ctx, watch, guilty, join=True)


def slow(ctx: Context, watch: Watch, guilty: int) -> diagnose.Verdict | None:
    ddp = replica(ctx, watch)
    for _ in range(2 * STEPS):
        if ctx.rank == guilty:
            time.sleep(0.05)  # BUG: this rank's data come from a slow disk. fix: loader workers, a local copy
        ddp(batch(ctx)).backward()
        watch.step()
    return watch.straggler()


def death(ctx: Context, watch: Watch, guilty: int) -> None:
    ddp = replica(ctx, watch)
    train(ctx, watch, ddp, 2)
    ctx.barrier("two steps")
    if ctx.rank == guilty:
        os.kill(os.getpid(), signal.SIGKILL)  # BUG: as the out-of-memory killer does. fix: less memory; checkpoints
    train(ctx, watch, ddp)


def inplace(ctx: Context, watch: Watch, guilty: int) -> None:
    ddp = replica(ctx, watch)
    last, first = ddp.module.last.weight, ddp.module.first.weight

    def clip_early(_: nn.Parameter) -> None:
        if ctx.rank == guilty:
            last.grad.mul_(0.5)  # BUG: the last layer's bucket left long ago, and is being summed right now

    first.register_post_accumulate_grad_hook(clip_early)
    train(ctx, watch, ddp)  #      fix: clip between backward() and optimizer.step()


def desync(ctx: Context, watch: Watch, guilty: int) -> diagnose.Verdict | None:
    ddp = replica(ctx, watch)
    optimizer = train(ctx, watch, ddp)
    if ctx.rank == guilty:
        with torch.no_grad():
            ddp.module.extra.weight[0, 0] += 1e-6  # BUG: one rank changes a weight that DDP has copied to all
    return diagnose.desync(ctx, ddp, optimizer)  #   fix: change weights before DDP, or on all ranks alike


def unused(ctx: Context, watch: Watch, guilty: int) -> diagnose.Verdict | None:
    ddp = replica(ctx, watch)
    extra = ctx.rank != guilty  # BUG: a branch of the model that depends on the data. fix: find_unused_parameters=True
    return diagnose.unused(ctx, ddp, lambda: ddp(batch(ctx), extra))


def unasked(ctx: Context, watch: Watch, guilty: int) -> None:
    """unused, and nobody asked before training: DDP hangs or throws, and the watch says why."""
    ddp = replica(ctx, watch)
    for _ in range(STEPS):
        ddp(batch(ctx), ctx.rank != guilty).backward()


FAULTS = {
    "deadlock": deadlock, "order": order, "shape": shape, "uneven": uneven, "slow": slow, "death": death,
    "inplace-bucket": inplace, "desync": desync, "unused": unused,
}  # fmt: skip
OTHERS = {"none": none, "uneven-joined": joined, "unused-unasked": unasked}
CHECKED = ("order", "shape")  # found before the call; gloo may abort the process otherwise
