"""The flags of the DeepSpeed training script. How the model is spread is not among them: the config file says it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch04_fsdp import zero_peers
from ch04_fsdp.options import check_fits
from ch05_deepspeed_megatron import activation_checkpointing, ds_check, ds_config, engine, infinity, ops
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
    device = dist.pick_device(args.device, launch)
    dtype, config = training.compute_dtype(args.dtype, device), lm.config(args.preset, args.seq_len)
    args.global_batch = args.global_batch or args.batch_size * launch.world_size
    shapes = infinity.shapes_of(config)
    known = ds_config.known_by(
        ranks=launch.world_size, global_batch=args.global_batch, micro_batch=args.batch_size, clip=args.clip,
        lr=args.lr, hidden=config.hidden_size, largest=max(shape.numel() for shape in shapes),
        layers=config.num_hidden_layers, dtype=dtype,
        nvme=infinity.folder_for(args.nvme_dir, launch) if args.nvme_dir else None,
    )  # fmt: skip
    found = ds_config.prepare(args.deepspeed_config, known, launch.world_size)
    if "optimizer" not in found:
        raise UserError(f"{args.deepspeed_config} has no section optimizer; take it from configs/zero2.json")
    accelerator = zero_peers.library(device).accelerator.get_accelerator()
    if found.get("fp16", {}).get("enabled") and not accelerator.is_fp16_supported():
        raise UserError(f"DeepSpeed has no float16 on a {device.type} like this; pass --dtype bf16 or fp32")
    if "scheduler" in found:
        raise UserError(
            f"{args.deepspeed_config}: the script sets the learning rate itself, step by step; remove scheduler"
        )
    settled(args, found)
    if args.compile and engine.stage_of(found) == 3:
        raise UserError(
            "--compile and ZeRO stage 3 exclude each other: its hooks break each layer's graph; leave it out"
        )
    activation_checkpointing.check(found.get("activation_checkpointing", {}))
    if "nvme" in (engine.device_of(found, what) for what in ("optimizer", "param")):
        place = infinity.place(shapes, found, ranks=launch.world_size, dtype=engine.precision(found))
        infinity.check_pinned(place.pinned)
    ops.build(ops.needed(found), device)
    return found


def settled(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Let flags say what the file says where it does not say "auto".

    Raises:
        UserError: the file has other batches than the flags, by which data are shared out.
    """
    accumulation = args.global_batch // (args.batch_size * dist.read_launch().world_size)
    by_flags = (args.global_batch, args.batch_size, accumulation)
    for name, wanted in zip(ds_check.BATCH, by_flags, strict=True):
        if found.setdefault(name, wanted) != wanted:
            raise UserError(f'{args.deepspeed_config}: {name} is {found[name]}, by the flags {wanted}; say "auto"')
    args.clip = found.setdefault("gradient_clipping", args.clip)  # without it DeepSpeed clips at 1
    args.dtype = next(name for name, dtype in training.DTYPES.items() if dtype == engine.precision(found))


def check_memory(args: argparse.Namespace, settings: engine.Settings, ctx: dist.Context) -> None:
    """Before anything is allocated: weights, gradients, two moments and DeepSpeed's float32 copy of the weights.

    Raises:
        UserError: what a rank is to hold between two steps does not fit. Activations come on top.
    """
    stage, ranks = engine.stage_of(settings), ctx.world_size
    devices = [engine.device_of(settings, what) for what in ("optimizer", "param")]
    if "nvme" in devices:
        return
    size = engine.precision(settings).itemsize
    held = {"optimizer": (12 if stage or size == 2 else 8, 1), "gradients": (size, 2), "param": (size, 3)}  # from stage
    on_host = ctx.device.type == "cpu"
    need = sum(
        a_parameter / (ranks if stage >= shared_from else 1)
        for what, (a_parameter, shared_from) in held.items()
        if on_host or engine.device_of(settings, what) == "none"
    )
    need *= lm.parameter_count(lm.config(args.preset, args.seq_len)) * (ctx.launch.local_world_size if on_host else 1)
    cure = "take more ranks, another config or a smaller --preset"
    check_fits(need, ctx.device, ctx, f"{args.preset} in stage {stage} on {ranks} ranks", cure)


def of_a_resume(args: argparse.Namespace, corpus: Any, ctx: dist.Context, settings: engine.Settings) -> dict[str, Any]:
    """What decides the course of the training: not the number of ranks, nor the stage."""
    names = ("preset", "steps", "seq_len", "lr", "warmup", "seed", "global_batch", "ragged", "clip", "dropout")
    return {name: getattr(args, name) for name in names} | {
        "data": corpus.folder.name,
        "dtype": str(training.compute_dtype(args.dtype, ctx.device)),
        "optimizer": settings.get("optimizer"),
    }
