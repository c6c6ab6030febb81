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


def span_s(stages: Sequence[Sequence[Event]]) -> float:
    """From the first operation's begin to the last one's end."""
    return max(e.end_s for stage in stages for e in stage) - min(e.begin_s for stage in stages for e in stage)


def bubble(stages: Sequence[Sequence[Event]]) -> float:
    """Idle share of all stages' time between the first operation's begin and the last one's end."""
    return 1 - sum(map(busy_s, stages)) / (len(stages) * span_s(stages))


def busy_s(stage: Sequence[Event]) -> float:
    return sum(event.end_s - event.begin_s for event in stage)


def nobody_s(stages: Sequence[Sequence[Event]]) -> float:
    """How long no stage computes at all: messages are under way, or the machine has other work."""
    idle, busy_until = 0.0, min(event.begin_s for stage in stages for event in stage)
    for event in sorted(event for stage in stages for event in stage):
        idle += max(0.0, event.begin_s - busy_until)
        busy_until = max(busy_until, event.end_s)
    return idle


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
