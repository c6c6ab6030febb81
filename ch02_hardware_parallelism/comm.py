"""The collectives of one group of ranks: built here from send and receive, with every byte counted, or the library's.

    comm = Comm(by_hand=True)          # all ranks
    tp, dp = comm.grid(dp=2, tp=2)...  # the rows and columns of a grid of ranks
    comm.all_reduce(x)                 # in place, summed
    comm.sent_bytes                    # what this rank has sent, payload only

The parallel strategies of this chapter talk through it and nothing else. by_hand=True is for looking and counting,
by_hand=False for speed: it calls torch.distributed (NCCL, gloo), whose messages cannot be seen from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as td

from ch01_intro.collectives import all_gather_single, reduce_scatter_single
from ch02_hardware_parallelism import allreduce
from ch02_hardware_parallelism.messages import Peers


class Handle(Protocol):
    """Something under way: a collective that was started with async_op=True."""

    def wait(self) -> object: ...


class Done:
    """A handle of what is already over."""

    def wait(self) -> None:
        return None


# By the job's own group, and gone with it: one that outlives its session has threads that can abort a leaving process.
_groups: WeakKeyDictionary[td.ProcessGroup, dict[tuple[int, ...], td.ProcessGroup]] = WeakKeyDictionary()


def group_of(ranks: Sequence[int]) -> td.ProcessGroup:
    """The process group of these global ranks, made once. All ranks of the job must ask for the same ones in order."""
    made = _groups.setdefault(td.group.WORLD, {})
    key = tuple(ranks)
    if key not in made:
        made[key] = td.new_group(list(key))
    return made[key]


@dataclass
class Comm:
    """The collectives of one group. Ranks are counted within the group."""

    group: td.ProcessGroup | None = None
    by_hand: bool = False
    peers: Peers = field(init=False)
    children: list[Comm] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.peers = Peers(self.group)

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def size(self) -> int:
        return self.peers.size

    @property
    def sent_bytes(self) -> int:
        """Payload bytes that this rank sent by hand through this group; the library's are not seen."""
        return self.peers.sent_bytes

    def total_sent_bytes(self) -> int:
        """The same with all groups that were split off this one."""
        return self.sent_bytes + sum(child.total_sent_bytes() for child in self.children)

    def grid(self, rows: int, columns: int) -> tuple[Comm, Comm]:
        """This group's ranks as a grid, filled row by row: the communicators of this rank's column and of its row.

        With tensor parallelism inside a row, rank r has data-parallel rank r // columns and tensor rank r % columns:
        neighbours, which share the fast links, are in the same row.
        """
        if rows * columns != self.size:
            raise ValueError(f"a grid of {rows} x {columns} does not hold {self.size} ranks")
        base = td.get_process_group_ranks(self.group or td.group.WORLD)
        in_columns = [group_of(base[c::columns]) for c in range(columns)]
        in_rows = [group_of(base[r * columns : (r + 1) * columns]) for r in range(rows)]
        row, column = divmod(self.rank, columns)
        self.children += [Comm(in_columns[column], self.by_hand), Comm(in_rows[row], self.by_hand)]
        return self.children[-2], self.children[-1]

    def all_reduce(self, x: torch.Tensor, *, async_op: bool = False) -> Handle:
        """Sum over the ranks, in place. A 0-d tensor will do."""
        if self.size == 1:
            return Done()
        if not self.by_hand:
            return td.all_reduce(x, group=self.group, async_op=async_op) or Done()
        flat = x.reshape(-1)  # a view of a contiguous x, else a copy
        allreduce.ring(flat, self.peers)
        if not x.is_contiguous():
            x.copy_(flat.view_as(x))
        return Done()

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over the ranks, in place."""
        if self.size > 1 and not self.by_hand:
            td.all_reduce(x, op=td.ReduceOp.MAX, group=self.group)
        elif self.size > 1:
            flat = x.reshape(-1)
            allreduce.ring(flat, self.peers, torch.maximum)
            if not x.is_contiguous():
                x.copy_(flat.view_as(x))
        return x

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The ranks' equal parts put together along `dim`, in rank order.

        Always by hand on gloo, whose own lets the two directions of a link take turns.
        """
        if self.size == 1:
            return x
        part = x.movedim(dim, 0).contiguous()
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        if self.by_hand or td.get_backend(self.group) == "gloo":
            parts = list(whole.chunk(self.size))
            parts[self.rank].copy_(part)
            allreduce.ring_all_gather(parts, self.peers, owned=self.rank)
        else:
            all_gather_single(whole, part, group=self.group)
        return whole.movedim(0, dim).contiguous()  # else every layer that reads it would make its own copy

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part, along `dim`, of the sum over the ranks. The ranks' parts are equal.

        Always by hand on gloo, whose own is an all_reduce underneath and sends twice as much.
        """
        if self.size == 1:
            return x
        whole = x.movedim(dim, 0).contiguous()
        if self.by_hand or td.get_backend(self.group) == "gloo":
            whole = whole.clone() if whole.data_ptr() == x.data_ptr() else whole
            parts = list(whole.chunk(self.size))
            allreduce.ring_reduce_scatter(parts, self.peers, owned=self.rank)
            return parts[self.rank].movedim(0, dim).clone(memory_format=torch.contiguous_format)
        part = torch.empty_like(whole.chunk(self.size)[self.rank])
        reduce_scatter_single(part, whole, group=self.group)
        return part.movedim(0, dim).contiguous()

    def broadcast(self, x: torch.Tensor, source: int = 0) -> None:
        """Everybody gets `source`'s x, in place."""
        if self.size > 1 and self.by_hand:
            flat = x.reshape(-1)
            allreduce.tree_broadcast(flat, self.peers, source)
            if not x.is_contiguous():
                x.copy_(flat.view_as(x))
        elif self.size > 1:
            td.broadcast(x, group=self.group, group_src=source)
