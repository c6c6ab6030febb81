"""The flags of the Megatron training script, checked before any rank builds anything."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ch01_intro import training
from ch03_ddp import options as ddp_options
from ch04_fsdp import options as fsdp_options
from ch04_fsdp.activations import Layer
from ch05_deepspeed_megatron.megatron_layout import Layout, add_layout_flags, checked
from common import lm
from common.dist import Context, read_launch
from common.script import UserError, at_least


def parse(doc: str | None, argv: list[str] | None) -> tuple[argparse.Namespace, Layout, Any]:
    """The flags, the layout, and the transformers config of the model; all fit each other and the number of ranks.

    Raises:
        UserError: one is wrong, or two contradict each other.
    """
    made = training.training_parser(doc)
    ddp_options.add_step_flags(made)
    add_layout_flags(made)
    mega = made.add_argument_group("Megatron-Core")
    mega.add_argument("--micro-batches", type=at_least(1), help="of --batch-size sequences, a step and replica; sets "
                      "--global-batch (default: as many as stages)")  # fmt: skip
    mega.add_argument("--optimizer-states", choices=("sharded", "whole"), default="sharded", help="sharded: Megatron's "
                      "distributed optimizer, each data-parallel rank has its share")  # fmt: skip
    mega.add_argument("--overlap", action="store_true", help="reduce gradients while backward still runs")
    ddp_options.add_survival_flags(made)
    args = ddp_options.check(made.parse_args(argv))
    layout = Layout(args.tp, args.pp, args.sequence_parallel)
    ranks = read_launch().world_size
    config = checked(args.preset, layout, ranks, args.seq_len)
    if args.compile:
        raise UserError("--compile is not for Megatron-Core's layers, whose fused kernels are its own; leave it out")
    if args.async_save:
        raise UserError("--async-save is not offered here: a save takes part in the step; leave it out")
    if args.micro_batches and args.global_batch:
        raise UserError("--micro-batches and --global-batch say the same; pass one of them")
    dp = layout.dp(ranks)
    args.global_batch = args.global_batch or args.batch_size * (args.micro_batches or layout.pp) * dp
    if args.global_batch < dp:
        raise UserError(f"--global-batch {args.global_batch} leaves some of {dp} replicas without any; raise it")
    return args, layout, config


def check_memory(args: argparse.Namespace, config: Any, layout: Layout, ctx: Context) -> None:
    """Before anything is allocated.

    Raises:
        UserError: what a rank holds does not fit: weights, float32 gradients, optimizer's state; activations.
    """
    dtype, dp = training.compute_dtype(args.dtype, ctx.device), layout.dp(ctx.world_size)
    need = states(dtype, dp if args.optimizer_states == "sharded" else 1) * lm.parameter_count(config)
    need /= layout.tp * layout.pp
    micro_batches = args.global_batch // (dp * args.batch_size)
    need += activations(config, layout, dtype, args.batch_size, args.seq_len, micro_batches)
    need *= ctx.launch.local_world_size if ctx.device.type == "cpu" else 1
    what = f"{args.preset} over --tp {layout.tp} x --pp {layout.pp} with --seq-len {args.seq_len}"
    fsdp_options.check_fits(need, ctx.device, ctx, what, "take more ranks a model, or a smaller --preset or --seq-len")


def states(dtype: torch.dtype, replicas: int) -> float:
    """Bytes a parameter of a rank's part: itself, a float32 gradient, two moments and, under bf16, a float32 copy, the
    last two shared out among the replicas."""
    return dtype.itemsize + 4 + (8 if dtype == torch.float32 else 12) / replicas


def activations(config: Any, layout: Layout, dtype: torch.dtype, batch: int, length: int, micro_batches: int) -> float:
    """Bytes that a rank keeps for backward, on the stage that keeps most: the first has as many micro-batches in flight
    as there are stages (1F1B), the last has one, and the logits in `dtype` and in float32."""
    layers = config.num_hidden_layers / layout.pp * activations_of_layer(config, layout, dtype, batch, length)
    logits = batch * length * config.vocab_size / layout.tp * (dtype.itemsize + 4)
    return max(layers * min(layout.pp, max(1, micro_batches)), layers + logits)


def activations_of_layer(config: Any, layout: Layout, dtype: torch.dtype, batch: int, length: int) -> float:
    """Of one micro-batch on one rank, in bytes: Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models" (arXiv:2205.05198), section 4, for a Llama: no dropout masks, a gated MLP, and the scores.

    Megatron's local attention keeps those, [b, heads / tp, t, t]: what softmax returns in float32, and under bf16 once
    more in 16 bits for the product with the values. Keys and values are repeated, to as many heads as queries have.
    """
    layer = Layer(config, batch * length, "fp32" if dtype == torch.float32 else "low", layout.tp)
    scores = batch * length**2 * config.num_attention_heads / layout.tp * (4 if dtype == torch.float32 else 6)
    between = 2 * layer.norm + 2 * layer.stream  # two norms, and what they put out
    return between / (layout.tp if layout.sequence_parallel else 1) + 4 * layer.mixed + scores + 4 * layer.inner
