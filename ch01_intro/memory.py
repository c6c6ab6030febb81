"""Where a training step's memory is: weights, gradients, optimizer state and saved activations, by kind of module.

Measured from the live tensors, computed from the model's shape, and followed over time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

KINDS = ("embedding", "attention", "MLP", "norms", "head", "loss", "other")
MIB = 2**20


def kind_of(path: str) -> str:
    """The kind of a module by its path in a Llama-style model; "" (no module is running) is the loss."""
    parts = path.split(".")
    if path == "":
        return "loss"
    if {"self_attn", "attn"} & set(parts) or "rotary" in parts[-1]:
        return "attention"
    if "mlp" in parts:
        return "MLP"
    for sign, kind in (("norm", "norms"), ("embed", "embedding"), ("lm_head", "head")):
        if sign in parts[-1]:
            return kind
    return "other"


@dataclass
class State:
    """Bytes that stay between steps (gradients: until zero_grad)."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, State]:
    """Bytes of the live parameters, gradients and optimizer moments, by kind of module; a tied weight counts once.

    A moment is a tensor of its parameter's shape: Adam has two. Its step counter, one number a tensor, is left out.
    """
    table: dict[str, State] = defaultdict(State)
    for name, parameter in model.named_parameters():
        row = table[kind_of(name.rpartition(".")[0])]
        row.parameters += parameter.nbytes
        row.gradients += parameter.grad.nbytes if parameter.grad is not None else 0
        row.optimizer += _moments(parameter, optimizer)
    return dict(table)


def _moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> int:
    held = optimizer.state.get(parameter, {}).values()
    return sum(t.nbytes for t in held if torch.is_tensor(t) and t.shape == parameter.shape and t.dim())


class SavedActivations:
    """Counts what autograd keeps for the backward pass of the forward that runs inside, by the module that saved it.

        with SavedActivations(model) as saved:
            loss = model(batch).sum()
        saved.bytes_by_module   ->  {"layers.0.mlp": 1048576, ..., "": 4096}      ("" is outside of all modules)

    Each storage counts once and whole, for the first module that saves it: a view keeps all of its storage alive, and
    three projections that save the same input hold it once. Parameters and buffers are left out, they live anyway; a
    low-precision copy that autocast makes of a parameter does count, for it lives from forward to backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes_by_module: dict[str, int] = defaultdict(int)
        self._running = [""]
        self._model = model
        # A saved storage stays alive until backward, so that its address is not given to another one meanwhile.
        self._seen = {_storage(t) for t in [*model.parameters(), *model.buffers()]}

    def __enter__(self) -> SavedActivations:
        self._hooks: list[Any] = []
        for path, module in self._model.named_modules():
            label = path or "(model)"
            self._hooks.append(module.register_forward_pre_hook(lambda *_, label=label: self._running.append(label)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))
        self._saving = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saving.__enter__()
        return self

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _storage(tensor)
        if key not in self._seen:
            self._seen.add(key)
            self.bytes_by_module[self._running[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def __exit__(self, *_: Any) -> None:
        self._saving.__exit__()
        for hook in self._hooks:
            hook.remove()

    def by_kind(self) -> dict[str, int]:
        table: dict[str, int] = defaultdict(int)
        for path, size in self.bytes_by_module.items():
            table[kind_of(path)] += size
        return dict(table)


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def activation_formula(config: Any, batch: int, seq_len: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that a Llama of Hugging Face transformers saves for backward, by kind of module. Weights are float32.

    Letters: N = batch x seq_len tokens, h hidden, f intermediate, V vocabulary, H heads of size D, K key-value heads,
    c bytes of `dtype`: 4, or 2 under autocast. What each module saves:

    * embedding   the token ids: 8 N
    * norm        its input x and x / rms(x), both float32 also under autocast, and 1 / rms: N (8 h + 4).
                  There are 2 a layer and one at the end.
    * attention   the input of q, k, v: one tensor of N h c in float32; under autocast each projection casts it anew and
                  saves its own copy, 3 N h c. Then q, k, v and the output as SDPA's flash kernels keep them,
                  N (2 H D + 2 K D) c, and the log-sum-exp, 4 N H. o_proj's input is SDPA's output: nothing new.
                  Once in the model: cos and sin of RoPE, 2 x 4 seq_len D.
    * MLP         its input for gate and up (N h c; under autocast 2 N h c), gate(x), silu(gate(x)), up(x) and their
                  product: 4 N f c
    * head        its input: N h c
    * loss        log-softmax of the logits, float32: 4 N V, and the targets: 8 N
    * autocast    besides, 2 bytes for each weight of a matrix: the copies that it keeps until the backward pass

    The starting point is Korthikanti et al., arXiv:2205.05198, section 4.1: s b h (34 + 5 a s / h) bytes for a GPT
    layer in 16 bits. What differs: SDPA keeps no score matrix (their 5 a s / h), there is no dropout (no masks), SwiGLU
    keeps four tensors of width f where GELU keeps two of 4 h, and transformers' RMSNorm keeps two float32 tensors where
    a fused layer norm keeps one in 16 bits. Where SDPA falls back to its math kernel (grouped heads in float32 on a
    GPU) it does keep scores, and the measured figure is larger.
    """
    tokens, hidden, wide = batch * seq_len, config.hidden_size, config.intermediate_size
    heads, layers, vocab = config.num_attention_heads, config.num_hidden_layers, config.vocab_size
    kv_heads = config.num_key_value_heads or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    cast = dtype != torch.float32
    size = dtype.itemsize
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)

    attention = tokens * hidden * size * (3 if cast else 1)
    attention += tokens * head_dim * (2 * heads + 2 * kv_heads) * size + 4 * tokens * heads
    attention += size * projections if cast else 0
    mlp = tokens * hidden * size * (2 if cast else 1) + 4 * tokens * wide * size
    mlp += size * 3 * hidden * wide if cast else 0
    return {
        "embedding": 8 * tokens,
        "attention": layers * attention + 2 * 4 * seq_len * head_dim,
        "MLP": layers * mlp,
        "norms": (2 * layers + 1) * tokens * (8 * hidden + 4),
        "head": tokens * hidden * size + (size * hidden * vocab if cast else 0),
        "loss": 4 * tokens * vocab + 8 * tokens,
    }


