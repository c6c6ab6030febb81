"""The cost of one layout: memory of the fullest GPU, bytes that a rank sends in a step, and the time of the step.

Letters: L layers, h hidden, f intermediate, V vocabulary, H heads and K key-value heads of size D; s sequence length,
b sequences of a micro-batch, m micro-batches of a step; t, c, p, d the degrees of tensor, context, pipeline and data
parallelism. Ranks are laid out as in Llama 3 (arXiv:2407.21783, section 3.3.2): TP innermost, then CP, PP, DP.

What the model leaves out: optimizer step, data loading, stragglers, and what concurrent collectives take from each
other. It ranks layouts; check_adviser.py shows how far its absolute figures are from published and measured ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ch02_hardware_parallelism.alpha_beta import AlphaBeta
from common import lm, profiling
from common.script import UserError

GIB = 2**30
# Of a data sheet's link rate, what a large collective reaches: ring all-reduce of 16 GiB on 8 H200 at 367.6 of 450 GB/s
# (stas00/ml-engineering, network benchmarks).
LINK_EFFICIENCY = 0.8
# Seconds a hop of a ring, protocol "simple": hwLat of NCCL's src/graph/tuning.cc, 3.4 us by NVLink, 14 us by network.
INTRA_LATENCY_S, INTER_LATENCY_S = 3.4e-6, 14e-6
# CUDA context, NCCL's buffers, cuBLAS workspaces, fragmentation: assumed, not measured.
RUNTIME_BYTES = 2 * GIB
# log-softmax, its gradient and the gradient of the logits, float32 each
LOGITS_BYTES = 12
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder by its dimensions, named as in a transformers config: lm.parameter_count and
    profiling.flops_per_token take one for the other."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None

    @property
    def width(self) -> int:
        """Size of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @cached_property
    def parameters(self) -> int:
        return lm.parameter_count(self)

    @cached_property
    def layer_parameters(self) -> int:
        ends = self.head_parameters * (1 if self.tie_word_embeddings else 2) + self.hidden_size  # and the last norm
        return (self.parameters - ends) // self.num_hidden_layers

    @property
    def head_parameters(self) -> int:
        """Of the output head; the embedding has as many."""
        return self.vocab_size * self.hidden_size


# arXiv:2407.21783, table 3, with Llama 3's vocabulary of 128,256
SHAPES = {
    "llama-8b": Shape("llama-8b", 128256, 4096, 14336, 32, 32, 8),
    "llama-70b": Shape("llama-70b", 128256, 8192, 28672, 80, 64, 8),
    "llama-405b": Shape("llama-405b", 128256, 16384, 53248, 126, 128, 8),
}


def find_shape(name: str) -> Shape:
    """A built-in shape, a preset of common.lm, or the config of a local folder.

    Raises:
        UserError: nothing of that name; the line lists those known.
    """
    if name in SHAPES:
        return SHAPES[name]
    if name in lm.PRESETS:
        fields = {key: value for key, value in lm.PRESETS[name].items() if key in Shape.__dataclass_fields__}
        return Shape(name, **fields)
    try:
        config = lm.config(name)
    except UserError:
        known = ", ".join([*SHAPES, *lm.PRESETS])
        raise UserError(f"no model {name!r}; take one of {known}, or a folder with config.json") from None
    names = [key for key in Shape.__dataclass_fields__ if key not in ("name", "head_dim")]
    return Shape(name, *(getattr(config, key) for key in names), head_dim=getattr(config, "head_dim", None))


@dataclass(frozen=True)
class Precision:
    """Bytes a parameter of weights, gradients and optimizer, and bytes an activation."""

    weights: int
    gradients: int
    optimizer: int
    activations: int


# bf16 weights and gradients, float32 master weights and two moments (ZeRO, arXiv:1910.02054, section 3.1). FSDP2 with
# float32 parameters holds 4 + 4 + 8: the same sum.
MIXED = Precision(2, 2, 12, 2)
FP32 = Precision(4, 4, 8, 4)


@dataclass(frozen=True)
class Gpu:
    """peak in FLOP/s (bf16, dense), memory in bytes as torch.cuda reports it, rates in bytes/s; the links' are of one
    GPU and one direction."""

    peak: float
    memory: float
    memory_rate: float
    intra: float
    inter: float
    efficiency: float


