"""The same training written four ways, each a loop of its own that calls `done` after every optimizer step.

Model, initial weights, sequences, micro-batches, precision, optimizer, schedule and clipping are the same for all: what
is left is the loop and what it wraps around DDP.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ch01_intro import training
from ch03_ddp import step
from ch03_ddp.feed import Feed
from ch03_ddp.preemption import Preemption
from common import data, profiling
from common.dist import Context
from common.script import UserError

LOG_EVERY = 10  # steps; where a loop reports losses at all
Done = Callable[[torch.Tensor], None]  # takes this rank's loss of the step: a mean over its tokens


class InOrder(Dataset[dict[str, torch.Tensor]]):
    """The corpus in the order of our Feed, one sequence an item, with the names that Hugging Face models take."""

    def __init__(self, blocks: data.Blocks, length: int, seed: int) -> None:
        self.blocks = blocks
        self.indices = data.ShardedBatches(blocks, length, seed=seed).next_indices()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        inputs, targets = self.blocks.batch(self.indices[item : item + 1])
        return {"input_ids": inputs[0], "labels": targets[0], "shift_labels": targets[0]}  # shifted already


@dataclass(frozen=True)
class Job:
    """What all loops train. args: of bench_peers.py."""

    args: argparse.Namespace
    ctx: Context
    blocks: data.Blocks
    total_steps: int
    preemption: Preemption
    folder: Path

    @property
    def global_batch(self) -> int:
        return self.args.batch_size * self.args.accumulation * self.ctx.world_size

    @property
    def dtype(self) -> torch.dtype:
        return training.compute_dtype(self.args.dtype, self.ctx.device)

    @cached_property
    def sequences(self) -> InOrder:
        return InOrder(self.blocks, self.global_batch * self.total_steps, self.args.seed)

    def model(self) -> nn.Module:
        model = training.build_model(self.args, self.ctx.device)
        model.config.use_cache = False
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return training.make_optimizer(model, self.args.lr)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: self.rate(number) / self.args.lr)

    def rate(self, number: int) -> float:
        return training.learning_rate(number, self.total_steps, self.args.lr, self.args.warmup)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.ctx.device.type, self.dtype, enabled=self.dtype != torch.float32)


def ours(job: Job, done: Done) -> None:
    """The loop of train_ddp.py, with all that it does in a step: signals, timers, schedule, losses read in the end."""
    model = job.model()
    optimizer, precision = job.optimizer(model), step.Precision.of(job.dtype, job.ctx.device)
    ddp = step.wrap(model, bucket_mib=job.args.bucket_mib)
    timer = profiling.StepTimer(job.ctx.device)
    feed = Feed(job.blocks, job.ctx, global_batch=job.global_batch, micro_batch=job.args.batch_size, seed=job.args.seed)
    pending: list[torch.Tensor] = []
    for number in range(job.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = job.rate(number)
        job.preemption.ask()
        with timer.phase("data"):
            batch = next(feed)
        with timer.phase("forward_backward"):
            loss = step.backward(ddp, batch.micro_batches, batch.tokens, job.ctx.world_size, precision)
        with timer.phase("optimizer"):
            step.update(ddp, optimizer, precision, max_norm=1.0)
        timer.end_step()
        job.preemption.answer()
        pending.append(loss)
        if len(pending) == LOG_EVERY:
            losses = torch.stack(pending)
            torch.distributed.all_reduce(losses)
            losses.tolist()
            pending = []
        done(loss * job.ctx.world_size)


def torch_ddp(job: Job, done: Done) -> None:
    """PyTorch's tutorial ("Getting Started with Distributed Data Parallel"), with accumulation and autocast."""
    on_gpu = job.ctx.device.type == "cuda"
    model = DistributedDataParallel(job.model(), device_ids=[job.ctx.device.index] if on_gpu else None)
    optimizer = job.optimizer(model)
    schedule = job.schedule(optimizer)
    sampler = DistributedSampler(job.sequences, shuffle=False)
    loss_sum = torch.zeros((), device=job.ctx.device)
    for number, batch in enumerate(DataLoader(job.sequences, job.args.batch_size, sampler=sampler, pin_memory=on_gpu)):
        last = (number + 1) % job.args.accumulation == 0
        with contextlib.nullcontext() if last else model.no_sync():
            with job.autocast():
                loss = model(**{name: x.to(job.ctx.device, non_blocking=True) for name, x in batch.items()}).loss
            (loss / job.args.accumulation).backward()
        loss_sum += loss.detach()
        if last:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done(loss_sum / job.args.accumulation)
            loss_sum.zero_()


