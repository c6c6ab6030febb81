"""What does watching cost? Microseconds a collective, milliseconds a step, and a comparison of all weights.

You learn   what may stay on in a long run (the watch, a desync check now and then) and what is for a search
            (check=True, TORCH_DISTRIBUTED_DEBUG=DETAIL), and what torch's own debug mode says of the same mistake
Laptop      python ch03_ddp/watch_cost.py
GPU node    python ch03_ddp/watch_cost.py --ranks 8 --million-parameters 500
Cluster     the same on one node
You see     the time of a small all_reduce and of a DDP step in each mode, interleaved; a fingerprint of all weights
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as td
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ch01_intro.roofline import synchronize
from ch03_ddp import diagnose
from common import dist, ranks, script

MODES = ("plain", "watch", "check")
SMALL = 1024  # float32 numbers
WIDTH = 1024  # of the matrices that are compared


def median_us(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        synchronize(device)
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def layers(width: int = 256, depth: int = 8) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds in which each mode has its turn. Called on every rank."""
    rows: dict[str, list[float]] = {}
    with dist.session(args.device, timeout_s=60, threads=1) as ctx:
        message, x = torch.ones(SMALL, device=ctx.device), torch.randn(32, 256, device=ctx.device)
        ids = [ctx.device.index] if ctx.device.type == "cuda" else None
        for _ in range(args.rounds):
            for mode in MODES:
                ddp = DistributedDataParallel(layers().to(ctx.device), device_ids=ids)
                block = nullcontext() if mode == "plain" else diagnose.watch(ctx, timeout_s=60, check=mode == "check")
                with block as watch:
                    if watch:
                        watch.model(ddp)

                    def step(ddp: nn.Module = ddp) -> None:
                        ddp(x).sum().backward()

                    for _ in range(3):  # DDP arranges its buckets after the first
                        step()
                    reduce_us = median_us(lambda: td.all_reduce(message), args.repeats, ctx.device)
                    step_us = median_us(step, args.repeats, ctx.device)
                rows.setdefault(f"all_reduce_{mode}_us", []).append(reduce_us)
                rows.setdefault(f"step_{mode}_us", []).append(step_us)
        matrices = max(1, round(args.million_parameters * 1e6 / WIDTH**2))
        model = nn.ParameterList(torch.zeros(WIDTH, WIDTH, device=ctx.device) for _ in range(matrices))
        rows["desync_ms"] = [median_us(lambda: diagnose.desync(ctx, model), 5, ctx.device) / 1e3]
    return {name: statistics.median(values) for name, values in rows.items()}


def debug_mode(args: argparse.Namespace) -> float:
    """A small all_reduce under torch's own debug mode. Called on every rank."""
    td.set_debug_level(td.DebugLevel.DETAIL)
    with dist.session(args.device, timeout_s=60, threads=1) as ctx:
        message = torch.ones(SMALL, device=ctx.device)
        median_us(lambda: td.all_reduce(message), 3, ctx.device)
        return median_us(lambda: td.all_reduce(message), args.repeats, ctx.device)


def wrong_shape(args: argparse.Namespace) -> str:
    """What that mode says when one rank's message is shorter. Called on every rank."""
    td.set_debug_level(td.DebugLevel.DETAIL)
    with dist.session(args.device, timeout_s=10, threads=1) as ctx:
        try:
            td.all_reduce(torch.ones(4 - ctx.rank, device=ctx.device))
        except RuntimeError as error:
            return str(error)
        return "nothing"


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--ranks", type=script.at_least(2), default=2)
    parser.add_argument("--rounds", type=script.at_least(1), default=5)
    parser.add_argument("--repeats", type=script.at_least(3), default=50)
    parser.add_argument("--million-parameters", type=script.positive, default=50, help="for the comparison of weights")
    args = parser.parse_args(argv)
    if dist.read_launch().launcher != "python":
        raise script.UserError("this script starts its own ranks; start it with plain python")
    script.start(__file__, args)
    result = ranks.values(ranks.run_ranks(measure, args.ranks, args, timeout_s=300))[0]
    result["all_reduce_detail_us"] = ranks.values(ranks.run_ranks(debug_mode, args.ranks, args))[0]
    said = ranks.values(ranks.run_ranks(wrong_shape, args.ranks, args))
    print(f"{'':38}{'all_reduce':>12}{'DDP step':>12}")
    for mode in MODES:
        label = {"plain": "unwatched", "watch": "watch(ctx)", "check": "watch(ctx, check=True)"}[mode]
        print(f"{label:38}{result[f'all_reduce_{mode}_us']:9.0f} us{result[f'step_{mode}_us'] / 1e3:9.2f} ms")
    print(f"{'TORCH_DISTRIBUTED_DEBUG=DETAIL':38}{result['all_reduce_detail_us']:9.0f} us")
    print(f"desync of {args.million_parameters:g} million float32 parameters: {result['desync_ms']:.1f} ms")
    print(f"the debug mode on rank 1's wrong shape: {' '.join(said[0].split())[:400]}")
    return {"world_size": args.ranks, **result, "detail_notices": all("mismatch" in text.lower() for text in said)}


if __name__ == "__main__":
    script.run(main)
