"""Bytes on the fullest GPU: states, activations, logits, buffers."""

from __future__ import annotations

from .job import Job, Layout, micro_batches, stage_layers, stage_parameters
from .shape import Shape

# log-softmax, its gradient and the gradient of the logits, float32 each
LOGITS_BYTES = 12


def layer_activations(shape: Shape, tp: int = 1, sp: bool = False, recompute: str = "none", size: int = 2) -> float:
    """Bytes a token that one layer keeps for backward, on one of `tp` ranks.

    Korthikanti et al. (arXiv:2205.05198, section 4) count s b h (10 + 24 / t) for a GPT layer with tensor parallelism,
    s b h 34 / t with sequence parallelism besides; their 5 a s / (h t), the scores, flash attention does not keep. The
    10 lie outside the regions that tensor parallelism splits, whole on each rank. For Llama, in elements:

    * outside the tensor-parallel regions: the inputs and outputs of two norms, 4 h; no dropout masks
    * inside: q and attention's output 2 H D, k and v 2 K D, SwiGLU's gate, up and their product 3 f (SiLU is fused)
    * besides flash attention's log-sum-exp, 4 H bytes

    selective: what costs no matrix product to make again is not kept: the norms' outputs and SwiGLU's product.
    full: only the layer's input, h.
    """
    outside, inside = 4.0 * shape.hidden_size, 3.0 * shape.intermediate_size
    shared = tp if sp else 1
    if recompute == "full":
        return size * shape.hidden_size / shared
    if recompute == "selective":
        outside, inside = outside / 2, inside * 2 / 3
    inside += 2 * shape.width * (shape.num_attention_heads + shape.num_key_value_heads)
    return size * outside / shared + (size * inside + 4 * shape.num_attention_heads) / tp


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

    kept = layer_activations(shape, layout.tp, layout.sp, layout.recompute, precision.activations)
    activations = layers * kept * in_flight(layout, micro_batches(job, layout), is_first)
    if layout.recompute == "full":  # the layer that is being recomputed
        activations += layer_activations(shape, layout.tp, layout.sp, "none", precision.activations)
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
