"""The book's Llama as a DeepSpeed PipelineModule: the same weights by the same names, cut into stages.

    module = build(lm.config("nano"), stages=2, partition="type:decoderlayer")
    initialize(module, seed=0)  or  load(module, folder)      # each rank its own stage's weights
    for name, whole in whole_parameters(module): ...          # Hugging Face's names; a collective

A pipeline is a list of layers, each fed with what the one before returns. Of L decoder layers it has L + 3:

    0          the embedding           model.embed_tokens.weight
    1 .. L     transformers' layers    model.layers.0.self_attn.q_proj.weight, ...
    L + 1      the norm                model.norm.weight
    L + 2      the head                lm_head.weight; tied: the embedding once more, as a second copy

DeepSpeed calls a parameter by the place of its layer (1.layer.mlp.up_proj.weight), whichever stage it is in.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from ch03_ddp.feed import IGNORE
from ch04_fsdp import weights
from common import lm
from common.script import UserError

METHODS = "uniform, parameters or type:REGEX"
TIED = "tied_modules.embedding"  # where DeepSpeed keeps a layer that several stages share
Labels = tuple[torch.Tensor, torch.Tensor]  # targets, int64 [b, t]; what their sum of losses is divided by, 0-d


class DecoderLayer(nn.Module):
    """transformers' layer as a pipeline wants it: hidden states in, hidden states out, nothing else travels."""

    def __init__(self, config: Any, index: int, rotary: nn.Module, norm: Any) -> None:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        super().__init__()
        self.layer = LlamaDecoderLayer(config, index)
        self.layer.input_layernorm, self.layer.post_attention_layernorm = norm.build(), norm.build()
        self.rotary = rotary  # no parameters: each layer asks it anew instead of being sent the angles

    def forward(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden_btd.shape[1], device=hidden_btd.device)[None]
        return self.layer(hidden_btd, position_embeddings=self.rotary(hidden_btd, positions))


def tied_head(embedding: nn.Module, hidden_btd: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden_btd, embedding.weight)  # type: ignore[arg-type]


