"""Which ceiling is a piece of work near: arithmetic, memory bandwidth, the network, or none of them?

The roofline model: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", CACM 52(4), 2009. Work of I FLOPs a byte reaches at most min(peak FLOP/s, I x bandwidth). The ceilings
here are measured on the machine itself, not taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ch01_intro.memory import activation_formula
from common import lm, profiling
from common.dist import Context

FAR = 0.25  # below this share of every ceiling the time goes elsewhere: launches, Python, waiting
COMPUTE, MEMORY, NETWORK = "compute bound", "memory-bandwidth bound", "network bound"
OVERHEAD = "overhead bound (far from every ceiling)"
# Adam's two moments 3 + 4, bias corrections, root and quotient 5, weight decay 2, update 2; clipping 3
OPTIMIZER_FLOPS = 19
Bytes = dict[str, float]


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best: FLOP/s of a matrix product, bytes/s of memory, bytes/s of an all_reduce."""

    flops: float
    memory: float
    network: float | None = None

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on arithmetic is the limit."""
        return self.flops / self.memory


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes to and from memory, bytes on the wire, and the seconds they took, of one device."""

    name: str
    seconds: float
    flops: float = 0
    moved: float = 0
    wire: float = 0

    @property
    def intensity(self) -> float:
        return self.flops / self.moved if self.moved else 0.0


def classify(work: Work, ceilings: Ceilings) -> tuple[str, str]:
    """(verdict, evidence in one line): the ceiling of which `work` reaches the largest share, if it is near any.

    A share above 100 % of the memory ceiling is possible: what fits a cache does not come from memory.
    """
    shares = {
        COMPUTE: work.flops / work.seconds / ceilings.flops,
        MEMORY: work.moved / work.seconds / ceilings.memory,
        NETWORK: work.wire / work.seconds / ceilings.network if ceilings.network else 0.0,
    }
    rates = {
        COMPUTE: f"{work.flops / work.seconds / 1e12:.3g} TFLOP/s, {shares[COMPUTE]:.0%} of the matmul ceiling",
        MEMORY: f"{work.moved / work.seconds / 2**30:.3g} GiB/s, {shares[MEMORY]:.0%} of the memory ceiling",
        NETWORK: f"{work.wire / work.seconds / 2**30:.3g} GiB/s, {shares[NETWORK]:.0%} of the all_reduce ceiling",
    }
    best = max(shares, key=lambda kind: shares[kind])
    counts = ((COMPUTE, work.flops), (MEMORY, work.moved), (NETWORK, work.wire))
    evidence = "; ".join(rates[kind] for kind, amount in counts if amount)
    if work.moved and work.flops:
        evidence += f"; {work.intensity:.3g} FLOPs a byte (ridge {ceilings.ridge:.3g})"
    if shares[MEMORY] > 1:
        evidence += "; above the memory ceiling: part of it stays in the caches"
    return (best if shares[best] >= FAR else OVERHEAD), evidence


def measure_ceilings(ctx: Context, dtype: torch.dtype) -> Ceilings:
    """Time a large matrix product, a large triad, and with several ranks a large all_reduce. All ranks take part."""
    local_ranks = ctx.launch.local_world_size
    flops, memory = matmul_rate(ctx.device, dtype), triad_rate(ctx.device, local_ranks)
    return Ceilings(flops, memory, allreduce_rate(ctx) if ctx.world_size > 1 else None)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * side**3 / best_seconds(lambda: torch.mm(a, b, out=product), device)


