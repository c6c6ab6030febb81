"""The training step of train_ddp.py beside others': a minimal DDP loop, Hugging Face accelerate and Trainer.

You learn   what a training loop costs on top of the model, and how to compare loops that do not want to be interrupted
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/bench_peers.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/bench_peers.py --preset small --batch-size 16 \
                --seq-len 1024
Cluster     srun python ch03_ddp/bench_peers.py --preset small
You see     the same losses from all, step by step, which proves the same work; then ratios of tokens/s, the median over
            rounds with quartiles: above 1 ours is faster

Each loop is as its own documentation writes it (peers.py), and runs in a thread of its own that stands still but when
it has the turn. All are alive at once and take turns in an order drawn anew each round; start-up and the first round
are not counted.
"""

from __future__ import annotations

import argparse
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

# How far the losses of the first steps may lie apart, relatively: rounding, of the type that matrix products have. The
# first one alone would not show who forgets the accumulation or does not send the gradients.
COMPARED = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
OURS = "ours"


def measure(args: argparse.Namespace, ctx: dist.Context, run: script.Run) -> dict:
    launch = ctx.launch  # Hugging Face's libraries ask for torchrun's variables, which srun does not set
    os.environ |= {"RANK": str(launch.rank), "LOCAL_RANK": str(launch.local_rank), "WORLD_SIZE": str(launch.world_size)}
    blocks = data.Blocks(training.load_corpus(args).train, args.seq_len)
    total = (args.rounds + 1) * args.steps
    preemption = Preemption([parse_signal("USR1")], ctx)  # signals belong to the main thread
    job = peers.Job(args, ctx, blocks, total, preemption, run.folder)
    loops = {OURS: peers.ours} | {name: peers.PEERS[name] for name in args.peers}
    turns = {name: peers.Turns(loop, job, args.timeout_s) for name, loop in loops.items()}
    order, times_ms = random.Random(args.seed), {name: [] for name in loops}  # the same order on all ranks
    progress = Progress(args.rounds + 1, "rounds")
    for number in range(args.rounds + 1):
        for name in order.sample(list(loops), len(loops)) if number else loops:
            spent_ms = timed_ms(partial(turns[name].take, args.steps), ctx.device)
            if number:  # the first one starts the loops and warms them up
                times_ms[name].append(spent_ms / args.steps)
        progress.update(number + 1)
    losses = {}
    for name, turn in turns.items():
        mean = torch.stack(turn.losses)
        torch.distributed.all_reduce(mean)
        losses[name] = (mean / ctx.world_size).tolist()
    return summary(times_ms, losses, job)


def summary(times_ms: dict[str, list[float]], losses: dict[str, list[float]], job: peers.Job) -> dict:
    tokens = job.global_batch * job.args.seq_len
    others = [name for name in times_ms if name != OURS]
    result: dict = {
        "world_size": job.ctx.world_size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "global_batch": job.global_batch,
        "rounds": job.args.rounds,
        "first_loss": losses[OURS][0],
        "losses_equal": True,
        "ours_step_ms": statistics.median(times_ms[OURS]),
        "ours_tokens_per_s": tokens / statistics.median(times_ms[OURS]) * 1e3,
    }
    for name in others:
        field = name.replace("-", "_")
        ratios = [theirs / mine for theirs, mine in zip(times_ms[name], times_ms[OURS], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        apart = [abs(a - b) / abs(a) for a, b in zip(losses[OURS], losses[name], strict=True)]
        result["losses_equal"] &= all(difference <= TOLERANCE[job.dtype] for difference in apart[:COMPARED])
        result |= {
            f"{field}_step_ms": statistics.median(times_ms[name]),
            f"{field}_tokens_per_s": tokens / statistics.median(times_ms[name]) * 1e3,
            f"over_{field}": quartiles[1],
            f"over_{field}_p25": quartiles[0],
            f"over_{field}_p75": quartiles[2],
            f"{field}_first_loss_difference": apart[0],
            f"{field}_largest_loss_difference": max(apart),
        }
    result["least_ratio"] = min(result[f"over_{name.replace('-', '_')}"] for name in others)
    return result


def show(result: dict, names: list[str]) -> None:
    print(
        f"{'loop':12}{'step ms':>9}{'tokens/s':>10}  {'ours over it':22}{'losses differ by, first step ... all steps'}"
    )
    print(f"{OURS:12}{result['ours_step_ms']:9.1f}{result['ours_tokens_per_s']:10,.0f}")
    for name in names:
        row = {key.replace(name.replace("-", "_"), "it"): value for key, value in result.items()}
        ratio = f"{row['over_it']:.3f} ({row['over_it_p25']:.3f} ... {row['over_it_p75']:.3f})"
        print(f"{name:12}{row['it_step_ms']:9.1f}{row['it_tokens_per_s']:10,.0f}  {ratio:24}"
              f"{row['it_first_loss_difference']:.1e} ... {row['it_largest_loss_difference']:.1e}")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--peers", type=script.comma_list(str), default=list(peers.PEERS), help=", ".join(peers.PEERS))
    parser.add_argument("--rounds", type=script.at_least(1), default=15)
    parser.add_argument("--steps", type=script.at_least(1), default=4, help="of each loop in each round")
    parser.add_argument("--preset", default="nano", help=f"{', '.join(lm.PRESETS)}, a model folder, or a hub id")
    parser.add_argument("--data", default="stdlib", help="stdlib, a file, a folder, or a hub data set id")
    parser.add_argument("--batch-size", type=script.at_least(1), default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulation", type=script.at_least(1), default=2, help="micro-batches a step")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--lr", type=script.positive, default=1e-3)
    parser.add_argument("--warmup", type=script.at_least(0), default=20)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--bucket-mib", type=script.positive, default=25, help="ours")
    parser.add_argument("--threads", type=script.at_least(1), help="CPU threads a rank (default: cores / local ranks)")
    parser.add_argument("--timeout-s", type=script.positive, default=300, help="for a turn")
    args = parser.parse_args(argv)
    peers.check(args.peers)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    run = script.start(__file__, args)
    if dist.read_launch().world_size == 1:
        raise script.UserError("the peers are loops around DDP, which needs ranks; start it with torchrun, 2 or more")
    with dist.session(args.device, threads=args.threads) as ctx:
        result = measure(args, ctx, run)
        if ctx.is_main:
            show(result, args.peers)
        if not result["losses_equal"]:
            raise script.CheckFailed("the losses of the first steps differ: this is not the same work", result)
        return result


if __name__ == "__main__":
    script.run(main)
