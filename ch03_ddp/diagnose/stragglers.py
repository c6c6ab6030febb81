"""Who is slow? All ranks' steps take equally long, because everybody waits for the slowest: only own work tells.

own work = the step less the time spent inside collectives, and less what DDP's backward waits for buckets.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import torch

from ch03_ddp.diagnose.verdict import Verdict
from common.dist import Context

WARM_UP = 2
ENOUGH = 5  # steps after that, to tell a slow rank from a slow moment
WORTH = 0.1  # of a step: less is not worth a word


class Pace:
    """The steps of this rank. On a GPU its marks are events in the current stream, which stop nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._waits: list[tuple[Any, Any]] = []
        self._steps: list[tuple[Any, Any, list[tuple[Any, Any]]]] = []
        self._begin = self.mark()

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waited(self, begin: Any, end: Any) -> None:
        self._waits.append((begin, end))

    def step(self) -> None:
        """A step ends here, and the next one begins."""
        end = self.mark()
        self._steps.append((self._begin, end, self._waits))
        self._begin, self._waits = end, []

    def _ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3)

    def own_ms(self) -> list[float]:
        """Of the steps after the warm-up: quartiles of own work, and the median of the whole step. Empty: too few."""
        if self._cuda:
            torch.cuda.synchronize()
        whole = [self._ms(begin, end) for begin, end, _ in self._steps[WARM_UP:]]
        waits = [sum(self._ms(*wait) for wait in waits) for _, _, waits in self._steps[WARM_UP:]]
        if len(whole) < ENOUGH:
            return []
        own = [step - wait for step, wait in zip(whole, waits, strict=True)]
        return [*statistics.quantiles(own, n=4), statistics.median(whole)]

    def straggler(self, ctx: Context) -> Verdict | None:
        """The rank that all others wait for, if there is one. Every rank must call it.

        Its quick steps must be slower than the slow ones of all others: a busy moment makes no straggler.
        """
        said = [json.loads(text) for text in ctx.exchange("diagnose: own work", json.dumps(self.own_ms()))]
        if ctx.world_size == 1 or not all(said):
            return None
        slowest = max(range(ctx.world_size), key=lambda rank: said[rank][1])
        others = [row for rank, row in enumerate(said) if rank != slowest]
        quick, own, _, _ = said[slowest]
        step = statistics.median(row[3] for row in said)
        gain = own - max(row[1] for row in others)  # until the next slow one is what all wait for
        if quick <= max(row[2] for row in others) or gain < WORTH * step:
            return None
        text = (
            f"rank {slowest} works {own:.1f} ms of a step of {step:.1f} ms, the others "
            f"{statistics.median(row[1] for row in others):.1f} ms, and wait; at their pace the job would be "
            f"{step / (step - gain):.1f} times as fast"
        )
        return Verdict("slow", (slowest,), text)
