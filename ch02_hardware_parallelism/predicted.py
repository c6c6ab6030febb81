"""How long an all-reduce should take: its messages, round by round, over links of a known latency and bandwidth.

The messages come from the algorithm itself, rehearsed: each rank runs it on a tensor without data and writes down what
it would send. On a flat network the sum over the rounds is the textbook's alpha times rounds plus beta times bytes:

    naive               2 alpha + 2 (N-1) n beta
    tree                2 log2 N (alpha + n beta)
    ring                2 (N-1) (alpha + n / N beta)
    halving_doubling    2 log2 N alpha + 2 (N-1)/N n beta         (N a power of two)

(Thakur, Rabenseifner and Gropp, 2005, without their term for the sums.) Between racks the bytes of a round that cross
an uplink share it, which is where the order of a ring decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ch02_hardware_parallelism.allreduce import ALGORITHMS
from ch02_hardware_parallelism.alpha_beta import AlphaBeta
from ch02_hardware_parallelism.journal import Journal, Message, replay
from ch02_hardware_parallelism.messages import Messages, Peers, Sent, Work

AllReduce = Callable[[torch.Tensor, Peers], None]


class Rehearsal(Peers):
    """Peers whose messages go nowhere and arrive at once."""

    def __init__(self, rank: int, ranks: int, journal: Journal) -> None:
        self.group, self.rank, self.size, self.members = None, rank, ranks, range(ranks)
        self.journal, self.sent, self._scratch = journal, Sent(), {}

    def _post(self, sends: Messages, receives: Messages) -> Sequence[Work]:
        return []


def messages(algorithm: str | AllReduce, size: int, ranks: int) -> list[Message]:
    """What all ranks send for `size` bytes, with the round of each.

    Raises:
        KeyError: there is no algorithm of that name.
    """
    run = ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm
    journals = []
    for rank in range(ranks):
        x = torch.empty(size, dtype=torch.uint8, device="meta")
        journals.append(Journal(x))
        run(x, Rehearsal(rank, ranks, journals[-1]))
    return replay(journals).messages


def predicted_s(
    algorithm: str | AllReduce,
    size: int,
    ranks: int,
    link: AlphaBeta,
    *,
    rack_of: Sequence[int] | None = None,
    uplink: AlphaBeta | None = None,
) -> float:
    """Seconds for an all-reduce of `size` bytes, sums not counted, the ranks in step from round to round.

    Args:
        algorithm: a name in ALGORITHMS, or any f(x, peers) that sends the same whatever the data.
        link: of one rank to the network, each way.
        rack_of: each rank's rack, where an uplink joins racks.
        uplink: the path to a rank in another rack; all messages that leave (or reach) a rack share its bandwidth.

    Raises:
        KeyError: there is no algorithm of that name.
    """
    seconds = 0.0
    sent = messages(algorithm, size, ranks)
    for number in range(1, max((message.round for message in sent), default=0) + 1):
        at_rank: Counter[tuple[str, int]] = Counter()
        at_rack: Counter[tuple[str, int]] = Counter()
        for message in sent:
            if message.round == number:
                at_rank["out", message.source] += message.bytes
                at_rank["in", message.target] += message.bytes
                if rack_of and rack_of[message.source] != rack_of[message.target]:
                    at_rack["out", rack_of[message.source]] += message.bytes
                    at_rack["in", rack_of[message.target]] += message.bytes
        near = link.time_s(max(at_rank.values()))
        far = uplink.time_s(max(at_rack.values())) if uplink and at_rack else 0.0
        seconds += max(near, far)
    return seconds
