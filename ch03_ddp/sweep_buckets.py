"""How large should a bucket be? Step time and the share of communication that is hidden, by size and by link.

You learn   the two prices: each bucket costs one latency (alpha), and the last one always shows, alpha + bytes x beta;
            which of them counts depends on the link
Laptop      python ch03_ddp/sweep_buckets.py                    (hosts of a virtual cluster, at 200mbit and 1gbit)
Loopback    torchrun --standalone --nproc-per-node=2 ch03_ddp/sweep_buckets.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/sweep_buckets.py --width 1024 --heads 16 --layers 12 \
                --seq-len 1024 --sizes 0.5,2,8,25,64,one
Cluster     srun python ch03_ddp/sweep_buckets.py --width 1024 --heads 16 --layers 12 --sizes 0.5,2,8,25,64,one
You see     a step is longest with one bucket, which hides nothing, and longer again where buckets are tiny; sweep.png

Measured as in chapter 2's overlap.py: each size against its own twin that sends nothing, all in turn in every round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

from ch02_hardware_parallelism.alpha_beta import AlphaBeta, fit_all_reduce
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.library_data import LibraryDDP
from ch02_hardware_parallelism.model import build
from ch02_hardware_parallelism.overlap import Message, send, silent_twin
from ch02_hardware_parallelism.rates import add_rates, as_flags, at_rates, check_ranks
from ch02_hardware_parallelism.training import (
    SHARED_FLAGS,
    WARM_UP,
    Text,
    adamw,
    flags,
    shape_of,
    timed_ms,
    train_step,
)
from common import dist, script

RATES = ["200mbit", "1gbit"]
ONE = "one"  # bucket for all gradients
SIZES = ["0.001", "0.25", "1", "2", "4", "8", ONE]  # MiB; the first: each parameter its own


def size(text: str) -> str:
    """argparse type: a bucket size in MiB, or `one` for all gradients in one bucket."""
    if text != ONE and script.positive(text) < 1e-6:
        raise argparse.ArgumentTypeError(f"{text} MiB is less than a byte")
    return text if text == ONE else f"{float(text):g}"


def make(args: argparse.Namespace, ctx: dist.Context, mib: str, comm: Comm) -> LibraryDDP:
    LibraryDDP.bucket_mib = 2.0**20 if mib == ONE else float(mib)
    return LibraryDDP(build(shape_of(args), seed=args.seed, device=str(ctx.device)), comm, adamw(args.lr))


def row(messages: list[Message], steps: list[float], computes: list[float], sends: list[float], fit: AlphaBeta) -> dict:
    """What a size costs, in ms: medians over the rounds, exposed as the median of the rounds' own differences."""
    buckets = [x.nbytes for _, x, meanwhile in messages if meanwhile]
    exposed = statistics.median(step - compute for step, compute in zip(steps, computes, strict=True))
    communication = statistics.median(sends)
    quartiles = statistics.quantiles(steps, n=4) if len(steps) > 1 else steps * 3
    return {
        "buckets": len(buckets),
        "largest_mib": max(buckets) / 2**20,
        "step_ms": statistics.median(steps),
        "step_ms_p25": quartiles[0],
        "step_ms_p75": quartiles[2],
        "compute_ms": statistics.median(computes),
        "communication_ms": communication,
        "exposed_ms": exposed,
        "hidden": 1 - exposed / communication,
        "latency_ms": len(buckets) * fit.alpha_s * 1e3,
        "last_bucket_ms": fit.time_s(buckets[-1]) * 1e3,
    }


def measure(args: argparse.Namespace, ctx: dist.Context) -> dict:
    """A row for each size, of interleaved steps."""
    text, comm = Text(args, ctx.device), Comm()
    fit = fit_all_reduce(ctx.device)
    sizes = {mib: make(args, ctx, mib, comm) for mib in args.sizes}
    twins = {mib: silent_twin(partial(make, args, ctx, mib), text) for mib in args.sizes}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.steps + WARM_UP):
        batches = text.step()
        for mib, strategy in sizes.items():
            twin, messages = twins[mib]
            actions: dict[str, Callable[[], object]] = {
                "step": partial(train_step, strategy, batches),
                "compute": partial(train_step, twin, batches),
                "communication": partial(send, messages, comm),
            }
            for name, action in actions.items():
                times.setdefault((mib, name), []).append(timed_ms(action, ctx.device))
    timed = {key: of_rounds[WARM_UP:] for key, of_rounds in times.items()}
    parts = ("step", "compute", "communication")
    rows = {mib: row(twins[mib][1], *(timed[mib, part] for part in parts), fit) for mib in args.sizes}
    return {
        "world_size": ctx.world_size,
        "backend": "nccl" if ctx.device.type == "cuda" else "gloo",
        "alpha_us": fit.alpha_s * 1e6,
        "beta_ms_per_mib": fit.beta_s_per_byte * 2**20 * 1e3,
        "sizes": rows,
        **summary(rows),
    }


