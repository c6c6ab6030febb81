"""The advice as a picture: memory of a GPU by component for the best layout of each strategy, beside its capacity."""

from __future__ import annotations

from pathlib import Path

from .cluster import GIB
from .search import SIMPLE, Advice

COLORS = {
    "weights": "#1f5c99", "gradients": "#b3541e", "optimizer": "#2e7d32", "activations": "#8da0cb", "logits": "#6a4c93",
    "buffers": "#b9b9b9",
}  # fmt: skip


def draw(advice: Advice, path: Path, title: str, most: int = 16) -> None:
    """One stacked bar a strategy, ranked: those of one kind of parallelism, and the best others. Bars end at 2.2
    capacities."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    possible = [row for row in advice.rows if row.plan is not None]
    simple = [row for row in possible if row.kind in SIMPLE]
    others = [row for row in possible if row.kind not in SIMPLE][: most - len(simple)]
    shown = [row for row in possible if row in simple or row in others]
    capacity = advice.winner.job.cluster.gpu.memory / GIB
    limit = 2.2 * capacity

    figure, axes = pyplot.subplots(figsize=(10.5, 1.9 + 0.36 * len(shown)), layout="constrained")
    for place, row in enumerate(shown):
        assert row.plan is not None
        left = 0.0
        for name, color in COLORS.items():
            size = row.plan.memory[name] / GIB
            axes.barh(place, min(size, max(0.0, limit - left)), left=left, color=color, height=0.66)
            left += size
        label = f"{left:,.0f} GiB, " + (
            f"{row.plan.step_s:.3g} s, MFU {row.plan.mfu:.0%}" if row.plan.fits else "too much"
        )
        weight = "bold" if row.plan is advice.winner else "normal"
        axes.text(1.01 * limit, place, label, va="center", fontsize=8, fontweight=weight)
    axes.axvline(capacity, color="black", linestyle="--", linewidth=1.2)
    axes.text(capacity, -0.75, f" capacity {capacity:.1f} GiB", fontsize=8, va="center")
    axes.set_yticks(range(len(shown)), [str(row.plan.layout) for row in shown if row.plan], fontsize=9)
    axes.set(xlabel="GiB a GPU", xlim=(0, limit), ylim=(len(shown) - 0.4, -1.2))
    axes.set_title(title, fontsize=10, loc="left")
    axes.text(1.01 * limit, -0.75, "memory, step, MFU", fontsize=8, va="center", color="#666666")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.legend(handles, list(COLORS), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
