"""More ranks, more speed, but not N times: the same training on 1 ... N ranks, and where the rest went.

You learn   what speed-up and efficiency are, and to read from the phases of a step why N ranks are not N times as fast
Laptop      python ch01_intro/scaling.py                 (one core a rank, so that a rank stands for a device)
GPU node    python ch01_intro/scaling.py --preset small --batch-size 16 --seq-len 1024     (one GPU a rank)
Cluster     run it on one node; chapter 3 goes on to several
You see     a table of tokens/s, speed-up and efficiency, and a plot of the step's phases: time in communication, and a
            forward and backward that got slower because ranks share memory bandwidth, caches and clock
"""

from __future__ import annotations

import argparse
import json

from common import process, script
from common.exercises import gpu_count
from common.logs import get_logger

log = get_logger()
PHASES = ("data", "forward", "backward", "communication", "optimizer")


def train(ranks: int, args: argparse.Namespace) -> dict:
    """Train on `ranks` ranks with the work a rank held constant (weak scaling); the RESULT of the run."""
    launcher = "python" if ranks == 1 else f"torchrun --standalone --nproc-per-node={ranks}"
    command = (
        f"{launcher} ch01_intro/train_baseline.py --preset {args.preset} --steps {args.steps} --device {args.device} "
        f"--batch-size {args.batch_size} --seq-len {args.seq_len} --seed {args.seed} --threads {args.threads_a_rank} "
        "--sample-tokens 0 --val-tokens 1024"
    )
    done = process.run(command, timeout_s=args.timeout_s)
    if done.result is None:
        raise script.UserError(f"training on {ranks} ranks failed ({done.reason()}); try it by itself: {command}")
    return done.result


def explain(base: dict, run: dict) -> dict:
    """How a step on N ranks differs from one on a single rank, in ms and as shares of the step."""
    compute = sum(run[f"{p}_ms"] - base[f"{p}_ms"] for p in ("forward", "backward"))
    communication = run.get("communication_ms", 0.0)
    return {
        "ranks": run["world_size"],
        "tokens_per_s": run["tokens_per_s"],
        "speedup": run["tokens_per_s"] / base["tokens_per_s"],
        "efficiency": run["tokens_per_s"] / base["tokens_per_s"] / run["world_size"],
        "step_ms": run["step_ms"],
        "communication_ms": communication,
        "communication_share": communication / run["step_ms"],
        "slower_compute_ms": compute,
        "data_share": run["data_ms"] / run["step_ms"],
    }


def draw(runs: list[dict], rows: list[dict], run: script.Run) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [row["ranks"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.plot(ranks, ranks, "--", color="#999999", label="N times")
    left.plot(ranks, [row["speedup"] for row in rows], "o-", color="#1f5c99", label="measured")
    for row in rows:
        place = {"textcoords": "offset points", "xytext": (6, -14), "fontsize": 9}
        left.annotate(f"{row['speedup']:.2f}× ({row['efficiency']:.0%})", (row["ranks"], row["speedup"]), **place)
    left.set(xlabel="ranks", ylabel="speed-up", title="Speed-up", xticks=ranks, xlim=(0.7, max(ranks) + 0.7))
    left.set_ylim(0, 1.08 * max(ranks))
    left.legend(frameon=False, loc="upper left")
    bottom = [0.0] * len(runs)
    colours = ("#8da0cb", "#66c2a5", "#4c9a84", "#fc8d62", "#e5c494")
    for phase, colour in zip(PHASES, colours, strict=True):
        heights = [r.get(f"{phase}_ms", 0.0) for r in runs]
        right.bar([str(n) for n in ranks], heights, bottom=bottom, color=colour, label=phase, width=0.55)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    right.set(xlabel="ranks", ylabel="ms", title="Where a step's time goes", ylim=(0, max(bottom) * 1.3))
    right.legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(run.path("scaling.png"), dpi=130)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=script.at_least(5), default=40)
    parser.add_argument("--batch-size", type=script.at_least(1), default=4)
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--max-ranks", type=script.at_least(2), help="default: the GPUs of this node, else its cores")
    parser.add_argument("--timeout-s", type=script.positive, default=900, help="for each run")
    args = parser.parse_args(argv)
    gpus = 0 if args.device == "cpu" else gpu_count()
    if gpus < 2:  # one GPU cannot be two devices: its cores can
        gpus, args.device = 0, "cpu"
    devices = gpus or script.usable_cores()
    kind = "GPUs" if gpus else "cores"
    if devices < 2:
        raise script.UserError("this machine has one core and no two GPUs; run it where there is something to scale to")
    args.max_ranks = args.max_ranks or min(devices, 8)
    if args.max_ranks > devices:
        raise script.UserError(
            f"{args.max_ranks} ranks need as many {kind}, this machine has {devices}; lower --max-ranks"
        )
    args.threads_a_rank = max(1, script.usable_cores() // gpus) if gpus else 1
    run = script.start(__file__, args)

    counts = sorted({n for n in (1, 2, 4, 8, 16) if n <= args.max_ranks} | {args.max_ranks})
    runs = []
    for ranks in counts:
        log.info("training", ranks=ranks, steps=args.steps)
        runs.append(train(ranks, args))
    rows = [explain(runs[0], r) for r in runs]
    run.path("scaling.json").write_text(json.dumps(rows, indent=2))
    draw(runs, rows, run)

    print("ranks  tokens/s  speed-up  efficiency   step ms  communication  slower compute  data")
    for row in rows:
        print(
            f"{row['ranks']:5} {row['tokens_per_s']:9,.0f} {row['speedup']:8.2f}x {row['efficiency']:10.0%} "
            f"{row['step_ms']:9.1f} {row['communication_ms']:10.1f} ms {row['slower_compute_ms']:12.1f} ms "
            f"{row['data_share']:6.1%}"
        )
    last = rows[-1]
    lost = last["step_ms"] - rows[0]["step_ms"]
    print(
        f"a step on {last['ranks']} ranks takes {lost:.1f} ms longer than on one: {last['communication_ms']:.1f} ms to "
        f"average gradients, {last['slower_compute_ms']:.1f} ms because ranks slow each other down"
    )
    return {
        "max_ranks": last["ranks"],
        **{k: last[k] for k in last if k != "ranks"},
        "tokens_per_s_one_rank": rows[0]["tokens_per_s"],
        "ranks_agree": all(r["ranks_agree"] for r in runs),
    }


if __name__ == "__main__":
    script.run(main)
