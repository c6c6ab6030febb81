"""What one rank sends, and how long its step waits for it, by kind of parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from .job import Job, Layout, micro_batches, stage_layers, stage_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, and seconds that it waits for them."""

    sent: float = 0.0
    seconds: float = 0.0


def slowest_layers(job: Job, layout: Layout) -> int:
    """Layers of a middle stage, which has the most."""
    return (stage_layers(job.shape, layout.pp) or (0, 0, 0))[1]


def rank_tokens(job: Job, layout: Layout) -> float:
    """Tokens of a micro-batch on a rank; tensor-parallel ranks have the same ones."""
    return layout.micro_batch * job.seq_len / layout.cp


def passes(layout: Layout) -> int:
    """Forwards and backwards of a micro-batch that communicate; full recomputation is a forward more."""
    return 3 if layout.recompute == "full" else 2


def residual_bytes(job: Job, layout: Layout) -> float:
    """Of a micro-batch's activations between two layers: b s h."""
    return rank_tokens(job, layout) * job.shape.hidden_size * job.precision.activations


def tensor_parallel(job: Job, layout: Layout) -> Traffic:
    """Of a micro-batch. A layer has two regions, and each pass all_reduces b s h once a region, exposed.

    With SP an all_gather at the region's begin and a reduce_scatter at its end take the all_reduce's place: a ring's
    all_reduce is these two, so that bytes and time are the same. But a rank then keeps 1 / t of a region's input, and
    gathers it once more in backward, behind the product that gives the input's gradient (Korthikanti et al.,
    arXiv:2205.05198, section 4.2.2): bytes, no time.
    """
    t, layers = layout.tp, slowest_layers(job, layout)
    if t == 1:
        return Traffic()
    waited, behind_compute = 4 * passes(layout) * layers, 2 * layers if layout.sp else 0
    size = residual_bytes(job, layout)
    one = job.cluster.gather(t, job.cluster.per_node(t, 1))
    return Traffic((waited + behind_compute) * size * (t - 1) / t, waited * one.time_s(size))


def context_parallel(job: Job, layout: Layout) -> Traffic:
    """Of a micro-batch: all_gather of keys and values in each pass, reduce_scatter of their gradients; exposed."""
    c, shape = layout.cp, job.shape
    if c == 1:
        return Traffic()
    count = slowest_layers(job, layout) * (passes(layout) + 1)
    numbers = 2 * shape.num_key_value_heads * shape.width / layout.tp
    size = c * rank_tokens(job, layout) * numbers * job.precision.activations
    one = job.cluster.gather(c, job.cluster.per_node(c, layout.tp))
    return Traffic(count * size * (c - 1) / c, count * one.time_s(size))


def pipeline_parallel(job: Job, layout: Layout) -> Traffic:
    """Of a micro-batch: at each chunk's boundary an activation forward, its gradient backward; exposed.

    Without SP each tensor-parallel rank has all of the activation, and sends it.
    """
    if layout.pp == 1:
        return Traffic()
    count, size = 2 * layout.chunks, residual_bytes(job, layout) / layout.shared
    one = job.cluster.send(layout.tp * layout.cp, layout.pp)
    return Traffic(count * size, count * one.time_s(size))


def data_parallel(job: Job, layout: Layout, forward_s: float, backward_s: float) -> tuple[Traffic, Traffic]:
    """Of a step: (reductions of gradients, gathers of weights), one collective a layer.

    They go behind the compute of the same phase, which takes `forward_s` and `backward_s` in a micro-batch: reductions
    behind the last backward (ZeRO-2 and 3: behind each), gathers behind the forward or backward that they are for. What
    takes longer is exposed, and once a step one layer's share, which has nothing to hide behind.
    """
    layers, m, zero = slowest_layers(job, layout), micro_batches(job, layout), layout.zero
    shards = layout.dp * layout.cp
    if shards == 1:
        return Traffic(), Traffic()
    cluster = job.cluster
    per_node = cluster.per_node(layout.cp, layout.tp) * cluster.per_node(layout.dp, layout.tp * layout.cp * layout.pp)
    one = cluster.gather(shards, per_node)
    parameters = stage_parameters(job.shape, layers, layout.pp == 1, layout.pp == 1) / layout.tp
    gradients, weights = parameters * job.precision.gradients, parameters * job.precision.weights
    reduce_s, gather_s = layers * one.time_s(gradients / layers), layers * one.time_s(weights / layers)

    def exposed(communication: float, behind: float, times: int = 1) -> float:
        return max(times * (communication - behind), communication / layers)

    # an all_reduce is a reduce_scatter and an all_gather: ZeRO-1 gathers weights in the place of gradients
    reduce_count, gather_count = {0: (2, 0), 1: (1, 1), 2: (m, 1), 3: (m, 2 * m)}[zero]
    reduce_waits = {
        0: exposed(2 * reduce_s, backward_s),
        1: exposed(reduce_s, backward_s),
        2: exposed(reduce_s, backward_s, m),
        3: exposed(gather_s + reduce_s, backward_s, m),  # backward gathers the weights anew
    }[zero]
    gather_waits = exposed(gather_s, forward_s, m if zero == 3 else 1) if zero else 0.0
    share = (shards - 1) / shards
    return (
        Traffic(reduce_count * share * gradients, reduce_waits),
        Traffic(gather_count * share * weights, gather_waits),
    )
