"""Where time and memory go: step phases, peak memory, traces, FLOPs and MFU."""

from __future__ import annotations

import contextlib
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30
PHASES = ("data", "forward", "backward", "communication", "optimizer")

# Dense peak rates in TFLOP/s, without sparsity: (name as torch.cuda reports it, rates). bf16 stands for fp16 too.
# Sources: NVIDIA's data sheets "H100 Tensor Core GPU", "H200", "A100", "L40S", "L4", "A10", "V100", "T4" and
# "DGX B200"; each sheet's "with sparsity" figure is halved. An SXM part is told from a PCIe one by its name.
PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bB200\b", {"bf16": 2250, "tf32": 1100, "fp32": 75}),
    (r"\bH[12]00 NVL", {"bf16": 835.5, "tf32": 417.5, "fp32": 60}),
    (r"\bH200\b", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"H100 PCIe", {"bf16": 756, "tf32": 378, "fp32": 51.2}),
    (r"H100", {"bf16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"A100", {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    (r"L40S", {"bf16": 362, "tf32": 183, "fp32": 91.6}),
    (r"\bL4\b", {"bf16": 121, "tf32": 60, "fp32": 30.3}),
    (r"\bA10\b", {"bf16": 125, "tf32": 62.5, "fp32": 31.2}),
    (r"V100", {"fp16": 125, "fp32": 15.7}),
    (r"\bT4\b", {"fp16": 65, "fp32": 8.1}),
)


class StepTimer:
    """Times the phases of a training step. On a GPU with CUDA events, which do not stop the device.

        with timer.phase("forward"):
            loss = model(batch)
        timer.end_step()
        timer.median_ms()   ->  {"data": 0.1, "forward": 31.0, ..., "step": 95.2}

    A phase may be entered several times in a step (accumulation): its times add up.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any, Any]] = []
        self._steps: list[list[tuple[str, Any, Any]]] = []
        self._ends: list[tuple[Any, Any]] = []  # begin and end of each step
        self._begin = self._mark()

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._open.append((name, begin, self._mark()))

    def end_step(self) -> None:
        """Close the step, which began where the one before ended."""
        end = self._mark()
        self._ends.append((self._begin, end))
        self._steps.append(self._open)
        self._begin, self._open = end, []

    def restart(self) -> None:
        """Begin the next step now: what came since the last one (a save, an evaluation) belongs to none."""
        self._begin = self._mark()

    def _ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3)

    def rows_ms(self, skip: int = 0) -> list[dict[str, float]]:
        """Milliseconds of each phase and of the whole step, one dict a step, the first `skip` steps left out."""
        if self._cuda:
            torch.cuda.synchronize()
        rows = []
        for phases, (step_begin, step_end) in list(zip(self._steps, self._ends, strict=True))[skip:]:
            row = {"step": self._ms(step_begin, step_end)}
            for name, begin, end in phases:
                row[name] = row.get(name, 0.0) + self._ms(begin, end)
            rows.append(row)
        return rows

    def median_ms(self, skip: int = 1) -> dict[str, float]:
        """Median of each phase over the steps after the first `skip` (warm-up); empty if there are none."""
        rows = self.rows_ms(skip)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}


@dataclass(frozen=True)
class Memory:
    """Bytes in use now and at most since the last reset. source: "cuda allocator" or "rss" (the whole process)."""

    current: int
    peak: int
    source: str

    @property
    def peak_gib(self) -> float:
        return self.peak / GIB


def memory(device: torch.device) -> Memory:
    """The CUDA caching allocator's figures on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), "cuda allocator")
    rss = psutil.Process().memory_info().rss
    peak = rss
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        peak = int(found[1]) * 1024 if found else rss
    return Memory(rss, max(rss, peak), "rss")


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak. On Linux the kernel resets VmHWM on a 5 written to clear_refs (man 5 proc)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken on this device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def trace(path: Path, device: torch.device, *, memory: bool = False) -> Iterator[list[str]]:
    """Profile the block with torch.profiler: a Chrome trace (chrome://tracing, Perfetto) and a table of the top 10.

    Yields a list into which the printed table is put when the block ends.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    table: list[str] = []
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profiler:
        yield table
    profiler.export_chrome_trace(str(path))
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table.append(profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40))


def flops_per_token(config: Any, seq_len: int, *, backward: bool = True) -> float:
    """Model FLOPs of a Llama-style decoder for one token, as PaLM counts them for MFU (arXiv:2204.02311, appendix B).

    Forward: 2 FLOPs for each weight of a matrix product (embedding look-ups cost none, the output head counts also when
    it is tied) plus 4 L H D T for the scores and the weighted sum of attention over T positions (L layers, H heads of
    size D; causality is not subtracted, as in the paper). Backward is twice the forward; recomputation does not count.
    """
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = config.num_key_value_heads or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * hidden * config.intermediate_size) + hidden * config.vocab_size
    forward = 2 * weights + 4 * layers * heads * head_dim * seq_len
    return float(forward * (3 if backward else 1))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Theoretical FLOP/s of the device for matrix products in `dtype`; None where the table does not know it."""
    if device.type != "cuda":
        return None
    fp32 = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    kinds = {torch.bfloat16: ["bf16"], torch.float16: ["fp16", "bf16"], torch.float32: [fp32]}.get(dtype, [])
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a slice of the device, of a size that the table does not know
        return None
    rates = next((rates for pattern, rates in PEAK_TFLOPS if re.search(pattern, name)), {})
    return next((rates[kind] * 1e12 for kind in kinds if kind in rates), None)


def mfu(tokens_per_s: float, flops_a_token: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """Model FLOPs utilisation of one device, 0..1; None for hardware of unknown peak."""
    peak = peak_flops(device, dtype)
    return None if peak is None else tokens_per_s * flops_a_token / peak
