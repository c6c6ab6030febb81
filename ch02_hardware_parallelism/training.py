"""What the strategies' scripts share: flags, real text, timed steps, and steps beside the same ones in one process."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from ch01_intro.collectives import slowest_us
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.model import Shape, build, loss_sum
from ch02_hardware_parallelism.strategy import Batch, Strategy, token_count
from common import data, dist, profiling, script

SHARED_FLAGS = (
    "width", "heads", "layers", "vocab", "seq_len", "batch_size", "accumulation", "steps", "lr", "seed", "device",
)  # fmt: skip
WARM_UP = 2  # steps before the timed ones: memory is allocated, and DDP has settled on its buckets


def flags(doc: str | None, *, by_hand: bool = False) -> argparse.ArgumentParser:
    """Model and data, and --by-hand where the script can count. The batch is the whole job's: the ranks share it."""
    made = script.parser(doc)
    made.add_argument("--width", type=script.at_least(1), default=256)
    made.add_argument("--heads", type=script.at_least(1), default=4)
    made.add_argument("--layers", type=script.at_least(1), default=4)
    made.add_argument("--vocab", type=script.at_least(512), default=2048)
    made.add_argument("--seq-len", type=script.at_least(2), default=128)
    made.add_argument("--batch-size", type=script.at_least(1), default=8, help="sequences a micro-batch, of all ranks")
    made.add_argument("--accumulation", type=script.at_least(1), default=1, help="micro-batches a step")
    made.add_argument("--steps", type=script.at_least(1), default=20)
    made.add_argument("--lr", type=script.positive, default=1e-3)
    if by_hand:
        made.add_argument("--by-hand", action="store_true", help="collectives from send and receive, bytes counted")
    return made


def shape_of(args: argparse.Namespace, *, tied: bool = True) -> Shape:
    """The model of the flags.

    Raises:
        UserError: the heads do not divide the width.
    """
    if args.width % args.heads:
        raise script.UserError(f"--heads {args.heads} does not divide --width {args.width}; take one that does")
    return Shape(args.vocab, args.width, args.heads, args.layers, args.seq_len, tied)


class Text:
    """Real text, tokenised: an endless row of steps, the same on every rank, each a list of micro-batches."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.blocks = data.Blocks(data.prepare("stdlib", args.vocab).train, args.seq_len)
        self.order = np.random.default_rng(args.seed)

    def step(self) -> list[Batch]:
        micro_batches = []
        for _ in range(self.args.accumulation):
            chosen = self.order.integers(len(self.blocks), size=self.args.batch_size)
            inputs_bt, targets_bt = self.blocks.batch(chosen)
            micro_batches.append((inputs_bt.to(self.device), targets_bt.to(self.device)))
        return micro_batches


def adamw(lr: float) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def train_step(strategy: Strategy, micro_batches: list[Batch]) -> None:
    strategy.backward(micro_batches)
    strategy.update()


def timed_ms(action: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the slowest rank; all begin together."""
    return slowest_us(action, device, repeats=1)[0] / 1e3


def one_process_losses(model: nn.Module, args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of the same steps without any parallelism."""
    optimizer, text, losses = adamw(args.lr)(model.parameters()), Text(args, device), []
    for _ in range(args.steps):
        micro_batches = text.step()
        loss = torch.zeros((), device=device)
        for inputs_bt, targets_bt in micro_batches:
            part = loss_sum(model(inputs_bt), targets_bt) / token_count(micro_batches)
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_beside_one_process(
    make: type[Strategy],
    args: argparse.Namespace,
    run: script.Run,
    report: Callable[[Strategy], dict] = lambda strategy: {},
) -> dict:
    """Train by a strategy on all ranks and in one process on rank 0, print both, and return what RESULT holds.

    Args:
        report: further RESULT fields, from the trained strategy.
    """
    with dist.session(args.device) as ctx:
        model = build(shape_of(args), seed=args.seed, device=str(ctx.device))
        if reason := make.why_not(model, ctx.world_size):
            raise script.UserError(reason)
        parameters = sum(p.numel() for p in model.parameters())
        wanted_bytes = make.wire_bytes(model, Text(args, ctx.device).step(), ctx.world_size)
        alone = []
        if ctx.is_main:
            alone = one_process_losses(build(shape_of(args), seed=args.seed, device=str(ctx.device)), args, ctx.device)
        ctx.barrier("one process")
        comm = Comm(by_hand=args.by_hand)
        strategy, text = make(model, comm, adamw(args.lr)), Text(args, ctx.device)
        profiling.reset_peak_memory(ctx.device)  # of the strategy's own steps
        losses, times_ms, sent = [], [], 0
        for number in range(args.steps):
            micro_batches, before, begin = text.step(), comm.total_sent_bytes(), time.perf_counter()
            loss = strategy.backward(micro_batches)
            strategy.update()
            losses.append(loss.item())
            times_ms.append((time.perf_counter() - begin) * 1e3)
            sent = comm.total_sent_bytes() - before
            if not ctx.is_main:
                continue
            run.log(step=number + 1, loss=losses[-1], one_process_loss=alone[number])
            if number % max(1, args.steps // 5) == 0 or number == args.steps - 1:
                print(f"step {number + 1:3}  loss {losses[-1]:.6f}  one process {alone[number]:.6f}", flush=True)
        counted = sum(ctx.gather(sent))
        held = sum(w.numel() for w in strategy.model.parameters())
        further = report(strategy)
        strategy.close()
        if not ctx.is_main:
            return {}
        difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
        told = f"counted {counted:,}" if args.by_hand else "not counted (--by-hand counts)"
        wanted = "unknown" if wanted_bytes is None else f"{wanted_bytes:,}"
        print(f"bytes on the wire a step, all ranks: by formula {wanted}, {told}")
        return {
            "world_size": ctx.world_size,
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "largest_loss_difference": difference,
            "parameters": parameters,
            "parameters_per_rank": held,
            "wire_bytes_formula": wanted_bytes,
            "wire_bytes_per_step": counted if args.by_hand else None,
            "step_ms": statistics.median(times_ms),
            # On a CPU it would be the whole process's, with torch and the steps of one process in it.
            "peak_mem_gib": profiling.memory(ctx.device).peak_gib if ctx.device.type == "cuda" else None,
            **further,
        }
