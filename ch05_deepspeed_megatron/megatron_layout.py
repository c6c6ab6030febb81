"""How ranks are arranged: tensor parallel x pipeline x data parallel, in Megatron's order, checked before any is used.

    layout = Layout(tp=4, pp=2)
    layout.check(config, world_size, seq_len)
    with layout.groups(ctx):
        ...                                        # megatron.core.parallel_state knows this rank's place

Rank r has tensor-parallel rank r % tp, and neighbours in the pipeline are tp x dp ranks apart: those that talk most are
next to each other (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
arXiv:2104.04473, section 3).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ch05_deepspeed_megatron import megatron_shim
from common import lm
from common.dist import Context
from common.script import UserError, at_least


@dataclass(frozen=True)
class Layout:
    """Sizes of the first two dimensions; data parallel takes what is left of the ranks."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False  # norms and what lies between them are split along the sequence, over the tp ranks

    def dp(self, world_size: int) -> int:
        return world_size // (self.tp * self.pp)

    def check(self, config: Any, world_size: int, seq_len: int | None = None) -> None:
        """
        Args:
            config: a transformers config of a Llama.
            seq_len: of the batches, if any are to be taken.

        Raises:
            UserError: the ranks or the model do not divide so; or it is no Llama as Megatron-Core builds it here.
        """
        if world_size % (self.tp * self.pp):
            raise UserError(
                f"{world_size} ranks do not divide by --tp {self.tp} x --pp {self.pp} = {self.tp * self.pp}; start a "
                "multiple of that"
            )
        parts = {
            "attention heads": config.num_attention_heads, "key-value heads": config.num_key_value_heads,
            "words of the vocabulary": config.vocab_size, "columns of the feed-forward": config.intermediate_size,
        }  # fmt: skip
        for what, size in parts.items():
            if size % self.tp:
                raise UserError(f"{size} {what} do not divide by --tp {self.tp}; take a divisor of {size}")
        if config.num_hidden_layers % self.pp:
            raise UserError(
                f"{config.num_hidden_layers} layers do not divide by --pp {self.pp}; take a divisor of "
                f"{config.num_hidden_layers}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise UserError("--sequence-parallel shares the sequence out among tensor-parallel ranks; pass --tp 2 too")
        if seq_len and self.sequence_parallel and seq_len % self.tp:
            raise UserError(f"--seq-len {seq_len} does not divide by --tp {self.tp} for --sequence-parallel; change it")
        if seq_len and seq_len > config.max_position_embeddings:
            raise UserError(
                f"--seq-len {seq_len} is longer than the model's {config.max_position_embeddings} positions; shorten it"
            )
        if getattr(config, "model_type", "") != "llama":
            raise UserError(f"a {config.model_type!r} is not a Llama, which is what is mapped here; take one")
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise UserError("this Llama has biases in its matrices, which are not mapped here; take one without")

    @contextlib.contextmanager
    def groups(self, ctx: Context, seed: int = 1) -> Iterator[None]:
        """Megatron's process groups of this layout, in parallel_state, and, on a GPU, its streams of random numbers
        for dropout, from `seed`. One layout at a time."""
        megatron_shim.install(ctx.device)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(
            self.tp, self.pp, create_gloo_process_groups=False,
            distributed_timeout_minutes=timedelta(seconds=ctx.timeout_s) // timedelta(minutes=1) or 1,
        )  # fmt: skip
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()

    def replica(self, ctx: Context) -> Context:
        """The same job seen from the data: which of the data-parallel ranks this is, and of how many."""
        dp = self.dp(ctx.world_size)
        launch = dataclasses.replace(
            ctx.launch, rank=ctx.rank // self.tp % dp, world_size=dp, local_world_size=dp, local_rank=0
        )
        return dataclasses.replace(ctx, launch=launch)

    def stage(self, ctx: Context) -> int:
        return ctx.rank // (ctx.world_size // self.pp)

    def owners(self, stage: int, world_size: int) -> list[int]:
        """The ranks that hold the shards of a stage's weights, in order; of the first of its replicas."""
        first = stage * (world_size // self.pp)
        return list(range(first, first + self.tp))


def checked(name: str, layout: Layout, world_size: int, seq_len: int) -> Any:
    """The transformers config of a preset or folder that fits the layout."""
    config = lm.config(name, seq_len)
    layout.check(config, world_size, seq_len)
    return config


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout")
    group.add_argument("--tp", type=at_least(1), default=1, help="tensor parallel: ranks that share each matrix")
    group.add_argument("--pp", type=at_least(1), default=1, help="pipeline parallel: stages of consecutive layers")
    group.add_argument("--sequence-parallel", action="store_true", help="share the sequence out between the matrices, "
                       "over the --tp ranks: less activation memory, no more bytes")  # fmt: skip
