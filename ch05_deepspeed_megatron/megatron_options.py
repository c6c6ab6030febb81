"""The flags of the Megatron training script, checked before any rank builds anything."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch04_fsdp import options as fsdp_options
from ch05_deepspeed_megatron.megatron_layout import Layout, add_layout_flags, checked
from common import lm
from common.dist import Context, read_launch
from common.script import UserError, at_least


def parse(doc: str | None, argv: list[str] | None) -> tuple[argparse.Namespace, Layout, Any]:
    """The flags, the layout, and the transformers config of the model; all fit each other and the number of ranks.

    Raises:
        UserError: one is wrong, or two contradict each other.
    """
    made = training.training_parser(doc)
    ddp_options.add_step_flags(made)
    add_layout_flags(made)
    mega = made.add_argument_group("Megatron-Core")
    mega.add_argument("--micro-batches", type=at_least(1), help="of --batch-size sequences, a step and replica; sets "
                      "--global-batch (default: as many as stages)")  # fmt: skip
    mega.add_argument("--optimizer-states", choices=("sharded", "whole"), default="sharded", help="sharded: Megatron's "
                      "distributed optimizer, each data-parallel rank has its share")  # fmt: skip
    mega.add_argument("--overlap", action="store_true", help="reduce gradients while backward still runs")
    ddp_options.add_survival_flags(made)
    args = ddp_options.check(made.parse_args(argv))
    layout = Layout(args.tp, args.pp, args.sequence_parallel)
    ranks = read_launch().world_size
    config = checked(args.preset, layout, ranks, args.seq_len)
    if args.compile:
        raise UserError("--compile is not for Megatron-Core's layers, whose fused kernels are its own; leave it out")
    if args.async_save:
        raise UserError("--async-save is not offered here: a save takes part in the step; leave it out")
    if args.micro_batches and args.global_batch:
        raise UserError("--micro-batches and --global-batch say the same; pass one of them")
    dp = layout.dp(ranks)
    args.global_batch = args.global_batch or args.batch_size * (args.micro_batches or layout.pp) * dp
    if args.global_batch < dp:
        raise UserError(f"--global-batch {args.global_batch} leaves some of {dp} replicas without any; raise it")
    return args, layout, config


def check_memory(args: argparse.Namespace, config: Any, layout: Layout, ctx: Context) -> None:
    """Before anything is allocated. Activations come on top.

    Raises:
        UserError: what a rank holds between two steps does not fit: weights, float32 gradients, optimizer's state.
    """
    replicas = layout.dp(ctx.world_size) if args.optimizer_states == "sharded" else 1
    need = states(training.compute_dtype(args.dtype, ctx.device), replicas) * lm.parameter_count(config)
    need *= (ctx.launch.local_world_size if ctx.device.type == "cpu" else 1) / (layout.tp * layout.pp)
    what = f"{args.preset} over --tp {layout.tp} x --pp {layout.pp}"
    fsdp_options.check_fits(need, ctx.device, ctx, what, "take more ranks a model or a smaller --preset")


def states(dtype: torch.dtype, replicas: int) -> float:
    """Bytes a parameter of a rank's part: itself, a float32 gradient, two moments and, under bf16, a float32 copy, the
    last two shared out among the replicas."""
    return dtype.itemsize + 4 + (8 if dtype == torch.float32 else 12) / replicas
