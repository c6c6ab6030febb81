"""The flags of the FSDP training script, and which of them a run that resumes must share with the one that saved."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch04_fsdp import offload_folder, recompute
from ch04_fsdp.sharding import OFFLOADS, STRATEGIES, Sharding
from common import data, lm, profiling
from common.dist import Context, compress
from common.script import UserError, at_least, positive


def add_sharding_flags(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("FSDP")
    group.add_argument("--strategy", choices=STRATEGIES, default="full", help="see ch04_fsdp/sharding.py")
    group.add_argument("--shard-ranks", type=at_least(1), help="hybrid: ranks that share one copy of the model "
                       "(default: those of a node)")  # fmt: skip
    group.add_argument("--recompute", default="none", help=f"activation checkpointing: {', '.join(recompute.CHOICES)}")
    group.add_argument("--offload", choices=OFFLOADS, default="none", help="where shards and optimizer state live")
    group.add_argument("--offload-dir", type=offload_folder.existing, help="--offload disk: a folder on that disk "
                       "(default: the run's); its file has no name and goes with the process")  # fmt: skip
    group.add_argument("--memory-cap-gib", type=positive, help="let each rank have so much for the model, no more; see "
                       "larger_than_memory.py")  # fmt: skip
    group.add_argument("--prefetch-layers", type=at_least(1), default=1, help="gathered ahead of the one that computes")
    group.add_argument("--sync-each", action="store_true", help="reduce the gradients after each micro-batch: more "
                       "messages, and only shards of gradients in memory")  # fmt: skip


def parse(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked against each other.

    Raises:
        UserError: one is wrong, or two contradict each other.
    """
    made = training.training_parser(doc)
    ddp_options.add_step_flags(made)
    add_sharding_flags(made)
    ddp_options.add_survival_flags(made)
    args = ddp_options.check(made.parse_args(argv))
    check_sharding(args)
    if args.offload == "disk" and args.async_save:
        raise UserError("--async-save copies into memory what --offload disk keeps out of it; leave one of them out")
    return args


def check_sharding(args: argparse.Namespace) -> None:
    """
    Raises:
        UserError: two flags contradict each other: found before anything is started.
    """
    sharding_of(args, torch.float32)
    if args.offload_dir and args.offload != "disk":
        raise UserError("--offload-dir belongs to --offload disk; pass that too, or neither")
    if args.strategy == "replicate" and args.sync_each:
        raise UserError("--sync-each belongs to a strategy with shards of gradients; take another --strategy")


def offload_dir(args: argparse.Namespace, run_folder: Path, ctx: Context) -> Path | None:
    """Where the disk tier's file of this rank goes; None without one."""
    if args.offload != "disk":
        return None
    own = Path(ctx.exchange("the run folder", str(run_folder.resolve()))[0])  # only rank 0 has made its own
    if args.offload_dir is None:
        try:
            own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {own} on this node ({error.strerror}); pass --offload-dir") from None
    return offload_folder.chosen(args.offload_dir, own)


def sharding_of(args: argparse.Namespace, dtype: torch.dtype) -> Sharding:
    return Sharding(
        args.strategy, args.shard_ranks, dtype, args.recompute, args.offload, args.prefetch_layers,
        getattr(args, "compile", False),
    )  # fmt: skip


def sharding(args: argparse.Namespace, ctx: Context) -> Sharding:
    return sharding_of(args, training.compute_dtype(args.dtype, ctx.device))


def check_batch(args: argparse.Namespace, ctx: Context) -> None:
    """
    Raises:
        UserError: the ranks would make unequal numbers of forward passes, of which each is a collective.
    """
    if args.global_batch % ctx.world_size:
        raise UserError(
            f"--global-batch {args.global_batch} does not divide by {ctx.world_size} ranks; take a multiple: under "
            "FSDP all ranks make the same number of passes"
        )


