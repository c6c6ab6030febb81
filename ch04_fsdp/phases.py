"""The memory of a training step, phase by phase: what is held when each ends, and the peak inside it.

line = MemoryLine(ctx.device)
with line.hooks(model):         # a mark after each layer's forward, and when its backward begins
    step.backward(...)
    line.mark("backward embed_tokens")
line.moments                    # [Moment("forward layers.0", seconds=..., held=..., peak=..., malloc=...), ...]

A GPU: torch's caching allocator (memory_allocated, and the peak since the last mark). A CPU: the resident set and its
high-water mark, which the kernel keeps and which starts anew at each mark; and what malloc has given out.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ch01_intro.memory import SavedActivations, State, _storage, kind_of
from ch04_fsdp import resident
from common import profiling

MIB = 2**20
COLORS = {"build": "#eeeeee", "forward": "#dbe9f6", "loss": "#fff3bf", "backward": "#fde5d2", "clip": "#e4dcf1",
          "optimizer": "#dff0dc", "zero_grad": "#dff0dc"}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """The end of a phase. Bytes are counted from when the line began."""

    label: str
    seconds: float
    held: int
    peak: int  # inside the phase
    malloc: int  # exact where the resident set has whole pages only; on a GPU the same as held


class MemoryLine:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[Moment] = []
        self.source = "torch's CUDA allocator" if device.type == "cuda" else "resident set (VmRSS, VmHWM)"
        self._begin = time.perf_counter()
        self._base = self._read()
        profiling.reset_peak_memory(device)

    def _read(self) -> tuple[int, int, int]:
        memory = profiling.memory(self.device)
        malloc = memory.current if self.device.type == "cuda" else resident.malloc_bytes() or memory.current
        return memory.current, memory.peak, malloc

    def mark(self, label: str) -> None:
        """The phase that began at the mark before ends here, and is called so."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        held, peak, malloc = self._read()
        at = time.perf_counter() - self._begin
        base, _, base_malloc = self._base
        self.moments.append(Moment(label, at, held - base, max(peak, held) - base, malloc - base_malloc))
        profiling.reset_peak_memory(self.device)

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Marks in a transformers decoder, made after sharding: FSDP's own hooks come first."""
        parts: list[tuple[str, Any]] = [("embed_tokens", model.model.embed_tokens)]  # type: ignore[union-attr]
        parts += [(f"layers.{i}", layer) for i, layer in enumerate(model.model.layers)]  # type: ignore
        names = [name for name, _ in parts] + ["head"]
        made = []
        for number, (name, module) in enumerate([*parts, ("head", model)]):
            ends = "loss" if name == "head" else f"backward {names[number + 1]}"
            made.append(module.register_forward_hook(self._after(name, ends)))
        try:
            yield
        finally:
            for hook in made:
                hook.remove()

    def _after(self, name: str, ends: str) -> Any:
        """A forward hook: marks the end of this module's forward, and of `ends` when its output's gradient is there."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.mark(f"forward {name}")
            out = output if torch.is_tensor(output) else getattr(output, "logits", None)
            out = output[0] if out is None else out
            if out.requires_grad:
                out.register_hook(lambda _: self.mark(ends))

        return hook

    def kept(self, prefix: str = "forward layers.") -> list[int]:
        """Bytes that each layer's forward left behind, in the last micro-batch: activations, and weights not freed."""
        found = {
            after.label: after.malloc - before.malloc
            for before, after in itertools.pairwise(self.moments)
            if after.label.startswith(prefix)
        }
        return list(found.values())

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.peak)


class ShardedActivations(SavedActivations):
    """Chapter 1's count of what autograd saves, by module, where weights are gathered: those are not activations.

    What selective checkpointing keeps (recompute "ops") lies in a place of its own and is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(nn.Module())
        self._model = model

    def __enter__(self) -> ShardedActivations:
        self._seen = {_storage(buffer) for buffer in self._model.buffers()}
        self._modules = {path or "(model)": module for path, module in self._model.named_modules()} | {"": None}
        super().__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        module = self._modules[self._running[-1]]
        own = [] if module is None else [p for p in module.parameters(recurse=False) if not isinstance(p, DTensor)]
        if any(_storage(parameter) == _storage(tensor) for parameter in own):
            return tensor
        return super()._pack(tensor)


def local_bytes(tensor: torch.Tensor | None) -> int:
    if tensor is None:
        return 0
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, State]:
    """Bytes that this rank holds of parameters, gradients and moments, by kind of module; a tied weight counts once."""
    table: dict[str, State] = defaultdict(State)
    for name, parameter in model.named_parameters():
        row, state = table[kind_of(name.rpartition(".")[0])], optimizer.state.get(parameter, {})
        row.parameters += local_bytes(parameter)
        row.gradients += local_bytes(parameter.grad)
        row.optimizer += sum(local_bytes(t) for t in state.values() if torch.is_tensor(t) and t.dim())
    return dict(table)


def plot(moments: Sequence[Moment], path: Path, title: str) -> None:
    """What is held at each mark, and the peaks between, with the phases shaded behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    ends = np.array([moment.seconds - moments[0].seconds for moment in moments]) * 1e3
    begins = np.concatenate([[0], ends[:-1]])  # what was before the first mark (the build) has no width
    held, peaks = (np.array([getattr(m, name) for m in moments]) / MIB for name in ("held", "peak"))
    figure, axes = pyplot.subplots(figsize=(10, 4.8), layout="constrained")
    for moment, begin, end in zip(moments, begins, ends, strict=True):
        axes.axvspan(begin, end, color=COLORS.get(moment.label.split()[0], "#f5f5f5"), linewidth=0)
    axes.fill_between(ends, held, color="#1f5c99", alpha=0.35, linewidth=0, label="held at the end of a phase")
    axes.plot(ends, held, color="#1f5c99", linewidth=1.2)
    axes.hlines(peaks, begins, ends, color="#b3541e", linewidth=2, label="peak inside a phase")
    top = int(np.argmax(peaks))
    axes.plot((begins[top] + ends[top]) / 2, peaks[top], "v", color="black",
              label=f"{peaks[top]:,.0f} MiB in {moments[top].label}")  # fmt: skip
    axes.set(xlabel="ms (with the marks' own time)", ylabel="MiB", ylim=(0, None), xlim=(begins[0], ends[-1]))
    axes.set_title(title, fontsize=10)
    kinds = dict.fromkeys(moment.label.split()[0] for moment in moments[1:])
    shades = [patches.Patch(color=COLORS.get(kind, "#f5f5f5"), label=kind) for kind in kinds]
    lines = axes.get_legend_handles_labels()[0]
    figure.legend(handles=[*lines, *shades], loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