def _gpu(tflops: float, gib: float, memory_tb_s: float, intra_gb_s: float, inter_gb_s: float, efficiency: float) -> Gpu:
    return Gpu(tflops * 1e12, gib * GIB, memory_tb_s * 1e12, intra_gb_s * 1e9, inter_gb_s * 1e9, efficiency)


# The share of the peak at which a GPU trains where no communication is in the way. One source, and nothing tuned to the
# runs of published.toml: MFU of fms-fsdp's Llama 2 7B on 128 GPUs, compiled, whose communication FSDP hides
# (foundation-model-stack/fms-fsdp; PyTorch blog "Maximizing Training Throughput Using PyTorch FSDP and Torch.compile").
# A large matrix product alone reaches more, 794.5 of 989 TFLOP/s on an H100 (stas00/ml-engineering): a ceiling, not
# what a training step sustains.
HOPPER, AMPERE = 0.46, 0.68
# NVIDIA's data sheets of each GPU: peak, memory bandwidth, NVLink (half of the "total bandwidth", which counts both
# directions). Network: 400 Gb/s a GPU beside Hopper (DGX H100), 200 Gb/s beside Ampere (DGX A100). h100-96g is the
# HBM2e part of Meta's Grand Teton nodes, as torchtitan's benchmarks describe it.
GPUS = {
    "h100-80g": _gpu(989.4, 79.1, 3.35, 450, 50, HOPPER),
    "h100-96g": _gpu(989.4, 95.0, 2.4, 450, 50, HOPPER),
    "h200": _gpu(989.4, 139.8, 4.8, 450, 50, HOPPER),
    "a100-80g": _gpu(312, 79.2, 2.04, 300, 25, AMPERE),
    "a100-40g": _gpu(312, 39.4, 1.56, 300, 25, AMPERE),
}