def check_memory(args: argparse.Namespace, sharding: Sharding, ctx: Context) -> None:
    """Before anything is allocated. Activations and gathered layers come on top: plan_memory.py knows them.

    Raises:
        UserError: what a rank is to hold between two steps does not fit: 16 bytes for each parameter of its shards.
    """
    if sharding.offload == "disk":
        return  # it asks the disk itself
    shards = 1 if sharding.strategy == "replicate" else ctx.world_size
    if sharding.is_hybrid:
        shards = sharding.shard_ranks or ctx.launch.local_world_size
    on_host = sharding.offload == "cpu" or ctx.device.type == "cpu"
    need = 16 * lm.parameter_count(lm.config(args.preset, args.seq_len)) // shards
    need *= ctx.launch.local_world_size if on_host else 1
    where = torch.device("cpu") if on_host else ctx.device
    what, cure = f"{args.preset} in {shards} shards", "take more ranks, another --offload or a smaller --preset"
    check_fits(need, where, ctx, what, cure)


def check_fits(need: float, where: torch.device, ctx: Context, what: str, cure: str) -> None:
    """No rank allocates before all have looked.

    Args:
        need: bytes of what this rank, or on a CPU this host's ranks, hold between two steps.

    Raises:
        UserError: so many are not free.
    """
    if need > (free := profiling.available_memory(where)):
        raise UserError(
            f"{what} takes {need / 2**30:.0f} GiB of {'this host' if where.type == 'cpu' else where} for weights, "
            f"gradients and optimizer, and {free / 2**30:.0f} GiB are free; {cure}"
        )
    ctx.barrier("memory checked")


def check_out(out: Path, ctx: Context) -> None:
    """Every rank writes its part of a checkpoint: do all see one folder? Rank 0 leaves a mark there, all look for it.

    Raises:
        UserError: on every rank, if one does not see it or rank 0 cannot write it.
    """
    mark = out / f".seen-by-all-{secrets.token_hex(8)}"  # a name that no node has looked up before, and remembers
    try:
        reason = ""
        if ctx.is_main:
            try:
                out.mkdir(parents=True, exist_ok=True)
                mark.touch()
            except OSError as error:
                reason = error.strerror or type(error).__name__
        name, reason = json.loads(ctx.exchange("mark in --out", json.dumps([mark.name, reason]))[0])
        if reason:
            raise UserError(f"rank 0 cannot write to {out} ({reason}); pass another --out")
        seen = ctx.exchange("mark seen", "yes" if os.path.exists(out / name) else "")
        if blind := [rank for rank, yes in enumerate(seen) if not yes]:
            raise UserError(
                f"rank {compress(blind)} does not see in its --out what rank 0 writes to its own, and each is to write "
                "a part of every checkpoint; give all nodes one folder that they share"
            )
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)  # rank 0's; nobody else has made one


def agree(ctx: Context, source: Path | None, settings: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the ranks have different versions of torch, flags, data or checkpoints; the line names what differs.
    """
    own = {"torch": torch.__version__, "checkpoint": source and source.name, **settings}
    said = [json.loads(text) for text in ctx.exchange("start", json.dumps(own))]
    for name in own:
        values = list(dict.fromkeys(str(other[name]) for other in said))
        if len(values) > 1:
            raise UserError(
                f"the ranks would start with different {name}: {' and '.join(values)}; give all nodes the same "
                "environment, data, flags and checkpoints (a shared folder for --out)"
            )


def of_all_ranks(args: argparse.Namespace, ctx: Context) -> dict[str, Any]:
    """Flags that decide which collectives a run makes, and when: ranks that differ in one would wait for each other."""
    own = ("run_dir", "all_ranks", "device", "threads", "data", "out", "resume", "offload_dir", "memory_cap_gib",
           "nvme_dir", "deepspeed_config")  # fmt: skip
    found = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in own}
    if getattr(args, "strategy", "").startswith("hybrid") and not args.shard_ranks:  # what it takes for them
        found["number of ranks a node"] = str(ctx.launch.local_world_size)
    return found | {"device": ctx.device.type}


def settings(args: argparse.Namespace, corpus: data.Corpus, ctx: Context) -> dict[str, Any]:
    """What decides the course of the training. Neither the number of ranks nor how the model is spread is among it."""
    names = ("preset", "steps", "seq_len", "lr", "warmup", "seed", "global_batch", "ragged", "clip", "dropout")
    dtype = str(training.compute_dtype(args.dtype, ctx.device))
    return {name: getattr(args, name) for name in names} | {"data": corpus.folder.name, "dtype": dtype}
