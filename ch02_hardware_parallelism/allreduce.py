"""All-reduce by hand, from point-to-point messages: five algorithms, each summing x [n] over the ranks in place.

    naive               all send to rank 0, which sums and sends back         2 rounds, 2 (N-1) n through one rank
    tree                sums meet in pairs up to rank 0, copies go back down  2 log2 N rounds of n
    ring                reduce-scatter around the ring, then all-gather       2 (N-1) rounds of n / N
    halving_doubling    the same with ever farther partners, ever less data   2 log2 N rounds, n / 2 + n / 4 + ...
    hierarchical        reduce-scatter in a rack, ring among racks, and back  each uplink of R racks: 2 (R-1) n / R

Few rounds win where messages are small, few bytes where they are large, and the uplink decides where it is thin.

Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009 (ring; brought to deep
learning by Baidu in 2017). Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
MPICH", 2005 (halving and doubling, binomial trees).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ch02_hardware_parallelism.messages import Peers, Work

Reduction = Callable[..., torch.Tensor]  # torch.add, torch.maximum: f(a, b, out=a)

PIECE = 2**22  # bytes of one message in the ring, which longer parts are cut into
AHEAD = 2  # messages under way at once


def naive(x: torch.Tensor, peers: Peers) -> None:
    """All ranks send to rank 0, which sums and sends back: 2 rounds, but all bytes go through one rank's link."""
    others = range(1, peers.size)
    if peers.rank:
        peers.exchange(sends=[(x, 0)])
        peers.exchange(receives=[(x, 0)])
    else:
        arrived = x.new_empty(len(others), x.numel())
        peers.exchange(receives=[(arrived[r - 1], r) for r in others])
        for r in others:
            x.add_(arrived[r - 1])
        peers.exchange(sends=[(x, r) for r in others])


def tree(x: torch.Tensor, peers: Peers) -> None:
    """Sum up a binomial tree to rank 0, and broadcast down the same tree: 2 log2 N rounds of n."""
    tree_reduce(x, peers)
    tree_broadcast(x, peers)


def tree_reduce(x: torch.Tensor, peers: Peers) -> None:
    """x [n] of rank 0 becomes the sum over the ranks; the others are left with partial sums. log2 N rounds."""
    reach = 1
    while reach < peers.size:
        if peers.rank % (2 * reach) == reach:
            peers.exchange(sends=[(x, peers.rank - reach)])
        elif peers.rank % (2 * reach) == 0 and peers.rank + reach < peers.size:
            receive_and_add(x, peers, peers.rank + reach)
        reach *= 2


def tree_broadcast(x: torch.Tensor, peers: Peers, source: int = 0) -> None:
    """x [n] of `source` to all: in each round everybody who has it tells one who has not. log2 N rounds.

    The far ranks first: between racks, where ranks are numbered rack by rack, it travels once and not many times.
    """
    me = (peers.rank - source) % peers.size  # counted from the source
    reach = largest_power(peers.size)
    while reach:
        if me % (2 * reach) == 0 and me + reach < peers.size:
            peers.exchange(sends=[(x, (peers.rank + reach) % peers.size)])
        elif me % (2 * reach) == reach:
            peers.exchange(receives=[(x, (peers.rank - reach) % peers.size)])
        reach //= 2


def receive_and_add(x: torch.Tensor, peers: Peers, source: int) -> None:
    arrived = peers.scratch(x.numel(), x)
    peers.exchange(receives=[(arrived, source)])
    x.add_(arrived)


def largest_power(ranks: int) -> int:
    """The largest power of two that is not above `ranks`."""
    return 1 << (ranks.bit_length() - 1)


def halving_doubling(x: torch.Tensor, peers: Peers) -> None:
    """Rabenseifner: swap halves with the neighbour and sum, quarters with the one at distance 2, ...; then all back.

    2 log2 N rounds that move as few bytes as a ring. The largest messages go to the nearest rank. Ranks beyond a power
    of two hand their x to another one first, and get the sum at the end.
    """
    power = largest_power(peers.size)
    if peers.rank >= power:
        peers.exchange(sends=[(x, peers.rank - power)])
        peers.exchange(receives=[(x, peers.rank - power)])
        return
    if guest := peers.rank + power < peers.size:
        receive_and_add(x, peers, peers.rank + power)
    mine, done = x, []
    for distance in (2**k for k in range(power.bit_length() - 1)):
        partner = peers.rank ^ distance
        low, high = mine.tensor_split(2)
        mine, theirs = (low, high) if peers.rank < partner else (high, low)
        arrived = peers.scratch(mine.numel(), x)
        peers.exchange([(theirs, partner)], [(arrived, partner)])
        mine.add_(arrived)
        done.append((partner, mine, theirs))
    for partner, mine, theirs in reversed(done):
        peers.exchange([(mine, partner)], [(theirs, partner)])
    if guest:
        peers.exchange(sends=[(x, peers.rank + power)])


