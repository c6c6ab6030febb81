"""ZeRO-Offload and ZeRO-Infinity measured: the same steps with nothing, the optimizer, or everything off the device.

You learn   what each kind of offload leaves in memory, to the buffer; which knobs decide it (sub_group_size,
            buffer_count, and a size below which nothing is offloaded); what then fits on one device, and at what pace
Laptop      python ch05_deepspeed_megatron/offload_deepspeed.py
GPU node    python ch05_deepspeed_megatron/offload_deepspeed.py --preset 1b --seq-len 512 --nvme-dir /mnt/nvme
Training    torchrun ... ch05_deepspeed_megatron/train_deepspeed.py \
                --deepspeed-config ch05_deepspeed_megatron/configs/zero3_nvme.json --nvme-dir /mnt/nvme
You see     a row a config: bytes held between backward and the step, predicted and measured, and those in files; the
            same losses; under a cap on memory the rows without offload end, out of memory, and NVMe trains

On a CPU the host's memory is the device's: "cpu" offload saves nothing there, and costs a second copy of the weights.
Its row is the proof that it computes the same. On a GPU held is the device's, host what went to the other side.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp import offload_folder, short_run
from ch04_fsdp.sharding import Sharding
from ch05_deepspeed_megatron import infinity, offload_run, ops
from ch05_deepspeed_megatron.offload_run import Job
from common import dist, lm, script

MIB = 2**20
ROWS = ("zero2", "zero2_cpu_offload", "zero3", "zero3_cpu_offload", "zero3_nvme")
PLAIN, TO_CPU, TO_DISK = "zero3", "zero3_cpu_offload", "zero3_nvme"
APART = 1e-4  # of losses: DeepSpeed's optimizer on the CPU rounds in its own way
WITHIN = 0.1  # of what is saved, predicted and measured


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--preset", help=f"{', '.join(lm.PRESETS)} (default: nano, of --layers and --width)")
    made.add_argument("--layers", type=script.at_least(1), default=8)
    made.add_argument("--width", type=script.at_least(64), default=512)
    made.add_argument("--ranks", type=script.at_least(1), default=1)
    made.add_argument("--steps", type=script.at_least(2), default=4)
    made.add_argument("--seq-len", type=script.at_least(2), default=32)
    made.add_argument("--global-batch", type=script.at_least(1), default=4, help="sequences a step, over all ranks")
    made.add_argument("--configs", type=script.comma_list(str), default=list(ROWS), help=", ".join(ROWS))
    made.add_argument("--share", type=script.positive, default=0.85, help="cap: of the 16 bytes a parameter and rank")
    made.add_argument("--nvme-dir", type=offload_folder.existing, help="on the disk to use (default: the run folder)")
    made.add_argument("--timeout", type=script.positive, default=300, help="seconds that a row may take")
    args = made.parse_args(argv)
    if unknown := [name for name in args.configs if name not in ROWS]:
        raise script.UserError(f"no config {unknown[0]!r} here; of {', '.join(ROWS)}")
    if missing := {PLAIN, TO_DISK} - {*args.configs}:
        raise script.UserError(f"--configs lacks {min(missing)}, which the others are compared with; add it")
    if args.global_batch % args.ranks:
        raise script.UserError(f"--global-batch {args.global_batch} does not divide by {args.ranks} ranks; change one")
    if args.width % 64:
        raise script.UserError(f"--width {args.width} is not a multiple of 64, the size of a head; take one")
    if args.preset and not lm.is_preset(args.preset):
        raise script.UserError(f"no preset {args.preset!r}; one of {', '.join(lm.PRESETS)}")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device = dist.pick_device(args.device, dist.Launch("python"))
    run = script.start(__file__, args)
    with tempfile.TemporaryDirectory(dir=offload_folder.chosen(args.nvme_dir, run.folder)) as folder:
        shape: dict[str, Any] = (
            {"preset": args.preset} if args.preset else {"layers": args.layers, "hidden": args.width}
        )
        job = Job(
            Sharding(), ranks=args.ranks, steps=args.steps, seq_len=args.seq_len, global_batch=args.global_batch,
            seed=args.seed, device=args.device, folder=Path(folder), **shape,
        )  # fmt: skip
        jobs = {}
        for name in args.configs:
            own = Path(folder, name)
            own.mkdir()
            jobs[name] = dataclasses.replace(job, settings=name, folder=own)
        infinity.check_pinned(jobs[TO_DISK].place().pinned)
        for name in args.configs:
            ops.build(ops.needed(jobs[name].filled()), device)
        training.load_corpus(argparse.Namespace(preset=job.preset, data="stdlib", seq_len=job.seq_len))  # once, here
        result, wrong = measure(jobs, args, device)
        limited, more = under_a_cap(jobs, args, device)
    if wrong := wrong + more:
        raise script.CheckFailed("; ".join(wrong), result | limited)
    return result | limited


def measure(jobs: dict[str, Job], args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """Each row's bytes, pace and losses; and what is not as it should be."""
    print(f"a rank's weights, gradients and moments: {state_mib(jobs[PLAIN]):.0f} MiB; MiB of a rank, MiB in all files")
    print(
        f"{'':19}{'held':>6}{'formula':>9}{'host':>7}{'peak':>7}{'files':>7}{'formula':>9}{'tokens/s':>10}  last loss"
    )
    found, wrong = {}, []
    for name, job in jobs.items():
        done = short_run.run(job, args.timeout, offload_run.train)
        if done.result is None:
            raise script.UserError(f"{name}: {done.error}")
        this = found[name] = done.result
        formula = job.place() if name.startswith("zero3") else None
        held, host, peak = (this[kind] / MIB for kind in ("held_bytes", "host_bytes", "peak_bytes"))
        predicted = f"{formula.memory / MIB:9.0f}" if formula and device.type == "cpu" else f"{'':9}"
        files = f"{this['disk_bytes'] / MIB:7.0f}{formula.disk * job.ranks / MIB:9.0f}" if formula else f"{'':16}"
        pace = f"{this['tokens_per_s']:10,.0f}  {this['losses'][-1]:.5f}"
        print(f"{name:19}{held:6.0f}{predicted}{host:7.0f}{peak:7.0f}{files}{pace}", flush=True)
    losses = found[PLAIN]["losses"]
    apart = max(abs(a - b) for row in found.values() for a, b in zip(row["losses"], losses, strict=True))
    place, plain = jobs[TO_DISK].place(), jobs[PLAIN].place()
    result = {
        "ranks": args.ranks,
        "losses_apart": apart,
        "disk_mib": found[TO_DISK]["disk_bytes"] / MIB,
        "disk_predicted_mib": place.disk * args.ranks / MIB,
        "pinned_mib": place.pinned / MIB,
        "nvme_saved_mib": (found[PLAIN]["held_bytes"] - found[TO_DISK]["held_bytes"]) / MIB,
        **{f"{name}_tokens_per_s": row["tokens_per_s"] for name, row in found.items()},
        **{f"{name}_held_mib": row["held_bytes"] / MIB for name, row in found.items()},
    }
    if apart > APART:
        wrong.append(f"the losses are {apart:.1e} apart")
    if found[TO_DISK]["disk_bytes"] != place.disk * args.ranks:
        wrong.append(f"{result['disk_mib']:.1f} MiB are in files, the formula says {result['disk_predicted_mib']:.1f}")
    if device.type == "cpu":
        result["nvme_saved_predicted_mib"] = (plain.memory - place.memory) / MIB
        if abs(result["nvme_saved_mib"] / result["nvme_saved_predicted_mib"] - 1) > WITHIN:
            wrong.append(
                f"NVMe saves {result['nvme_saved_mib']:.0f} MiB, the formula says "
                f"{result['nvme_saved_predicted_mib']:.0f}"
            )
        print("cpu offload saves nothing here: on CPU ranks the host's memory is the device's")
    return result, wrong


def under_a_cap(
    jobs: dict[str, Job], args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], list[str]]:
    """Which rows train on a device of that size."""
    cap = int(args.share * state_mib(jobs[PLAIN]) * MIB)
    print(f"\nwith at most {cap / MIB:.0f} MiB of memory a rank")
    result: dict[str, Any] = {"cap_mib": cap / MIB}
    wrong = []
    for name in (PLAIN, TO_CPU, TO_DISK):
        if name not in jobs:
            continue
        done = short_run.run(dataclasses.replace(jobs[name], cap_bytes=cap), args.timeout, offload_run.train)
        said = "trains" if done.result else "out of memory" if done.out_of_memory else f"failed: {done.error}"
        print(f"{name:19}{said}", flush=True)
        result[f"{name}_under_cap"] = said
        off_device = name == TO_DISK or (name == TO_CPU and device.type == "cuda")
        if said != ("trains" if off_device else "out of memory"):
            wrong.append(f"under the cap {name}: {said}")
    return result, wrong


def state_mib(job: Job) -> float:
    return job.state_bytes / job.ranks / MIB


if __name__ == "__main__":
    script.run(main)
