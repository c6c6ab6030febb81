"""Which part of which Hugging Face tensor a Megatron parameter is, on every rank of every layout; and the way back.

    Megatron, on tensor-parallel rank r of p                   Hugging Face
    embedding.word_embeddings, output_layer                    rows r of p of embed_tokens, of lm_head
    self_attention.linear_qkv                                  rows r of p of q_proj, k_proj and v_proj, which lie in it
                                                               group by group: its queries, its key, its value
    self_attention.linear_proj, mlp.linear_fc2                 columns r of p of o_proj, of down_proj
    mlp.linear_fc1                                             rows r of p of gate_proj, then those of up_proj
    *layernorm                                                 all of it, on every rank

What holds for a weight holds for its gradient: megatron_parity.py compares gradients by Hugging Face's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ch04_fsdp import weights
from ch05_deepspeed_megatron.megatron_layout import Layout
from ch05_deepspeed_megatron.megatron_model import head_dim
from common.dist import Context

LAYER = {
    "input_layernorm": (("input_layernorm",), None),
    "self_attention.linear_qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
    "self_attention.linear_proj": (("self_attn.o_proj",), 1),
    "pre_mlp_layernorm": (("post_attention_layernorm",), None),
    "mlp.linear_fc1": (("mlp.gate_proj", "mlp.up_proj"), 0),
    "mlp.linear_fc2": (("mlp.down_proj",), 1),
}
OUTSIDE = {"embedding.word_embeddings": ("model.embed_tokens", 0), "decoder.final_layernorm": ("model.norm", None)}


@dataclass(frozen=True)
class Rule:
    """Where one Megatron parameter of this rank comes from."""

    names: tuple[str, ...]  # Hugging Face's
    dim: int | None  # along which the tensor-parallel ranks have equal slices; None: each has the whole
    groups: int = 0  # key-value heads on this rank, for linear_qkv
    head_rows: int = 0  # of one of them

    def join(self, slices: list[torch.Tensor]) -> torch.Tensor:
        """Megatron's tensor from this rank's slices of Hugging Face's."""
        if self.groups:
            parts = [part.unflatten(0, (self.groups, -1)) for part in slices]  # [group, rows, hidden]
            return torch.cat(parts, 1).flatten(0, 1)
        return torch.cat(slices) if len(slices) > 1 else slices[0]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The way back."""
        if self.groups:
            by_group = tensor.unflatten(0, (self.groups, -1))
            head = self.head_rows
            parts = by_group.split([by_group.shape[1] - 2 * head, head, head], 1)
            return [part.flatten(0, 1) for part in parts]
        return list(tensor.chunk(len(self.names))) if len(self.names) > 1 else [tensor]


def rules(model: nn.Module, stage: int) -> dict[str, Rule]:
    """By Megatron's name, for the parameters of this rank's GPTModel."""
    config, layout = model.hf_config, model.layout
    first = stage * (config.num_hidden_layers // layout.pp)
    found = {}
    for name, _ in model.named_parameters():
        stem = name.removesuffix(".weight")
        if stem == "output_layer":
            embedding = config.tie_word_embeddings  # its copy, on the last stage
            found[name] = Rule(("model.embed_tokens.weight" if embedding else "lm_head.weight",), 0)
        elif stem in OUTSIDE:
            theirs, dim = OUTSIDE[stem]
            found[name] = Rule((f"{theirs}.weight",), dim)
        else:
            number, kind = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", stem).groups()
            theirs, dim = LAYER[kind]
            groups = config.num_key_value_heads // layout.tp if len(theirs) == 3 else 0
            names = tuple(f"model.layers.{first + int(number)}.{part}.weight" for part in theirs)
            found[name] = Rule(names, dim, groups, head_dim(config) if groups else 0)
    return found


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of all Hugging Face tensors of a Llama, a tied head left out."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return found


def stage_of(name: str, config: Any, layout: Layout) -> int:
    """On which pipeline stage a Hugging Face tensor lives; a tied embedding on the first, as far as saving goes."""
    if match := re.match(r"model\.layers\.(\d+)\.", name):
        return int(match[1]) // (config.num_hidden_layers // layout.pp)
    return 0 if name == "model.embed_tokens.weight" else layout.pp - 1


@torch.no_grad()
def fill(model: nn.Module, ctx: Context, read: Callable[[str, int | None, int, int], torch.Tensor]) -> None:
    """Set each parameter of this rank from `read(name, dim, part, parts)`, a slice of a Hugging Face tensor."""
    layout = model.layout
    parameters = dict(model.named_parameters())
    for name, rule in rules(model, layout.stage(ctx)).items():
        part, parts = (ctx.rank % layout.tp, layout.tp) if rule.dim is not None else (0, 1)
        slices = [read(theirs, rule.dim, part, parts) for theirs in rule.names]
        parameters[name].copy_(rule.join(slices))


def slices_here(model: nn.Module, ctx: Context, of: Callable[[nn.Parameter], torch.Tensor | None]) -> Iterator[Any]:
    """(Hugging Face name, slice, dim) for what this rank holds; of: what to take of a parameter, as its gradient."""
    parameters = dict(model.named_parameters())
    for name, rule in rules(model, model.layout.stage(ctx)).items():
        if (tensor := of(parameters[name])) is not None:
            for theirs, piece in zip(rule.names, rule.split(tensor), strict=True):
                yield theirs, piece, rule.dim


def whole_here(model: nn.Module, ctx: Context, of: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole tensor for the parameters of this rank's stage, put together from the tensor-parallel ranks.

    Args:
        of: which attribute of a parameter: "data" or "main_grad".
    """
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    for name, piece, dim in slices_here(model, ctx, lambda p: getattr(p, of, None)):
        pieces = [torch.empty_like(piece) for _ in range(model.layout.tp)]
        dist.all_gather(pieces, piece.contiguous(), group=group)
        # What each rank has whole is shown as this rank has it: a copy that went astray shows.
        yield name, torch.cat(pieces, dim) if dim is not None else piece.clone()


