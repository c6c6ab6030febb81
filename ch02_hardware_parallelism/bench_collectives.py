"""The network as a program sees it: time and bandwidth of every collective by size, in the terms of nccl-tests.

You learn   algorithm and bus bandwidth; where latency ends and bandwidth begins; alpha and beta of your own network
Laptop      torchrun --standalone --nproc-per-node=2 ch02_hardware_parallelism/bench_collectives.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch02_hardware_parallelism/bench_collectives.py --max-bytes 4GiB
Cluster     srun python ch02_hardware_parallelism/bench_collectives.py --max-bytes 4GiB        (one task a GPU)
You see     a table as of nccl-tests with every result verified, then the fit time = alpha + size / bandwidth and how
            far each size is off it. Small messages cost alpha, large ones reach the bandwidth.

Size is that of a rank's largest buffer, bandwidths are GB/s of 10^9 bytes, as in nccl-tests (doc/PERFORMANCE.md there).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td

from ch01_intro.collectives import slowest_us
from ch02_hardware_parallelism.alpha_beta import AlphaBeta, bus_factor, fit
from ch02_hardware_parallelism.checked_collectives import (
    COLLECTIVES,
    buffers,
    check_memory,
    count_wrong,
    expected,
    modulus,
    pattern,
    put,
)
from common import dist, script
from common.logs import Progress

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GLOO_NOTES = (
    "# gloo: through the CPUs and TCP. It says nothing about a GPU network.",
    "# gloo's reduce_scatter is an all_reduce underneath, which sends twice as much as the bus bandwidth counts:",
    "# that figure is not the bandwidth of the network.",
)


@dataclass(frozen=True)
class Row:
    """One collective at one size. Times are of the slowest rank, in microseconds; wrong counts numbers, over all ranks.

    fit_error_percent: how far the fitted line is above (+) or below (-) the median.
    """

    collective: str
    size_bytes: int
    count: int
    repeats: int
    time_us: float
    p25_us: float
    p75_us: float
    min_us: float
    algbw_gb_per_s: float
    busbw_gb_per_s: float
    wrong: int
    fit_error_percent: float | None = None


def measure(name: str, size: int, dtype: torch.dtype, budget_s: float, ctx: dist.Context) -> Row:
    """Warm up, time the collective for about `budget_s` seconds, then check what one call on fresh data gives."""
    ranks, count = ctx.world_size, size // dtype.itemsize
    send, receive = buffers(name, count, dtype, ctx)
    once = functools.partial(COLLECTIVES[name], send, receive, ctx)
    calls = 20 if ctx.device.type == "cuda" and size <= 2**20 else 1  # back to back, as nccl-tests does
    first = min(slowest_us(once, ctx.device, 2, calls)) * calls / 1e6
    repeats = max(5, min(200, int(budget_s / first)))  # the same on all ranks, since `first` is
    times = slowest_us(once, ctx.device, repeats, calls)

    receive.fill_(-1)
    put(send, pattern(ctx.rank, modulus(name, dtype, ranks)))
    once()
    wrong = torch.tensor([count_wrong(receive, expected(name, ctx.rank, ranks, count // ranks, dtype))])
    td.all_reduce(wrong)
    p25, median, p75 = np.percentile(times, [25, 50, 75]).tolist()
    algbw = size / median / 1e3  # bytes a microsecond = MB/s
    busbw = algbw * bus_factor(name, ranks)
    return Row(name, size, count, repeats, median, p25, p75, min(times), algbw, busbw, int(wrong))


def with_fit(rows: list[Row]) -> tuple[list[Row], AlphaBeta | None]:
    """The rows of one collective, each with its distance from the line through all; no line through one size."""
    if len(rows) < 2:
        return rows, None
    line = fit([row.size_bytes for row in rows], [row.time_us / 1e6 for row in rows])
    errors = [100 * (line.time_s(row.size_bytes) * 1e6 / row.time_us - 1) for row in rows]
    return [dataclasses.replace(r, fit_error_percent=e) for r, e in zip(rows, errors, strict=True)], line


def parse_size(text: str) -> int:
    """argparse type: bytes from 4096, 4K, 4KiB, 1.5GiB. Units are powers of 1024, as in nccl-tests."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0 such as 64KiB, 16MiB or 1GiB")
    return size


