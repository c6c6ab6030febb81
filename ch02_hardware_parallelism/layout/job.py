"""What is to be trained, and one way to lay it out over the ranks; `refuse` says why a layout cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from common import profiling

from .cluster import Cluster
from .shape import Shape

RECOMPUTE = ("none", "selective", "full")
ZERO = ("DP", "ZeRO-1", "ZeRO-2", "ZeRO-3 (FSDP)")


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
    dp x cp ranks. sp: sequence parallelism, by which the tensor-parallel ranks also share out what lies between their
    matrix products. chunks > 1: interleaved pipeline, that many stages a GPU."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    zero: int = 0
    sp: bool = False
    micro_batch: int = 1
    recompute: str = "none"
    chunks: int = 1

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def shared(self) -> int:
        """Among how many ranks the activations between the tensor-parallel matrix products are shared out."""
        return self.tp if self.sp else 1

    def __str__(self) -> str:
        shown = [f"{ZERO[self.zero]} {self.dp}"] if self.dp > 1 or self.zero else []
        shown += [f"TP {self.tp}{' + SP' if self.sp else ''}"] if self.tp > 1 else []
        shown += [f"{name} {n}" for name, n in (("CP", self.cp), ("PP", self.pp)) if n > 1]
        return " × ".join(shown) or "one GPU"


def micro_batches(job: Job, layout: Layout) -> int:
    return job.batch // (layout.dp * layout.micro_batch)


def refuse(job: Job, layout: Layout) -> str | None:
    """Why a layout cannot be, or None."""
    shape, m = job.shape, job.batch / (layout.dp * layout.micro_batch)
    split_by_tp = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_key_value_heads,
        "columns of the MLP": shape.intermediate_size,
        "entries of the vocabulary": shape.vocab_size,
    }
    for what, count in split_by_tp.items():
        if count % layout.tp:
            return f"{count} {what} do not divide by TP {layout.tp}"
    if layout.sp and layout.tp == 1:
        return "sequence parallelism shares work out among tensor-parallel ranks, and TP is 1"
    if layout.dp > job.batch:
        return f"the batch of {job.batch} sequences allows only {job.batch} data-parallel ranks, this needs {layout.dp}"
    if m != int(m):
        return f"{job.batch} sequences do not divide into {layout.dp} ranks × micro-batches of {layout.micro_batch}"
    if layout.cp > 1 and job.seq_len % (2 * layout.cp):
        return f"{job.seq_len} tokens do not divide into {2 * layout.cp} chunks (2 a rank balance the causal mask)"
    tokens = job.seq_len // layout.cp
    if layout.sp and tokens % layout.tp:
        return f"{tokens} tokens of a sequence do not divide by TP {layout.tp}, as sequence parallelism needs"
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


def stage_parameters(shape: Shape, layers: int, is_first: bool, is_last: bool) -> float:
    """Parameters of a pipeline stage. With one stage all of the model's; a tied head on another stage is a copy."""
    if is_first and is_last:
        return shape.parameters
    ends = shape.head_parameters * (is_first + is_last) + shape.hidden_size * is_last
    return layers * shape.layer_parameters + ends