def hierarchical(x: torch.Tensor, peers: Peers, rack_of: Sequence[int] | None = None) -> None:
    """Sum in the rack, then among racks, each rank a part of its own, then back. `rack_of`: each rank's (two halves).

    Racks of different sizes have one rank each that talks to the others, since the parts would not match.
    """
    rack_of = rack_of or [2 * rank // peers.size for rank in range(peers.size)]
    racks = [[rank for rank in range(peers.size) if rack_of[rank] == rack] for rack in sorted(set(rack_of))]
    inside = peers.among(next(rack for rack in racks if peers.rank in rack))
    if len({len(rack) for rack in racks}) > 1:
        tree_reduce(x, inside)
        if inside.rank == 0:
            ring(x, peers.among([rack[0] for rack in racks]))
        tree_broadcast(x, inside)
        return
    parts = list(x.tensor_split(inside.size))
    ring_reduce_scatter(parts, inside, owned=inside.rank)
    ring(parts[inside.rank], peers.among([rack[inside.rank] for rack in racks]))
    ring_all_gather(parts, inside, owned=inside.rank)


def ring(x: torch.Tensor, peers: Peers, reduction: Reduction = torch.add, order: Sequence[int] | None = None) -> None:
    """Sum x [n] over the ranks, in place, around the ring of ranks in `order`: 2 (N-1) rounds of n / N.

    Raises:
        ValueError: `order` is not a permutation of the ranks.
    """
    if order is not None:
        if sorted(order) != list(range(peers.size)):
            raise ValueError(f"the order {list(order)} is not a permutation of {peers.size} ranks")
        peers = peers.among(order)
    parts = list(x.tensor_split(peers.size))
    around_the_ring(parts, peers, peers.rank, range(2 * peers.size - 2), reduction)


def ring_reduce_scatter(
    parts: list[torch.Tensor], peers: Peers, *, owned: int, reduction: Reduction = torch.add
) -> None:
    """After N-1 rounds parts[owned] holds the sum over the ranks; the others hold partial sums."""
    around_the_ring(parts, peers, owned, range(peers.size - 1), reduction)


def ring_all_gather(parts: list[torch.Tensor], peers: Peers, *, owned: int) -> None:
    """parts[owned] is this rank's own; after N-1 rounds all are there."""
    around_the_ring(parts, peers, owned, range(peers.size - 1, 2 * peers.size - 2))


def around_the_ring(
    parts: list[torch.Tensor], peers: Peers, owned: int, steps: range, reduction: Reduction | None = None
) -> None:
    """The rounds `steps` of 2 (N-1): what arrives is summed and sent on, until it is whole, and then only sent on.

    Long parts travel in pieces: while one is summed, the next ones are on their way. No piece waits for the rest of
    its part. `owned`, the part that is whole first, counts up by one along the ring.
    """
    n, right, left = peers.size, (peers.rank + 1) % peers.size, (peers.rank - 1) % peers.size
    pieces = in_pieces(parts)
    each = len(pieces[0])
    ahead = min(AHEAD, each)  # a piece is sent on one round, `each` messages, after it arrived: it must be summed
    longest = max(part[0].numel() for part in pieces)
    scratch = peers.scratch(ahead * longest, parts[0]).tensor_split(ahead)
    under_way: dict[int, tuple[Sequence[Work], torch.Tensor, torch.Tensor]] = {}
    for tick in range(steps.start * each, steps.stop * each + ahead):
        if tick - ahead in under_way:
            works, incoming, arrived = under_way.pop(tick - ahead)
            for work in works:
                work.wait()
            if arrived is not incoming:
                reduction(incoming, arrived, out=incoming)
        step, k = divmod(tick, each)
        if step in steps:
            outgoing, incoming = pieces[(owned - 1 - step) % n][k], pieces[(owned - 2 - step) % n][k]
            arrived = scratch[tick % ahead][: incoming.numel()] if step < n - 1 else incoming
            under_way[tick] = (peers.start([(outgoing, right)], [(arrived, left)]), incoming, arrived)


def in_pieces(parts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Each part cut into the same number of pieces of at most PIECE bytes."""
    largest = max(part.numel() * part.element_size() for part in parts)
    return [list(part.view(-1).tensor_split(max(1, -(-largest // PIECE)))) for part in parts]


ALGORITHMS: dict[str, Callable[[torch.Tensor, Peers], None]] = {
    f.__name__: f for f in (naive, tree, ring, halving_doubling, hierarchical)
}
