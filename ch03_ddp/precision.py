"""Mixed precision under DDP: what bf16 and fp16 do to speed, loss and gradients, and how an overflow passes.

You learn   why bf16 needs no loss scaling and fp16 does, and why all ranks skip the same step though one overflowed
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/precision.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/precision.py --preset small --seq-len 1024
Cluster     srun python ch03_ddp/precision.py --preset small
You see     step times, losses against fp32's, and the share of gradients that are 0 because they were too small for the
            type; then a planted overflow on one rank: no weight moves anywhere, the scale halves, training goes on
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from ch01_intro import training
from ch02_hardware_parallelism.training import timed_ms
from ch03_ddp import rungs, step
from common import data, dist, lm, script

WARM_UP = 2
NAMES = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16, scaled", "fp16_bare": "fp16, not scaled"}


class Trainee(rungs.Trainee):
    """One precision in training; counts which gradients are 0."""

    def __init__(self, name: str, args: argparse.Namespace, rows: data.Blocks, ctx: dist.Context) -> None:
        dtype = name.removesuffix("_bare")
        rung = rungs.Rung(name=name, dtype=dtype, fused=True, overlap=ctx.world_size > 1)
        super().__init__(rung, args, rows, ctx)
        if name == "fp16_bare":
            scaler = torch.amp.GradScaler(ctx.device.type, enabled=False)
            self.precision = step.Precision(torch.float16, ctx.device, scaler)
        self.zero_share = 0.0

    def step(self) -> None:
        batch = next(self.feed)
        self.losses.append(
            step.backward(self.model, batch.micro_batches, batch.tokens, self.ctx.world_size, self.precision)
        )
        step.update(self.model, self.optimizer, self.precision, max_norm=1.0)

    def count_zeros(self) -> None:
        """One more backward pass, whose gradients are looked at and dropped. Before they are summed over the ranks: two
        short numbers of opposite sign often are each other's negative, and their sum 0 without any being too small."""
        batch = next(self.feed)
        with step.no_sync(self.model):
            step.backward(self.model, batch.micro_batches, batch.tokens, self.ctx.world_size, self.precision)
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.zero_share = 1 - sum(g.count_nonzero().item() for g in gradients) / sum(g.numel() for g in gradients)
        self.optimizer.zero_grad()


def compare(args: argparse.Namespace, ctx: dist.Context) -> dict[str, Any]:
    """Train in each precision, step by step in turns: {name}_step_ms, _loss, _loss_difference, _zero_gradients."""
    rows = data.Blocks(training.load_corpus(args).train, args.seq_len)
    trainees = {name: Trainee(name, args, rows, ctx) for name in NAMES}
    times_ms: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(args.steps):
        for name, trainee in trainees.items():
            times_ms[name].append(timed_ms(trainee.step, ctx.device))
    losses = {name: trainee.all_losses() for name, trainee in trainees.items()}
    result: dict[str, Any] = {}
    for name, trainee in trainees.items():
        trainee.count_zeros()
        counted = times_ms[name][WARM_UP:]
        ratios = [a / b for a, b in zip(times_ms["fp32"][WARM_UP:], counted, strict=True)]
        result |= {
            f"{name}_step_ms": statistics.median(counted),
            f"{name}_over_fp32": statistics.median(ratios),
            f"{name}_loss": losses[name][-1],
            f"{name}_loss_difference": max(abs(a - b) for a, b in zip(losses["fp32"], losses[name], strict=True)),
            f"{name}_zero_gradients": trainee.zero_share,
        }
    result["scale"] = trainees["fp16"].precision.scaler.get_scale()
    return result


def overflow(args: argparse.Namespace, ctx: dist.Context) -> dict[str, Any]:
    """Spoil one gradient on the last rank, between two healthy steps, and note what every rank does."""
    rows = data.Blocks(training.load_corpus(args).train, args.seq_len)
    trainee = Trainee("fp16", args, rows, ctx)
    parameter = trainee.module.model.norm.weight  # type: ignore[union-attr]
    trainee.step()

    def spoilt() -> None:
        if ctx.rank != ctx.world_size - 1:
            return trainee.step()
        hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
        trainee.step()
        return hook.remove()

    noted = [observe(action, trainee) for action in (spoilt, trainee.step)]
    told = ctx.gather([*noted, lm.weights_sha256(trainee.module)])
    if not ctx.is_main:
        return {}
    return {
        "overflow_on_rank": ctx.world_size - 1,
        "scales": [rank[0]["scales"] for rank in told],
        "ranks_that_skipped": sum(not rank[0]["moved"] for rank in told),
        "ranks_that_went_on": sum(rank[1]["moved"] for rank in told),
        "ranks_agree": len({rank[2] for rank in told}) == 1,
    }


def observe(action: Callable[[], None], trainee: Trainee) -> dict[str, Any]:
    """Do a step: the scale before and after, and whether any weight moved."""
    before, scale = lm.weights_sha256(trainee.module), trainee.precision.scaler.get_scale()
    action()
    after = lm.weights_sha256(trainee.module)
    return {"scales": [scale, trainee.precision.scaler.get_scale()], "moved": before != after}


def show(result: dict[str, Any], ranks: int) -> None:
    print(f"{'':18}{'step ms':>9}{'x fp32':>8}{'loss':>9}{'furthest from fp32':>20}{'gradients that are 0':>22}")
    for name, label in NAMES.items():
        row = {part: result[f"{name}_{part}"] for part in
               ("step_ms", "over_fp32", "loss", "loss_difference", "zero_gradients")}  # fmt: skip
        print(f"{label:18}{row['step_ms']:9.1f}{row['over_fp32']:8.2f}{row['loss']:9.4f}{row['loss_difference']:20.1e}"
              f"{row['zero_gradients']:22.4%}")  # fmt: skip
    before, after = result["scales"][0]
    print(f"\na gradient made infinite on rank {result['overflow_on_rank']}: {result['ranks_that_skipped']} of {ranks} "
          f"ranks skip the step, scale {before:,.0f} -> {after:,.0f}; next step: {result['ranks_that_went_on']} go on, "
          f"weights {'equal' if result['ranks_agree'] else 'NOT equal'}")  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    parser.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank and step")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--steps", type=script.at_least(WARM_UP + 1), default=20)
    parser.add_argument("--lr", type=script.positive, default=1e-3)
    args = parser.parse_args(argv)
    script.start(__file__, args)
    with dist.session(args.device) as ctx:
        result = compare(args, ctx) | overflow(args, ctx)
        if ctx.is_main:
            show(result, ctx.world_size)
        return {"world_size": ctx.world_size} | result


if __name__ == "__main__":
    script.run(main)
