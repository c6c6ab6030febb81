"""The training step of train_deepspeed.py beside the loop of DeepSpeed's own guide: what does ours cost on top?

You learn   what a loop with a right divisor, a schedule, signals, timers and losses adds to forward, backward, step
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/bench_loop.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/bench_loop.py --preset small \
                --batch-size 16 --seq-len 1024 --deepspeed-config ch05_deepspeed_megatron/configs/zero3.json
Cluster     srun python ch05_deepspeed_megatron/bench_loop.py --preset small
You see     the same losses step by step; the ratio of tokens/s, the median over rounds with quartiles: above 1 ours is
            faster; ours once more as a control, which shows what is noise

Loops take turns in threads of their own, as in chapter 3's bench_peers.py.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from ch01_intro import training
from ch03_ddp import bench_peers, peers
from ch03_ddp.feed import Feed
from ch03_ddp.peers import Done, Job
from ch04_fsdp import zero_peers
from ch05_deepspeed_megatron import ds_config, engine, options
from common import dist, lm, profiling, script


def ours(settings: engine.Settings, job: Job, done: Done) -> None:
    """The loop of train_deepspeed.py, with all that it does in a step: signals, timers, schedule, losses in the end."""
    zero = start(settings, job)
    timer = profiling.StepTimer(job.ctx.device)
    feed = Feed(job.blocks, job.ctx, global_batch=job.global_batch, micro_batch=job.args.batch_size, seed=job.args.seed)
    pending: list[torch.Tensor] = []
    for number in range(job.total_steps):
        engine.set_learning_rate(zero, job.rate(number))
        job.preemption.ask()
        with timer.phase("data"):
            batch = next(feed)
        with timer.phase("forward_backward"):
            loss = zero_peers.backward(zero, batch.micro_batches, batch.tokens, job.ctx.world_size)
        with timer.phase("optimizer"):
            zero_peers.update(zero)
        timer.end_step()
        job.preemption.answer()
        pending.append(loss)
        if len(pending) == peers.LOG_EVERY:
            losses = torch.stack(pending)
            torch.distributed.all_reduce(losses)
            losses.tolist()
            pending = []
        done(loss * job.ctx.world_size)


def guide(settings: engine.Settings, job: Job, done: Done) -> None:
    """DeepSpeed's "Getting Started": forward, backward, step for each micro-batch; its means are means of means."""
    zero = start(settings, job)
    sampler = DistributedSampler(job.sequences, shuffle=False)
    on_gpu = job.ctx.device.type == "cuda"
    losses: list[torch.Tensor] = []
    for batch in DataLoader(job.sequences, job.args.batch_size, sampler=sampler, pin_memory=on_gpu):
        if not losses:
            engine.set_learning_rate(zero, job.rate(zero.global_steps))
        loss = zero(**{name: x.to(job.ctx.device, non_blocking=True) for name, x in batch.items()}).loss
        zero.backward(loss)
        zero.step()
        losses.append(loss.detach())
        if len(losses) == job.args.accumulation:
            done(torch.stack(losses).mean())
            losses = []


def start(settings: engine.Settings, job: Job) -> Any:
    args = job.args
    model = engine.build(args.preset, settings, job.ctx, seq_len=args.seq_len, seed=args.seed)
    model.config.use_cache = False
    return engine.initialize(model.train(), settings, job.ctx)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--deepspeed-config", type=Path, default=options.DEFAULT)
    bench_peers.add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    launch = dist.read_launch()
    known = ds_config.known_by(
        ranks=launch.world_size, global_batch=launch.world_size * args.batch_size * args.accumulation,
        micro_batch=args.batch_size, clip=1.0, lr=args.lr, hidden=lm.config(args.preset, args.seq_len).hidden_size,
        dtype=training.compute_dtype(args.dtype, dist.pick_device(args.device, launch)),
    )  # fmt: skip
    settings = ds_config.prepare(args.deepspeed_config, known, launch.world_size)
    run = script.start(__file__, args)
    loops = {
        bench_peers.OURS: partial(ours, settings),
        "guide": partial(guide, settings),
        peers.AGAIN: partial(ours, settings),
    }
    with dist.session(args.device, threads=args.threads) as ctx:
        result = bench_peers.measure(args, ctx, run, loops)
        if ctx.is_main:
            bench_peers.show(result, list(loops)[1:])
        if not result["losses_equal"]:
            raise script.CheckFailed("the losses of the first steps differ: this is not the same work", result)
        return result | {"stage": engine.stage_of(settings)}


if __name__ == "__main__":
    script.run(main)