def collective(text: str) -> str:
    """argparse type."""
    if text not in COLLECTIVES:
        raise argparse.ArgumentTypeError(f"no collective {text!r}; there are {', '.join(COLLECTIVES)}")
    return text


def sweep(smallest: int, largest: int, factor: int, step: int) -> list[int]:
    """Sizes in bytes from smallest to largest, each `factor` times the last, rounded up to multiples of `step`."""
    sizes = []
    while smallest <= largest:
        sizes.append(-(-smallest // step) * step)
        smallest *= factor
    return sorted(set(sizes))


def check(args: argparse.Namespace, launch: dist.Launch) -> None:
    """Raises UserError for what cannot be measured: one rank, no sizes, sizes that do not fit, sums that round."""
    if launch.world_size < 2:
        raise script.UserError("one rank has nobody to talk to; start it with torchrun --nproc-per-node=2, or more")
    if args.min_bytes > args.max_bytes:
        raise script.UserError(
            f"--min-bytes {args.min_bytes} is above --max-bytes {args.max_bytes}; give --min-bytes the smaller one"
        )
    if modulus("all_reduce", DTYPES[args.dtype], launch.world_size) < 2:
        raise script.UserError(f"sums of {launch.world_size} ranks are not exact in {args.dtype}; take --dtype float32")
    if args.json and launch.rank == 0 and (args.json.is_dir() or not os.access(args.json.resolve().parent, os.W_OK)):
        raise script.UserError(f"cannot write {args.json}; pass another --json, in a folder that is there")
    check_memory("--max-bytes", 3 * args.max_bytes, args.device, launch)  # sent, received, and the backend's copies


def show(rows: list[Row], line: AlphaBeta | None, head: str) -> None:
    print(f"#\n# {rows[0].collective}: {head}")
    print("#        size       count       time        p25        p75        min   algbw   busbw  #wrong   fit is off")
    print("#         (B)  (elements)       (us)       (us)       (us)       (us)  (GB/s)  (GB/s)")
    for r in rows:
        times = "".join(f"{t:11.1f}" for t in (r.time_us, r.p25_us, r.p75_us, r.min_us))
        off = "" if r.fit_error_percent is None else f"{r.fit_error_percent:+12.0f}%"
        print(f"{r.size_bytes:13}{r.count:12}{times}{r.algbw_gb_per_s:8.3f}{r.busbw_gb_per_s:8.3f}{r.wrong:8}{off}")
    if line:
        errors = [abs(row.fit_error_percent or 0) for row in rows]
        print(
            f"# fit: {line.alpha_s * 1e6:.1f} us + size / {line.bytes_per_s / 1e9:.3f} GB/s; "
            f"off by {statistics.median(errors):.0f} % (median), {max(errors):.0f} % at most"
        )


def plot(rows: list[Row], lines: dict[str, AlphaBeta | None], ranks: int, path: Path, title: str) -> None:
    """Time and bus bandwidth by size; dashed: the fit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for number, (name, line) in enumerate(lines.items()):
        mine = [row for row in rows if row.collective == name]
        sizes, color = np.array([row.size_bytes for row in mine]), f"C{number}"
        spread = [[r.time_us - r.p25_us for r in mine], [r.p75_us - r.time_us for r in mine]]
        times = [row.time_us for row in mine]
        left.errorbar(sizes, times, yerr=spread, fmt="o", color=color, markersize=4, linewidth=1, label=name)
        right.plot(sizes, [row.busbw_gb_per_s for row in mine], "o", color=color, markersize=4)
        if line:
            seconds = line.alpha_s + sizes * line.beta_s_per_byte
            left.plot(sizes, seconds * 1e6, "--", color=color, linewidth=1)
            right.plot(sizes, sizes / seconds / 1e9 * bus_factor(name, ranks), "--", color=color, linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="size (bytes)", ylabel="time of the slowest rank (us), quartiles")
    right.set(xscale="log", yscale="log", xlabel="size (bytes)", ylabel="bus bandwidth (GB/s)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}; dashed: fit of alpha + size / bandwidth")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--min-bytes", type=parse_size, default=2**10, metavar="SIZE", help="smallest size (1KiB)")
    parser.add_argument("--max-bytes", type=parse_size, metavar="SIZE", help="largest (1GiB; on a CPU 64MiB)")
    parser.add_argument("--factor", type=script.at_least(2), default=4, help="from one size to the next")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--collectives", type=script.comma_list(collective), default=list(COLLECTIVES), metavar="A,B")
    parser.add_argument("--budget-s", type=script.positive, default=0.2, help="time for each size, 5 to 200 repeats")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args(argv)
    launch = dist.read_launch()
    on_gpu = dist.pick_device(args.device, launch).type == "cuda"
    args.max_bytes = args.max_bytes or (2**30 if on_gpu else 2**26)
    check(args, launch)
    run = script.start(__file__, args)
    rows: list[Row] = []
    lines: dict[str, AlphaBeta | None] = {}
    with dist.session(args.device) as ctx:
        dtype = DTYPES[args.dtype]
        sizes = sweep(args.min_bytes, args.max_bytes, args.factor, dtype.itemsize * ctx.world_size)
        backend = "nccl" if on_gpu else "gloo"
        head = f"{ctx.world_size} ranks, {backend}, {args.dtype}"
        with Progress(len(args.collectives) * len(sizes), "measuring") as progress:
            for name in args.collectives:
                measured = []
                for size in sizes:
                    measured.append(measure(name, size, dtype, args.budget_s, ctx))
                    progress.update(len(rows) + len(measured), f"{name} {size} bytes")
                measured, lines[name] = with_fit(measured)
                rows += measured
                if ctx.is_main:
                    show(measured, lines[name], head)
        if ctx.is_main:
            print(*GLOO_NOTES if backend == "gloo" else (), sep="\n")
            save(rows, run, args.json)
            plot(rows, lines, ctx.world_size, run.path("collectives.png"), head)
    wrong = sum(row.wrong for row in rows)
    result = {
        "world_size": launch.world_size, "backend": backend, "verified": len(rows), "wrong": wrong,
        **{key: value for name in lines for key, value in figures(name, rows, lines[name]).items()},
    }  # fmt: skip
    if wrong:
        bad = sorted({row.collective for row in rows if row.wrong})
        message = f"{wrong} numbers are wrong after {', '.join(bad)}: do not train on this network"
        raise script.CheckFailed(message, result)
    return result


def save(rows: list[Row], run: script.Run, also: Path | None) -> None:
    table = [dataclasses.asdict(row) for row in rows]
    try:
        for path in filter(None, (run.path("collectives.json"), also)):
            with script.atomic_write(path) as file:
                json.dump(table, file, indent=1)
    except OSError as error:
        raise script.UserError(f"cannot write {error.filename} ({error.strerror}); pass another --json") from None
    with script.atomic_write(run.path("collectives.csv")) as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def figures(name: str, rows: list[Row], line: AlphaBeta | None) -> dict:
    """The RESULT of one collective: its latency, the largest size's bus bandwidth, the fit's errors."""
    mine = [row for row in rows if row.collective == name]
    errors = [abs(row.fit_error_percent or 0) for row in mine]
    return {
        f"{name}_alpha_us": line and line.alpha_s * 1e6,
        f"{name}_bus_gb_per_s": mine[-1].busbw_gb_per_s,
        f"{name}_fit_error_percent": line and statistics.median(errors),
        f"{name}_largest_fit_error_percent": line and max(errors),
    }


if __name__ == "__main__":
    script.run(main)
