"""The other patterns of communication by hand, and for each what every rank must hold in the end.

All work in place in a buffer of one chunk a rank, x [ranks * chunk].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ch02_hardware_parallelism import allreduce
from ch02_hardware_parallelism.journal import Held
from ch02_hardware_parallelism.messages import Peers


def scatter(x: torch.Tensor, peers: Peers, root: int = 0) -> None:
    """Chunk r of `root` to rank r: one round of N-1 messages."""
    chunks = x.tensor_split(peers.size)
    if peers.rank == root:
        peers.exchange(sends=[(chunks[r], r) for r in range(peers.size) if r != root])
    else:
        peers.exchange(receives=[(chunks[peers.rank], root)])


def gather(x: torch.Tensor, peers: Peers, root: int = 0) -> None:
    """Chunk r of rank r to `root`: one round of N-1 messages."""
    chunks = x.tensor_split(peers.size)
    if peers.rank == root:
        peers.exchange(receives=[(chunks[r], r) for r in range(peers.size) if r != root])
    else:
        peers.exchange(sends=[(chunks[peers.rank], root)])


def all_gather(x: torch.Tensor, peers: Peers) -> None:
    """Chunk r of rank r to all, around the ring: N-1 rounds."""
    allreduce.ring_all_gather(list(x.tensor_split(peers.size)), peers, owned=peers.rank)


def reduce_scatter(x: torch.Tensor, peers: Peers) -> None:
    """Rank r gets the sum of all chunks r, around the ring: N-1 rounds."""
    allreduce.ring_reduce_scatter(list(x.tensor_split(peers.size)), peers, owned=peers.rank)


def all_to_all(x: torch.Tensor, peers: Peers) -> None:
    """Chunk s of rank r becomes chunk r of rank s: the transpose of a matrix with a row a rank.

    All pairs meet once to swap, as in a tournament. In round k these are the ranks whose numbers add up to k; or, for a
    power of two, differ in the bits of k, so that nobody ever idles.
    """
    chunks = x.tensor_split(peers.size)
    even = peers.size == allreduce.largest_power(peers.size)
    for k in range(peers.size):
        partner = peers.rank ^ k if even else (k - peers.rank) % peers.size
        if partner != peers.rank:
            arrived = peers.scratch(chunks[partner].numel(), x)
            peers.exchange([(chunks[partner], partner)], [(arrived, partner)])
            chunks[partner].copy_(arrived)


@dataclass(frozen=True)
class Pattern:
    """A collective and its promise, on contributions (rank, cell): what counts at the start, what must come out."""

    run: Callable[[torch.Tensor, Peers], None]
    starts: Callable[[int, int], bool]  # (rank, cell)
    promise: Callable[[int, int, int], Held | None]  # (rank, cell, ranks); None: whatever
    cells: Callable[[int], int] = lambda ranks: ranks  # how many a buffer has, so that all messages are whole ones


def everybody(rank: int, cell: int) -> bool:
    return True


def the_root(rank: int, cell: int) -> bool:
    return rank == 0


def its_own(rank: int, cell: int) -> bool:
    return rank == cell


def total(rank: int, cell: int, ranks: int) -> Held:
    return Counter({(source, cell): 1 for source in range(ranks)})


PATTERNS: dict[str, Pattern] = {
    "broadcast": Pattern(allreduce.tree_broadcast, the_root, lambda r, c, n: Counter({(0, c): 1})),
    "scatter": Pattern(scatter, the_root, lambda r, c, n: Counter({(0, c): 1}) if r == c else None),
    "gather": Pattern(gather, its_own, lambda r, c, n: Counter({(c, c): 1}) if r == 0 else None),
    "all_gather": Pattern(all_gather, its_own, lambda r, c, n: Counter({(c, c): 1})),
    "reduce_scatter": Pattern(reduce_scatter, everybody, lambda r, c, n: total(r, c, n) if r == c else None),
    "all_to_all": Pattern(all_to_all, everybody, lambda r, c, n: Counter({(c, r): 1})),
} | {f"all_reduce-{name}": Pattern(run, everybody, total) for name, run in allreduce.ALGORITHMS.items()}
PATTERNS["all_reduce-halving_doubling"] = Pattern(
    allreduce.halving_doubling, everybody, total, cells=allreduce.largest_power
)
PATTERNS["all_reduce-hierarchical"] = Pattern(
    allreduce.hierarchical, everybody, total, cells=lambda ranks: ranks if ranks % 2 == 0 else 2
)
