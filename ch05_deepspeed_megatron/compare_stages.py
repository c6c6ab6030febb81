"""ZeRO's stages side by side, from their config files: memory by component, bytes sent, pace, and the same training.

You learn   what each stage takes off a rank and what it sends for it, by formula and as measured; that stage 3 keeps
            what it gathered in forward for backward, unless stage3_max_reuse_distance tells it not to
Laptop      python ch05_deepspeed_megatron/compare_stages.py
GPU node    python ch05_deepspeed_megatron/compare_stages.py --ranks 8 --preset 1b --layers 4 --dtype bf16
Cluster     the stages one by one, under srun: train_deepspeed.py --deepspeed-config configs/zeroN.json
You see     a table of MiB a rank, each figure beside its formula's; losses and norms of all stages equal to rounding;
            tokens/s taken in turns; a plot

Stage 0 is data parallelism by the same engine. "3, freed" is stage 3 that gathers each layer a second time in backward.
Each is weighed in processes of its own; for the race all are alive in one. The planner is chapter 4's.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from ch01_intro import training
from ch04_fsdp.compare_report import KINDS
from ch04_fsdp.compare_zero import shape
from ch05_deepspeed_megatron import stages
from ch05_deepspeed_megatron.stages import NAMES, Job
from common import dist, lm, ranks, script

MIB = 2**20
APART = {  # relative; norms as in chapter 4: DeepSpeed adds up squares in float32, in an order of its own
    torch.float32: {"losses": 1e-5, "norms": 1e-4},
    torch.bfloat16: {"losses": 2e-2, "norms": 2e-2},
}
WITHIN = 0.02  # of each component, and of what is sent: padding, norms and flags come on top


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--ranks", type=script.at_least(2), default=2)
    parser.add_argument("--preset", default="nano", help=", ".join(lm.PRESETS))
    parser.add_argument("--width", type=script.at_least(64), help="in place of the preset's")
    parser.add_argument("--layers", type=script.at_least(1), help="in place of the preset's")
    parser.add_argument("--batch-size", type=script.at_least(1), default=2, help="sequences a rank and micro-batch")
    parser.add_argument("--accumulation", type=script.at_least(1), default=1, help="micro-batches a step")
    parser.add_argument("--seq-len", type=script.at_least(2), default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=script.at_least(1), default=9)
    parser.add_argument("--timeout", type=script.positive, default=300, help="seconds for each part")
    args = parser.parse_args(argv)
    if not lm.is_preset(args.preset):
        raise script.UserError(f"no preset {args.preset!r}; one of {', '.join(lm.PRESETS)}")
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if 0 < gpus < args.ranks:
        raise script.UserError(f"--ranks {args.ranks} on {gpus} GPUs; take as many, or --device cpu")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    dist.pick_device(args.device, dist.Launch("python"))
    run = script.start(__file__, args)
    job = Job(
        shape(args), args.ranks, args.batch_size, args.accumulation, args.seq_len, training.DTYPES[args.dtype],
        seed=args.seed, device=args.device,
    )  # fmt: skip
    weighed = {}
    ranks.preload("transformers.models.llama.modeling_llama")
    for name in NAMES:
        every = ranks.values(ranks.run_ranks(stages.weigh, args.ranks, name, job, timeout_s=args.timeout))
        most = max(every, key=lambda rank: sum(rank["held"].values()))
        weighed[name] = most | {"peak": max(rank["peak"] for rank in every)}
    raced = ranks.values(
        ranks.run_ranks(stages.race, args.ranks, NAMES, job, args.rounds, args.seed, timeout_s=args.timeout)
    )[0]
    rows = {name: row(name, job, weighed[name], raced[name]) for name in NAMES}
    result, wrong = judged(rows, raced, job)
    show(rows)
    draw(rows, run.path("stages.png"))
    if wrong:
        raise script.CheckFailed("; ".join(wrong), result)
    return result


def row(name: str, job: Job, weighed: dict[str, Any], raced: dict[str, list[float]]) -> dict[str, Any]:
    """Of one stage, MiB: measured, and predicted where there is a formula."""
    formula = {kind: size / MIB for kind, size in stages.predicted(name, job).items()}
    ms = statistics.median(raced["ms"])
    return {
        "held": {kind: weighed["held"].get(kind, 0) / MIB for kind in KINDS},
        "formula": formula,
        "peak": weighed["peak"] / MIB,
        "sent": weighed["sent"] / MIB,
        "calls": weighed["calls"],
        "ms": ms,
        "tokens_per_s": job.tokens / ms * 1e3,
    }


def judged(rows: dict[str, dict[str, Any]], raced: Any, job: Job) -> tuple[dict[str, Any], list[str]]:
    wrong, largest = [], 0.0
    for name, this in rows.items():
        total = sum(this["formula"].get(kind, 0) for kind in KINDS)
        pairs = {kind: (this["held"][kind], this["formula"].get(kind, 0.0)) for kind in KINDS}
        for kind, (measured, predicted) in pairs.items():
            largest = max(largest, abs(measured - predicted) / total)
            if abs(measured - predicted) > WITHIN * total:
                wrong.append(f"stage {name}: {kind} {measured:.2f} MiB, by formula {predicted:.2f}")
        if abs(this["sent"] / this["formula"]["sent"] - 1) > WITHIN:
            wrong.append(f"stage {name}: sends {this['sent']:.2f} MiB, by formula {this['formula']['sent']:.2f}")
    apart = {
        what: max(
            abs(a / b - 1) for other in raced.values() for a, b in zip(other[what], raced["0"][what], strict=True)
        )
        for what in ("losses", "norms")
    }
    for what, allowed in APART[job.dtype].items():
        if not apart[what] <= allowed:
            wrong.append(f"{what} are {apart[what]:.1e} apart: not the same training")
    result: dict[str, Any] = {
        "ranks": job.ranks,
        "losses_apart": apart["losses"],
        "norms_apart": apart["norms"],
        "largest_error": largest,
        "as_expected": not wrong,
    }
    for name, this in rows.items():
        key = f"stage{name.replace(', ', '_')}"
        result |= {
            f"{key}_held_mib": sum(this["held"].values()), f"{key}_peak_mib": this["peak"],
            f"{key}_sent_mib": this["sent"], f"{key}_tokens_per_s": this["tokens_per_s"],
        }  # fmt: skip
    return result, wrong


def show(rows: dict[str, dict[str, Any]]) -> None:
    print("MiB of a rank between backward and the step, then of a step; in brackets by formula")
    print(
        f"{'stage':10}" + "".join(f"{kind:>18}" for kind in (*KINDS, "peak", "sent")) + f"{'calls':>7}{'tokens/s':>10}"
    )
    for name, this in rows.items():
        cells = {**this["held"], "peak": this["peak"], "sent": this["sent"]}
        line = "".join(f"{size:8.2f} {_bracketed(this['formula'].get(kind)):>9}" for kind, size in cells.items())
        print(f"{name:10}{line}{this['calls']:7}{this['tokens_per_s']:10,.0f}")


def _bracketed(size: float | None) -> str:
    return "" if size is None else f"({size:.2f})"


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Three panels over the stages: a rank's memory by component, bytes sent, tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, where = list(rows), range(len(rows))
    figure, (held, sent, pace) = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    bottom = [0.0] * len(names)
    for kind, color in KINDS.items():
        heights = [this["held"][kind] for this in rows.values()]
        held.bar(where, heights, 0.6, bottom, color=color, label=kind)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    ideal = [sum(this["formula"].get(kind, 0) for kind in KINDS) for this in rows.values()]
    held.scatter(where, ideal, s=180, marker="_", color="black", label="formula", zorder=3)
    held.set(title="A rank holds", ylabel="MiB")
    held.legend(frameon=False, fontsize=8)
    sent.bar(where, [this["sent"] for this in rows.values()], 0.6, color="#c9c9c9")
    sent.scatter(where, [this["formula"]["sent"] for this in rows.values()], s=180, marker="_", color="black")
    sent.set(title="and sends in a step, at least", ylabel="MiB")
    pace.bar(where, [this["tokens_per_s"] for this in rows.values()], 0.6, color="#c9c9c9")
    pace.set(title="Tokens/s of all ranks, taken in turns", ylabel="tokens/s")
    for axes in figure.axes:
        axes.set_xticks(where, names)
        axes.set_xlabel("stage")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    script.run(main)
