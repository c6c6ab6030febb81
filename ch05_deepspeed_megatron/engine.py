"""A DeepSpeed engine around one of the book's models: whole on each rank in stages 0 to 2, on none in stage 3.

    model = build(args.preset, settings, ctx, seq_len=128)
    engine = initialize(model, settings, ctx)
    loss = zero_peers.backward(engine, batch.micro_batches, batch.tokens, ctx.world_size)
    norm = zero_peers.update(engine)

Weights are drawn as in chapter 4, by seed and name alone: each stage, on any number of ranks, starts from the model of
FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ch04_fsdp import weights, zero_peers
from ch05_deepspeed_megatron import activation_checkpointing
from common import lm
from common.dist import Context
from common.script import UserError

Settings = Mapping[str, Any]


def stage_of(settings: Settings) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def precision(settings: Settings) -> torch.dtype:
    """Of the weights that compute, and of their gradients."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if settings.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def device_of(settings: Settings, what: str) -> str:
    """Where "optimizer" or "param" is offloaded to: none, cpu or nvme."""
    return str((settings.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none"))


def build(
    name: str | Any, settings: Settings, ctx: Context, *, seq_len: int, seed: int = 0, dropout: float = 0.0
) -> nn.Module:
    """A preset with random weights, or a Hugging Face folder with its own.

    Args:
        name: as said, or a transformers config, for random weights.

    Raises:
        UserError: there is no such model, it is too short for seq_len, or its checkpoint does not fit it.
    """
    config = lm.config(name, seq_len) if isinstance(name, str) else name
    if seq_len > config.max_position_embeddings:
        raise UserError(
            f"--seq-len {seq_len} is longer than the model's {config.max_position_embeddings} positions; shorten it"
        )
    config.attention_dropout = dropout
    model = weights.plan(config)
    folder = weights.checkpoint_files(name) if isinstance(name, str) and not lm.is_preset(name) else None
    if stage_of(settings) == 3:
        _fill_in_shards(model, folder, seed, settings, ctx)
        return model
    weights.allocate(model, ctx.device)
    if folder:
        weights.load(model, folder)
    else:
        weights.initialize(model, seed)
    return model


@torch.no_grad()
def _fill_in_shards(model: nn.Module, folder: Path | None, seed: int, settings: Settings, ctx: Context) -> None:
    """Layer by layer: memory for it, its weights, and it is cut into shards before the next one.

    deepspeed.zero.Init would do so while a model is built, but with values that depend on the stage.
    """
    deepspeed = zero_peers.join(ctx.launch, ctx.device)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored = weights.Stored(folder, known) if folder else None
    swapper = None  # of the first: each would have buffers of its own
    for prefix, unit in [*((f"model.layers.{n}.", layer) for n, layer in enumerate(model.model.layers)), ("", model)]:
        planned = {name: p for name, p in unit.named_parameters() if p.is_meta}
        for name, parameter in planned.items():
            whole = torch.empty(parameter.shape, device=ctx.device)
            if stored:
                whole.copy_(stored.read(prefix + name, whole.shape))
            else:
                weights.draw(whole, prefix + name, seed, model.config.initializer_range)
            _replace(unit, parameter, nn.Parameter(whole.to(precision(settings))))  # what is sharded stays in it
        made = deepspeed.zero.Init(module=unit, config_dict_or_path=dict(settings), param_swapper=swapper)
        swapper = made.param_swapper
    weights.allocate_buffers(model, ctx.device)
    weights.initialize_buffers(model, ctx.device)


def _replace(module: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """In each place where it stands: tied weights have two."""
    for inner in module.modules():
        for name, parameter in list(inner._parameters.items()):
            if parameter is old:
                inner._parameters[name] = new


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only, as in chapter 1. A sharded parameter has its shape elsewhere."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def initialize(
    model: nn.Module, settings: Settings, ctx: Context, optimizer: torch.optim.Optimizer | None = None
) -> Any:
    """The engine, with the optimizer of the settings, or this one. One dist.session a process: see zero_peers."""
    library = zero_peers.join(ctx.launch, ctx.device)
    groups = None if optimizer else parameter_groups(model)
    engine, *_ = library.initialize(
        model=model, optimizer=optimizer, model_parameters=groups, config=dict(settings), dist_init_required=None
    )
    if section := settings.get("activation_checkpointing"):
        activation_checkpointing.apply(model, section)
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def whole_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole float32 value of each parameter, sorted by name. A collective, one parameter at a time."""
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # stage 0 in float32: the weights themselves
        return iter(sorted((name, p.detach()) for name, p in engine.module.named_parameters()))
    from deepspeed.utils import safe_get_full_fp32_param

    named = sorted(engine.module.named_parameters(), key=lambda pair: pair[0])
    return ((name, safe_get_full_fp32_param(p) if p.requires_grad else _whole(p)) for name, p in named)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """A frozen one, of which no optimizer has a copy."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()
