"""What compare_zero.py has measured, as RESULT fields, as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ch04_fsdp import contestants
from ch04_fsdp.contestants import Job
from ch04_fsdp.traffic import Collective

MIB = 2**20
REFERENCE, CONTROL = "ddp", "fsdp-full-again"
# Largest difference from DDP. A gradient's is relative to the largest element of its tensor. The weights' is of the
# whole step, relative to its length: AdamW's first step is lr * sign(g), so that rounding turns elements near 0 around.
TOLERANCE = {
    torch.float32: {"loss": 1e-5, "norm": 1e-4, "gradients": 1e-5, "step": 1e-3},
    torch.bfloat16: {"loss": 1e-3, "norm": 1e-2, "gradients": 0.1, "step": 0.5},
}
KINDS = {"parameters": "#4c78a8", "gradients": "#f2a154", "optimizer": "#54a24b", "master": "#b279a2"}
Figures = dict[str, Any]


def of(
    name: str,
    parameters: int,
    job: Job,
    weighed: dict[str, int],
    sent: Sequence[Collective],
    saved: dict[str, float],
) -> Figures:
    """What one contestant holds, sends and saves, in MiB and seconds. `weighed` is empty on ranks other than 0."""
    ranks, ideal = job.ctx.world_size, contestants.ideal_bytes(name, parameters, job.ctx.world_size, job.dtype)
    gathered = 4 if job.dtype == torch.float32 else 2
    held = sum(weighed.get(kind, 0) for kind in KINDS)
    return {
        "held_mib": held / MIB,
        "ideal_mib": sum(ideal.values()) / MIB,
        "over_ideal": held / sum(ideal.values()),
        **{f"{kind}_mib": weighed.get(kind, 0) / MIB for kind in KINDS},
        "resident_mib": weighed.get("resident", 0) / MIB,
        "peak_mib": weighed.get("peak", 0) / MIB,
        "collectives": len(sent),
        "sent_mib": sum(call.sent_bytes for call in sent) / MIB,
        "formula_mib": contestants.sent_bytes(
            name, summed=4 * parameters, gathered=gathered * parameters, ranks=ranks, micro_batches=job.micro_batches,
            again=gathered * contestants.gathered_again(job.config),
        ) / MIB,
        **saved,
    }  # fmt: skip


def ours(figures: dict[str, Figures]) -> str:
    """The contestant that the others' speed is compared with: FSDP in full, or the first if that does not run."""
    return "fsdp-full" if "fsdp-full" in figures else next(iter(figures))


