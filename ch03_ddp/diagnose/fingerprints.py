"""Are the ranks still one model? A fingerprint of every tensor, compared over the ranks in one small message."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as td
from torch import nn

from ch03_ddp.diagnose.verdict import Verdict, minority, name
from common.dist import Context

PART = 2**16  # 4-byte words that are hashed at once: they and their factors stay in the cache
NEXT_PART = 1_000_003  # odd, so that no bit is lost


def desync(ctx: Context, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Verdict | None:
    """The first tensor in which the ranks differ, if there is one: parameters, then buffers, then optimizer state.

    Every rank must call it, between steps. It reads each tensor and sends 8 bytes for it. Any single number that
    differs is found; NaNs are compared by their bits, like everything else.
    """
    tensors = list(state(model, optimizer))
    if found := _other_tensors(ctx, tensors):
        return found
    if not tensors:
        return None
    mine = torch.stack([fingerprint(tensor).to(ctx.device) for _, tensor in tensors])  # int64 [tensors]
    everyone = [torch.empty_like(mine) for _ in range(ctx.world_size)]
    td.all_gather(everyone, mine)
    if all(torch.equal(other, mine) for other in everyone):
        return None
    said = {rank: other.tolist() for rank, other in enumerate(everyone)}
    differing = [place for place in range(len(tensors)) if len({values[place] for values in said.values()}) > 1]
    _, odd = minority({rank: values[differing[0]] for rank, values in said.items()})
    others = [rank for rank in range(ctx.world_size) if rank not in odd]
    kinds = Counter(tensors[place][0].split(" ")[0] for place in differing)
    text = (
        f"{name(odd)} has another {tensors[differing[0]][0]} than {name(others)}; it is the first of "
        f"{', '.join(f'{count} {kind}s' for kind, count in kinds.items())} that differ, of {len(tensors)} tensors"
    )
    return Verdict("desync", tuple(odd), text)


def _other_tensors(ctx: Context, tensors: list[tuple[str, torch.Tensor]]) -> Verdict | None:
    """Ranks that do not have the same tensors at all, as without optimizer state: over these no collective would end.

    Through the store, and names only where there is something to tell.
    """
    names = [f"{label} ({str(tensor.dtype)[6:]} {list(tensor.shape)})" for label, tensor in tensors]
    said = dict(enumerate(ctx.exchange("diagnose: tensors", hashlib.sha256(repr(names).encode()).hexdigest())))
    _, odd = minority(said)
    if not odd:
        return None
    others = [rank for rank in range(ctx.world_size) if rank not in odd]
    lists = [json.loads(text) for text in ctx.exchange("diagnose: names of tensors", json.dumps(names))]
    pairs = itertools.zip_longest(lists[odd[0]], lists[others[0]], fillvalue="nothing")
    theirs, usual = next(pair for pair in pairs if pair[0] != pair[1])
    return Verdict(
        "desync", tuple(odd), f"of the model's state {name(odd)} holds {theirs} where {name(others)} hold {usual}"
    )


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, torch.Tensor]]:
    """What must be alike on all ranks, with a name for each, in the same order everywhere."""
    own = getattr(model, "module", model)  # DDP's names without DDP
    for label, parameter in own.named_parameters():
        yield f"parameter {label}", parameter.detach()
    for label, buffer in own.named_buffers():
        yield f"buffer {label}", buffer
    if optimizer:
        names = {parameter: label for label, parameter in own.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        yield f"optimizer {key} of {names.get(parameter, 'a parameter')}", value


@functools.cache
def factors(device: torch.device) -> torch.Tensor:
    """int64 [PART], from 1 to 2^31 - 1: the same on all ranks, whatever device they have."""
    return torch.randint(1, 2**31, (PART,), generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64, 0-d: a multilinear hash of the tensor's bits (Lemire and Kaser, arXiv:1202.4961), part by part.

    Each 4-byte word times a factor of its own, summed modulo 2^64. A change of one word moves the sum by less than 2^63
    and not by 0, so it is always found; others, and exchanged words, are missed once in some 2^31. Integers add up to
    the same in any order: equal bits give equal fingerprints on every device. (torch.hash_tensor xors: any even number
    of equal values vanishes, as in the weights of a fresh norm. A plain sum of words does not see two signs change.)
    """
    bytes_ = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(bytes_) % 4:
        bytes_ = nn.functional.pad(bytes_, (0, -len(bytes_) % 4))
    if bytes_.storage_offset() % 4:
        bytes_ = bytes_.clone()
    found = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in bytes_.view(torch.int32).split(PART):
        found = NEXT_PART * found + (part * factors(tensor.device)[: len(part)]).sum()
    return found
