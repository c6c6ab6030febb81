"""Offload, configured and measured: the same steps with shards on the device, in host memory, and in a file on a disk.

You learn   what each place costs and saves, how much has to move in a step, and how fast your disk would have to be
Laptop      python ch04_fsdp/offload.py
GPU node    python ch04_fsdp/offload.py --preset 1b --seq-len 512 --offload-dir /mnt/nvme
Training    torchrun ... ch04_fsdp/train_fsdp.py --offload cpu, or --offload disk --offload-dir /mnt/nvme
You see     the same loss in every row, on a CPU also the same hash of the weights; less memory in each; the disk's own
            speed next to what paging reached, from the page cache and with every page read from the disk

On a CPU the first two rows are one: the host's memory is the device's. FSDP's CPUOffloadPolicy keeps shards, gradients
and optimizer state on the host, and the optimizer runs there; the disk tier is the same policy over a mapped file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ch01_intro import training
from ch04_fsdp import offload_folder, short_run
from ch04_fsdp.sharding import Sharding
from ch04_fsdp.short_run import Job
from common import dist, lm, script

MIB = 2**20
TOLERANCE = 2e-3  # between losses on a GPU
ROWS = (  # name, offload, whether the page cache may keep what has been used
    ("none", "none", True),
    ("cpu", "cpu", True),
    ("disk", "disk", True),
    ("disk, uncached", "disk", False),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--preset", help=f"{', '.join(lm.PRESETS)} (default: nano, of 6 layers and width 512)")
    made.add_argument("--ranks", type=script.at_least(1), default=1)
    made.add_argument("--steps", type=script.at_least(3), default=5)
    made.add_argument("--seq-len", type=script.at_least(2), default=64)
    made.add_argument("--global-batch", type=script.at_least(1), default=4, help="sequences a step, over all ranks")
    made.add_argument("--recompute", default="none", help="activation checkpointing, see recompute.py")
    made.add_argument(
        "--offload-dir",
        type=offload_folder.existing,
        help="folder on the disk to offload to (default: the run folder)",
    )
    made.add_argument("--timeout", type=script.positive, default=300, help="seconds that a row may take")
    args = made.parse_args(argv)
    if args.global_batch % args.ranks:
        raise script.UserError(f"--global-batch {args.global_batch} does not divide by {args.ranks} ranks; change one")
    if args.preset and not lm.is_preset(args.preset):
        raise script.UserError(f"no preset {args.preset!r}; one of {', '.join(lm.PRESETS)}")
    return args


def disk_rates(folder: Path, size: int = 256 * MIB, chunk: int = 8 * MIB) -> tuple[float, float]:
    """Bytes a second of the disk itself, read and written in sequence: to the disk and from it, not the page cache."""
    data = os.urandom(chunk)  # no file system can make less of it
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(size // chunk):
            file.write(data)
        os.fdatasync(file.fileno())
        written_s = time.perf_counter() - begin
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        while file.read(chunk):
            pass
        return size / (time.perf_counter() - begin), size / written_s


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    on_gpu = dist.pick_device(args.device, dist.Launch("python")).type == "cuda"
    run = script.start(__file__, args)
    folder = offload_folder.chosen(args.offload_dir, run.folder)
    job = Job(
        Sharding(), ranks=args.ranks, steps=args.steps, seq_len=args.seq_len, global_batch=args.global_batch,
        seed=args.seed, device=args.device, folder=folder,
        **({"preset": args.preset} if args.preset else {"layers": 6, "hidden": 512}),
    )  # fmt: skip
    training.load_corpus(argparse.Namespace(preset=job.preset, data="stdlib", seq_len=job.seq_len))  # once, here
    share = job.state_bytes / args.ranks
    print(f"weights, gradients and Adam's moments of a rank {share / MIB:.0f} MiB; MiB a step over all ranks")
    print("offload         peak MiB   host tokens/s  step ms  paged in   out  disk read  written  last loss  weights")
    result: dict[str, Any] = {"state_gib": share / 2**30, "ranks": args.ranks}
    found: dict[str, dict[str, Any]] = {}
    for name, offload, cached in ROWS:
        sharding = Sharding("full", recompute=args.recompute, offload=offload)
        done = short_run.run(dataclasses.replace(job, sharding=sharding, cached=cached), args.timeout)
        if done.result is None:
            raise script.UserError(f"{name}: {done.error}")
        this = found[name] = done.result
        moved = {key: value / MIB for key, value in this.items() if key.endswith("bytes")}
        print(
            f"{name:<16}{moved['peak_bytes']:>8.0f}{moved['host_peak_bytes']:>7.0f}{this['tokens_per_s']:>9.0f}"
            f"{this['step_s'] * 1e3:>9.0f}{moved['paged_in_bytes']:>10.0f}{moved['paged_out_bytes']:>6.0f}"
            f"{moved['disk_read_bytes']:>11.0f}{moved['disk_written_bytes']:>9.0f}{this['losses'][-1]:>11.4f}"
            f"  {this['weights_sha256'][:8]}",
            flush=True,
        )
        key = name.replace(", ", "_")
        result[f"{key}_peak_gib"] = this["host_peak_bytes" if offload != "none" else "peak_bytes"] / 2**30
        result[f"{key}_tokens_per_s"] = this["tokens_per_s"]
        result[f"{key}_loss_last"] = this["losses"][-1]
    reads, writes = disk_rates(folder)
    reached = {
        name: (found[name]["paged_in_bytes"] + found[name]["paged_out_bytes"]) / found[name]["step_s"]
        for name in ("disk", "disk, uncached")
    }
    uncached, first = found["disk, uncached"], found["none"]["losses"]
    alone_s = uncached["disk_read_bytes"] / reads + uncached["disk_written_bytes"] / writes
    print(
        f"the disk ({offload_folder.kind(folder)}) reads {reads / MIB:,.0f} MiB/s and writes {writes / MIB:,.0f} MiB/s "
        f"in sequence; the tier paged {reached['disk'] / MIB:,.0f} MiB/s from the page cache,\n"
        f"{reached['disk, uncached'] / MIB:,.0f} MiB/s past it: {uncached['step_s'] * 1e3:,.0f} ms a step, of which "
        f"the disk at its own speed needs {alone_s * 1e3:,.0f}"
    )
    result |= {
        "disk_read_mib_per_s": reads / MIB, "disk_write_mib_per_s": writes / MIB,
        "paged_mib_per_s": reached["disk"] / MIB, "paged_uncached_mib_per_s": reached["disk, uncached"] / MIB,
        "paged_in_gib_per_step": found["disk"]["paged_in_bytes"] / 2**30,
        "paged_out_gib_per_step": found["disk"]["paged_out_bytes"] / 2**30,
        "disk_read_uncached_gib_per_step": uncached["disk_read_bytes"] / 2**30,
        "file_gib": found["disk"]["file_bytes"] / 2**30,
        "weights_equal": len({row["weights_sha256"] for row in found.values()}) == 1,
        "losses_equal": len({tuple(row["losses"]) for row in found.values()}) == 1,
        "losses_apart": max(abs(a - b) for row in found.values() for a, b in zip(row["losses"], first, strict=True)),
    }  # fmt: skip
    equal = result["weights_equal"] and result["losses_equal"]
    if on_gpu:  # with shards on the device its own optimizer steps, else the host's: they round each in their way
        equal = result["losses_apart"] <= TOLERANCE
    if not equal:
        raise script.CheckFailed("offloading has changed the training", result)
    return result


if __name__ == "__main__":
    script.run(main)
