"""Point-to-point messages between the ranks of a group: all that the collectives of this chapter are built from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as td

if TYPE_CHECKING:
    from ch02_hardware_parallelism.journal import Journal

Messages = Sequence[tuple[torch.Tensor, int]]  # (tensor, to whom) or (buffer, from whom)


class Work(Protocol):
    """Messages under way; wait() returns when the buffers may be used again."""

    def wait(self) -> object: ...


@dataclass
class Sent:
    """What has been sent: payload bytes, and messages."""

    bytes: int = 0
    messages: int = 0


class Peers:
    """The ranks of one group, and the messages this one exchanges with them. Ranks are counted within the group."""

    def __init__(self, group: td.ProcessGroup | None = None, journal: Journal | None = None) -> None:
        self.group = group
        self.rank = td.get_rank(group)
        self.size = td.get_world_size(group)
        self.members: Sequence[int] = range(self.size)  # how the group numbers the ranks
        self.journal = journal
        self.sent = Sent()
        self._scratch: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def sent_bytes(self) -> int:
        return self.sent.bytes

    @property
    def sent_messages(self) -> int:
        return self.sent.messages

    def among(self, ranks: Sequence[int]) -> Peers:
        """These ranks alone, this one among them, numbered 0, 1, ... in the order given. What they send counts here.

        Raises:
            ValueError: this rank is not one of them.
        """
        part = copy.copy(self)
        part.members = [self.members[rank] for rank in ranks]
        part.rank, part.size = list(ranks).index(self.rank), len(ranks)
        return part

    def scratch(self, numbers: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer [numbers] to receive into, until the next call. Kept: new memory costs a page fault every 4 KiB."""
        kind = like.dtype, like.device
        if kind not in self._scratch or self._scratch[kind].numel() < numbers:
            self._scratch[kind] = like.new_empty(numbers)
        return self._scratch[kind][:numbers]

    def exchange(self, sends: Messages = (), receives: Messages = ()) -> None:
        """Send and receive at once: (tensor, to whom) and (buffer, from whom), contiguous. Returns when all is done.

        Posted together: two ranks that both send first and receive then could wait for each other for ever.
        """
        works = self.start(sends, receives)
        for work in works:
            work.wait()

    def start(self, sends: Messages = (), receives: Messages = ()) -> Sequence[Work]:
        """The same without waiting: the buffers must be left alone until every work's wait() has returned.

        A message of no bytes is not sent: both sides know its length.
        """
        sends = [(x, self.members[to]) for x, to in sends if x.numel()]
        receives = [(x, self.members[source]) for x, source in receives if x.numel()]
        for x, _ in sends:
            self.sent.bytes += x.numel() * x.element_size()
            self.sent.messages += 1
        entry = self.journal.begin(sends, receives) if self.journal else None
        works = self._post(sends, receives)
        return [entry.under_way(works)] if entry else works

    def _post(self, sends: Messages, receives: Messages) -> Sequence[Work]:
        # Receives first: gloo tells the sender that a buffer is ready, over the connection that our own data take too.
        # Behind them that word would be late, and the two directions would take turns.
        posts = [td.P2POp(td.irecv, x, group=self.group, group_peer=source) for x, source in receives]
        posts += [td.P2POp(td.isend, x, group=self.group, group_peer=to) for x, to in sends]
        return td.batch_isend_irecv(posts) if posts else []
