"""The table and the plot of hybrid.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each policy."""
    rows = [f"{'policy':<10}" + "".join(f"{title:>14}" for title, _, _ in COLUMNS)]
    for name, figures in found.items():
        rows.append(f"{name:<10}" + "".join(f"{form.format(figures[key]):>14}" for _, key, form in COLUMNS))
    return "\n".join(rows)


def draw(path: Path, found: Mapping[str, Mapping[str, float]], done: Sequence[Any]) -> None:
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
        points = [(one.e2e_s, one.predicted_e2e_s) for one in done if one.tier == tier and not one.error]
        if points:
            error.plot(*zip(*points, strict=True), ".", label=tier, alpha=0.6)
    ends = np.array([min(one.e2e_s for one in done if not one.error), max(one.e2e_s for one in done if not one.error)])
    error.plot(ends, ends, color="0.6", linewidth=1)
    error.set(xlabel="E2E measured, s", ylabel="E2E predicted, s", xscale="log", yscale="log")
    error.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
