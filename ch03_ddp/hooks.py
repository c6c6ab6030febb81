"""Communication hooks: what DDP sends in place of its own all_reduce of a bucket.

    state = hooks.register(ddp, "int8")        # before the first backward, the same on all ranks

A hook is called with a bucket as soon as its last gradient is there, and answers with a Future of the mean over the
ranks. Collectives have no names: what a hook starts must be started in the same order on every rank. One that starts
exactly one collective a bucket, as all here but PowerSGD do, has that for free, because buckets leave in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ch01_intro.collectives import all_gather_single
from common.script import UserError

BLOCK = 1024  # int8 numbers that share a scale: 0.4 % more bytes; one scale a bucket would drown the small gradients
POWER_RANK = 4
POWER_START = 2  # exact steps first: DDP rebuilds its buckets after the first one, and PowerSGD's memory is by bucket
Buckets = Sequence[Sequence[torch.Size]]  # the shapes of the gradients in each


# No annotations on what DDP calls: it checks them, and would find strings.


def identity(group, bucket):
    """What DDP does without a hook, bit for bit.

    DDP divides while it copies a gradient into the bucket, by multiplying with 1/N. (Where .grad already is the bucket,
    after zero_grad(set_to_none=False) or no_sync, it divides by N: the same bits when N is a power of two.)
    """
    mean = bucket.buffer().mul_(1 / group.size())
    return td.all_reduce(mean, group=group, async_op=True).get_future().then(lambda done: done.value()[0])


def bf16(group, bucket):
    """Half the bytes, float32's range, 8 significant bits. torch's own insists on NCCL; gloo can do it too.

    Divided in float32 and rounded once; torch's rounds first, and again after the division.
    """
    buffer = bucket.buffer()
    sent = (buffer / group.size()).bfloat16()
    done = td.all_reduce(sent, group=group, async_op=True).get_future()
    return done.then(lambda done: buffer.copy_(done.value()[0]))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [blocks, BLOCK] as int8 of the same shape and a float32 scale a block [blocks, 1].

    The largest number of a block becomes 127: what comes back is off by half a scale at most.
    """
    scales = (x.abs().amax(1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round_().to(torch.int8), scales


@dataclass
class Int8:
    """Each rank's gradients in int8, gathered from all ranks and averaged in float32.

    Error feedback (1-bit SGD, Seide et al. 2014; Karimireddy et al., arXiv:1901.09847): what rounding took away stays
    here and is added to the next step's gradient. So the sum of all that was sent, and the residual, is the sum of all
    gradients: the error of that sum does not grow with the number of steps.

    int8 cannot be summed on the way, as an all_reduce does: sums overflow, and each rank has its own scales. Everybody
    gets everybody's bytes, and a rank sends (N-1) n of them, not 2 (N-1)/N x 4 n: with 8 ranks nothing is won.
    """

    group: td.ProcessGroup
    feedback: bool = True
    # By parameter and not by bucket: DDP moves parameters to other buckets. Flat, in the order of memory.
    residual: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)

    def reduce(self, bucket):
        buffer, parameters = bucket.buffer(), bucket.parameters()
        numbers, sizes = buffer.numel(), [p.numel() for p in parameters]
        wanted = nn.functional.pad(buffer, (0, -numbers % BLOCK))
        for parameter, part in zip(parameters, wanted[:numbers].split(sizes), strict=True):
            if parameter in self.residual:
                part += self.residual[parameter]
        values, scales = quantize(wanted.view(-1, BLOCK))
        if self.feedback:
            # A block with an inf or nan is lost for this step, which a GradScaler skips, but not for all that follow.
            left = (wanted.view_as(values) - values * scales).masked_fill_(~scales.isfinite(), 0)
            self.residual |= zip(parameters, left.flatten()[:numbers].split(sizes), strict=True)
        message = torch.cat([values.flatten(), scales.flatten().view(torch.int8)])  # one message, so one order
        received = message.new_empty(self.group.size(), message.numel())

        def mean(_):
            buffer.zero_()
            for of_rank in received:  # in the same order everywhere: all ranks get the same bits
                values, scales = (
                    of_rank[: wanted.numel()].view(-1, BLOCK),
                    of_rank[wanted.numel() :].view(torch.float32),
                )
                buffer.add_((values * scales[:, None]).flatten()[:numbers])
            return buffer.div_(self.group.size())

        done = all_gather_single(received.flatten(), message, group=self.group, async_op=True)
        return done.get_future().then(mean)


def power_sgd(state, bucket):
    """torch's (Vogels et al., arXiv:1905.13727): a matrix is sent as two thin ones, whose product comes near it.

    It sends three messages a bucket, the later ones out of callbacks. NCCL calls those at once, gloo when one of its
    threads is free: with several buckets the ranks' orders would differ. So on gloo a bucket is done before the next.
    """
    done = powerSGD_hook.powerSGD_hook(state, bucket)
    if bucket.buffer().device.type == "cpu":
        done.wait()
    return done


def all_reduce_bytes(numbers: int, itemsize: int, ranks: int) -> float:
    """What a rank sends in a bandwidth-optimal all_reduce."""
    return 2 * (ranks - 1) / ranks * numbers * itemsize


def numbers_in(buckets: Buckets) -> int:
    return sum(shape.numel() for bucket in buckets for shape in bucket)


def int8_bytes(buckets: Buckets, ranks: int) -> float:
    blocks = [math.ceil(numbers_in([bucket]) / BLOCK) for bucket in buckets]
    return (ranks - 1) * sum(blocks) * (BLOCK + 4)


def power_sgd_bytes(buckets: Buckets, ranks: int) -> float:
    """Of a step that is compressed: two thin matrices for each that more than halves so, the rest as it is."""
    sent = 0
    for shape in (shape for bucket in buckets for shape in bucket):
        rows, columns = shape[0], shape.numel() // shape[0]
        thin = (rows + columns) * min(rows, columns, POWER_RANK)
        sent += thin if 2 * thin < shape.numel() else shape.numel()
    return all_reduce_bytes(sent, 4, ranks)


@dataclass(frozen=True)
class Hook:
    """make: state and function for DDP's register_comm_hook, of the process group; None: no hook.

    sent_bytes: payload that a rank sends in a step, of float32 gradients.
    """

    make: Callable[[td.ProcessGroup], tuple[object, Callable]] | None
    sent_bytes: Callable[[Buckets, int], float]


def _plain_bytes(itemsize: int) -> Callable[[Buckets, int], float]:
    return lambda buckets, ranks: all_reduce_bytes(numbers_in(buckets), itemsize, ranks)


HOOKS = {
    "none": Hook(None, _plain_bytes(4)),
    "identity": Hook(lambda group: (group, identity), _plain_bytes(4)),
    "fp16": Hook(lambda group: (group, default_hooks.fp16_compress_hook), _plain_bytes(2)),
    "bf16": Hook(lambda group: (group, bf16), _plain_bytes(2)),
    "int8": Hook(lambda group: (Int8(group), Int8.reduce), int8_bytes),
    "int8-no-feedback": Hook(lambda group: (Int8(group, feedback=False), Int8.reduce), int8_bytes),
    "powersgd": Hook(
        lambda group: (powerSGD_hook.PowerSGDState(group, POWER_RANK, POWER_START), power_sgd), power_sgd_bytes
    ),
}


STATEFUL = (Int8, powerSGD_hook.PowerSGDState)  # what such a hook holds back goes into the next step


def register(ddp: DistributedDataParallel, name: str) -> object:
    """Give `ddp` the hook of that name, before its first backward. Returns the hook's state, None for "none".

    Raises:
        UserError: no such hook, or one that cannot work here.
    """
    if name not in HOOKS:
        raise UserError(f"there is no hook {name!r}; take one of {', '.join(HOOKS)}")
    if name == "powersgd" and ddp.device.type == "cpu" and torch.cuda.is_available():
        raise UserError(
            "torch's PowerSGD synchronises a GPU if it sees one; set CUDA_VISIBLE_DEVICES= with --device cpu"
        )
    make = HOOKS[name].make
    if make is None:
        return None
    state, hook = make(ddp.process_group)
    ddp.register_comm_hook(state, hook)
    return state
