"""The baseline: train a small Llama on real text, on one device. Everything later in the book is held against it.

You learn   what one training step consists of and what each part costs; how a checkpoint makes a resume exact
Laptop      python ch01_intro/train_baseline.py --steps 2000 --out runs/nano            (about three minutes)
GPU node    python ch01_intro/train_baseline.py --preset small --batch-size 16 --seq-len 1024 --lr 6e-4
Two ranks   torchrun --standalone --nproc-per-node=2 ch01_intro/train_baseline.py       (what it brings: scaling.py)
Cluster     srun python ch01_intro/train_baseline.py --preset small                     (one task a GPU)
You see     the loss falling below that of a bigram model fitted to the same tokens, tokens/s, MFU where the hardware's
            peak is known, a sample that looks like Python, and a hash of the weights: equal runs have equal hashes
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ch01_intro import checkpoint, training
from common import data, dist, lm, profiling, script
from common.logs import Metrics, Progress, get_logger

log = get_logger()
WARM_UP_STEPS = 3  # left out of the timings: first calls allocate, compile and fill caches


@dataclass(frozen=True)
class Step:
    """One finished step, counted from 1. The loss stays on the device: reading it would wait for the device."""

    number: int
    loss: torch.Tensor
    lr: float


def average_gradients(model: nn.Module, world_size: int) -> None:
    """Make every gradient the mean over ranks: all there is to data parallelism. Chapter 3 hides its cost."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])  # one message instead of one a tensor
    torch.distributed.all_reduce(flat)
    flat /= world_size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def training_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: data.ShardedBatches,
    args: argparse.Namespace,
    ctx: dist.Context,
    timer: profiling.StepTimer,
    first: int = 0,
) -> Iterator[Step]:
    """The loop itself: one optimizer step an iteration, from step `first` to args.steps."""
    dtype = training.compute_dtype(args.dtype, ctx.device)
    for number in range(first, args.steps):
        lr = training.learning_rate(number, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with timer.phase("data"):
            inputs, targets = (t.to(ctx.device, non_blocking=True) for t in next(batches))  # int64 [batch, seq]
        with timer.phase("forward"):
            with torch.autocast(ctx.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(input_ids=inputs, use_cache=False).logits  # [batch, seq, vocab]
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        with timer.phase("backward"):
            loss.backward()
        if ctx.world_size > 1:
            with timer.phase("communication"):
                average_gradients(model, ctx.world_size)
        with timer.phase("optimizer"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        timer.end_step()
        yield Step(number + 1, loss.detach(), lr)


def mean_over_ranks(steps: list[Step], ctx: dist.Context) -> list[float]:
    losses = torch.stack([step.loss for step in steps])
    torch.distributed.all_reduce(losses)
    return (losses / ctx.world_size).tolist()


def main(argv: list[str] | None = None) -> dict:
    args = training.training_parser(__doc__).parse_args(argv)
    source = training.find_checkpoint(args)
    run = script.start(__file__, args)
    out = args.out or run.folder
    corpus = training.load_corpus(args)

    with dist.session(args.device, threads=args.threads) as ctx:
        model = training.build_model(args, ctx.device)
        optimizer = training.make_optimizer(model, args.lr)
        blocks = data.Blocks(corpus.train, args.seq_len)
        batches = data.ShardedBatches(blocks, args.batch_size, rank=ctx.rank, world_size=ctx.world_size, seed=args.seed)
        settings, first = training.settings(args, corpus, ctx), 0
        started = ctx.exchange("start", json.dumps([str(source and source.name), settings], sort_keys=True))
        if len(set(started)) > 1:
            raise script.UserError(
                f"the ranks would start differently: {' and '.join(sorted(set(started)))}; give all nodes the same "
                "checkpoints, data, Python and flags (a shared folder for --out)"
            )
        if source:
            first, state = checkpoint.load(source, settings)
            training.restore_state(state, model, optimizer, batches)
            log.info("resumed", checkpoint=source, step=first)

        losses = training.open_losses(out, first, source) if ctx.is_main else None
        profiling.reset_peak_memory(ctx.device)
        timer = profiling.StepTimer(ctx.device)
        tokens_a_step = args.batch_size * args.seq_len * ctx.world_size
        pending: list[Step] = []
        window = time.perf_counter()
        with Progress(args.steps, "training") as progress:
            for step in training_steps(model, optimizer, batches, args, ctx, timer, first):
                pending.append(step)
                last = step.number == args.steps
                save_now = args.out and (last or (args.save_every and step.number % args.save_every == 0))
                if not (last or save_now or len(pending) == args.log_every):
                    continue
                means = mean_over_ranks(pending, ctx)
                if not all(map(math.isfinite, means)):
                    raise script.UserError(f"the loss is {means[-1]} at step {step.number}; lower --lr")
                rate = tokens_a_step * len(pending) / (time.perf_counter() - window)
                progress.update(step.number, f"loss {means[-1]:.3f}  {rate:,.0f} tokens/s")
                if losses:
                    for done, loss in zip(pending, means, strict=True):
                        losses.write(step=done.number, loss=loss, lr=done.lr)
                if last or step.number // (10 * args.log_every) > (step.number - len(pending)) // (10 * args.log_every):
                    log.info(f"step {step.number}/{args.steps}", loss=means[-1], lr=step.lr, tokens_per_s=round(rate))
                pending = []
                if save_now:
                    if ctx.is_main:
                        state = training.training_state(model, optimizer, batches)
                        checkpoint.save(out / "checkpoints", step.number, state, settings)
                    ctx.barrier("checkpoint")
                    timer.restart()
                window = time.perf_counter()

        memory = profiling.memory(ctx.device)
        phases_ms = timer.median_ms(WARM_UP_STEPS)
        hashes = ctx.gather(lm.weights_sha256(model))
        result = {"val_loss": training.evaluate(model, corpus, args, ctx)}
        if ctx.is_main:
            history = [row["loss"] for row in Metrics.read(out / "losses.jsonl")]
            rate = tokens_a_step / phases_ms["step"] * 1e3 if phases_ms else None
            flops = profiling.flops_per_token(model.config, args.seq_len)
            dtype = training.compute_dtype(args.dtype, ctx.device)
            result |= {
                "bigram_val_loss": training.bigram_loss(corpus, args),
                "loss_first": history[0] if history else None,
                "loss_last": history[-1] if history else None,
                "loss_drop": history[0] - history[-1] if history else None,
                "steps": args.steps,
                "resumed_at_step": first,
                "world_size": ctx.world_size,
                "ranks_agree": len(set(hashes)) == 1,
                "weights_sha256": hashes[0],
                "parameters": sum(p.numel() for p in model.parameters()),
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": args.steps * tokens_a_step,
                "tokens_per_s": rate,
                "mfu": rate and profiling.mfu(rate / ctx.world_size, flops, ctx.device, dtype),
                "model_tflop_per_s": rate and rate * flops / 1e12,
                "peak_mem_gib": memory.peak_gib,
                "memory_source": memory.source,
                **{f"{name}_ms": value for name, value in phases_ms.items()},
            }
            if history:
                training.plot_losses(history, result, run.path("loss.png"))
            finish(model, corpus.tokenizer(), args, out)
        ctx.barrier("report written")
    return result


def finish(model: nn.Module, tokenizer: object, args: argparse.Namespace, out: Path) -> None:
    """Show what the model writes, and leave a Hugging Face folder that any serving engine loads."""
    if args.sample_tokens:
        text = training.sample(model, tokenizer, args.prompt, args.sample_tokens, args.seed)
        print(f"--- the model continues {args.prompt!r}\n{text}\n---", flush=True)
    if args.out:
        lm.save(model, tokenizer, out / "model")
        log.info("saved the model", folder=out / "model")


if __name__ == "__main__":
    script.run(main)