def accelerate(job: Job, done: Done) -> None:
    """The loop of Hugging Face accelerate's guide, "Performing gradient accumulation with Accelerate"."""
    from accelerate import Accelerator

    forget_accelerate()
    accelerator = Accelerator(
        cpu=job.ctx.device.type == "cpu", gradient_accumulation_steps=job.args.accumulation,
        mixed_precision="bf16" if job.dtype == torch.bfloat16 else "no",
    )  # fmt: skip
    unwrapped = job.model()
    model, optimizer, loader = accelerator.prepare(
        unwrapped, job.optimizer(unwrapped), DataLoader(job.sequences, job.args.batch_size)
    )
    schedule = job.schedule(optimizer.optimizer)  # prepared, it would go on by a step a rank
    loss_sum = torch.zeros((), device=job.ctx.device)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            schedule.step()
            done(loss_sum / job.args.accumulation)
            loss_sum.zero_()


def trainer(job: Job, done: Done) -> None:
    """Hugging Face Trainer, which owns its loop: a callback at the end of each step gives the turn away."""
    import transformers

    class Watched(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class EndOfStep(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done(torch.stack(losses).sum())  # each is divided by the micro-batches
            losses.clear()

    forget_accelerate()
    losses: list[torch.Tensor] = []
    model = job.model()
    optimizer = job.optimizer(model)
    settings = transformers.TrainingArguments(
        output_dir=str(job.folder), per_device_train_batch_size=job.args.batch_size, max_grad_norm=1.0,
        gradient_accumulation_steps=job.args.accumulation, max_steps=job.total_steps, bf16=job.dtype == torch.bfloat16,
        use_cpu=job.ctx.device.type == "cpu", train_sampling_strategy="sequential", seed=job.args.seed,
        logging_steps=LOG_EVERY, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False,  # else it takes shift_labels away, and the model shifts the labels once more
    )  # fmt: skip
    made = Watched(
        model, settings, train_dataset=job.sequences, optimizers=(optimizer, job.schedule(optimizer)),
        callbacks=[EndOfStep()],
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    made.train()


def forget_accelerate() -> None:
    """Give the next Accelerator settings of its own, as in a process of its own.

    All that are made in a process share theirs: the Trainer's would set the accumulation of the other loop to 1.
    """
    from accelerate import state

    # It imports DeepSpeed (chapter 4's peer), whose log handler keeps the stdout of that moment; ours is for RESULT.
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")

    state.GradientState._shared_state = {}


Loop = Callable[[Job, Done], None]
AGAIN = "ours-again"  # a control: how far from 1 the ratio of two equal loops is on this machine
PEERS: dict[str, Loop] = {"torch-ddp": torch_ddp, "accelerate": accelerate, "trainer": trainer, AGAIN: ours}
ACCELERATE = ("accelerate", "trainer")  # need that package


def check(names: list[str]) -> None:
    """Raises UserError: an unknown peer, or one that is not installed."""
    if unknown := [name for name in names if name not in PEERS]:
        raise UserError(f"no peer {unknown[0]!r}; one of {', '.join(PEERS)}")
    if set(names) & set(ACCELERATE) and importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "accelerate is not installed; run make setup, or pip install accelerate, or pass --peers torch-ddp"
        )


class Stopped(BaseException):
    """Leads a loop out of its library when it has had its last turn; no handler of errors takes it for one."""


class Turns:
    """A loop in a thread of its own, which stands still but for the steps that it is given.

    So a loop that its library owns can be measured in turns with others, without being left or started anew.
    """

    def __init__(self, loop: Loop, job: Job, timeout_s: float) -> None:
        self.losses: list[torch.Tensor] = []
        self._left, self._timeout_s, self._error = 0, timeout_s, None
        self._stopping = False
        self._go, self._stand = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(loop, job), daemon=True)  # ends with the process
        self._thread.start()

    def take(self, steps: int) -> None:
        """Let the loop go on by so many steps.

        Raises:
            UserError: they took longer than the timeout.
            what the loop raised
        """
        self._left = steps
        self._go.release()
        if not self._stand.acquire(timeout=self._timeout_s):
            raise UserError(f"{steps} steps were not done in {self._timeout_s:g} s; take fewer --steps or a smaller "
                            "--preset, or look where the ranks are with py-spy dump --pid PID")  # fmt: skip
        if self._error:
            raise self._error

    def stop(self) -> None:
        """End the loop where it stands, and let go of its model."""
        self._stopping = True
        self._go.release()
        self._thread.join(self._timeout_s)

    def _run(self, loop: Loop, job: Job) -> None:
        self._go.acquire()
        try:
            if job.ctx.device.type == "cuda":
                torch.cuda.set_device(job.ctx.device)
            loop(job, self._done)
            self._error = None if self._left == 0 else RuntimeError(f"the loop ended {self._left} steps early")
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._stand.release()

    def _done(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.clone())
        self._left -= 1
        if self._left == 0:
            self._stand.release()
            self._go.acquire()
            if self._stopping:
                raise Stopped
