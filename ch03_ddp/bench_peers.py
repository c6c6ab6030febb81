"""The training step of train_ddp.py beside others': a minimal DDP loop, Hugging Face accelerate and Trainer.

You learn   what a training loop costs on top of the model, and how to compare loops that do not want to be interrupted
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/bench_peers.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/bench_peers.py --preset small --batch-size 16 \
                --seq-len 1024
Cluster     srun python ch03_ddp/bench_peers.py --preset small
You see     the same losses from all, step by step, which proves the same work; then ratios of tokens/s, the median over
            rounds with quartiles: above 1 ours is faster

Each loop is as its own documentation writes it (peers.py), and runs in a thread of its own that stands still but when
it has the turn. All are alive at once and take turns in an order drawn anew each round; start-up and the first steps
are not counted. Where a loop's memory happens to lie moves its speed by some percent for as long as it lives, so all
are built anew several times, in an order drawn anew. The loop `ours-again` is ours once more: what it shows is noise.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
from functools import partial

import torch

from ch01_intro import training
from ch02_hardware_parallelism.training import timed_ms
from ch03_ddp import peers
from ch03_ddp.preemption import Preemption, parse_signal
from common import data, dist, lm, script
from common.logs import Progress

WARM_UP = 4  # steps, of each start
# How far the losses of the first steps may lie apart, relatively: rounding, of the type that matrix products have. The
# first one alone would not show who forgets the accumulation or does not send the gradients.
COMPARED = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
OURS = "ours"


def measure(args: argparse.Namespace, ctx: dist.Context, run: script.Run, loops: dict[str, peers.Loop]) -> dict:
    """Let loops, the first of them `ours`, take turns. RESULT."""
    launch = ctx.launch  # Hugging Face's libraries ask for torchrun's variables, which srun does not set
    os.environ |= {"RANK": str(launch.rank), "LOCAL_RANK": str(launch.local_rank), "WORLD_SIZE": str(launch.world_size)}
    blocks = data.Blocks(training.load_corpus(args).train, args.seq_len)
    preemption = Preemption([parse_signal("USR1")], ctx)  # signals belong to the main thread
    job = peers.Job(args, ctx, blocks, WARM_UP + args.rounds * args.steps, preemption, run.folder)
    order = random.Random(args.seed)  # the same on all ranks
    times_ms: list[dict[str, list[float]]] = []  # by start, loop and round
    progress = Progress(args.starts * args.rounds, "rounds")
    for number in range(args.starts):
        turns = {name: peers.Turns(loops[name], job, args.timeout_s) for name in order.sample(list(loops), len(loops))}
        for turn in turns.values():
            turn.take(WARM_UP)
        times_ms.append({name: [] for name in loops})
        for done in range(args.rounds):
            for name in order.sample(list(loops), len(loops)):
                spent_ms = timed_ms(partial(turns[name].take, args.steps), ctx.device)
                times_ms[-1][name].append(spent_ms / args.steps)
            progress.update(number * args.rounds + done + 1)
        losses = {name: mean_over_ranks(turns[name].losses, ctx) for name in loops}  # of the last start
        for turn in turns.values():
            turn.stop()
        gc.collect()
    return summary(times_ms, losses, job)


def mean_over_ranks(losses: list[torch.Tensor], ctx: dist.Context) -> list[float]:
    mean = torch.stack(losses)
    torch.distributed.all_reduce(mean)
    return (mean / ctx.world_size).tolist()


def summary(times_ms: list[dict[str, list[float]]], losses: dict[str, list[float]], job: peers.Job) -> dict:
    """RESULT: rates, ratios of the rounds with quartiles, and of the starts the lowest and highest median."""
    tokens = job.global_batch * job.args.seq_len
    median_ms = {name: statistics.median(t for start in times_ms for t in start[name]) for name in losses}
    result: dict = {
        "world_size": job.ctx.world_size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "global_batch": job.global_batch,
        "rounds": sum(len(start[OURS]) for start in times_ms),
        "first_loss": losses[OURS][0],
        "losses_equal": True,
        "ours_step_ms": median_ms[OURS],
        "ours_tokens_per_s": tokens / median_ms[OURS] * 1e3,
    }
    for name in losses:
        if name == OURS:
            continue
        field = name.replace("-", "_")
        ratios = [[b / a for a, b in zip(start[OURS], start[name], strict=True)] for start in times_ms]
        flat = [ratio for of_a_start in ratios for ratio in of_a_start]
        low, middle, high = statistics.quantiles(flat, n=4, method="inclusive") if len(flat) > 1 else flat * 3
        by_start = [statistics.median(of_a_start) for of_a_start in ratios]
        apart = [abs(a - b) / abs(a) for a, b in zip(losses[OURS], losses[name], strict=True)]
        result["losses_equal"] &= all(difference <= TOLERANCE[job.dtype] for difference in apart[:COMPARED])
        result |= {
            f"{field}_step_ms": median_ms[name],
            f"{field}_tokens_per_s": tokens / median_ms[name] * 1e3,
            f"over_{field}": middle,
            f"over_{field}_p25": low,
            f"over_{field}_p75": high,
            f"over_{field}_lowest_start": min(by_start),
            f"over_{field}_highest_start": max(by_start),
            f"{field}_first_loss_difference": apart[0],
            f"{field}_largest_loss_difference": max(apart),
        }
    return result


def show(result: dict, names: list[str]) -> None:
    print(f"{'loop':12}{'step ms':>9}{'tokens/s':>10}  {'ours over it':24}{'starts':17}losses apart: first ... most")
    print(f"{OURS:12}{result['ours_step_ms']:9.1f}{result['ours_tokens_per_s']:10,.0f}")
    for name in names:
        field = name.replace("-", "_")
        middle, low, high, lowest, highest = (
            result[f"over_{field}{part}"] for part in ("", "_p25", "_p75", "_lowest_start", "_highest_start")
        )
        first, most = (result[f"{field}_{part}_loss_difference"] for part in ("first", "largest"))
        print(f"{name:12}{result[f'{field}_step_ms']:9.1f}{result[f'{field}_tokens_per_s']:10,.0f}  "
              f"{f'{middle:.3f} ({low:.3f} ... {high:.3f})':24}{f'{lowest:.3f} ... {highest:.3f}':17}"
              f"{first:.1e} ... {most:.1e}")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--peers", type=script.comma_list(str), default=list(peers.PEERS), help=", ".join(peers.PEERS))
    parser.add_argument("--bucket-mib", type=script.positive, default=25, help="ours")
    add_flags(parser)
    args = parser.parse_args(argv)
    peers.check(args.peers)
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of every comparison of loops."""
    parser.add_argument("--starts", type=script.at_least(1), default=6, help="build all loops anew so many times")
    parser.add_argument("--rounds", type=script.at_least(1), default=8, help="of each start")
    parser.add_argument("--steps", type=script.at_least(1), default=2, help="of each loop in each round")
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    parser.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulation", type=script.at_least(1), default=2, help="micro-batches a step")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--lr", type=script.positive, default=1e-3)
    parser.add_argument("--warmup", type=script.at_least(0), default=20)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=script.at_least(1), help="CPU threads a rank (default: cores / local ranks)")
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for a turn")


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    run = script.start(__file__, args)
    with dist.session(args.device, threads=args.threads) as ctx:
        loops = {OURS: peers.ours} | {name: peers.PEERS[name] for name in args.peers}
        result = measure(args, ctx, run, loops)
        if ctx.is_main:
            show(result, args.peers)
        if not result["losses_equal"]:
            raise script.CheckFailed("the losses of the first steps differ: this is not the same work", result)
        return result


if __name__ == "__main__":
    script.run(main)