@dataclass(frozen=True)
class Mark:
    label: str
    seconds: float
    allocated: int
    gradients: int
    optimizer: int


class Timeline:
    """Allocated bytes during a few steps, with a mark at each phase boundary, module forward and finished gradient.

    On a GPU each mark reads the caching allocator (torch.cuda.memory_allocated). A CPU has no such counter, and its
    resident set is coarse and keeps freed pages: there the allocations and frees that torch.profiler records (with
    memory=True) are added up, from the model's own bytes at the start. What a library takes by itself (oneDNN's
    scratch space, Python) is not in it. Start it before the first step: a block that existed before the profiler did is
    not reported when it is freed.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device
        self.weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        self.source = "torch.cuda.memory_allocated" if device.type == "cuda" else "torch.profiler's CPU memory events"
        self.marks: list[Mark] = []
        self.points: list[tuple[float, int]] = []  # (seconds, allocated bytes), filled by read()

    def mark(self, label: str) -> None:
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        moments = sum(_moments(p, self.optimizer) for p in self.model.parameters())
        allocated = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        # The same moment in the trace, whose clock is not ours.
        with torch.profiler.record_function(f"mark {len(self.marks)}: {label}"):
            self.marks.append(Mark(label, time.perf_counter(), allocated, gradients, moments))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.mark(f"begin {name}")
        yield
        self.mark(f"end {name}")

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Mark after each module's forward, and in backward each time that a parameter's gradient is complete."""
        made: list[Any] = []
        for path, module in self.model.named_modules():
            made.append(module.register_forward_hook(lambda *_, path=path: self.mark(f"forward {path or '(model)'}")))
        for name, parameter in self.model.named_parameters():
            done = functools.partial(lambda name, _: self.mark(f"gradient {name}"), name)
            made.append(parameter.register_post_accumulate_grad_hook(done))
        yield
        for hook in made:
            hook.remove()

    def read(self, trace: Path) -> int:
        """Take times (and on a CPU the bytes) from the Chrome trace of the steps; the number of its timed events."""
        events = json.loads(trace.read_text())["traceEvents"]
        if self.device.type == "cuda":
            times, totals = [mark.seconds for mark in self.marks], [mark.allocated for mark in self.marks]
            self.points = [(t - times[0], total) for t, total in zip(times, totals, strict=True)]
        else:
            at = {e["name"]: e["ts"] / 1e6 for e in events if e.get("cat") == "user_annotation"}
            times = [at[f"mark {i}: {mark.label}"] for i, mark in enumerate(self.marks)]
            deltas = sorted((e["ts"] / 1e6, e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
            live = np.cumsum([self.weights, *(size for _, size in deltas)], dtype=np.int64)
            at_event = [times[0], *(t for t, _ in deltas)]
            self.points = [(t - times[0], int(n)) for t, n in zip(at_event, live, strict=True)]
            totals = [int(live[i]) for i in np.searchsorted(at_event[1:], times)]
        start = times[0]
        self.marks = [
            Mark(m.label, t - start, total, m.gradients, m.optimizer)
            for m, t, total in zip(self.marks, times, totals, strict=True)
        ]
        return sum(e.get("ph") == "X" for e in events)

    def spans(self) -> list[tuple[str, float, float]]:
        """(phase, begin, end) in seconds."""
        edges = [m for m in self.marks if m.label.startswith(("begin ", "end "))]  # phases do not nest: they alternate
        return [(a.label[6:], a.seconds, b.seconds) for a, b in zip(edges[::2], edges[1::2], strict=True)]


SHADES = {"data": "#eeeeee", "forward": "#dbe9f6", "backward": "#fde5d2", "communication": "#e4dcf1",
          "optimizer": "#dff0dc"}  # fmt: skip
LAYERS = (("weights", "#1f5c99"), ("optimizer state", "#2e7d32"), ("gradients", "#b3541e"),
          ("activations and temporaries", "#c9c9c9"))  # fmt: skip


def plot_timeline(timeline: Timeline, path: Path, title: str) -> None:
    """Weights, optimizer state, gradients and the rest stacked over time; the phases are shaded behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    seconds, total = (np.array(column) for column in zip(*timeline.points, strict=True))
    milliseconds = seconds * 1e3
    # gradients and moments are known at the marks; between two marks they are as at the one before
    latest = np.clip(np.searchsorted([m.seconds for m in timeline.marks], seconds, side="right") - 1, 0, None)
    gradients = np.array([m.gradients for m in timeline.marks])[latest]
    moments = np.array([m.optimizer for m in timeline.marks])[latest]
    for before, after in itertools.pairwise(timeline.marks):  # ... but for the first optimizer step, which makes them
        inside = (seconds >= before.seconds) & (seconds < after.seconds)
        growth = np.clip(total[inside] - before.allocated, 0, after.optimizer - before.optimizer)
        moments[inside] += np.maximum.accumulate(growth)  # zero_grad then frees gradients, not moments
    gradients = np.clip(gradients, 0, total - timeline.weights - moments)
    weights = np.full_like(gradients, timeline.weights)
    rest = np.clip(total - weights - gradients - moments, 0, None)

    figure, axes = pyplot.subplots(figsize=(10, 5.4), layout="constrained")
    for name, begin, end in timeline.spans():
        axes.axvspan(begin * 1e3, end * 1e3, color=SHADES.get(name, "#f5f5f5"), linewidth=0)
    floor = np.zeros(len(total))
    for (label, color), layer in zip(LAYERS, (weights, moments, gradients, rest), strict=True):
        top = floor + layer / MIB
        axes.fill_between(milliseconds, floor, top, step="post", color=color, linewidth=0, label=label)
        floor = top
    peak = int(np.argmax(total))
    axes.plot(milliseconds[peak], total[peak] / MIB, "v", color="black", label=f"peak {total[peak] / MIB:,.0f} MiB")
    axes.set(xlabel="ms since the first step began (with the profiler on)", ylabel="allocated (MiB)", ylim=(0, None))
    axes.set_xlim(0, timeline.marks[-1].seconds * 1e3)
    axes.set_title(f"{title}\nsource: {timeline.source}", fontsize=10)
    shown = dict.fromkeys(name for name, *_ in timeline.spans())
    phases = [patches.Patch(color=SHADES.get(name, "#f5f5f5"), label=name) for name in shown]
    layers = axes.get_legend_handles_labels()[0]
    figure.legend(handles=[*layers, *phases], loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
