"""Each collective on buffers that are there already, and what must come out of it, at any size in little memory.

And what every benchmark of this chapter needs: one all-reduce timed and checked, and whether the buffers will fit.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as td

from ch01_intro.collectives import all_gather_single, pass_right, reduce_scatter_single
from ch01_intro.roofline import synchronize
from common import dist, profiling, script

PLACES = 101  # the data repeat after so many numbers: a prime, so that no two shares of a power of two look alike
SLAB = PLACES * 2**14  # numbers that are filled or compared at once


# Each runs on preallocated buffers: send [n], receive [n], or a share n / N of it where that is what a rank has.
def all_reduce(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    td.all_reduce(receive)


def reduce(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    td.reduce(receive, dst=0)


def broadcast(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    td.broadcast(receive, src=0)


def all_gather(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    all_gather_single(receive, send)


def reduce_scatter(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    reduce_scatter_single(receive, send)


def gather(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    td.gather(send, list(receive.chunk(ctx.world_size)) if ctx.is_main else None, dst=0)


def scatter(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    td.scatter(receive, list(send.chunk(ctx.world_size)) if ctx.is_main else None, src=0)


def all_to_all(send: torch.Tensor, receive: torch.Tensor, ctx: dist.Context) -> None:
    td.all_to_all_single(receive, send)


Run = Callable[[torch.Tensor, torch.Tensor, dist.Context], None]
COLLECTIVES: dict[str, Run] = {
    "all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter, "broadcast": broadcast,
    "reduce": reduce, "scatter": scatter, "gather": gather, "all_to_all": all_to_all, "send_recv": pass_right,
}  # fmt: skip
IN_PLACE = ("all_reduce", "reduce", "broadcast")
SUMS = ("all_reduce", "reduce", "reduce_scatter")


def buffers(name: str, count: int, dtype: torch.dtype, ctx: dist.Context) -> tuple[torch.Tensor, torch.Tensor]:
    """What this rank sends and where it receives, zeros; the larger of the two has `count` numbers on some rank."""
    share = count // ctx.world_size
    zeros = functools.partial(torch.zeros, dtype=dtype, device=ctx.device)  # no denormals in what is timed
    if name in IN_PLACE:
        return (both := zeros(count)), both
    if name == "all_gather" or (name == "gather" and ctx.is_main):
        return zeros(share), zeros(count)
    if name == "gather":
        return zeros(share), zeros(0)
    return zeros(count), zeros(share if name in ("reduce_scatter", "scatter") else count)


def pattern(rank: int, modulus: int) -> torch.Tensor:
    """What `rank` puts in, int64 [PLACES], repeated as often as needed: different by rank and by place."""
    return (torch.arange(PLACES) + 13 * rank) % modulus


def modulus(name: str, dtype: torch.dtype, ranks: int) -> int:
    """Numbers stay below it, so that they, and where they are summed their sum too, are exact in `dtype`."""
    exact = int(2 / torch.finfo(dtype).eps)
    return min(256, exact // ranks if name in SUMS else exact)


def expected(name: str, rank: int, ranks: int, share: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What `rank` must receive, by definition: the pattern of each of as many equal parts as there are in the list.

    share: numbers in an N-th of the buffer. It takes the memory of PLACES numbers a rank, whatever the size.
    """
    inputs = [pattern(r, modulus(name, dtype, ranks)) for r in range(ranks)]
    mine = -rank * share  # the pattern as it goes on from this rank's share
    return {
        "all_reduce": lambda: [torch.stack(inputs).sum(0)],
        "reduce": lambda: [torch.stack(inputs).sum(0)] if rank == 0 else [],  # elsewhere undefined
        "reduce_scatter": lambda: [torch.stack(inputs).sum(0).roll(mine)],
        "broadcast": lambda: [inputs[0]],
        "scatter": lambda: [inputs[0].roll(mine)],
        "gather": lambda: inputs if rank == 0 else [],
        "all_gather": lambda: inputs,
        "all_to_all": lambda: [numbers.roll(mine) for numbers in inputs],
        "send_recv": lambda: [inputs[rank - 1]],
    }[name]()


def slabs(buffer: torch.Tensor, numbers: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of the buffer, each beside what the repeated pattern has there."""
    repeated = numbers.to(buffer.device, buffer.dtype).repeat(SLAB // PLACES)
    for piece in buffer.split(SLAB):
        yield piece, repeated[: len(piece)]


def put(buffer: torch.Tensor, numbers: torch.Tensor) -> None:
    for piece, repeated in slabs(buffer, numbers):
        piece.copy_(repeated)


def count_wrong(buffer: torch.Tensor, parts: list[torch.Tensor]) -> int:
    chunks = buffer.chunk(len(parts)) if parts else ()
    return sum(int((a != b).sum()) for c, part in zip(chunks, parts, strict=True) for a, b in slabs(c, part))


def sum_once(all_reduce: Callable[[torch.Tensor], object], x: torch.Tensor) -> tuple[float, bool]:
    """Sum 1, 2, ... N of the N ranks in x [n]. Seconds of the slowest rank, and whether all sums are right on all."""
    x.fill_(td.get_rank() + 1)
    synchronize(x.device)
    td.barrier()
    begin = time.perf_counter()
    all_reduce(x)
    synchronize(x.device)
    seconds = time.perf_counter() - begin
    wrong = (x != sum(range(td.get_world_size() + 1))).any()
    worst = torch.tensor([seconds, float(wrong)], dtype=torch.float64)
    td.all_reduce(worst, op=td.ReduceOp.MAX)
    return worst[0].item(), worst[1].item() == 0


def check_memory(flag: str, rank_bytes: int, device: str, launch: dist.Launch, ranks: int | None = None) -> None:
    """Raises UserError if what `flag` asks for, `rank_bytes` a rank, is more than is free here.

    ranks: those that share the host's memory, where no launcher has started them yet.
    """
    place = dist.pick_device(device, launch)
    sharing = (ranks or launch.local_world_size) if place.type == "cpu" else 1
    free = profiling.available_memory(place) // sharing
    if rank_bytes > free:
        raise script.UserError(
            f"{flag} needs {rank_bytes / 2**30:,.1f} GiB a rank, and {free / 2**30:,.1f} GiB are free; take a smaller "
            f"{flag}"
        )
