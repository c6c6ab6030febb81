"""The cost of one layout: memory of the fullest GPU, bytes that a rank sends in a step, and the time of the step.

Letters: L layers, h hidden, f intermediate, V vocabulary, H heads and K key-value heads of size D; s sequence length,
b sequences of a micro-batch, m micro-batches of a step; t, c, p, d the degrees of tensor, context, pipeline and data
parallelism. Ranks are laid out as in Llama 3 (arXiv:2407.21783, section 3.3.2): TP innermost, then CP, PP, DP.

What the model leaves out: optimizer step, data loading, stragglers, and what concurrent collectives take from compute
and from each other. It ranks layouts; check_adviser.py shows how far its absolute figures are from published and
measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .cluster import GIB
from .communication import context_parallel, data_parallel, pipeline_parallel, rank_tokens, tensor_parallel
from .job import Job, Layout, micro_batches, stage_layers
from .memory import memory


@dataclass(frozen=True)
class Plan:
    """One layout with its costs: bytes a GPU and bytes a rank sends in a step by kind, seconds of a step by part."""

    job: Job
    layout: Layout
    memory: dict[str, float] = field(repr=False)
    wire: dict[str, float] = field(repr=False)
    seconds: dict[str, float] = field(repr=False)

    @cached_property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.job.cluster.gpu.memory

    @cached_property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_s_gpu(self) -> float:
        return self.job.batch * self.job.seq_len / self.step_s / self.job.cluster.gpus

    @property
    def mfu(self) -> float:
        return self.tokens_per_s_gpu * self.job.flops_per_token / self.job.cluster.gpu.peak

    @property
    def bubble(self) -> float:
        """The share of the pipeline's time in which a stage waits: (p - 1) / (v m + p - 1)."""
        layout = self.layout
        waits = layout.pp - 1
        return waits / (layout.chunks * micro_batches(self.job, layout) + waits)


def compute(job: Job, layout: Layout) -> dict[str, float]:
    """Seconds of a micro-batch on the slowest stage, forward and backward: its matrix products, what is recomputed, and
    what the tensor-parallel ranks all do alike.

    * matrix products   FLOPs / (peak x efficiency), backward twice the forward
    * recompute         full: a forward; selective: the bytes of the norms and of SwiGLU's product / memory bandwidth
    * replicated        without SP each rank makes the norms of all tokens, 1 / t of which were its share: forward reads
                        and writes h twice, backward reads 2 h and writes h twice. For the 22 B model of Korthikanti
                        et al. that is 0.4 ms a layer; SP saved them 0.6 of 19.6 ms, dropouts and all (table 4)
    """
    shape, gpu, t = job.shape, job.cluster.gpu, layout.tp
    first, middle, last = stage_layers(shape, layout.pp) or (0, 0, 0)
    tokens = rank_tokens(job, layout)
    flops_per_s = t * gpu.peak * gpu.efficiency
    bytes_of_h = tokens * middle * job.precision.activations * shape.hidden_size

    head_flops = 2.0 * shape.head_parameters
    layer_flops = (job.flops_per_token / 3 - head_flops) / shape.num_hidden_layers
    stage_flops = max(
        middle * layer_flops if layout.pp > 2 else 0, first * layer_flops, last * layer_flops + head_flops
    )
    again, norms = 0.0, 10 * bytes_of_h
    if layout.recompute == "full":
        again, norms = tokens * middle * layer_flops / flops_per_s, 14 * bytes_of_h
    elif layout.recompute == "selective":  # norms: read x, write y, twice; SwiGLU: read two, write one
        swiglu = 3 * bytes_of_h * shape.intermediate_size / shape.hidden_size
        again, norms = (4 * bytes_of_h + swiglu) / t / gpu.memory_rate, 14 * bytes_of_h
    return {
        "compute": 3 * tokens * stage_flops / flops_per_s,
        "recompute": again,
        "replicated": norms * (1 / layout.shared - 1 / t) / gpu.memory_rate,
    }


def plan(job: Job, layout: Layout) -> Plan:
    """Memory, bytes and time of a layout that `refuse` lets pass.

    Time of a step = m x (compute + TP + CP + PP) + bubble + data-parallel communication that is not hidden. The bubble
    is (p - 1) / v micro-batches.
    """
    m = micro_batches(job, layout)
    work = compute(job, layout)
    waits = {"tp": tensor_parallel(job, layout), "cp": context_parallel(job, layout)}
    waits["pp"] = pipeline_parallel(job, layout)
    parts = work | {name: traffic.seconds for name, traffic in waits.items()}
    micro = sum(parts.values())
    forward = work["compute"] / 3 + (micro - work["compute"] - work["recompute"]) / 2
    reductions, gathers = data_parallel(job, layout, forward, micro - forward)
    return Plan(
        job,
        layout,
        memory=memory(job, layout),
        wire={
            "dp gradients": reductions.sent,
            "fsdp gathers": gathers.sent,
            **{name: m * traffic.sent for name, traffic in waits.items()},
        },
        seconds={
            **{name: m * seconds for name, seconds in parts.items()},
            "bubble": (layout.pp - 1) / layout.chunks * micro,
            "dp": reductions.seconds + gathers.seconds,
        },
    )


def gib(size: float) -> str:
    """Bytes as GiB, three digits or so: 0.067, 65.1, 1,077."""
    value = size / GIB
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, units in the names."""
    layout = {name: getattr(plan.layout, name) for name in Layout.__dataclass_fields__}
    return {
        **layout,
        "fits": plan.fits,
        "memory_gib": plan.memory_bytes / GIB,
        "memory_gib_by_component": {name: size / GIB for name, size in plan.memory.items()},
        "wire_gib_per_step": {name: size / GIB for name, size in plan.wire.items()},
        "step_s": plan.step_s,
        "step_s_by_part": plan.seconds,
        "mfu": plan.mfu,
        "tokens_per_s_gpu": plan.tokens_per_s_gpu,
        "bubble": plan.bubble,
    }
