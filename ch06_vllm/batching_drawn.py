"""The pictures of continuous_batching.py: who had which slot when, and what a long prompt does to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ch06_vllm.batching import Served

COLORS = ("#1f5c99", "#b3541e", "#2e7d32", "#6a4c93")


def figure_with(rows: int, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, figsize=(11, height), layout="constrained", sharex=True)
    return pyplot, figure, axes


def draw_slots(ways: Mapping[str, Sequence[Served]], slots: int, path: Path) -> None:
    """A row for each slot, a bar for each request; grey is a slot that is held and brings nobody tokens."""
    pyplot, figure, axes = figure_with(len(ways), 7)
    for axis, (name, served) in zip(axes, ways.items(), strict=True):
        for one in served:
            color = COLORS[1] if one.priority <= 0 else COLORS[0]
            bar = {"height": 0.8, "edgecolor": "white", "linewidth": 0.5}
            axis.barh(one.slot, one.done_s - one.admitted_s, left=one.admitted_s, color=color, **bar)
            axis.barh(one.slot, one.released_s - one.done_s, left=one.done_s, color="#cccccc", **bar)
        tokens, seconds = sum(one.tokens for one in served), max(one.released_s for one in served)
        axis.set(ylabel="slot", ylim=(slots - 0.5, -0.5), title=f"{name}: {tokens / seconds:,.0f} useful tokens/s")
        axis.vlines([one.arrived_s for one in served], -0.5, 0, color="black", linewidth=0.5)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("s     (orange: priority 0 or smaller; grey: done, but the batch is not; ticks: arrivals)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_stall(ways: Mapping[str, Sequence[tuple[float, float]]], path: Path, what: str) -> None:
    """(seconds since the long prompt came, milliseconds since the request's last token) of running requests."""
    pyplot, figure, axis = figure_with(1, 4.5)
    for (name, gaps), color in zip(ways.items(), COLORS, strict=False):
        longest = max(ms for at_s, ms in gaps if at_s > 0)
        axis.plot(*zip(*gaps, strict=True), ".", color=color, markersize=4, label=f"{name}: longest {longest:.0f} ms")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel="s since the long prompt came", ylabel="ms between tokens", ylim=(0, None), title=what)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
