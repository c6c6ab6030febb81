"""Who computed what when: the bubble of a pipeline as it was measured, and a picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Event(NamedTuple):
    """One computation of a stage, timed on this rank's clock."""

    begin_s: float
    end_s: float
    kind: str
    chunk: int


def bubble(stages: Sequence[Sequence[Event]]) -> float:
    """Idle share of all stages' time between the first operation's begin and the last one's end."""
    events = [event for stage in stages for event in stage]
    whole_s = max(event.end_s for event in events) - min(event.begin_s for event in events)
    return 1 - sum(event.end_s - event.begin_s for event in events) / (len(stages) * whole_s)


def draw(stages: Sequence[Sequence[Event]], title: str, path: Path) -> None:
    """A Gantt chart as PNG: a row for each stage, a bar for each operation, with the number of its chunk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    origin_s = min(event.begin_s for stage in stages for event in stage)
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.7 * len(stages)), layout="constrained")
    for row, stage in enumerate(stages):
        for event in stage:
            begin_ms, width_ms = 1e3 * (event.begin_s - origin_s), 1e3 * (event.end_s - event.begin_s)
            color = {"forward": "#4c78a8", "backward": "#f2a154"}[event.kind]
            axes.barh(row, width_ms, left=begin_ms, height=0.8, color=color, edgecolor="white", linewidth=0.8)
            axes.text(begin_ms + width_ms / 2, row, str(event.chunk), ha="center", va="center", fontsize=8)
    for name, color in (("forward", "#4c78a8"), ("backward", "#f2a154")):
        axes.barh(0, 0, color=color, label=name)
    axes.set(yticks=range(len(stages)), yticklabels=[f"stage {row}" for row in range(len(stages))], xlabel="ms")
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside upper right", frameon=False, ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
