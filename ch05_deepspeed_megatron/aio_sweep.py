"""DeepSpeed's aio settings swept against the disk's own speed: block size, queue depth, threads, and how requests go.

You learn   what each key of the section "aio" does, which of them matter on your disk, and how near the best comes to
            what the disk gives; that no setting helps where offload's own buffers are too few
Laptop      python ch05_deepspeed_megatron/aio_sweep.py
GPU node    python ch05_deepspeed_megatron/aio_sweep.py --nvme-dir /mnt/nvme --mib 1024 --rounds 5
Cluster     srun -N1 python ch05_deepspeed_megatron/aio_sweep.py --nvme-dir $SCRATCH: each kind of node has its own best
You see     GiB/s read and written by each setting beside a plain O_DIRECT loop's on the same file, medians of turns
            taken in an order drawn anew; the best as an "aio" section, written into a copy of zero3_nvme.json; a plot

    block_size            bytes of one request. Small ones cost system calls, large ones leave fewer in flight; nothing
                          smaller than a block is offloaded at all, so a large one keeps small models in memory
    queue_depth           requests that the kernel has at a time: an NVMe disk works on many at once
    intra_op_parallelism  threads, each with its own part of a tensor and its own queue
    single_submit         one system call a request, instead of one for a queue of them
    overlap_events        take in what is done while the rest is still under way, instead of waiting for a whole queue

DeepSpeed opens with O_DIRECT: past the page cache, which would keep a second copy of what is meant to leave memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ch04_fsdp import offload_folder
from ch05_deepspeed_megatron import ds_config, infinity, ops, options
from common import dist, script

KIB, MIB, GIB = 2**10, 2**20, 2**30
CHUNK = 8 * MIB  # of the plain loop: large enough for a disk to work on all of its channels
Setting = dict[str, Any]


class Plain:
    """One thread that reads or writes with O_DIRECT, a chunk at a time: what the disk gives without any finesse."""

    def __init__(self, size: int) -> None:
        self.buffer = mmap.mmap(-1, size)  # page-aligned, as O_DIRECT wants it

    def read(self, path: Path) -> None:
        self._each(path, os.O_RDONLY, os.preadv)

    def write(self, path: Path) -> None:
        self._each(path, os.O_WRONLY | os.O_CREAT, os.pwritev)

    def _each(self, path: Path, flags: int, call: Any) -> None:
        file = os.open(path, flags | os.O_DIRECT)
        try:
            whole = memoryview(self.buffer)
            for at in range(0, len(whole), CHUNK):
                assert call(file, [whole[at : at + CHUNK]], at) == len(whole[at : at + CHUNK])
        finally:
            os.close(file)


class Aio:
    """DeepSpeed's handle, as its swappers call it."""

    def __init__(self, setting: Setting, size: int) -> None:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        self.handle = AsyncIOBuilder().load(verbose=False).aio_handle(**setting)
        self.buffer = self.handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8))

    def read(self, path: Path) -> None:
        assert self.handle.async_pread(self.buffer, str(path), 0) == 0
        assert self.handle.wait() == 1

    def write(self, path: Path) -> None:
        assert self.handle.async_pwrite(self.buffer, str(path), 0) == 0
        assert self.handle.wait() == 1

    def close(self) -> None:
        self.handle.free_cpu_locked_tensor(self.buffer)


def rates(settings: Sequence[Setting], path: Path, size: int, rounds: int, seed: int) -> list[dict[str, float]]:
    """Median bytes a second of each setting, in order; the last one is the plain loop's."""
    taken: list[dict[str, list[float]]] = [{"read": [], "write": []} for _ in range(len(settings) + 1)]
    order, plain = random.Random(seed), Plain(size)
    for _ in range(rounds):
        for number in order.sample(range(len(taken)), len(taken)):
            one: Any = plain if number == len(settings) else Aio(settings[number], size)
            for what in ("write", "read"):
                begin = time.perf_counter()
                getattr(one, what)(path)
                taken[number][what].append(time.perf_counter() - begin)
            if number < len(settings):
                one.close()
    return [{what: size / statistics.median(seconds) for what, seconds in times.items()} for times in taken]