def summary(rows: dict[str, dict]) -> dict:
    """The best size, and the most divided and the least divided step beside it."""
    best = min(rows, key=lambda mib: rows[mib]["step_ms"])
    fewest = min(rows, key=lambda mib: rows[mib]["buckets"])
    return {
        "best_mib": rows[best]["largest_mib"] if best == ONE else float(best),
        "best_step_ms": rows[best]["step_ms"],
        "best_hidden": rows[best]["hidden"],
        "best_buckets": rows[best]["buckets"],
        "most_buckets": max(found["buckets"] for found in rows.values()),
        "fewest_buckets": rows[fewest]["buckets"],
        "fewest_hidden": rows[fewest]["hidden"],
        "fewest_over_best": rows[fewest]["step_ms"] / rows[best]["step_ms"],
    }


def show(result: dict) -> None:
    rows, alpha_us, beta = result["sizes"], result["alpha_us"], result["beta_ms_per_mib"]
    print(f"all_reduce: alpha {alpha_us:.0f} us, beta {beta:.2f} ms/MiB ({8388.608 / beta:,.0f} Mbit/s)")
    print(f"{'MiB':>5}{'buckets':>8}{'step ms':>9}{'quartiles':>16}{'compute':>9}{'communication':>15}{'exposed':>9}"
          f"{'hidden':>8}{'k alpha':>9}{'last':>8}")  # fmt: skip
    for mib, r in rows.items():
        quartiles = f"{r['step_ms_p25']:.1f} - {r['step_ms_p75']:.1f}"
        print(f"{mib:>5}{r['buckets']:8}{r['step_ms']:9.1f}{quartiles:>16}{r['compute_ms']:9.1f}"
              f"{r['communication_ms']:15.1f}{r['exposed_ms']:9.1f}{r['hidden']:8.0%}{r['latency_ms']:9.1f}"
              f"{r['last_bucket_ms']:8.1f}")  # fmt: skip
    best = min(rows, key=lambda mib: rows[mib]["step_ms"])
    told = rows[best]
    print(
        f"best: {best} MiB. {told['buckets']} buckets cost {told['latency_ms']:.1f} ms of latency; the last of them, "
        f"which no backward covers, {told['last_bucket_ms']:.1f} ms."
    )
    most = max(rows.values(), key=lambda r: r["buckets"])
    fewest = min(rows.values(), key=lambda r: r["buckets"])
    print(
        f"{most['buckets']} buckets would pay {most['latency_ms']:.1f} and {most['last_bucket_ms']:.1f} ms, "
        f"{fewest['buckets']} would pay {fewest['latency_ms']:.1f} and {fewest['last_bucket_ms']:.1f} ms.",
        flush=True,
    )


def draw(found: dict[str, dict], run: script.Run) -> None:
    """Step time and hidden share by bucket size, a line for each link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for color, (rate, result) in zip(("#b3541e", "#1f5c99", "#2e7d32", "#6a3d9a") * 3, found.items(), strict=False):
        rows = list(result["sizes"].values())
        best = min(row["step_ms"] for row in rows)
        places = range(len(rows))
        over = [[row[key] / best for row in rows] for key in ("step_ms", "step_ms_p25", "step_ms_p75")]
        left.plot(places, over[0], "o-", color=color, label=f"{rate} (best: {best:.0f} ms)")
        left.fill_between(places, over[1], over[2], color=color, alpha=0.15)
        right.plot(places, [100 * row["hidden"] for row in rows], "o-", color=color, label=rate)
    labels = [f"{mib}\n({row['buckets']})" for mib, row in next(iter(found.values()))["sizes"].items()]
    for axes, title in ((left, "step, over the best (band: quartiles)"), (right, "communication hidden, %")):
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel="bucket_cap_mb (buckets)", title=title)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(run.path("sweep.png"), dpi=120)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = flags(__doc__)
    parser.set_defaults(width=192, layers=8, steps=8)  # many small tensors, 15 MiB in all
    parser.add_argument(
        "--sizes", type=script.comma_list(size), default=SIZES, help="of buckets, in MiB, or `one` for a single bucket"
    )
    add_rates(parser)
    args = parser.parse_args(argv)
    shape_of(args)
    args.sizes = list(dict.fromkeys(args.sizes))
    if len(args.sizes) < 2:
        raise script.UserError("one size is no sweep; pass two or more, as in --sizes 1,4,one")
    if args.rates is None and dist.read_launch().world_size == 1:
        args.rates = RATES
    check_ranks(args.rates)
    run = script.start(__file__, args)
    if args.rates:
        found = at_rates(__file__, [*as_flags(args, *SHARED_FLAGS), "--sizes", ",".join(args.sizes)], args.rates, run)
        draw(found, run)
        kept = [*summary(next(iter(found.values()))["sizes"]), "alpha_us", "beta_ms_per_mib"]
        return {"world_size": 2} | {f"{key}_{rate}": result[key] for rate, result in found.items() for key in kept}
    with dist.session(args.device) as ctx:
        result = measure(args, ctx)
        if ctx.is_main:
            show(result)
            draw({"this network": result}, run)
        return result


if __name__ == "__main__":
    script.run(main)
