"""Train a transformer with DDP: one file for a laptop, a GPU node and a cluster, that can be killed at any moment.

You learn   what a training script needs around DDP(model): accumulation without messages, the right divisor, mixed
            precision, checkpoints that resume exactly on any number of ranks, leaving in good order when told to
Laptop      torchrun --standalone --nproc-per-node=2 ch03_ddp/train_ddp.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/train_ddp.py --preset small --batch-size 16 \
                --seq-len 1024 --lr 6e-4 --compile
Two hosts   python -m ch02_hardware_parallelism.virtual_cluster --launch torchrun -- ch03_ddp/train_ddp.py --steps 20
Cluster     sbatch ch03_ddp/launch/train.sbatch ch03_ddp/train_ddp.py --preset 1b --global-batch 512 --compile
You see     the loss fall, with --steps 2000 below a bigram model's, along the same curve on 1, 2 or 4 ranks if
            --global-batch is the same; tokens/s, MFU where the peak is known, one hash of the weights on all ranks
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ch01_intro import checkpoint, training
from ch03_ddp import hooks, options, preemption, step
from ch03_ddp.checkpoints import Keeper, newest_whole
from ch03_ddp.feed import Documents, Feed, Prefetched, StepBatch
from ch03_ddp.report import Report
from common import data, dist, script
from common.logs import get_logger

log = get_logger()


def build(args: argparse.Namespace, ctx: dist.Context) -> nn.Module:
    """The model with the same weights on every rank, and a random stream of its own (dropout) on each."""
    model = training.build_model(args, ctx.device)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = args.dropout
    script.seed_everything(args.seed + 1 + ctx.rank)
    if args.compile:
        step.compile_layers(model)
    return model


def open_feed(args: argparse.Namespace, corpus: data.Corpus, ctx: dist.Context, position: int) -> Iterator[StepBatch]:
    rows = (
        Documents(corpus.train, corpus.tokenizer().eos_token_id, args.seq_len)
        if args.ragged
        else data.Blocks(corpus.train, args.seq_len)
    )
    feed = Feed(
        rows, ctx, global_batch=args.global_batch, micro_batch=args.batch_size, seed=args.seed, position=position
    )
    ahead = args.prefetch == "on" or (args.prefetch == "auto" and ctx.device.type == "cuda")
    return Prefetched(feed) if ahead else feed


def find_start(args: argparse.Namespace, keeper: Keeper) -> tuple[Path | None, int, dict[str, Any]]:
    """The checkpoint that --resume means, its step and its state; (None, 0, {}) to begin anew."""
    if args.resume == "auto" and args.out:
        return newest_whole(keeper.folder, keeper.settings) or (None, 0, {})
    path = training.find_checkpoint(args)
    return (path, *checkpoint.load(path, keeper.settings)) if path else (None, 0, {})


@dataclass
class Parts:
    """What the next step depends on, besides the data's position: all of it is in a checkpoint."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: step.Precision

    def state(self, position: int, ctx: dist.Context) -> dict[str, Any]:
        """To save. Called on every rank: each has random numbers of its own. Rank 0's answer is the whole one."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "position": position,
            "rng": ctx.gather(training.random_state()),
        }

    def restore(self, state: dict[str, Any], rank: int) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        if rank < len(state["rng"]):  # a rank that was not there keeps the stream it was seeded with
            training.restore_random_state(state["rng"][rank])


def main(argv: list[str] | None = None) -> dict:
    args = options.parse(__doc__, argv)
    run = script.start(__file__, args)
    out = args.out or run.folder
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx:
        args.global_batch = args.global_batch or args.batch_size * ctx.world_size
        keeper = Keeper(
            out / "checkpoints", options.settings(args, corpus, ctx), keep=args.keep, in_background=args.async_save
        )
        source, first, state = find_start(args, keeper)
        started = ctx.exchange("start", json.dumps([str(source and source.name), keeper.settings], sort_keys=True))
        if len(set(started)) > 1:
            raise script.UserError(
                f"the ranks would start differently: {' and '.join(sorted(set(started)))}; give all nodes the same "
                "checkpoints, data, Python and flags (a shared folder for --out)"
            )
        model = build(args, ctx)
        precision = step.Precision.of(training.compute_dtype(args.dtype, ctx.device), ctx.device)
        parts = Parts(model, training.make_optimizer(model, args.lr), precision)
        if source:
            parts.restore(state, ctx.rank)
            log.info("resumed", checkpoint=source, step=first)
        ddp = step.wrap(
            model, bucket_mib=args.bucket_mib, static_graph=args.static_graph, bucket_view=not args.no_bucket_view
        )
        if ctx.world_size > 1:
            remembers = hooks.register(ddp, args.hook)
            if source and isinstance(remembers, hooks.STATEFUL):
                log.warning(f"--hook {args.hook} has a memory that no checkpoint holds: this resume is not exact")
        feed = open_feed(args, corpus, ctx, state.get("position", 0))
        report = Report(args, corpus, ctx, out, first, source)
        preempted = preemption.Preemption(args.preempt_signals, ctx)

        leave = None
        for number in range(first + 1, args.steps + 1):
            lr = training.learning_rate(number - 1, args.steps, args.lr, args.warmup)
            for group in parts.optimizer.param_groups:
                group["lr"] = lr
            preempted.ask()
            with report.timer.phase("data"):
                batch = next(feed)
            with report.timer.phase("forward_backward"):  # and the messages, which travel meanwhile
                loss = step.backward(ddp, batch.micro_batches, batch.tokens, ctx.world_size, precision)
            with report.timer.phase("optimizer"):
                step.update(ddp, parts.optimizer, precision, args.clip)
            report.step(number, loss, lr, batch)

            leave = preempted.answer()
            last = bool(leave) or number == args.steps
            validated = args.val_every and number % args.val_every == 0 and not last
            val_loss = report.validate(model, number) if validated else None
            due = args.save_every and number % args.save_every == 0
            if args.out and (last or due or validated):
                report.flush()  # what a checkpoint has passed must not be missing from the losses
                state = parts.state(batch.position, ctx)
                if ctx.is_main:
                    keeper.save(number, state, val_loss)
                if not args.async_save:
                    ctx.barrier("checkpoint")
                report.pause()
            if leave:
                break

        keeper.wait()
        result = report.finish(model, preempted=bool(leave))
        if ctx.is_main and leave:
            result["requeued"] = preemption.requeue(leave)
        ctx.barrier("report written")
        return result


if __name__ == "__main__":
    script.run(main)
