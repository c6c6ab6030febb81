"""A journal of messages: what a rank sent, received, summed and copied, in its own order; and what all ranks' tell.

    journal = Journal(x)
    with journal:                                     # sums and copies are seen from here on, messages by Peers
        allreduce.ring(x, Peers(journal=journal))
    story = replay(journals_of_all_ranks, cell_bytes=..., starts=...)
    story.rounds, story.messages, story.states        # states[round][rank][cell]: whose contributions it holds

No rank's clock is trusted to order the messages of several. A message gets the number of its round from logical clocks
(Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978): one more than that of the last
message that its sender knew of. What no dependency orders is in the same round.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ch01_intro import roofline
from ch02_hardware_parallelism.messages import Messages, Work

aten = torch.ops.aten
CPU = torch.device("cpu")
SUMS = (aten.add, aten.add_, aten.maximum)

Held = Counter[tuple[int, int]]  # contributions (rank, cell), and how many times each is in


@dataclass(frozen=True)
class Region:
    """Contiguous memory of one rank."""

    address: int
    bytes: int

    @classmethod
    def of(cls, x: torch.Tensor) -> Region:
        if not x.is_contiguous():
            raise ValueError("a journal follows contiguous tensors only")
        return cls(x.data_ptr(), x.numel() * x.element_size())


@dataclass
class Batch:
    """Messages started together: (other rank, region). From begin_s until wait() returned, wall clock."""

    sends: list[tuple[int, Region]]
    receives: list[tuple[int, Region]]
    begin_s: float
    end_s: float = 0.0


@dataclass(frozen=True)
class Local:
    """A sum or a copy: `target` becomes the sum of `sources`."""

    target: Region
    sources: list[Region]


@dataclass(frozen=True)
class Event:
    what: str  # begin, end: of a batch; local
    of: Batch | Local


@dataclass
class Journal:
    """One rank's. `watched` is the tensor whose contents are followed; it is needed while recording only."""

    watched: torch.Tensor | Region
    events: list[Event] = field(default_factory=list)
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if isinstance(self.watched, torch.Tensor):
            self.device = self.watched.device
            self.watched = Region.of(self.watched)

    def begin(self, sends: Messages, receives: Messages) -> Entry:
        batch = Batch(
            [(to, Region.of(x)) for x, to in sends], [(source, Region.of(x)) for x, source in receives], time.time()
        )
        self.events.append(Event("begin", batch))
        return Entry(self, batch)

    def __enter__(self) -> Journal:
        self._arithmetic = _Arithmetic(self)
        self._arithmetic.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._arithmetic.__exit__(*error)
        del self._arithmetic


@dataclass
class Entry:
    """A batch under way, to be waited for like torch's own works."""

    journal: Journal
    batch: Batch
    works: Sequence[Work] = ()

    def under_way(self, works: Sequence[Work]) -> Entry:
        self.works = works
        return self

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        roofline.synchronize(self.journal.device)  # NCCL's wait() returns before the data have moved
        self.batch.end_s = time.time()
        self.journal.events.append(Event("end", self.batch))