@dataclass(frozen=True)
class Cluster:
    gpus: int
    gpus_per_node: int
    gpu: Gpu
    runtime_bytes: float = RUNTIME_BYTES
    intra_latency_s: float = INTRA_LATENCY_S
    inter_latency_s: float = INTER_LATENCY_S

    @classmethod
    def of(cls, gpu: str, gpus: int, gpus_per_node: int = 8) -> Cluster:
        return cls(gpus, min(gpus, gpus_per_node), GPUS[gpu])

    def per_node(self, ranks: int, stride: int) -> int:
        """How many of a group's ranks share a node, if its neighbours are `stride` ranks apart."""
        return math.gcd(ranks, self.gpus_per_node // stride) if stride < self.gpus_per_node else 1

    def gather(self, ranks: int, per_node: int) -> AlphaBeta:
        """Time of an all_gather or reduce_scatter by its largest buffer (an all_reduce takes two of them).

        A ring: each rank sends (ranks - 1) / ranks of the buffer. Where the group spans nodes, the `per_node` ranks on
        a node bring as many NICs, and the ring is as slow as its slowest link.
        """
        if ranks == 1:
            return AlphaBeta(0.0, 0.0)
        nodes = ranks // per_node
        rate = self.gpu.intra if nodes == 1 else min(self.gpu.intra, per_node * self.gpu.inter)
        between = nodes if nodes > 1 else 0  # hops of the ring that leave a node
        alpha = between * self.inter_latency_s + max(0, ranks - 1 - between) * self.intra_latency_s
        return AlphaBeta(alpha, (ranks - 1) / ranks / (rate * LINK_EFFICIENCY))

    def send(self, stride: int, ranks: int) -> AlphaBeta:
        """Time of a message to the next pipeline stage, `stride` ranks away."""
        inside = self.per_node(ranks, stride) == ranks
        alpha = self.intra_latency_s if inside else self.inter_latency_s
        return AlphaBeta(alpha, 1 / ((self.gpu.intra if inside else self.gpu.inter) * LINK_EFFICIENCY))


@dataclass(frozen=True)
class Job:
    """What is to be trained: `batch` sequences of `seq_len` tokens in a step."""

    shape: Shape
    cluster: Cluster
    seq_len: int
    batch: int
    precision: Precision = MIXED

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward, as PaLM counts them: causality is not subtracted. Flash attention skips the masked
        half of the scores, and reaches about half of a matrix product's rate on the rest."""
        return profiling.flops_per_token(self.shape, self.seq_len)


@dataclass(frozen=True)
class Layout:
    """dp x tp x pp x cp ranks. zero: 0 plain DP, 1 optimizer sharded, 2 and gradients, 3 and weights (FSDP), over all
    dp x cp ranks. TP always comes with sequence parallelism (the same bytes on the wire, less memory). chunks > 1:
    interleaved pipeline, that many stages a GPU."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 0
    micro_batch: int = 1
    recompute: str = "none"
    chunks: int = 1

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    def __str__(self) -> str:
        kind = "DP" if self.zero == 0 else f"ZeRO-{self.zero}"
        degrees = [(kind, self.dp), ("TP", self.tp), ("CP", self.cp), ("PP", self.pp)]
        shown = [f"{name} {n}" for name, n in degrees if n > 1] or ["one GPU"]
        return " × ".join(shown)


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


def micro_batches(job: Job, layout: Layout) -> int:
    return job.batch // (layout.dp * layout.micro_batch)


def refuse(job: Job, layout: Layout) -> str | None:
    """Why a layout cannot be, or None."""
    shape, m = job.shape, job.batch / (layout.dp * layout.micro_batch)
    for count, what in ((shape.num_attention_heads, "attention heads"), (shape.num_key_value_heads, "key-value heads")):
        if count % layout.tp:
            return f"{count} {what} do not divide by TP {layout.tp}"
    if layout.dp > job.batch:
        return f"the batch of {job.batch} sequences allows only {job.batch} data-parallel ranks, this needs {layout.dp}"
    if m != int(m):
        return f"{job.batch} sequences do not divide into {layout.dp} ranks × micro-batches of {layout.micro_batch}"
    if layout.cp > 1 and job.seq_len % (2 * layout.cp):
        return f"{job.seq_len} tokens do not divide into {2 * layout.cp} chunks (2 a rank balance the causal mask)"
    if stage_layers(shape, layout.pp) is None:
        return f"{shape.num_hidden_layers} layers do not divide into {layout.pp} stages"
    if layout.chunks > 1 and (m % layout.pp or _slots(shape, layout.pp) % layout.chunks):
        return (
            f"an interleaved schedule needs micro-batches in multiples of {layout.pp} and {layout.chunks} equal chunks"
        )
    return None


def _slots(shape: Shape, pp: int) -> int:
    layers = shape.num_hidden_layers
    return layers // pp if layers % pp == 0 else (layers + 2) // pp


def stage_layers(shape: Shape, pp: int) -> tuple[int, int, int] | None:
    """Layers of the first, a middle and the last stage: equal, or as in Llama 3 one less at both ends, where the
    embedding and the head are; None if neither divides."""
    layers = shape.num_hidden_layers
    if layers % pp == 0:
        return layers // pp, layers // pp, layers // pp
    if (layers + 2) % pp == 0 and (layers + 2) // pp > 1:
        slots = (layers + 2) // pp
        return slots - 1, slots, slots - 1
    return None


def layer_activations(
    shape: Shape, tp: int = 1, recompute: str = "none", size: int = 2, sequence_parallel: bool = True
) -> float:
    """Bytes a token that one layer keeps for backward, on one of `tp` ranks.

    Korthikanti et al. (arXiv:2205.05198) count s b h (10 + 24 / t) for a GPT layer with tensor parallelism, 34 / t with
    sequence parallelism besides, without the scores (section 4; flash attention keeps none). For Llama, in elements:

    * outside the tensor-parallel regions: the inputs and outputs of two norms, 4 h; no dropout masks
    * inside: q and attention's output 2 H D, k and v 2 K D, SwiGLU's gate, up and their product 3 f (SiLU is fused)
    * besides flash attention's log-sum-exp, 4 H bytes

    selective: what costs no matrix product to make again is not kept: the norms' outputs and SwiGLU's product.
    full: only the layer's input, h.
    """
    outside, inside = 4.0 * shape.hidden_size, 3.0 * shape.intermediate_size
    if recompute == "full":
        outside = float(shape.hidden_size)
        return size * outside / (tp if sequence_parallel else 1)
    if recompute == "selective":
        outside, inside = outside / 2, inside * 2 / 3
    inside += 2 * shape.width * (shape.num_attention_heads + shape.num_key_value_heads)
    return size * outside / (tp if sequence_parallel else 1) + (size * inside + 4 * shape.num_attention_heads) / tp


def in_flight(layout: Layout, m: int, first: bool) -> float:
    """Micro-batches whose activations a stage holds at once, as a share of its layers: p on 1F1B's first stage, 1 on
    its last; an interleaved schedule starts 2 (p - 1) + (v - 1) p + 1 chunks before its first backward (Megatron-LM,
    arXiv:2104.04473, section 2.2; Korthikanti et al., section 4.2.3: a factor 1 + (p - 1) / (p v))."""
    p, v = layout.pp, layout.chunks
    if v == 1:
        return min(m, p if first else 1)
    return min(m * v, (2 * (p - 1) if first else 0) + (v - 1) * p + 1) / v


def memory(job: Job, layout: Layout) -> dict[str, float]:
    """Bytes on the fullest GPU by component: the first stage has the most activations, the last one the logits.

    The components' peaks are added as if they came together; gradients grow while activations shrink, so that the true
    peak is a little lower.
    """
    first, _, last = stage_layers(job.shape, layout.pp) or (0, 0, 0)
    stages = [_stage_memory(job, layout, first, True, layout.pp == 1)]
    if layout.pp > 1:
        stages.append(_stage_memory(job, layout, last, False, True))
    return max(stages, key=lambda parts: sum(parts.values()))


def _stage_memory(job: Job, layout: Layout, layers: int, is_first: bool, is_last: bool) -> dict[str, float]:
    shape, precision, shards = job.shape, job.precision, layout.dp * layout.cp
    tokens = layout.micro_batch * job.seq_len / layout.cp
    matrices = stage_parameters(shape, layers, is_first, is_last) / layout.tp
    largest = max(shape.layer_parameters, shape.head_parameters) / layout.tp

    kept = layer_activations(shape, layout.tp, layout.recompute, precision.activations)
    activations = layers * kept * in_flight(layout, micro_batches(job, layout), is_first)
    if layout.recompute == "full":  # the layer that is being recomputed
        activations += layer_activations(shape, layout.tp, "none", precision.activations)
    # FSDP holds a layer whole and gathers the next; with sharded gradients one layer's are whole until reduced
    whole_weights = (shape.layer_parameters / layout.tp + largest) * precision.weights if layout.zero == 3 else 0
    whole_gradients = largest * precision.gradients if layout.zero >= 2 else 0
    return {
        "weights": matrices * precision.weights / (shards if layout.zero >= 3 else 1),
        "gradients": matrices * precision.gradients / (shards if layout.zero >= 2 else 1),
        "optimizer": matrices * precision.optimizer / (shards if layout.zero >= 1 else 1),
        "activations": tokens * activations,
        "logits": tokens * shape.vocab_size * LOGITS_BYTES / layout.tp if is_last else 0.0,
        "buffers": whole_weights + whole_gradients + job.cluster.runtime_bytes,
    }


def stage_parameters(shape: Shape, layers: int, is_first: bool, is_last: bool) -> float:
    """Parameters of a pipeline stage. With one stage all of the model's; a tied head on another stage is a copy."""
    if is_first and is_last:
        return shape.parameters
    ends = shape.head_parameters * (is_first + is_last) + shape.hidden_size * is_last
    return layers * shape.layer_parameters + ends


def plan(job: Job, layout: Layout) -> Plan:
    """Memory, bytes and time of a layout that `refuse` lets pass.

    Time of a step = m x (forward + backward + TP + CP + PP) + bubble + data-parallel communication that is not hidden.

    * forward, backward   FLOPs of the slowest stage / (peak x efficiency); full recomputation adds a forward, selective
                          the bytes of its element-wise work / memory bandwidth
    * TP (+ SP)           2 all_gathers and 2 reduce_scatters of b s h forward, as many backward, in each layer: exposed
    * CP                  all_gather of k and v forward, again backward, reduce_scatter of their gradients: exposed
    * PP                  an activation forward and its gradient backward at each chunk's boundary: exposed
    * bubble              (p - 1) / v micro-batches
    * DP, FSDP            behind the compute of the same phase: a gradient reduction behind the last backward (ZeRO-2
                          and 3: behind each), a gather behind the forward or backward that it is for. What takes longer
                          than that is exposed, and once a step one layer's share, which has nothing to hide behind.
    """
    shape, cluster, gpu, size = job.shape, job.cluster, job.cluster.gpu, job.precision.activations
    t, c, p, v, m = layout.tp, layout.cp, layout.pp, layout.chunks, micro_batches(job, layout)
    first, middle, last = stage_layers(shape, p) or (0, 0, 0)
    tokens = layout.micro_batch * job.seq_len / c

    head_flops = 2.0 * shape.head_parameters
    layer_flops = (job.flops_per_token / 3 - head_flops) / shape.num_hidden_layers
    stage_flops = max(middle * layer_flops if p > 2 else 0, first * layer_flops, last * layer_flops + head_flops)
    forward = tokens * stage_flops / t / (gpu.peak * gpu.efficiency)
    again = 0.0
    if layout.recompute == "full":
        again = tokens * middle * layer_flops / t / (gpu.peak * gpu.efficiency)
    elif layout.recompute == "selective":  # norms: read x, write y, twice; SwiGLU: read two, write one
        again = tokens * middle * size * (4 * shape.hidden_size + 3 * shape.intermediate_size) / t / gpu.memory_rate
    times = 3 if layout.recompute == "full" else 2  # forwards and backwards that communicate

    residual = tokens * shape.hidden_size * size
    tp_one = cluster.gather(t, cluster.per_node(t, 1))
    tp_count = middle * 4 * times
    keys_values = c * tokens * 2 * shape.num_key_value_heads * shape.width * size / t
    cp_one = cluster.gather(c, cluster.per_node(c, t))
    cp_count = middle * (times + 1)
    tp_s = tp_count * tp_one.time_s(residual) if t > 1 else 0.0
    cp_s = cp_count * cp_one.time_s(keys_values) if c > 1 else 0.0
    pp_s = 2 * v * cluster.send(t * c, p).time_s(residual / t) if p > 1 else 0.0
    micro = 3 * forward + again + tp_s + cp_s + pp_s

    matrices = stage_parameters(shape, middle, p == 1, p == 1) / t
    shards = layout.dp * c
    per_node = cluster.per_node(c, t) * cluster.per_node(layout.dp, t * c * p)
    dp_one = cluster.gather(shards, per_node)
    weights, gradients = matrices * job.precision.weights, matrices * job.precision.gradients
    # one collective a layer: alpha counts for each
    gather_s = middle * dp_one.time_s(weights / middle) if shards > 1 else 0.0
    reduce_s = middle * dp_one.time_s(gradients / middle) if shards > 1 else 0.0
    forward_busy = forward + (tp_s + cp_s + pp_s) / 2
    backward_busy = micro - forward_busy

    def exposed(communication: float, behind: float, times: int = 1) -> float:
        return max(times * (communication - behind), communication / middle)

    dp_s = {
        0: exposed(2 * reduce_s, backward_busy),
        1: exposed(reduce_s, backward_busy) + exposed(gather_s, forward_busy),
        2: exposed(reduce_s, backward_busy, m) + exposed(gather_s, forward_busy),
        3: exposed(gather_s, forward_busy, m) + exposed(gather_s + reduce_s, backward_busy, m),
    }[layout.zero]
    share = (shards - 1) / shards
    reductions, gathers = {0: (2, 0), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[layout.zero]
    return Plan(
        job,
        layout,
        memory=memory(job, layout),
        wire={
            "dp gradients": reductions * share * gradients,
            "fsdp gathers": gathers * share * weights,
            "tp": m * tp_count * residual * (t - 1) / t,
            "cp": m * cp_count * keys_values * (c - 1) / c,
            "pp": m * 2 * v * residual / t if p > 1 else 0.0,
        },
        seconds={
            "compute": m * 3 * forward,
            "recompute": m * again,
            "tp": m * tp_s,
            "cp": m * cp_s,
            "pp": m * pp_s,
            "bubble": (p - 1) / v * micro,
            "dp": dp_s,
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
