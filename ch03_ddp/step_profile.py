"""Where the time of a training step goes, from a trace of torch.profiler: every moment belongs to one kind of work.

On a GPU the device's own timeline counts, on a CPU the thread that trains. A moment that several kinds share belongs to
the first of them in KINDS, so that `communication` is what no compute hides.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common import profiling

STEP, OPTIMIZER = "training step", "optimizer"  # names of torch.profiler.record_function
KINDS = ("matrix products", "attention", "optimizer", "other operators", "communication", "waiting")
ATTENTION = re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)
PRODUCT = re.compile(
    r"^aten::(mm|addmm|bmm|baddbmm|_int_mm)$|^mkldnn|gemm|gemv|cutlass|nvjet|xmma|triton_.*_mm", re.IGNORECASE
)
Span = tuple[float, float]  # begin and end, us


@dataclass(frozen=True)
class Profile:
    """Of some steps under the profiler. `ms` sums up to a step, `peak_bytes` is without what lived before it."""

    ms: dict[str, float]
    communication_ms: float  # of it, `ms["communication"]` shows
    peak_bytes: int
    table: str

    @property
    def hidden(self) -> float | None:
        """The share of the communication that runs beside compute."""
        return 1 - self.ms["communication"] / self.communication_ms if self.communication_ms else None


def profile(step: Callable[[], object], device: torch.device, steps: int = 3, keep: Path | None = None) -> Profile:
    """Run and trace `steps` steps. All ranks must: one that is traced alone is the one that the others wait for.

    Args:
        keep: where the Chrome trace stays (chrome://tracing, Perfetto).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        profiling.reset_peak_memory(device)
        with profiling.trace(path, device, memory=device.type == "cpu") as table:
            for _ in range(steps):
                with torch.profiler.record_function(STEP):
                    step()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
        events = json.loads(path.read_text())["traceEvents"]
    ms, communication_ms = split(events, on_gpu=device.type == "cuda")
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else highest(events)
    return Profile(ms, communication_ms, peak, table[0])


def highest(events: list[dict[str, Any]]) -> int:
    """The most bytes that were allocated at once, by the profiler's own record of allocations and frees."""
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(0, int(np.cumsum([size for _, size in changes], dtype=np.int64).max(initial=0)))


def split(events: list[dict[str, Any]], *, on_gpu: bool) -> tuple[dict[str, float], float]:
    """Milliseconds a step by kind, and of all communication, hidden or not."""
    timed = [e for e in events if e.get("ph") == "X"]
    steps = [e for e in timed if e["name"] == STEP and e.get("cat") == "user_annotation"]
    spans: dict[str, list[Span]] = {kind: [] for kind in KINDS}
    spans["step"] = [span(e) for e in steps]
    for event in timed:
        kind = gpu_kind(event) if on_gpu else cpu_kind(event, thread=steps[0]["tid"])
        if kind:
            spans[kind].append(span(event))
    edges = np.unique([edge for group in spans.values() for begin_end in group for edge in begin_end])
    lengths = np.diff(edges)
    inside = {name: covered(edges, group) for name, group in spans.items()}
    free, ms = inside["step"].copy(), {}
    for kind in KINDS[:-1]:
        ms[kind] = float(lengths[inside[kind] & free].sum()) / 1e3 / len(steps)
        free &= ~inside[kind]
    ms["waiting"] = float(lengths[free].sum()) / 1e3 / len(steps)
    return ms, float(lengths[inside["communication"] & inside["step"]].sum()) / 1e3 / len(steps)


def gpu_kind(event: dict[str, Any]) -> str | None:
    """Kernels and copies; a range of record_function comes with the device times of what was launched in it."""
    category, name = event.get("cat"), event["name"]
    if category == "gpu_user_annotation":
        return "optimizer" if name == OPTIMIZER else None
    if category not in ("kernel", "gpu_memcpy", "gpu_memset"):
        return None
    if "nccl" in name.lower():
        return "communication"
    if ATTENTION.search(name):
        return "attention"
    return "matrix products" if PRODUCT.search(name) else "other operators"


def cpu_kind(event: dict[str, Any], thread: int) -> str | None:
    """Operators of the thread that trains, and gloo's messages, which other threads carry."""
    name = event["name"]
    if name.startswith("gloo:"):
        return "communication"
    if event["tid"] != thread:
        return None
    if name == OPTIMIZER:
        return "optimizer"
    if event.get("cat") != "cpu_op":
        return None
    if ATTENTION.search(name):
        return "attention"
    return "matrix products" if PRODUCT.search(name) else "other operators"


def span(event: dict[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def covered(edges: npt.NDArray[np.float64], spans: list[Span]) -> npt.NDArray[np.bool_]:
    """Which of the stretches between the edges lie in one of the spans."""
    change = np.zeros(len(edges), dtype=np.int64)
    for begin, end in spans:
        change[np.searchsorted(edges, begin)] += 1
        change[np.searchsorted(edges, end)] -= 1
    return np.cumsum(change)[:-1] > 0