def both(rate: dict[str, float]) -> float:
    """Bytes a second of a step that reads and writes as much."""
    return 2 / (1 / rate["read"] + 1 / rate["write"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--nvme-dir", type=offload_folder.existing, help="on the disk to use (default: the run folder)")
    parser.add_argument("--mib", type=script.at_least(8), default=64, help="of the file; a multiple of 8")
    parser.add_argument("--block-kib", type=script.comma_list(script.at_least(4)), default=[128, 1024, 8192])
    parser.add_argument("--queue-depth", type=script.comma_list(script.at_least(1)), default=[1, 8, 32])
    parser.add_argument("--threads", type=script.comma_list(script.at_least(1)), default=[1, 2])
    parser.add_argument("--rounds", type=script.at_least(1), default=3)
    args = parser.parse_args(argv)
    if args.mib % 8:
        raise script.UserError(f"--mib {args.mib} is no multiple of 8; take one")
    if wrong := [threads for threads in args.threads if args.mib * MIB % threads]:
        raise script.UserError(f"--mib {args.mib} does not divide among {wrong[0]} threads; change one")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    folder, size = offload_folder.chosen(args.nvme_dir, run.folder), args.mib * MIB
    infinity.check_direct(folder)
    infinity.check_pinned(size)
    ops.build([ops.AIO], dist.pick_device(args.device, dist.Launch("python")))
    path = folder / f"aio-sweep-{os.getpid()}"
    try:
        grid: list[Setting] = [
            {"block_size": block * KIB, "queue_depth": depth, "intra_op_parallelism": threads, "single_submit": False,
             "overlap_events": True}
            for block, depth, threads in itertools.product(args.block_kib, args.queue_depth, args.threads)
        ]  # fmt: skip
        first = rates(grid, path, size, args.rounds, args.seed)
        best = max(range(len(grid)), key=lambda number: both(first[number]))
        ways = [
            grid[best] | {"single_submit": single, "overlap_events": overlap}
            for single, overlap in itertools.product((False, True), (True, False))
        ]
        second = rates(ways, path, size, args.rounds, args.seed)
    finally:
        path.unlink(missing_ok=True)
    show(grid, first)
    print("\nthe best of them, submitted in other ways")
    show(ways, second)
    chosen = max(range(len(ways)), key=lambda number: both(second[number]))
    section = ways[chosen]
    config = ds_config.read(options.CONFIGS / "zero3_nvme.json") | {"aio": section}
    with script.atomic_write(run.path("zero3_nvme.json")) as file:
        json.dump(config, file, indent=2)
    print(f'\n"aio": {json.dumps(section)}\nin {run.path("zero3_nvme.json")}')
    plot(grid, first, run.path("aio.png"))
    default = {"block_size": MIB, "queue_depth": 8, "intra_op_parallelism": 1}
    usual = next((n for n, one in enumerate(grid) if default.items() <= one.items()), None)
    plain, winner = second[-1], second[chosen]
    return {
        **{f"best_{key}": value for key, value in section.items()},
        **{f"plain_{what}_gib_per_s": plain[what] / GIB for what in plain},
        **{f"best_{what}_gib_per_s": winner[what] / GIB for what in winner},
        "best_over_plain": both(winner) / both(plain),
        "best_over_default": both(first[best]) / both(first[usual]) if usual is not None else None,
        "settings": len(grid) + len(ways),
        "file_system": offload_folder.kind(folder),
    }


def show(settings: Sequence[Setting], measured: Sequence[dict[str, float]]) -> None:
    print(f"{'block KiB':>9}{'depth':>7}{'threads':>9}  single  overlap{'read GiB/s':>12}{'write GiB/s':>13}")
    for one, rate in zip(settings, measured[:-1], strict=True):
        flags = "  ".join(f"{'yes' if one[key] else 'no':>6}" for key in ("single_submit", "overlap_events"))
        print(f"{one['block_size'] // KIB:9}{one['queue_depth']:7}{one['intra_op_parallelism']:9}  {flags} "
              f"{rate['read'] / GIB:12.2f}{rate['write'] / GIB:13.2f}")  # fmt: skip
    print(f"{'plain O_DIRECT loop':43}{measured[-1]['read'] / GIB:12.2f}{measured[-1]['write'] / GIB:13.2f}")


def plot(settings: Sequence[Setting], measured: Sequence[dict[str, float]], path: Path) -> None:
    """Read and written GiB/s over the queue depth, a line for each block size and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    keys = list(dict.fromkeys((one["block_size"], one["intra_op_parallelism"]) for one in settings))
    blocks = sorted({block for block, _ in keys})
    for axes, what in zip(panels, ("read", "write"), strict=True):
        for block, threads in keys:
            line = sorted(
                (one["queue_depth"], rate[what] / GIB)
                for one, rate in zip(settings, measured[:-1], strict=True)
                if (one["block_size"], one["intra_op_parallelism"]) == (block, threads)
            )
            axes.plot(
                *zip(*line, strict=True), marker="o", color=f"C{blocks.index(block)}", alpha=1 if threads == 1 else 0.5,
                linestyle="-" if threads == 1 else "--", label=f"{block // KIB} KiB, {threads} thread(s)",
            )  # fmt: skip
        axes.axhline(measured[-1][what] / GIB, color="black", linewidth=1, label="plain O_DIRECT loop")
        axes.set(title=what, xlabel="queue_depth", xscale="log", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GiB/s")
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    script.run(main)
