"""Which parameters take no part? Asked before training, by a backward that sends nothing, so that nothing can hang.

DDP waits for the gradient of every parameter. One that a rank did not use keeps its bucket at home: the others hang in
it, and the next forward of that rank raises "Expected to have finished reduction".
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp.diagnose.verdict import Verdict
from common.dist import Context


def unused(ctx: Context, ddp: DistributedDataParallel, loss: Callable[[], torch.Tensor]) -> Verdict | None:
    """Try one forward and backward, and name the parameters that got no gradient, by rank. Every rank must call it.

    Args:
        loss: runs the model on a batch of this rank and returns the loss, 0-d. Gradients are put back afterwards; what
            else a forward changes (running means, random numbers) is not.
    """
    trainable = [(label, p) for label, p in ddp.module.named_parameters() if p.requires_grad]
    kept = [p.grad for _, p in trainable]
    for _, parameter in trainable:
        parameter.grad = None
    with ddp.no_sync():
        loss().backward()
    missing = [label for label, p in trainable if p.grad is None]
    for (_, parameter), gradient in zip(trainable, kept, strict=True):
        parameter.grad = gradient
    said = [json.loads(text) for text in ctx.exchange("diagnose: unused parameters", json.dumps(missing))]
    without = {rank: tuple(names) for rank, names in enumerate(said) if names}
    if not without:
        return None
    text = " and ".join(f"on rank {rank} backward gives no gradient to {', '.join(n)}" for rank, n in without.items())
    return Verdict("unused", tuple(without), text)
