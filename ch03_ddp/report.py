"""What a training run tells while it goes on and in the end: losses, rates, a plot, a sample, the RESULT."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ch01_intro import training
from ch03_ddp.feed import StepBatch
from common import data, lm, profiling, script
from common.dist import Context
from common.logs import Metrics, Progress, get_logger

log = get_logger()
WARM_UP_STEPS = 3  # left out of the timings: memory is allocated, code compiled, and DDP settles on its buckets


class Report:
    """Collects the steps of one run. The losses stay on the device until --log-every of them are read at once."""

    def __init__(
        self, args: argparse.Namespace, corpus: data.Corpus, ctx: Context, out: Path, first: int, source: Path | None
    ) -> None:
        self.args, self.corpus, self.ctx, self.out, self.first = args, corpus, ctx, out, first
        self.losses = training.open_losses(out, first, source) if ctx.is_main else None
        self.samples = self._open_samples() if args.record_samples else None
        self.progress = Progress(args.steps, "training")
        self.timer = profiling.StepTimer(ctx.device)
        self.pending: list[tuple[int, torch.Tensor, float, int]] = []  # step, part of its loss, learning rate, tokens
        self.tokens = 0
        self.val_loss: float | None = None
        self.window = time.perf_counter()
        profiling.reset_peak_memory(ctx.device)

    def _open_samples(self) -> Metrics:
        """A file a rank. What earlier runs noted of steps that come again goes first, whatever ranks they had."""
        folder = self.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        if self.ctx.is_main:
            for path in folder.glob("*.jsonl"):
                kept = [row for row in Metrics.read(path) if row["step"] <= self.first]
                with script.atomic_write(path) as file:
                    file.writelines(json.dumps(row) + "\n" for row in kept)
        self.ctx.barrier("samples")
        return Metrics(folder / f"rank{self.ctx.rank}.jsonl")

    def step(self, number: int, loss_part: torch.Tensor, lr: float, batch: StepBatch) -> None:
        """Note a finished step; every --log-every of them are read, written and shown.

        Raises:
            UserError: a loss is not finite.
        """
        self.timer.end_step()
        self.pending.append((number, loss_part, lr, batch.tokens))
        if self.samples:
            self.samples.write(step=number, sequences=batch.indices.tolist())
        if number % self.args.log_every == 0 or number == self.args.steps:
            self.flush()

    def flush(self) -> None:
        """Read the losses of the steps since the last time: this waits for the device."""
        if not self.pending:
            return
        losses = torch.stack([part for _, part, _, _ in self.pending])
        torch.distributed.all_reduce(losses)  # parts add up to the mean over all tokens
        number, _, lr, _ = self.pending[-1]
        tokens = sum(count for *_, count in self.pending)
        if not torch.isfinite(losses).all():
            raise script.UserError(f"the loss is {losses[-1].item()} at step {number}; lower --lr")
        rate = tokens / (time.perf_counter() - self.window)
        self.progress.update(number, f"loss {losses[-1]:.3f}  {rate:,.0f} tokens/s")
        if self.losses:
            for (done, _, at, _), loss in zip(self.pending, losses.tolist(), strict=True):
                self.losses.write(step=done, loss=loss, lr=at)
        every = 10 * self.args.log_every
        if number == self.args.steps or number // every > (number - len(self.pending)) // every:
            shown = f"step {number}/{self.args.steps}"
            log.info(shown, loss=losses[-1].item(), lr=lr, tokens_per_s=round(rate))
        self.tokens += tokens
        self.pending, self.window = [], time.perf_counter()

    def validate(self, model: nn.Module, number: int) -> float:
        self.flush()
        self.val_loss = self.evaluate(model)
        log.info(f"validation after step {number}", loss=self.val_loss)
        if self.losses:
            self.losses.write(step=number, val_loss=self.val_loss)
        self.pause()
        return self.val_loss

    def pause(self) -> None:
        """What came since the last step, a save or a validation, belongs to no step."""
        self.timer.restart()
        self.window = time.perf_counter()

    def finish(self, model: nn.Module, *, preempted: bool) -> dict[str, Any]:
        """The RESULT; in the end of a whole run also the plot, the sample and the model's folder."""
        self.flush()
        args, ctx = self.args, self.ctx
        memory = profiling.memory(ctx.device)
        phases_ms = self.timer.median_ms(WARM_UP_STEPS)
        hashes = ctx.gather(self.weights_sha256(model))
        if not preempted:
            self.val_loss = self.evaluate(model)
            self.save_model(model)
            self.sample(model)
        if not ctx.is_main:
            return {"preempted": preempted}  # whoever started this rank may have to start it again
        rows = [row for row in Metrics.read(self.out / "losses.jsonl") if "loss" in row]
        history = [row["loss"] for row in rows]
        steps = len(self.timer.rows_ms())
        rate = self.tokens / steps / phases_ms["step"] * 1e3 if phases_ms and steps else None
        dtype = training.compute_dtype(args.dtype, ctx.device)
        flops = profiling.flops_per_token(model.config, args.seq_len)
        result = {
            "val_loss": self.val_loss,
            "bigram_val_loss": None if preempted else training.bigram_loss(self.corpus, args),
            "loss_first": history[0] if history else None,
            "loss_last": history[-1] if history else None,
            "loss_drop": history[0] - history[-1] if history else None,
            "steps": rows[-1]["step"] if rows else 0,
            "resumed_at_step": self.first,
            "preempted": preempted,
            "world_size": ctx.world_size,
            "global_batch": args.global_batch,
            "ranks_agree": len(set(hashes)) == 1,
            "weights_sha256": hashes[0],
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": self.tokens,
            "tokens_per_s": rate,
            "mfu": rate and profiling.mfu(rate / ctx.world_size, flops, ctx.device, dtype),
            "peak_mem_gib": memory.peak_gib,
            "memory_source": memory.source,
            **{f"{name}_ms": value for name, value in phases_ms.items()},
        }
        if not preempted and history and script.Run.current:
            training.plot_losses(history, result, script.Run.current.path("loss.png"))
        return result

    # What differs where no rank holds the whole model; there all ranks take part in each (chapter 4).

    def evaluate(self, model: nn.Module) -> float:
        return training.evaluate(model, self.corpus, self.args, self.ctx)

    def weights_sha256(self, model: nn.Module) -> str:
        return lm.weights_sha256(model)

    def save_model(self, model: nn.Module) -> None:
        if self.args.out and self.ctx.is_main:
            lm.save(model, self.corpus.tokenizer(), self.out / "model")
            log.info("saved the model", folder=self.out / "model")

    def sample(self, model: nn.Module) -> None:
        if self.args.sample_tokens and self.ctx.is_main:
            self.show_sample(model)

    def show_sample(self, model: nn.Module, *, to_the_end: bool = False) -> None:
        args = self.args
        text = training.sample(
            model, self.corpus.tokenizer(), args.prompt, args.sample_tokens, args.seed, to_the_end=to_the_end
        )
        if self.ctx.is_main:
            print(f"--- the model continues {args.prompt!r}\n{text}\n---", flush=True)
