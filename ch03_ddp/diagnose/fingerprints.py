"""Are the ranks still one model? A fingerprint of every tensor, compared over the ranks in one small message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as td
from torch import nn

from ch03_ddp.diagnose.verdict import Verdict, minority, name
from common.dist import Context


def desync(ctx: Context, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Verdict | None:
    """The first tensor in which the ranks differ, if there is one: parameters, then buffers, then optimizer state.

    Every rank must call it, between steps. It reads each tensor and sends 8 bytes for it. Any single bit that differs
    is found; NaNs are compared by their bits, like everything else.
    """
    tensors = list(state(model, optimizer))
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


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """int64, 0-d: the sum of the tensor's 8-byte words, and that of every third one, so that places count too.

    Integers add up to the same in any order: equal bits give equal fingerprints on every device. (torch.hash_tensor
    xors: any even number of equal values vanishes, as in the weights of a fresh norm.)
    """
    bytes_ = tensor.detach().contiguous().flatten().view(torch.uint8)
    if bytes_.storage_offset() % 8:
        bytes_ = bytes_.clone()
    whole = len(bytes_) // 8 * 8
    words = bytes_[:whole].view(torch.int64)
    return 3 * words.sum() + words[::3].sum() + bytes_[whole:].sum(dtype=torch.int64)
