"""A model larger than one device's memory: every rank has a real cap, under which only sharding or a disk trains it.

You learn   what it takes to train a model that does not fit: DDP needs all of it on each rank, FSDP on N ranks one N-th
            and a layer, a disk behind one rank a layer
Laptop      python ch04_fsdp/larger_than_memory.py
GPU node    python ch04_fsdp/larger_than_memory.py --preset 1b --seq-len 128 --offload-dir /mnt/nvme
Cluster     the cap by itself: srun python ch04_fsdp/train_fsdp.py --preset 8b --memory-cap-gib 40 [--offload disk]
You see     DDP and one rank alone end with one line, out of memory, and exit code 2; FSDP on two ranks and four, and
            one rank with its shards on disk train, all to the same losses

The cap is --share of what the model's float32 weights, gradients and Adam moments take, 16 bytes a parameter. On a GPU
it is the share of the device that the allocator may take; on a CPU a limit on the process's private memory, over what
Python and torch take before the model is there. See memory_cap.py.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import offload_folder, short_run
from ch04_fsdp.sharding import Sharding
from ch04_fsdp.short_run import Done, Job
from common import dist, lm, script
from common.logs import get_logger

log = get_logger()
MIB = 2**20
CASES = (  # name in the table and in RESULT, ranks, strategy, offload, whether it must train
    ("one rank", 1, "replicate", "none", False),
    ("ddp, 2 ranks", 2, "replicate", "none", False),
    ("fsdp, 2 ranks", 2, "full", "none", True),
    ("fsdp, 4 ranks", 4, "full", "none", True),
    ("one rank, disk", 1, "full", "disk", True),
)
TOLERANCE = 2e-3  # between losses: the ranks' sums are taken in another order


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--preset", help=f"{', '.join(lm.PRESETS)} (default: nano, of 8 layers and width 512)")
    made.add_argument("--share", type=script.positive, default=0.75, help="of the model's state that a rank may hold")
    made.add_argument("--steps", type=script.at_least(2), default=4)
    made.add_argument("--seq-len", type=script.at_least(2), default=32)
    made.add_argument("--global-batch", type=script.at_least(4), default=4, help="sequences a step; divisible by 4")
    made.add_argument(
        "--offload-dir",
        type=offload_folder.existing,
        help="folder on the disk to offload to (default: the run folder)",
    )
    made.add_argument("--timeout", type=script.positive, default=120, help="seconds that a case may take")
    args = made.parse_args(argv)
    if args.global_batch % 4:
        raise script.UserError(f"--global-batch {args.global_batch} does not divide by 4 ranks; take a multiple of 4")
    if args.preset and not lm.is_preset(args.preset):
        raise script.UserError(f"no preset {args.preset!r}; one of {', '.join(lm.PRESETS)}")
    return args


def job_of(args: argparse.Namespace, folder: Path) -> Job:
    shape: dict[str, Any] = {"preset": args.preset} if args.preset else {"layers": 8, "hidden": 512}
    job = Job(
        Sharding(), steps=args.steps, seq_len=args.seq_len, global_batch=args.global_batch, seed=args.seed,
        device=args.device, folder=folder, **shape,
    )  # fmt: skip
    return dataclasses.replace(job, cap_bytes=int(args.share * job.state_bytes))


def outcome(done: Done) -> str:
    return "trains" if done.result else "out of memory" if done.out_of_memory else "failed"


def row(name: str, done: Done) -> str:
    if not done.result:
        why = done.error.split(". ")[0][:110]
        return f"{name:<16}{outcome(done):<15}{'':>8}{'':>9}  exit codes {done.exit_codes}: {why}"
    losses = done.result["losses"]
    return (
        f"{name:<16}{outcome(done):<15}{done.result['peak_bytes'] / MIB:>8.0f}{done.result['tokens_per_s']:>9.0f}  "
        f"{losses[0]:.4f} ... {losses[-1]:.4f}"
    )


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    dist.pick_device(args.device, dist.Launch("python"))  # --device cuda without one
    run = script.start(__file__, args)
    folder = offload_folder.chosen(args.offload_dir, run.folder)
    job = job_of(args, folder)
    training.load_corpus(argparse.Namespace(preset=job.preset, data="stdlib", seq_len=job.seq_len))  # once, here
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    print(f"the model's state {job.state_bytes / MIB:.0f} MiB, the cap of each rank {job.cap_bytes / MIB:.0f} MiB")
    print(f"{'':<16}{'':<15}{'peak MiB':>8}{'tokens/s':>9}  losses")
    result: dict[str, Any] = {"state_gib": job.state_bytes / 2**30, "cap_gib": job.cap_bytes / 2**30}
    first_losses: list[float] | None = None
    wrong = []
    for name, ranks, strategy, offload, trains in CASES:
        key = name.replace(", ", "_").replace(" ", "_")
        if 0 < gpus < ranks:
            print(f"{name:<16}skipped: needs {ranks} GPUs")
            result[key] = "skipped"
            continue
        this = dataclasses.replace(job, sharding=Sharding(strategy, offload=offload), ranks=ranks)
        done = short_run.run(this, args.timeout)
        print(row(name, done), flush=True)
        result[key] = outcome(done)
        result[f"{key}_exit_codes"] = done.exit_codes
        if result[key] != ("trains" if trains else "out of memory"):
            wrong.append(f"{name}: {done.error or result[key]}")
        if done.error:
            result[f"{key}_error"] = done.error
        if done.result:
            losses = done.result["losses"]
            first_losses = first_losses or losses
            apart = max(abs(a - b) for a, b in zip(first_losses, losses, strict=True))
            result["losses_apart"] = max(apart, result.get("losses_apart", 0.0))
            result[f"{key}_peak_gib"] = done.result["peak_bytes"] / 2**30
            result[f"{key}_loss_last"] = losses[-1]
            if done.result["peak_bytes"] > job.cap_bytes:
                wrong.append(f"{name}: its peak is above the cap")
    if result.get("losses_apart", 0.0) > TOLERANCE:
        wrong.append(f"the losses are {result['losses_apart']:.1e} apart")
    result["as_expected"] = not wrong
    if wrong:
        raise script.CheckFailed("; ".join(wrong), result)
    return result


if __name__ == "__main__":
    script.run(main)
