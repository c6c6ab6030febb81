"""The flags of the DDP training script, and which of them a run that resumes must share with the one that saved."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ch01_intro import checkpoint, training
from ch03_ddp import hooks
from ch03_ddp.preemption import parse_signal
from common import data
from common.dist import Context
from common.script import UserError, at_least, comma_list, positive


def parse(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked against each other.

    Raises:
        UserError: one is wrong, or two contradict each other.
    """
    made = training.training_parser(doc, dtypes=("fp32", "bf16", "fp16"))
    add_step_flags(made)
    ddp = made.add_argument_group("DDP")
    ddp.add_argument("--bucket-mib", type=positive, default=25, help="gradients travel in buckets of this size")
    ddp.add_argument("--static-graph", action="store_true", help="promise that each step uses the same parameters")
    ddp.add_argument("--no-bucket-view", action="store_true", help="gradients beside the buckets, not inside them")
    ddp.add_argument("--hook", choices=list(hooks.HOOKS), default="none", help="what a bucket becomes on the wire")
    add_survival_flags(made)
    return check(made.parse_args(argv))


def add_step_flags(made: argparse.ArgumentParser) -> None:
    batch = made.add_argument_group("the step")
    batch.add_argument("--global-batch", type=at_least(1), help="sequences a step over all ranks, in micro-batches of "
                       "--batch-size (default: one micro-batch a rank)")  # fmt: skip
    batch.add_argument("--ragged", action="store_true", help="one document a row, padded, instead of packed blocks")
    batch.add_argument("--clip", type=positive, default=1.0, help="largest norm of the gradients")
    batch.add_argument("--dropout", type=probability, default=0.0, help="of the attention weights")
    batch.add_argument("--compile", action="store_true", help="torch.compile each layer")
    batch.add_argument("--prefetch", choices=("auto", "on", "off"), default="auto",
                       help="a thread makes the next step's batches; auto: on a GPU")  # fmt: skip


def add_survival_flags(made: argparse.ArgumentParser) -> None:
    survive = made.add_argument_group("checkpoints and survival")
    survive.add_argument("--val-every", type=at_least(0), default=0, help="steps between validations; 0: at the end")
    survive.add_argument("--keep", type=at_least(1), default=2, help="checkpoints to keep, beside the best")
    survive.add_argument("--async-save", action="store_true", help="write checkpoints while training goes on")
    survive.add_argument("--preempt-signals", type=comma_list(parse_signal), default="TERM,USR1",
                         help="on these save at the end of the step, and leave")  # fmt: skip
    survive.add_argument("--record-samples", action="store_true", help="note in --out which sequences each rank took")


def check(args: argparse.Namespace) -> argparse.Namespace:
    """
    Raises:
        UserError: two flags contradict each other.
    """
    if restarted() and (args.resume == "never" or (args.out and checkpoint.every(args.out / "checkpoints"))):
        args.resume = "auto"  # also where a checkpoint was named: this job has gone on from it since
    if args.record_samples and args.out is None:
        raise UserError("--record-samples needs a place for its notes; pass --out DIR")
    return args


def restarted() -> bool:
    """torchrun or Slurm has started this job again after a failure or a preemption."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def probability(text: str) -> float:
    """argparse type: 0 <= p < 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability below 1")
    return value


def settings(args: argparse.Namespace, corpus: data.Corpus, ctx: Context) -> dict[str, Any]:
    """What decides the course of the training. Neither the number of ranks nor the micro-batch is among it."""
    names = ("preset", "steps", "seq_len", "lr", "warmup", "seed", "global_batch", "ragged", "clip", "dropout", "hook")
    dtype = str(training.compute_dtype(args.dtype, ctx.device))
    return {name: getattr(args, name) for name in names} | {"data": corpus.folder.name, "dtype": dtype}
