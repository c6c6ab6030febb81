"""What DDP's reducer does in a step, recorded on a live model: when each gradient is ready and each bucket flies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp import hooks


class Clock:
    """Marks in the order of the device's work: CUDA events, which do not stop it, or the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        if not self.cuda:
            return (end - begin) * 1e3
        end.synchronize()
        return begin.elapsed_time(end)


@dataclass
class Bucket:
    """One bucket of one step. ready_ms: its last gradient is there. Times count from the step's begin."""

    index: int
    names: list[str]
    bytes: int
    is_last: bool
    launched: Any
    finished: Any = None
    ready_ms: float = 0.0
    launched_ms: float = 0.0
    finished_ms: float = 0.0

    def hidden(self, backward_ends_ms: float) -> float:
        """The share of its flight that lies under backward."""
        flight = self.finished_ms - self.launched_ms
        return max(0.0, min(self.finished_ms, backward_ends_ms) - self.launched_ms) / flight if flight else 1.0


@dataclass
class Step:
    """A recorded step, in ms from its begin. backward_ms: the last gradient is there, and backward only waits."""

    forward_ms: float
    backward_ms: float
    end_ms: float
    gradients_ms: dict[str, float]
    buckets: list[Bucket]

    def hidden(self) -> float:
        """The share of all buckets' time in flight that lies under backward."""
        flights = [b.finished_ms - b.launched_ms for b in self.buckets]
        hidden = sum(b.hidden(self.backward_ms) * flight for b, flight in zip(self.buckets, flights, strict=True))
        return hidden / sum(flights)


class Recorder:
    """Watches a DDP model through a hook of each gradient, and DDP's own hook of each bucket, which changes no bit."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.ddp, self.clock = ddp, Clock(ddp.device)
        self.name_of = {p: name for name, p in ddp.module.named_parameters() if p.requires_grad}
        self.gradients: dict[str, Any] = {}
        self.buckets: list[Bucket] = []
        self.buffers: list[torch.Tensor] = []  # the buckets' flat tensors
        for parameter in self.name_of:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        ddp.register_comm_hook(self, Recorder._on_bucket)

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        self.gradients[self.name_of[parameter]] = self.clock.mark()  # type: ignore[index]

    def _on_bucket(self, bucket):  # no annotations: DDP checks them, and would find strings
        names, size = [self.name_of[p] for p in bucket.parameters()], bucket.buffer().nbytes
        seen = Bucket(bucket.index(), names, size, bucket.is_last(), self.clock.mark())
        self.buckets.append(seen)
        self.buffers.append(bucket.buffer())

        def landed(done):
            seen.finished = self.clock.mark()
            return done.value()

        return hooks.identity(self.ddp.process_group, bucket).then(landed)

    def clear(self) -> None:
        self.gradients, self.buckets, self.buffers = {}, [], []

    def step(self, begin: Any, forward: Any, end: Any) -> Step:
        """What was recorded since `clear`, given the marks at the begin, after forward, and after backward."""
        times = {name: self.clock.ms(begin, mark) for name, mark in self.gradients.items()}
        for bucket in self.buckets:
            bucket.ready_ms = max(times[name] for name in bucket.names if name in times)
            bucket.launched_ms = self.clock.ms(begin, bucket.launched)
            bucket.finished_ms = self.clock.ms(begin, bucket.finished)
        forward_ms, end_ms = self.clock.ms(begin, forward), self.clock.ms(begin, end)
        return Step(forward_ms, max(times.values()), end_ms, times, self.buckets)


def expected_buckets(ddp: DistributedDataParallel, ready: Sequence[str]) -> list[list[str]]:
    """The buckets that DDP's own rule makes of parameters that become ready in this order.

    It puts one after the other into a bucket until that holds bucket_cap_mb or more, and then begins the next. With the
    default cap of 25 MiB the first bucket is closed at 1 MiB already, so that something leaves early.
    """
    by_name = dict(ddp.module.named_parameters())
    caps = [ddp._bucket_config.first_bucket_bytes_cap, ddp._bucket_config.bucket_bytes_cap]
    parameters, numbers = [by_name[name] for name in ready], list(range(len(ready)))
    filled, _ = td._compute_bucket_assignment_by_size(parameters, caps, [False] * len(ready), numbers)
    return [[ready[number] for number in bucket] for bucket in filled]


def storage_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Memory behind these tensors: a storage that several share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def draw(step: Step, title: str, path: Path) -> None:
    """The step as a time line: compute above, below it each bucket as it fills, waits and flies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blue, orange, green, grey = "#4c78a8", "#f2a154", "#2e7d32", "#d9d9d9"
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.36 * len(step.buckets)), layout="constrained")
    axes.barh(0, step.forward_ms, color=blue, label="forward")
    axes.barh(0, step.backward_ms - step.forward_ms, left=step.forward_ms, color=orange, label="backward")
    axes.barh(0, step.end_ms - step.backward_ms, left=step.backward_ms, color=grey, hatch="//", label="waits")
    for row, bucket in enumerate(step.buckets, 1):
        first = min(step.gradients_ms[name] for name in bucket.names if name in step.gradients_ms)
        axes.barh(row, bucket.launched_ms - first, left=first, height=0.25, color=grey)
        flight = bucket.finished_ms - bucket.launched_ms
        label = "bucket in flight" if row == 1 else None
        axes.barh(row, flight, left=bucket.launched_ms, height=0.7, color=green, alpha=0.8, label=label)
        text = f" {bucket.bytes / 2**20:.1f} MiB, {bucket.hidden(step.backward_ms):.0%} hidden"
        axes.text(bucket.finished_ms, row, text, va="center", fontsize=8)
        marks = [step.gradients_ms[name] for name in bucket.names if name in step.gradients_ms]
        label = "a gradient is ready" if row == 1 else None
        axes.plot(marks, [row] * len(marks), "|", color="black", markersize=7, label=label)
    axes.axvline(step.backward_ms, color="black", linewidth=0.8, linestyle=":")
    rows = ["compute", *(f"bucket {bucket.index}" for bucket in step.buckets)]
    axes.set(yticks=range(len(rows)), yticklabels=rows, xlabel="ms")
    axes.set_xlim(0, step.end_ms * 1.2)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(loc="outside lower center", frameon=False, ncols=5, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