class _Arithmetic(TorchDispatchMode):
    """Sees each operation of torch on its way to the kernel, and notes the sums and the copies."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in SUMS:
            sources = [Region.of(x) for x in args if isinstance(x, torch.Tensor)]
            self.journal.events.append(Event("local", Local(Region.of(out), sources)))
        elif func.overloadpacket is aten.copy_:
            self.journal.events.append(Event("local", Local(Region.of(args[0]), [Region.of(args[1])])))
        return out


@dataclass(frozen=True)
class Message:
    """One message of a replay. `cells` are those of the sender's watched tensor. Seconds of each host's wall clock."""

    round: int  # from 1
    source: int
    target: int
    bytes: int
    cells: tuple[int, ...]
    begin_s: float  # at the sender
    end_s: float  # at the receiver


@dataclass(frozen=True)
class Story:
    messages: list[Message]
    states: list[list[list[Held]]]  # [round, 0 before the first][rank][cell]

    @property
    def rounds(self) -> int:
        return len(self.states) - 1

    def traffic(self) -> list[list[int]]:
        """Bytes [from][to]."""
        ranks = len(self.states[0])
        table = [[0] * ranks for _ in range(ranks)]
        for message in self.messages:
            table[message.source][message.target] += message.bytes
        return table


class _Rank:
    """One rank in a replay: its memory, cell by cell, its place in its journal and its logical clock."""

    def __init__(self, rank: int, journal: Journal, cell_bytes: int | None, starts: Callable[[int, int], bool]) -> None:
        assert isinstance(journal.watched, Region)
        self.rank, self.events, self.watched, self.cell_bytes = rank, journal.events, journal.watched, cell_bytes
        self.next = self.clock = 0
        self.memory: dict[int, Held] = {}
        self.writes: list[tuple[int, int, Held]] = []  # to the watched tensor: clock, cell, what
        count = self.watched.bytes // cell_bytes if cell_bytes else 0
        self.write(self.watched, [Counter({(rank, c): 1} if starts(rank, c) else {}) for c in range(count)])
        self.tickets: Counter[int] = Counter()  # messages posted to be received so far, by their source
        self.stamps: dict[int, tuple[int, list[tuple[int, int, Region]]]] = {}

    def addresses(self, region: Region) -> range:
        if self.cell_bytes is None:
            return range(0)
        if region.bytes % self.cell_bytes:
            raise ValueError(f"{region.bytes} bytes are not whole cells of {self.cell_bytes} bytes")
        return range(region.address, region.address + region.bytes, self.cell_bytes)

    def read(self, region: Region) -> list[Held]:
        return [self.memory.get(address, Counter()) for address in self.addresses(region)]

    def write(self, region: Region, held: list[Held]) -> None:
        for address, what in zip(self.addresses(region), held, strict=True):
            self.memory[address] = what
            if 0 <= address - self.watched.address < self.watched.bytes:
                self.writes.append((self.clock, (address - self.watched.address) // self.cell_bytes, what))

    def cells(self, region: Region) -> tuple[int, ...]:
        return tuple((address - self.watched.address) // self.cell_bytes for address in self.addresses(region))


def replay(
    journals: Sequence[Journal],
    *,
    cell_bytes: int | None = None,
    starts: Callable[[int, int], bool] = lambda r, c: True,
) -> Story:
    """Let the ranks' journals happen again, on contributions in place of numbers.

    Args:
        journals: of all ranks, in order.
        cell_bytes: of the cells that are followed; all messages and sums hold whole cells. None: no contents.
        starts: whether what a rank's cell holds at the start counts as a contribution.

    Raises:
        ValueError: a message was never sent or never received, or its sizes differ: the recording is not whole.
    """
    ranks = [_Rank(number, journal, cell_bytes, starts) for number, journal in enumerate(journals)]
    wire: dict[tuple[int, int], list[tuple[int, list[Held], Message]]] = defaultdict(list)
    arrived: list[Message] = []
    while sum(_advance(rank, wire, arrived) for rank in ranks):  # until nobody gets any further
        pass
    for rank in ranks:
        if rank.next < len(rank.events):
            raise ValueError(f"rank {rank.rank} waits for a message that no journal knows of")
    if len(arrived) != sum(map(len, wire.values())):
        raise ValueError("a message was sent and never received")
    last = max((message.round for message in arrived), default=0)
    states = [[_state(rank, number) for rank in ranks] for number in range(last + 1)]
    return Story(sorted(arrived, key=lambda m: (m.round, m.source, m.target)), states)


def _advance(rank: _Rank, wire: dict, arrived: list[Message]) -> bool:
    """Let a rank go on until it waits for a message that has not been sent. Whether it got anywhere."""
    begun = rank.next
    while rank.next < len(rank.events):
        event = rank.events[rank.next]
        if isinstance(event.of, Local):
            sources = [rank.read(source) for source in event.of.sources]
            rank.write(event.of.target, [sum(held, Counter()) for held in zip(*sources, strict=True)])
        elif event.what == "begin":
            expected = []
            for to, region in event.of.sends:
                message = Message(
                    rank.clock + 1, rank.rank, to, region.bytes, rank.cells(region), event.of.begin_s, event.of.end_s
                )
                wire[rank.rank, to].append((rank.clock + 1, rank.read(region), message))
            for source, region in event.of.receives:
                expected.append((source, rank.tickets[source], region))
                rank.tickets[source] += 1
            rank.stamps[id(event.of)] = (rank.clock + 1 if event.of.sends else 0, expected)
        else:
            stamp, expected = rank.stamps[id(event.of)]
            if any(len(wire[source, rank.rank]) <= ticket for source, ticket, _ in expected):
                break
            got = [(wire[source, rank.rank][ticket], region) for source, ticket, region in expected]
            rank.clock = max([rank.clock, stamp, *(stamped for (stamped, _, _), _ in got)])
            for (_, held, message), region in got:
                rank.write(region, held)
                arrived.append(Message(**{**vars(message), "end_s": event.of.end_s}))
        rank.next += 1
    return rank.next > begun


def _state(rank: _Rank, number: int) -> list[Held]:
    """The watched cells at the end of a round."""
    cells: list[Held] = [Counter() for _ in range(rank.watched.bytes // rank.cell_bytes if rank.cell_bytes else 0)]
    for clock, cell, what in rank.writes:
        if clock <= number:
            cells[cell] = what
    return cells