def triad_rate(device: torch.device, local_ranks: int = 1) -> float:
    """Bytes/s of STREAM's triad: two arrays read, one written; each larger than most caches, and small beside what is
    free."""
    size = min(2**30 if device.type == "cuda" else 2**27, profiling.available_memory(device) // (16 * local_ranks))
    x, y, z = (torch.ones(size // 4, device=device) for _ in range(3))
    return 3 * x.nbytes / best_seconds(lambda: torch.add(x, y, alpha=3.0, out=z), device)


def allreduce_rate(ctx: Context) -> float:
    """Bytes/s that each rank sends in an all_reduce of 64 MiB, 1 GiB on GPUs. With gloo on one host: loopback."""
    message = torch.zeros(2**28 if ctx.device.type == "cuda" else 2**24, device=ctx.device)
    # a fixed number of runs: all ranks must call equally often
    seconds = best_seconds(lambda: torch.distributed.all_reduce(message), ctx.device, budget_s=0, least=5)
    return wire_bytes(message.nbytes, ctx.world_size) / seconds


def wire_bytes(size: int, world_size: int) -> float:
    """Bytes that each rank sends in a ring all_reduce of `size` bytes."""
    return 2 * (world_size - 1) / world_size * size


def best_seconds(action: Callable[[], Any], device: torch.device, budget_s: float = 0.5, least: int = 3) -> float:
    """Shortest of several runs, after two to warm up: a ceiling is what the machine can do undisturbed."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least + 2 or time.perf_counter() - begin < budget_s:
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operators inside read and write. Eager mode runs each as a kernel of its own.

    Every tensor argument is read once and every result written once; views are free. An argument that is written in
    place counts again. Of an embedding only the rows looked up are read. What a cache keeps between two operators is
    counted as if it came from memory.
    """

    FREE = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in self.FREE:
            return out
        results = tree_leaves(out)
        if name == "embedding":
            self.bytes += 2 * _size(results)
            return out
        self.bytes += _size(tree_leaves((args, kwargs))) + _size(results)
        return out


def _size(leaves: list[Any]) -> int:
    # an expanded tensor has more elements than bytes
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in leaves if torch.is_tensor(t))


def training_flops(config: Any, batch: int, seq_len: int) -> dict[str, float]:
    """FLOPs of each phase of one step on one device (common.profiling.flops_per_token; backward is twice forward)."""
    forward = profiling.flops_per_token(config, seq_len, backward=False) * batch * seq_len
    optimizer = float(OPTIMIZER_FLOPS * lm.parameter_count(config))
    return {"forward": forward, "backward": 2 * forward, "optimizer": optimizer}


def training_bytes(config: Any, batch: int, seq_len: int, dtype: torch.dtype) -> Bytes:
    """The least that each phase must move, were all operators between two matrix products fused. P parameters,
    A the bytes of activation_formula.

    * forward    weights read (4 P), activations written and read by the next operator: 4 P + 2 A
    * backward   weights and saved activations read, the activations' gradients written and read, the weights' gradients
                 written: 4 P + 3 A + 4 P
    * optimizer  AdamW reads weight, gradient and two moments and writes all but the gradient: 28 P. Clipping reads the
                 gradients for their norm, and reads and writes them to scale: 12 P
    """
    parameters = lm.parameter_count(config)
    activations = sum(activation_formula(config, batch, seq_len, dtype).values())
    return {
        "forward": 4 * parameters + 2 * activations,
        "backward": 8 * parameters + 3 * activations,
        "optimizer": 40 * parameters,
    }


def inference_bytes(config: Any, batch: int, new: int, context: int, size: int) -> float:
    """The least that one forward pass of `new` tokens a sequence moves, with `context` tokens of each in the KV cache.

    Everything in elements of `size` bytes: the weights once (P; an untied embedding only by the rows looked up), the
    cache read (context) and written (new), and what each layer hands from one fused piece to the next, written and
    read: the residual stream twice, q, k, v and the output of attention, and the product inside the MLP. The output
    head is computed for the last position only.
    """
    parameters = lm.parameter_count(config)
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    passed_on = 2 * config.hidden_size + head_dim * (2 * heads + 2 * kv_heads) + config.intermediate_size
    activations = 2 * batch * new * config.num_hidden_layers * passed_on + 2 * batch * config.vocab_size
    return size * (parameters + activations) + kv_bytes(config, batch, context + new, size)


def inference_flops(config: Any, batch: int, new: int, context: int) -> float:
    """FLOPs of one forward pass of `new` tokens a sequence after `context` cached ones, logits for the last only."""
    per_token = profiling.flops_per_token(config, context + new, backward=False)
    return batch * (new * per_token - (new - 1) * 2 * config.hidden_size * config.vocab_size)


def kv_bytes(config: Any, batch: int, tokens: int, size: int) -> int:
    """Keys and values of `tokens` tokens a sequence: 2 x layers x key-value heads x head size x `size` bytes each."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * size * batch * tokens)


COLORS = ("#1f5c99", "#b3541e", "#2e7d32", "#6a4c93", "#8c6d1f", "#444444")
MARKERS = ("o", "s", "^", "D", "P", "X")


def draw(axes: Any, works: list[Work], ceilings: Ceilings) -> None:
    """The roofline and one point for each piece of work. What each is stands in the legend, where nothing overlaps."""
    shown = [work for work in works if work.flops and work.moved]
    low = min(*(work.intensity for work in shown), ceilings.ridge) / 4
    high = max(*(work.intensity for work in shown), ceilings.ridge) * 4
    roof = f"ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s (matmul), {ceilings.memory / 2**30:.3g} GiB/s (triad)"
    axes.plot([low, ceilings.ridge, high], [low * ceilings.memory, ceilings.flops, ceilings.flops], "k-", label=roof)
    axes.axvline(ceilings.ridge, color="#bbbbbb", linestyle=":", label=f"ridge: {ceilings.ridge:.3g} FLOPs a byte")
    for work, color, marker in zip(shown, COLORS, MARKERS, strict=False):
        verdict, _ = classify(work, ceilings)
        label = f"{work.name}: {work.seconds * 1e3:.3g} ms, {verdict.partition(' (')[0]}"
        point = (work.intensity, work.flops / work.seconds)  # hollow: two may lie on each other
        axes.plot(*point, marker, color=color, markersize=9, markerfacecolor="none", markeredgewidth=2, label=label)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs a byte", ylabel="FLOP/s")
    axes.grid(which="major", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)


def plot(works: list[Work], ceilings: Ceilings, path: Path, title: str) -> None:
    """The roofline as a PNG; work without FLOPs (communication) is told in the title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 6.2), layout="constrained")
    draw(axes, works, ceilings)
    notes = [f"{w.name}: {w.seconds * 1e3:.3g} ms, {classify(w, ceilings)[0]}" for w in works if not w.flops]
    axes.set_title("\n".join([title, *notes]), fontsize=10)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