def result(
    figures: dict[str, Figures],
    times_ms: list[dict[str, list[float]]],
    apart: dict[str, dict[str, float]],
    job: Job,
    tokens: int,
) -> dict[str, Any]:
    """RESULT. `over_x` fields are ratios of tokens/s in the same round, FSDP's in full to x's: median and quartiles."""
    allowed = TOLERANCE[job.dtype]
    chosen = ours(figures)
    made: dict[str, Any] = {
        "world_size": job.ctx.world_size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "tokens_per_step": tokens,
        "rounds": sum(len(start[chosen]) for start in times_ms),
        "equal": all(found[what] <= allowed[what] for found in apart.values() for what in allowed),
        "largest_differences": {what: max((f[what] for f in apart.values()), default=0.0) for what in allowed},
        "contestants": figures,
    }
    for name in times_ms[0]:
        flat = [ms for start in times_ms for ms in start[name]]
        ratios = [b / a for start in times_ms for a, b in zip(start[chosen], start[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        speed = {
            "step_ms": statistics.median(flat), "tokens_per_s": tokens / statistics.median(flat) * 1e3,
            "fsdp_over_it": middle, "fsdp_over_it_p25": low, "fsdp_over_it_p75": high,
        }  # fmt: skip
        if name == CONTROL:
            made["control"] = speed
        else:
            figures[name] |= speed
            figures[name]["apart"] = apart.get(name, {})
    if chosen == "fsdp-full":
        made["memory_over_ideal"] = figures[chosen]["over_ideal"]
        made["resident_over_ideal"] = figures[chosen]["resident_mib"] / figures[chosen]["ideal_mib"]
        made["sent_over_formula"] = figures[chosen]["sent_mib"] / figures[chosen]["formula_mib"]
        made["fsdp_over_again"] = made["control"]["fsdp_over_it"]
        for other in figures.keys() - {chosen}:
            made[f"fsdp_over_{other.replace('-', '')}"] = figures[other]["fsdp_over_it"]
        if "zero-3" in figures:
            made["zero3_memory_over_ideal"] = figures["zero-3"]["over_ideal"]
            made["fsdp_peak_over_zero3"] = figures[chosen]["peak_mib"] / figures["zero-3"]["peak_mib"]
    if {"fsdp-grad", "zero-2"} <= figures.keys():
        made["grad_over_zero2"] = statistics.median(
            b / a for start in times_ms for a, b in zip(start["fsdp-grad"], start["zero-2"], strict=True)
        )
    return made


def missed(result: dict[str, Any]) -> list[str]:
    """What does not hold of what we say of DDP and FSDP: the same step, the share held, the bytes sent.

    Speed is no such thing: it is measured, and differs from machine to machine.
    """
    wrong = [] if result["equal"] else ["the first step is not the same: this is not the same training"]
    for name, f in result["contestants"].items():
        if name.startswith("zero"):
            continue
        if not 0.99 < f["over_ideal"] < 1.1:
            wrong.append(f"a rank of {name} holds {f['over_ideal']:.3f} times its share")
        if not 0.98 < (ratio := f["sent_mib"] / f["formula_mib"]) < 1.02:
            wrong.append(f"a rank of {name} sends {ratio:.3f} times the bytes of the formula")
    return wrong


def show(result: dict[str, Any]) -> None:
    every: dict[str, Figures] = result["contestants"]
    kinds = "  ".join(f"{kind:>10}" for kind in KINDS)
    print(f"a rank holds, MiB\n{'':11}{kinds}{'all':>9}{'ideal':>9}{'ratio':>7}{'resident':>10}{'peak':>8}")
    for name, f in every.items():
        by_kind = "  ".join(f"{f[f'{kind}_mib']:10.1f}" for kind in KINDS)
        print(f"{name:11}{by_kind}{f['held_mib']:9.1f}{f['ideal_mib']:9.1f}{f['over_ideal']:7.3f}"
              f"{f['resident_mib']:10.1f}{f['peak_mib']:8.1f}")  # fmt: skip
    print("\na step and a checkpoint")
    print(f"{'':16}{'ms':>7}{'tokens/s':>10}  {f'{ours(every)} over it':24}{'calls':>6}{'sent MiB':>10}{'formula':>9}"
          f"{'save s':>8}{'MiB':>8}  {'gradients, step apart from ddp'}")  # fmt: skip
    for name, f in [*every.items(), *([(CONTROL, result["control"])] if "control" in result else [])]:
        quartiles = f"({f['fsdp_over_it_p25']:.3f} ... {f['fsdp_over_it_p75']:.3f})"
        line = f"{name:16}{f['step_ms']:7.0f}{f['tokens_per_s']:10,.0f}  {f['fsdp_over_it']:.3f} {quartiles:18}"
        if "sent_mib" in f:
            line += f"{f['collectives']:6}{f['sent_mib']:10.1f}{f['formula_mib']:9.1f}"
            line += f"{f['save_s']:8.2f}{f['save_mib']:8.1f}"
            line += "".join(f"  {f['apart'][what]:.1e}" for what in ("gradients", "step") if f["apart"])
        print(line)


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels over the contestants: memory of a rank, tokens/s, bytes sent, time to save."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every: dict[str, Figures] = result["contestants"]
    names, where = list(every), range(len(every))
    figure, ((held, speed), (sent, saved)) = pyplot.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    bottom = [0.0] * len(names)
    for kind, color in KINDS.items():
        heights = [f[f"{kind}_mib"] for f in every.values()]
        held.bar(where, heights, 0.6, bottom, color=color, label=kind)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    for marker, field, label in (("_", "ideal_mib", "ideal"), ("v", "peak_mib", "peak of a step, measured")):
        held.scatter(where, [f[field] for f in every.values()], s=180 if marker == "_" else 30, marker=marker,
                     color="black", label=label, zorder=3)  # fmt: skip
    held.set(title="A rank's memory", ylabel="MiB", ylim=(0, 1.35 * max(f["peak_mib"] for f in every.values())))
    held.legend(frameon=False, fontsize=8, ncols=2)
    blue, grey = "#4c78a8", "#c9c9c9"
    colors = [blue if name.startswith("fsdp") else grey for name in names]
    rates = [f["tokens_per_s"] for f in every.values()]
    speed.bar(where, rates, 0.6, color=colors)
    speed.bar_label(speed.containers[0], [f"{rate:,.0f}" for rate in rates], fontsize=8)
    speed.set(title="Tokens/s of all ranks, taken in turns", ylabel="tokens/s")
    sent.bar(where, [f["sent_mib"] for f in every.values()], 0.6, color=colors)
    sent.scatter(where, [f["formula_mib"] for f in every.values()], s=180, marker="_", color="black", label="formula")
    sent.set(title="A rank sends in a step, at least", ylabel="MiB",
             ylim=(0, 1.2 * max(max(f["sent_mib"], f["formula_mib"]) for f in every.values())))  # fmt: skip
    sent.legend(frameon=False, fontsize=8)
    saved.bar(where, [f["save_s"] for f in every.values()], 0.6, color=colors)
    saved.bar_label(saved.containers[0], [f"{f['save_mib']:.0f} MiB" for f in every.values()], fontsize=8)
    saved.set(title="A checkpoint, until it is on the disk", ylabel="seconds")
    for axes in figure.axes:
        axes.set_xticks(where, names, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
