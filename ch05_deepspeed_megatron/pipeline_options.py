"""The flags of the pipeline training script, its DeepSpeed config, and what of both is wrong before a rank builds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch04_fsdp.options import check_fits
from ch05_deepspeed_megatron import ds_config, engine, pipeline_model
from common import data, dist, lm
from common.dist import Context
from common.script import UserError, at_least

CONFIG = Path(__file__).parent / "configs/pipeline.json"


def parse(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the config in args.settings and the layers' split in args.parts.

    Raises:
        UserError: one is wrong, or two contradict each other.
    """
    made = training.training_parser(doc)
    ddp_options.add_step_flags(made)
    ddp_options.add_survival_flags(made)
    group = made.add_argument_group("pipeline")
    group.add_argument("--stages", type=at_least(1), default=2, help="ranks divided by it are data replicas")
    group.add_argument("--partition", default="parameters", help=pipeline_model.METHODS)
    group.add_argument("--recompute-layers", type=at_least(0), help="recompute the activations of so many layers at a "
                       "time; 0: keep them (default: the config's)")  # fmt: skip
    group.add_argument("--deepspeed-config", type=Path, default=CONFIG, help="JSON, as DeepSpeed has it")
    args = ddp_options.check(made.parse_args(argv))
    for flag in ("async_save", "compile"):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} is not made for a pipeline; leave it out")
    _check_ranks(args, dist.read_launch())
    _check_model(args)
    return args


def _check_ranks(args: argparse.Namespace, launch: dist.Launch) -> None:
    ranks = launch.world_size
    if ranks % args.stages:
        raise UserError(f"{args.stages} stages do not divide {ranks} ranks; start a multiple, or take other --stages")
    args.replicas = ranks // args.stages
    args.global_batch = args.global_batch or 4 * args.stages * args.batch_size * args.replicas
    if args.global_batch % (args.batch_size * args.replicas):
        raise UserError(
            f"--global-batch {args.global_batch} is no multiple of {args.batch_size} (--batch-size) x {args.replicas} "
            "data replicas; each must get as many whole micro-batches"
        )
    args.micro_batches = args.global_batch // (args.batch_size * args.replicas)


def load(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config that --deepspeed-config names, filled and checked.

    Raises:
        UserError: it is wrong, or has what a pipeline or this script cannot take.
    """
    path, replicas = args.deepspeed_config, args.replicas
    known = ds_config.known_by(
        ranks=replicas, global_batch=args.global_batch, micro_batch=args.batch_size, clip=args.clip, lr=args.lr,
        hidden=lm.config(args.preset, args.seq_len).hidden_size, dtype=dtype,
    )  # fmt: skip
    found = ds_config.prepare(path, known, replicas)
    if (stage := engine.stage_of(found)) > 1:
        raise UserError(
            f"{path} asks for ZeRO {stage}, which frees gradients or weights that a pipeline needs for its next "
            "micro-batch; take stage 0 or 1"
        )
    if found.get("fp16", {}).get("enabled"):
        raise UserError(f"{path} enables fp16; leave that out and pass --dtype bf16")
    for own in ("optimizer", "scheduler"):
        if own in found:
            raise UserError(f"{path} has a section {own!r}, which this script brings along; leave it out")
    if found.get("gradient_accumulation_steps") != args.micro_batches:
        raise UserError(f'{path}: gradient_accumulation_steps is not the {args.micro_batches} of the flags; say "auto"')
    if dtype == torch.bfloat16 and not stage:
        raise UserError("in bf16 DeepSpeed sums a pipeline's gradients in float32 with ZeRO 1 only; take that stage, "
                        "or --dtype fp32")  # fmt: skip
    return found


def _check_model(args: argparse.Namespace) -> None:
    config = lm.config(args.preset, args.seq_len)
    if config.model_type != "llama":
        raise UserError(f"{args.preset} is a {config.model_type}, the pipeline is made of Llama's layers; take a Llama")
    if args.seq_len > config.max_position_embeddings:
        longest = config.max_position_embeddings
        raise UserError(f"--seq-len {args.seq_len} is longer than the {longest} positions of {args.preset}; shorten it")
    launch = dist.read_launch()
    device = dist.pick_device(args.device, launch)
    args.settings = load(args, training.compute_dtype(args.dtype, device))
    args.parts = pipeline_model.split(config, args.stages, args.partition)
    if args.recompute_layers is None:
        args.recompute_layers = args.settings.get("pipeline", {}).get("activation_checkpoint_interval", 0)


def check_memory(args: argparse.Namespace, ctx: Context) -> None:
    """Before anything is allocated. Activations come on top.

    Raises:
        UserError: the largest stage does not fit: weights, gradients (in bf16 their float32 sums too) and moments;
            ZeRO 1 has a float32 copy of the weights, and shares it and the moments out among the replicas.
    """
    config = lm.config(args.preset, args.seq_len)
    sizes = pipeline_model.layer_parameters(config)
    largest = max(sum(sizes[a:b]) for a, b in zip(args.parts, args.parts[1:], strict=False))
    each = 8 + 12 / args.replicas if engine.stage_of(args.settings) else 16
    need = each * largest * (ctx.launch.local_world_size if ctx.device.type == "cpu" else 1)
    what, cure = f"the largest of {args.stages} stages of {args.preset}", "take more --stages or a smaller --preset"
    check_fits(need, ctx.device, ctx, what, cure)


def settings(args: argparse.Namespace, corpus: data.Corpus, ctx: Context) -> dict[str, Any]:
    """What decides the course of the training, and what its checkpoints' files are cut by."""
    names = ("preset", "steps", "seq_len", "lr", "warmup", "seed", "global_batch", "ragged", "clip", "dropout",
             "stages", "partition")  # fmt: skip
    dtype = str(training.compute_dtype(args.dtype, ctx.device))
    zero = args.settings.get("zero_optimization", {}).get("stage", 0)
    return {name: getattr(args, name) for name in names} | {
        "data": corpus.folder.name, "dtype": dtype, "zero": zero,
        "replicas": args.replicas if zero else None,  # without ZeRO any number of them resumes
    }  # fmt: skip
