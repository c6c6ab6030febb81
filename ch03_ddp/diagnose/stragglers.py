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
SLOWER = 1.5  # times the own work of the others' median
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

    def medians_ms(self) -> tuple[float, float]:
        """Of the steps after the warm-up: own work, and the whole step."""
        if self._cuda:
            torch.cuda.synchronize()
        rows = []
        for begin, end, waits in self._steps[WARM_UP:]:
            whole = self._ms(begin, end)
            rows.append((whole - sum(self._ms(*wait) for wait in waits), whole))
        own, whole = zip(*rows, strict=True) if rows else ((0.0,), (0.0,))
        return statistics.median(own), statistics.median(whole)

    def straggler(self, ctx: Context) -> Verdict | None:
        """The rank that all others wait for, if there is one. Every rank must call it."""
        said = [json.loads(text) for text in ctx.exchange("diagnose: own work", json.dumps(self.medians_ms()))]
        own = {rank: ms for rank, (ms, _) in enumerate(said)}
        slowest = max(own, key=lambda rank: own[rank])
        others = [ms for rank, ms in own.items() if rank != slowest]
        step = statistics.median(whole for _, whole in said)
        if not others or step <= 0:
            return None
        gain = own[slowest] - max(others)  # until the next slow one is what all wait for
        if own[slowest] < SLOWER * statistics.median(others) or gain < WORTH * step:
            return None
        text = (
            f"rank {slowest} works {own[slowest]:.1f} ms of a step of {step:.1f} ms, the others "
            f"{statistics.median(others):.1f} ms, and wait; at their pace the job would be "
            f"{step / (step - gain):.1f} times as fast"
        )
        return Verdict("slow", (slowest,), text)
