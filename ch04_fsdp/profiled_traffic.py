"""Which collectives a step makes and how many bytes each moves, whoever calls them: FSDP, DDP's C++ reducer, DeepSpeed.

All of them reach torch's process groups through its dispatcher, where the profiler sees them with their shapes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = {  # name in the dispatcher: the collective, and which argument is the whole tensor (not a rank's part)
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
}
ELEMENT_BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "long": 8, "int": 4}


@dataclass(frozen=True)
class Collective:
    """bytes: of the whole tensor: what is summed, the result of a gather, the input of a reduce-scatter."""

    kind: str
    bytes: int

    def wire_bytes(self, ranks: int) -> float:
        """What a rank sends at least, as a ring does: a sum is a reduce-scatter and a gather."""
        return (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks * self.bytes


def record(action: Callable[[], object]) -> list[Collective]:
    """The collectives of this rank while `action` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    calls = [event for event in events if event.get("name") in KINDS]
    return [_collective(event["name"], event["args"]) for event in sorted(calls, key=lambda event: event["ts"])]


def _collective(name: str, told: dict[str, Any]) -> Collective:
    kind, position = KINDS[name]
    shape, type_name = told["Input Dims"][position], told["Input type"][position]
    shapes = shape if shape and isinstance(shape[0], list) else [shape]  # a list of tensors, or one
    # Of a list the profiler does not know the type: what is summed as a list here is float32, or one flag.
    return Collective(kind, sum(map(math.prod, shapes)) * ELEMENT_BYTES.get(type_name, 4))


def formula(name: str, *, summed: int, gathered: int, ranks: int, micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step by each strategy, whatever else travels (the norm, flags) left out.

    Args:
        summed: bytes of all gradients as they travel.
        gathered: bytes of all parameters as they travel.
    """
    part = (ranks - 1) / ranks
    reduce, gather = part * summed, part * gathered
    return {
        "ddp": 2 * reduce,
        "fsdp-grad": micro_batches * (gather + reduce),
        "fsdp-full": micro_batches * (2 * gather + reduce),
        "zero-1": 2 * reduce + gather,  # a reduce-scatter would do, DeepSpeed sums whole buckets
        "zero-2": micro_batches * 2 * reduce + gather,
        "zero-3": micro_batches * (2 * gather + reduce),
        "zero-3-keep": micro_batches * (gather + reduce),
    }[name]
