"""All-reduce by hand, from point-to-point messages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ch02_hardware_parallelism.messages import Peers

Reduction = Callable[..., torch.Tensor]  # torch.add, torch.maximum: f(a, b, out=a)


def ring(x: torch.Tensor, peers: Peers, reduction: Reduction = torch.add) -> None:
    """Sum x [n] over the ranks, in place: reduce-scatter around the ring, then all-gather. 2 (N-1) rounds of n / N."""
    parts = list(x.tensor_split(peers.size))
    ring_reduce_scatter(parts, peers, owned=peers.rank, reduction=reduction)
    ring_all_gather(parts, peers, owned=peers.rank)


def ring_reduce_scatter(
    parts: list[torch.Tensor], peers: Peers, *, owned: int, reduction: Reduction = torch.add
) -> None:
    """After N-1 rounds parts[owned] holds the sum over the ranks; the others hold partial sums."""
    n, right, left = peers.size, (peers.rank + 1) % peers.size, (peers.rank - 1) % peers.size
    buffer = torch.empty_like(max(parts, key=torch.Tensor.numel))
    for step in range(n - 1):
        outgoing, incoming = parts[(owned - 1 - step) % n], parts[(owned - 2 - step) % n]
        arrived = buffer.flatten()[: incoming.numel()].view_as(incoming)
        peers.exchange([(outgoing, right)], [(arrived, left)])
        reduction(incoming, arrived, out=incoming)


def ring_all_gather(parts: list[torch.Tensor], peers: Peers, *, owned: int) -> None:
    """parts[owned] is this rank's own; after N-1 rounds all are there."""
    n, right, left = peers.size, (peers.rank + 1) % peers.size, (peers.rank - 1) % peers.size
    for step in range(n - 1):
        peers.exchange([(parts[(owned - step) % n], right)], [(parts[(owned - 1 - step) % n], left)])


def tree_broadcast(x: torch.Tensor, peers: Peers, source: int = 0) -> None:
    """x [n] of `source` to all: in each round everybody who has it tells one who has not. log2 N rounds."""
    me = (peers.rank - source) % peers.size  # counted from the source
    reach = 1
    while reach < peers.size:
        other = lambda r: (r + source) % peers.size  # noqa: E731
        if me < reach and me + reach < peers.size:
            peers.exchange(sends=[(x, other(me + reach))])
        elif reach <= me < 2 * reach:
            peers.exchange(receives=[(x, other(me - reach))])
        reach *= 2