def gather_gradients(ddp: nn.Module) -> None:
    """After a reduce-scatter each replica has its share of the sums: fetch the others' too, which no step needs."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(size))
            dist.all_gather(shards, shards[rank].clone(), group=group)


@torch.no_grad()
def whole_tensors(model: nn.Module, ctx: Context, order: list[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole value of one Hugging Face tensor after another, on rank 0: nobody else has more than its shards.

    A collective: every rank must go through it. Ranks other than 0 are given nothing, and only send.

    Args:
        order: of the names, the same on all ranks; the default is sorted.
    """
    config, layout = model.hf_config, model.layout
    mine = {}
    if ctx.rank in layout.owners(layout.stage(ctx), ctx.world_size):
        mine = {name: (piece, dim) for name, piece, dim in slices_here(model, ctx, lambda p: p.detach())}
    dims = {f"{name}.weight": dim for names, dim in LAYER.values() for name in names}
    for name in order or sorted(shapes(config)):
        stage = stage_of(name, config, layout)
        dim = dims.get(re.sub(r"^model\.layers\.\d+\.", "", name), None if name == "model.norm.weight" else 0)
        owners = layout.owners(stage, ctx.world_size)[: layout.tp if dim is not None else 1]
        if ctx.rank in owners and not ctx.is_main:
            dist.send(mine[name][0].contiguous(), 0)
        if not ctx.is_main:
            continue
        shape = list(shapes(config)[name])
        if dim is not None:
            shape[dim] //= layout.tp
        pieces = []
        for owner in owners:
            if owner == 0:
                pieces.append(mine[name][0])
            else:
                piece = torch.empty(shape, dtype=next(model.parameters()).dtype, device=ctx.device)
                dist.recv(piece, owner)
                pieces.append(piece)
        yield name, pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def sha256(model: nn.Module, ctx: Context) -> str:
    """common.lm.weights_sha256 of the whole model, on every rank. A collective."""
    return ctx.exchange("weights", weights.sha256_of(whole_tensors(model, ctx)))[0]
