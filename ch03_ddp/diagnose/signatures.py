"""Compare before the call: is this rank about to make the same collective as all others? A debug mode.

Through the store, so that nothing has to work that is being checked: a wrong shape hangs NCCL, and aborts the process
under gloo, before anybody could ask. TORCH_DISTRIBUTED_DEBUG=DETAIL does the same inside torch, over a second gloo
group. It names both shapes, but neither the line nor, in a deadlock, what the missing rank does instead.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import torch.distributed as td

from ch03_ddp.diagnose import stacks, verdict
from ch03_ddp.diagnose.recorder import Call


class SignatureCheck:
    """One round trip more through the store for each collective: for debugging, not for production."""

    def __init__(self, store: td.Store, raise_if_told: Callable[[], None]) -> None:
        self.store, self.raise_if_told = store, raise_if_told
        self.waiting: tuple[Call, float] | None = None  # the call that the others have not announced, since when
        self._count: Counter[str] = Counter()

    def __call__(self, op: str, message: torch.Tensor | None, group: td.ProcessGroup) -> None:
        """Raises Fault if the ranks differ. Returns when all of the group have announced the same call."""
        ranks = td.get_process_group_ranks(group)
        self._count[group.group_name] += 1
        number, rank = self._count[group.group_name], td.get_rank()
        dtype, shape = ("nothing", ()) if message is None else (str(message.dtype)[6:], tuple(message.shape))
        call = Call(group.group_name, number, op, dtype, shape, stacks.caller(), done=False)
        key = f"call/{group.group_name}/{number}"
        self.store.set(f"{key}/{rank}", json.dumps(asdict(call)))
        self.waiting = call, time.monotonic()
        if self.store.add(key, 1) == len(ranks):
            self.store.set(f"{key}/all", "")
        pause = 1e-4
        while not self.store.check([f"{key}/all"]):
            self.raise_if_told()
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        said = self.store.multi_get([f"{key}/{r}" for r in ranks])
        self.waiting = None
        at = {rank: Call.from_dict(json.loads(text)) for rank, text in zip(ranks, said, strict=True)}
        if found := verdict.compare(at):
            raise verdict.Fault(found)
        if number > 2:  # all have read what was announced two calls ago, else they had not announced the last one
            self.store.delete_key(f"call/{group.group_name}/{number - 2}/{rank}")

    def announced(self, made: list[Call]) -> Call:
        """The call that waits to be made, numbered after those that were made: torch counts also what C++ calls."""
        assert self.waiting is not None
        call = self.waiting[0]
        last = max((c.number for c in made if c.group == call.group), default=0)
        return replace(call, number=last + 1, op=call.op.split("(")[0])
