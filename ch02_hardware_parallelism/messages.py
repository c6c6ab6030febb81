"""Point-to-point messages between the ranks of a group: all that the collectives of this chapter are built from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as td


class Peers:
    """The ranks of one group, and the messages this one exchanges with them. Ranks are counted within the group."""

    def __init__(self, group: td.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = td.get_rank(group)
        self.size = td.get_world_size(group)
        self.sent_bytes = 0
        self.sent_messages = 0

    def exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]] = (), receives: Sequence[tuple[torch.Tensor, int]] = ()
    ) -> None:
        """Send and receive at once: (tensor, to whom) and (buffer, from whom), contiguous. Returns when all is done.

        Posted together: two ranks that both send first and receive then could wait for each other for ever.
        """
        works = self.start(sends, receives)
        for work in works:
            work.wait()

    def start(
        self, sends: Sequence[tuple[torch.Tensor, int]] = (), receives: Sequence[tuple[torch.Tensor, int]] = ()
    ) -> list[td.Work]:
        """The same without waiting: the buffers must be left alone until every work's wait() has returned."""
        posts = [td.P2POp(td.isend, x, group=self.group, group_peer=to) for x, to in sends]
        posts += [td.P2POp(td.irecv, x, group=self.group, group_peer=source) for x, source in receives]
        for x, _ in sends:
            self.sent_bytes += x.numel() * x.element_size()
            self.sent_messages += 1
        return td.batch_isend_irecv(posts) if posts else []
