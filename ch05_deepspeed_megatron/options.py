"""The flags of the DeepSpeed training script. How the model is spread is not among them: the config file says it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch05_deepspeed_megatron import ds_config, engine
from common import dist, lm
from common.script import UserError

CONFIGS = Path(__file__).with_name("configs")
DEFAULT = CONFIGS / "zero2.json"


def parse(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked against each other.

    Raises:
        UserError: one is wrong, or two contradict each other.
    """
    made = training.training_parser(doc, dtypes=("fp32", "bf16", "fp16"))
    ddp_options.add_step_flags(made)
    group = made.add_argument_group("DeepSpeed")
    group.add_argument(
        "--deepspeed-config", type=Path, default=DEFAULT, help='JSON, as DeepSpeed has it; "auto" is what these flags '
        "say (default: configs/zero2.json beside this script)",
    )  # fmt: skip
    group.add_argument("--nvme-dir", type=Path, help='what an nvme_path "auto" stands for: a folder on the fast disk')
    # the deepspeed launcher passes it to each rank, which knows it from LOCAL_RANK
    group.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    ddp_options.add_survival_flags(made)
    args = ddp_options.check(made.parse_args(argv))
    if args.async_save:
        raise UserError(
            "DeepSpeed's engine saves while training waits; leave --async-save out, or take chapter 4's script"
        )
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What to initialize the engine with. Before ranks have met: each reads the same file and flags.

    Raises:
        UserError: the file, or what it says, is wrong.
    """
    launch = dist.read_launch()
    dtype = training.compute_dtype(args.dtype, dist.pick_device(args.device, launch))
    args.global_batch = args.global_batch or args.batch_size * launch.world_size
    known = ds_config.known_by(
        ranks=launch.world_size, global_batch=args.global_batch, micro_batch=args.batch_size, clip=args.clip,
        lr=args.lr, hidden=lm.config(args.preset, args.seq_len).hidden_size, dtype=dtype, nvme=args.nvme_dir,
    )  # fmt: skip
    found = ds_config.prepare(args.deepspeed_config, known, launch.world_size)
    if "scheduler" in found:
        raise UserError(
            f"{args.deepspeed_config}: the script sets the learning rate itself, step by step; remove scheduler"
        )
    if args.compile and engine.stage_of(found) == 3:
        raise UserError(
            "--compile and ZeRO stage 3 exclude each other: its hooks break each layer's graph; leave it out"
        )
    return found


def of_a_resume(args: argparse.Namespace, corpus: Any, ctx: dist.Context, settings: engine.Settings) -> dict[str, Any]:
    """What decides the course of the training: not the number of ranks, nor the stage."""
    names = ("preset", "steps", "seq_len", "lr", "warmup", "seed", "global_batch", "ragged", "clip", "dropout")
    return {name: getattr(args, name) for name in names} | {
        "data": corpus.folder.name,
        "dtype": str(training.compute_dtype(args.dtype, ctx.device)),
        "optimizer": settings.get("optimizer"),
    }


def precision(settings: engine.Settings) -> torch.dtype:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.get(name, {}).get("enabled"):
            return dtype
    return torch.float32
