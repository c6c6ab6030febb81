"""What came of the requests of hybrid.py: figures, table and plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ch07_sglang_routing import tiers
from ch07_sglang_routing.tiers import BATCH, INTERACTIVE, SHORT, Prediction, Replica
from common.script import UserError

COLUMNS = (
    ("within TTFT", "interactive_within", "{:.0%}"),
    ("TTFT p50 ms", "interactive_ttft_ms_p50", "{:.0f}"),
    ("p99", "interactive_ttft_ms_p99", "{:.0f}"),
    ("short E2E ms", "short_e2e_ms_p50", "{:.0f}"),
    ("batch E2E s", "batch_e2e_s_p50", "{:.2f}"),
    ("on gpu", "gpu_share", "{:.0%}"),
    ("$/Mtok rented", "usd_per_mtok_rented", "{:.3f}"),
    ("busy", "usd_per_mtok_busy", "{:.3f}"),
)


@dataclass(frozen=True)
class Done:
    """What came of it. ttft_s and e2e_s count from sending, late_s is how much later than planned that was."""

    kind: str
    tier: str
    replica: str
    sent_s: float
    late_s: float
    ttft_s: float
    e2e_s: float
    predicted: Prediction  # by which the policy chose
    prompt: int
    output: int
    within: bool
    error: str = ""


def figures(runs: list[list[Done]], usd_per_h: Mapping[str, float], replicas: Sequence[Replica]) -> dict:
    """Of one policy, over all its rounds.

    Raises:
        UserError: of a class, no request was answered.
    """
    every = [one for run in runs for one in run]
    of = {kind: [one for one in every if one.kind == kind and not one.error] for kind in (INTERACTIVE, SHORT, BATCH)}
    for kind, answered in of.items():
        if not answered:
            said = next((one.error for one in every if one.kind == kind), "there was none")
            raise UserError(f"no {kind} request was answered ({said}); see the servers' logs")
    used = {one.tier for one in every}
    rented = sum(usd_per_h[replica.tier] for replica in replicas if replica.tier in used)
    tokens = sum(one.prompt + one.output for one in every if not one.error)
    length_s = sum(max((one.sent_s + one.e2e_s for one in run if not one.error), default=0.0) for run in runs)
    busy_usd = 0.0
    for run in runs:
        for replica in replicas:
            spans = [
                (one.sent_s, one.sent_s + one.e2e_s) for one in run if one.replica == replica.name and not one.error
            ]
            busy_usd += usd_per_h[replica.tier] / 3600 * tiers.busy_s(spans)
    ttft_ms = [1e3 * (one.ttft_s + one.late_s) for one in of[INTERACTIVE]]
    return {
        "answered": sum(not one.error for one in every), "failed": sum(bool(one.error) for one in every),
        "interactive_within": float(np.mean([one.within for one in every if one.kind == INTERACTIVE])),
        "interactive_ttft_ms_p50": float(np.median(ttft_ms)),
        "interactive_ttft_ms_p99": float(np.percentile(ttft_ms, 99)),
        "short_e2e_ms_p50": 1e3 * statistics.median(one.e2e_s for one in of[SHORT]),
        "batch_e2e_s_p50": statistics.median(one.e2e_s for one in of[BATCH]),
        "batch_within": float(np.mean([one.within for one in every if one.kind == BATCH])),
        "gpu_share": float(np.mean([one.tier == "gpu" for one in every])),
        "usd_per_mtok_rented": tiers.usd_per_mtok(rented, length_s, tokens),
        "usd_per_mtok_busy": busy_usd / tokens * 1e6,
    }  # fmt: skip


def prediction_error(turns: Sequence[Sequence[Done]], replicas: Sequence[Replica]) -> dict[str, float]:
    """Predicted over measured: its median is the bias; the median of how far it is off.

    hindsight: the same engine played with all that was sent to a replica in a turn. What it is off by is the model's
    error, and what the machine does besides; the rest of the prediction's is what came after it was made.
    """
    pairs: dict[str, list[tuple[Prediction, Done]]] = {"": [], "_hindsight": []}
    for done in turns:
        for replica in replicas:
            answered = [one for one in done if one.replica == replica.name and not one.error]
            own = sorted(answered, key=lambda one: one.sent_s)
            known = tiers.hindsight(
                replica.physics, replica.config, [(one.sent_s, one.prompt, one.output) for one in own]
            )
            pairs[""] += [(one.predicted, one) for one in own]
            pairs["_hindsight"] += zip(known, own, strict=True)
    found = {}
    for kind, each in pairs.items():
        for name in ("ttft", "e2e"):
            said = [getattr(predicted, f"{name}_s") / getattr(one, f"{name}_s") for predicted, one in each]
            found[f"{name}{kind}_over_measured"] = float(np.median(said))
            found[f"{name}{kind}_error_p50"] = float(np.median(np.abs(np.array(said) - 1)))
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each policy."""
    rows = [f"{'policy':<10}" + "".join(f"{title:>14}" for title, _, _ in COLUMNS)]
    for name, figures in found.items():
        rows.append(f"{name:<10}" + "".join(f"{form.format(figures[key]):>14}" for _, key, form in COLUMNS))
    return "\n".join(rows)


def draw(path: Path, found: Mapping[str, Mapping[str, float]], done: Sequence[Done]) -> None:
    """Dollars beside latency, a point for each policy; predicted against measured, a point for each request."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (cost, error) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, figures in found.items():
        cost.plot(figures["interactive_ttft_ms_p99"], figures["usd_per_mtok_busy"], "o", label=f"{name}, busy")
        last = cost.lines[-1].get_color()
        cost.plot(figures["interactive_ttft_ms_p99"], figures["usd_per_mtok_rented"], "s", mfc="none", color=last)
    cost.set(xlabel="TTFT p99 of interactive requests, ms", ylabel="$ / million tokens (square: rented)", xscale="log")
    cost.set_ylim(0, None)
    cost.legend(fontsize=8)
    for tier in ("gpu", "cpu"):
        points = [(one.e2e_s, one.predicted.e2e_s) for one in done if one.tier == tier and not one.error]
        if points:
            error.plot(*zip(*points, strict=True), ".", label=tier, alpha=0.6)
    ends = np.array([min(one.e2e_s for one in done if not one.error), max(one.e2e_s for one in done if not one.error)])
    error.plot(ends, ends, color="0.6", linewidth=1)
    error.set(xlabel="E2E measured, s", ylabel="E2E predicted, s", xscale="log", yscale="log")
    error.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
