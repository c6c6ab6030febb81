"""What a memory budget is computed for: how a model is trained, and which part of it one rank then has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ch02_hardware_parallelism.schedules import peak_live, schedule
from ch04_fsdp import recompute
from ch04_fsdp.activations import head_dim
from ch04_fsdp.sharding import OFFLOADS
from ch04_fsdp.sharding import STRATEGIES as FSDP
from common.script import UserError

ZERO = ("zero1", "zero2", "zero3")
STRATEGIES = (*FSDP, *ZERO)
NO_PIPELINE = ("zero2", "zero3")  # DeepSpeed's engine asserts so: stages sum whole gradients over their micro-batches
OPTIMIZER_BYTES = {"adamw": 8, "adamw-8bit": 2, "momentum": 4, "sgd": 0}  # moments, a parameter


@dataclass(frozen=True)
class Setting:
    """How a model is trained. ranks = replicas x tp x pp; one of `strategy` spreads it over the replicas."""

    strategy: str = "full"
    ranks: int = 1
    shard_ranks: int | None = None  # hybrid: ranks that share one copy; None: all
    tp: int = 1
    pp: int = 1
    micro_batch: int = 1
    seq_len: int = 1024
    accumulate: int = 1  # micro-batches a step
    sync_each: bool = False  # FSDP: reduce after each of them
    dtype: torch.dtype = torch.bfloat16
    recompute: str = "none"
    offload: str = "none"
    prefetch: int = 1
    optimizer: str = "adamw"
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UserError(f"no strategy {self.strategy!r}; one of {', '.join(STRATEGIES)}")
        if self.optimizer not in OPTIMIZER_BYTES:
            raise UserError(f"no optimizer {self.optimizer!r}; one of {', '.join(OPTIMIZER_BYTES)}")
        if self.offload not in OFFLOADS:
            raise UserError(f"cannot offload to {self.offload!r}; one of {', '.join(OFFLOADS)}")
        if self.offload != "none" and self.strategy == "replicate":
            raise UserError("replicate has no shards to offload; take another strategy")
        if self.pp > 1 and self.strategy in NO_PIPELINE:
            raise UserError(f"{self.strategy} does not go with a pipeline of {self.pp} stages; take zero1, or pp 1")
        recompute.check(self.recompute)
        if self.ranks % (self.tp * self.pp):
            raise UserError(f"{self.ranks} ranks do not divide into tp {self.tp} x pp {self.pp}; change one of them")
        if self.shards < 1 or self.replicas % self.shards:
            raise UserError(
                f"{self.replicas} replicas do not divide into groups of {self.shards}; change --shard-ranks"
            )

    @property
    def replicas(self) -> int:
        """Ranks with the same part of the model and other data."""
        return self.ranks // (self.tp * self.pp)

    @property
    def shards(self) -> int:
        """N: over how many ranks the states are spread."""
        if self.strategy == "replicate":
            return 1
        return (self.shard_ranks or self.replicas) if self.strategy.startswith("hybrid") else self.replicas

    @property
    def is_fsdp(self) -> bool:
        return self.strategy in FSDP and self.strategy != "replicate"

    @property
    def reshards(self) -> bool:
        return self.strategy in ("full", "hybrid", "zero3")

    @property
    def precision(self) -> str:
        """See activations.py."""
        if self.dtype == torch.float32:
            return "fp32"
        return "autocast" if self.strategy == "replicate" else "low"

    @property
    def weight(self) -> int:
        """Bytes of a weight as the matrix products take it from the strategy (autocast's copies come on top)."""
        return 2 if self.precision == "low" else 4


@dataclass(frozen=True)
class Part:
    """Parameters of one rank's part of the model: of pipeline stage `stage`, cut by tensor parallelism."""

    embedding: int  # 0 where another stage has it
    layer: int  # of one layer
    layers: int
    head: int  # with the final norm; of a tied head only the norm
    matrices: int  # of all of them those that autocast copies
    tied: bool

    @property
    def total(self) -> int:
        return self.embedding + self.layer * self.layers + self.head

    @property
    def first_unit(self) -> int:
        """What FSDP gathers before the first layer: the embedding. With a tied head it stays to the end (the root)."""
        return self.embedding + (self.head if self.tied else 0)

    @property
    def last_unit(self) -> int:
        return 0 if self.tied else self.head


def layers_of(stage: int, stages: int, layers: int) -> int:
    """As chapter 2's Stage cuts them: what does not divide goes to the first ones."""
    return layers // stages + (stage < layers % stages)


def part(config: Any, setting: Setting, stage: int = 0) -> Part:
    """Heads, MLP and vocabulary are cut by tp, norms are whole on every rank (chapter 2's tensor_layers.py).

    Raises:
        UserError: something does not divide, or there are more stages than layers.
    """
    tp, pp = setting.tp, setting.pp
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % tp:
            raise UserError(f"{name} {getattr(config, name)} does not divide by tp {tp}; take another --tp")
    if pp > config.num_hidden_layers:
        raise UserError(f"{pp} stages for {config.num_hidden_layers} layers; take a smaller --pp")
    hidden, vocabulary = config.hidden_size, config.vocab_size * config.hidden_size // tp
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    products = (hidden * head_dim(config) * heads + 3 * hidden * config.intermediate_size) // tp
    first, last = stage == 0, stage == pp - 1
    tied = config.tie_word_embeddings and first and last  # over several stages both ends have a copy
    layers = layers_of(stage, pp, config.num_hidden_layers)
    return Part(
        embedding=vocabulary if first else 0,
        layer=products + 2 * hidden,
        layers=layers,
        head=(hidden + (0 if tied else vocabulary)) if last else 0,
        matrices=layers * products + (vocabulary if last else 0),
        tied=tied,
    )


def in_flight(setting: Setting, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once, under 1F1B: as many as there are stages from it on."""
    return peak_live(schedule("1f1b", stage, setting.pp, setting.accumulate)) if setting.pp > 1 else 1