def loss(logits_btv: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Sum of the losses of the tokens that are not padding, over the divisor that comes with them, 0-d."""
    targets_bt, divisor = labels
    wide = logits_btv if logits_btv.dtype == torch.float64 else logits_btv.float()
    total = F.cross_entropy(wide.flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / divisor.to(total.dtype)  # of one type on all stages: the others get it in a message


def specs(config: Any, norm_type: type[nn.Module] | None = None) -> list[Any]:
    """The layers of the whole model, of which each stage builds its own.

    Args:
        norm_type: another norm than transformers' (which goes through float32).
    """
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    config._attn_implementation = "sdpa"  # a layer by itself would take the slow one
    size = (config.vocab_size, config.hidden_size)
    rotary = LlamaRotaryEmbedding(config)
    norm = LayerSpec(LlamaRMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    if norm_type:
        norm = LayerSpec(norm_type, config.hidden_size)
    if config.tie_word_embeddings:
        first = TiedLayerSpec("embedding", nn.Embedding, *size)
        head = TiedLayerSpec("embedding", nn.Embedding, *size, forward_fn=tied_head)
    else:
        first = LayerSpec(nn.Embedding, *size)
        head = LayerSpec(nn.Linear, config.hidden_size, config.vocab_size, bias=False)
    layers = [LayerSpec(DecoderLayer, config, index, rotary, norm) for index in range(config.num_hidden_layers)]
    return [first, *layers, norm, head]


def layer_parameters(config: Any) -> list[int]:
    """Of each of the L + 3 layers; tied, the embedding counts in both of its places, as each stage holds a copy."""
    layers, hidden, ends = config.num_hidden_layers, config.hidden_size, config.vocab_size * config.hidden_size
    inside = lm.parameter_count(config) - hidden - ends * (1 if config.tie_word_embeddings else 2)
    return [ends, *[inside // layers] * layers, hidden, ends]


def split(config: Any, stages: int, partition: str) -> list[int]:
    """Where the stages begin and end among the L + 3 layers, as DeepSpeed cuts them; nothing is built.

    uniform: as many layers in each. parameters: as many parameters. type:REGEX: as many layers of that type.

    Raises:
        UserError: the method is unknown, matches no layer, or leaves a stage without one.
    """
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    layers = config.num_hidden_layers
    names = [
        "Embedding",
        *["DecoderLayer"] * layers,
        "LlamaRMSNorm",
        "Embedding" if config.tie_word_embeddings else "Linear",
    ]
    if stages > layers:
        raise UserError(f"{stages} stages for {layers} decoder layers; take at most {layers}")
    method, _, pattern = partition.lower().partition(":")
    if method == "uniform":
        parts = partition_uniform(len(names), stages)
    elif method == "parameters":
        parts = partition_balanced(layer_parameters(config), num_parts=stages)
    elif method == "type" and pattern:
        try:
            found = [int(bool(re.search(pattern, name, re.IGNORECASE))) for name in names]
        except re.error as error:
            raise UserError(f"--partition {partition} is not a regular expression ({error}); correct it") from None
        if sum(found) < stages:
            raise UserError(
                f"--partition {partition} matches {sum(found)} of the layers {', '.join(dict.fromkeys(names))}, too "
                f"few for {stages} stages; give another pattern, as type:decoderlayer"
            )
        parts = partition_balanced(found, num_parts=stages)
    else:
        raise UserError(f"no partition method {partition!r}; one of {METHODS}")
    parts = [int(part) for part in parts]
    if empty := [stage for stage in range(stages) if parts[stage] == parts[stage + 1]]:
        raise UserError(f"--partition {partition} leaves stage {empty[0]} of {stages} without layers; take another")
    return parts


def build(
    config: Any,
    stages: int,
    partition: str,
    *,
    checkpoint_every: int = 0,
    dynamic_shape: bool = False,
    norm_type: type[nn.Module] | None = None,
    loss_fn: Callable[[torch.Tensor, Labels], torch.Tensor] = loss,
) -> Any:
    """This rank's stage as a PipelineModule; after zero_peers.join. Ranks beyond `stages` are data parallel.

    Rank r is stage r // D of data replica r % D, where D = ranks / stages: what replicas send each other, gradients, is
    more than what stages do, so replicas are neighbours.

    Args:
        checkpoint_every: recompute the activations of so many layers at a time in backward; 0: keep them.
        dynamic_shape: micro-batches may differ in shape, for one more message each.
    """
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    # It prints; and it broadcasts the tied weights themselves, which autograd would take for a part of the model.
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        module = PipelineModule(
            specs(config, norm_type),
            topology=PipeDataParallelTopology(num_pp=stages, num_dp=dist.get_world_size() // stages),
            loss_fn=loss_fn,
            partition_method=partition,
            activation_checkpoint_interval=checkpoint_every,
            # DeepSpeed's own needs inputs with gradients, which tokens have not: the embedding would not learn.
            activation_checkpoint_func=functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
            dynamic_shape=dynamic_shape,
        )
    module.config = config
    return module


def hf_name(name: str, layers: int) -> str:
    """A parameter's name in the Hugging Face model of so many decoder layers.

    >>> hf_name("1.layer.mlp.up_proj.weight", 4), hf_name("tied_modules.embedding.weight", 4), hf_name("5.weight", 4)
    ('model.layers.0.mlp.up_proj.weight', 'model.embed_tokens.weight', 'model.norm.weight')
    """
    if name == f"{TIED}.weight":
        return "model.embed_tokens.weight"
    place, rest = name.split(".", 1)
    whole = {0: "model.embed_tokens", layers + 1: "model.norm", layers + 2: "lm_head"}
    inside = f"model.layers.{int(place) - 1}"
    return f"{whole.get(int(place), inside)}.{rest.removeprefix('layer.')}"


def named_parameters(module: Any) -> list[tuple[str, nn.Parameter]]:
    """This stage's, by Hugging Face's names. The tied embedding is in the first stage and in the last."""
    return [(hf_name(name, module.config.num_hidden_layers), p) for name, p in module.named_parameters()]


class Renamed(nn.Module):
    """A stage as chapter 4's weights.initialize sees a model: a config, and parameters by their names."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.config, self.renamed = module.config, named_parameters(module)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.renamed)


def initialize(module: Any, seed: int) -> None:
    """Random weights from the seed and each parameter's name alone: those of train_fsdp.py, on any number of stages."""
    weights.initialize(Renamed(module), seed)


@torch.no_grad()
def load(module: Any, folder: Path) -> None:
    """Fill this rank's stage from a Hugging Face folder; it reads nothing else.

    Raises:
        UserError: a tensor is missing, too many, of another shape, or unreadable.
    """
    known = {name for name, _ in lm.build(module.config, "meta").named_parameters(remove_duplicate=False)}
    stored = weights.Stored(folder, known)
    for name, parameter in named_parameters(module):
        parameter.copy_(stored.read(name, parameter.shape))


def master(parameter: nn.Parameter) -> torch.Tensor:
    """What the optimizer steps on: in bf16 and with ZeRO 1 a float32 copy, of which each data replica has a part."""
    return parameter.get_full_hp_param() if hasattr(parameter, "_hp_mapping") else parameter.detach()  # type: ignore


def whole_parameters(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter of the model, sorted by name, a tied one once: on the first stage of each data replica.

    A collective: the other stages must go through it too, and get what they send themselves.
    """
    grid, own = module.mpu(), dict(named_parameters(module))
    first = grid.stage_to_global(0)
    names: list[Any] = [None] * grid.pipe_parallel_size
    shapes = {
        name: (tuple(p.shape), torch.float32 if hasattr(p, "_hp_mapping") else p.dtype) for name, p in own.items()
    }
    dist.all_gather_object(names, shapes, grid.get_pipe_parallel_group())
    owner = {name: stage for stage in reversed(range(len(names))) for name in names[stage]}
    for name in sorted(owner):
        if owner[name] == grid.stage_id:
            value = master(own[name])
            if grid.stage_id:
                dist.send(value.contiguous(), first)
            yield name, value
        elif grid.stage_id == 0:
            shape, dtype = names[owner[name]][name]
            arrived = torch.empty(shape, dtype=dtype, device=next(module.parameters()).device)
            dist.recv(arrived, grid.stage_to_global(owner[name]))
            yield name, arrived


def sha256(module: Any) -> str:
    """common.lm.weights_sha256 of the whole model, the same on all stages of a data replica. A collective.

    Two copies of a tied embedding that are not equal give another hash than the model has.
    """
    grid = module.mpu()
    whole = weights.sha256_of(whole_parameters(module))
    tied = named_parameters(module) if module.config.tie_word_embeddings else []
    copy = weights.sha256_of((name, master(p)) for name, p in tied if name == "model.embed_tokens.weight")
    said: list[Any] = [None] * grid.pipe_parallel_size
    dist.all_gather_object(said, (whole, copy), grid.get_pipe_parallel_group())
    return said[0][0] if said[0][1] == said[-1][1] else f"{said[0][0]}, but the head's copy of the embedding is another"
