"""What each rank trains on in each step: a share of one global batch, cut into micro-batches, ready before it is asked.

The global batch is the job's, not the rank's: N ranks see the same sequences in a step as one, so a job may go on with
more ranks or fewer and still take the same steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from common import data
from common.dist import Context
from common.script import UserError

IGNORE = -100  # target of a padded position: F.cross_entropy's default ignore_index
Indices = npt.NDArray[np.int64]
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, int64 [b, t]


class Rows(Protocol):
    """Sequences by number: data.Blocks and Documents."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Batch: ...


class Documents:
    """Each document in rows of its own, the last one shorter and padded: what fine-tuning data look like.

    Blocks are all of one length, so that a mean over ranks is a mean over tokens. Here it is not: see token_count.
    """

    def __init__(self, tokens: data.Tokens, end: int, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        ends = np.flatnonzero(tokens == end)  # each document ends with this token
        starts = np.concatenate([[0], ends[:-1] + 1])
        self.rows = np.array(
            [
                (at, min(at + seq_len, stop))  # the targets are one further
                for start, stop in zip(starts.tolist(), ends.tolist(), strict=True)
                for at in range(start, stop, seq_len)
            ],
            dtype=np.int64,
        ).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Indices) -> Batch:
        inputs = torch.zeros(len(indices), self.seq_len, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE)
        for row, index in enumerate(indices):
            start, stop = self.rows[index]
            span = torch.from_numpy(self.tokens[start : stop + 1].astype(np.int64))
            inputs[row, : stop - start], targets[row, : stop - start] = span[:-1], span[1:]
        return inputs, targets

    def token_count(self, indices: Indices) -> int:
        return int((self.rows[indices, 1] - self.rows[indices, 0]).sum())


@dataclass(frozen=True)
class StepBatch:
    """One step of this rank. `tokens` is the whole job's: what every rank divides its sum of losses by."""

    micro_batches: list[Batch]
    tokens: int
    position: int  # sequences that the job has taken when this step is done
    indices: Indices  # this rank's


class Feed:
    """Steps without end. The order is drawn from (seed, epoch) alone; `position` in it is all there is to save.

    Every rank knows the whole step, so that none has to be told how many tokens the others hold.
    """

    def __init__(
        self, rows: Rows, ctx: Context, *, global_batch: int, micro_batch: int, seed: int, position: int = 0
    ) -> None:
        if global_batch < ctx.world_size:
            raise UserError(
                f"a step of {global_batch} sequences leaves some of {ctx.world_size} ranks without any; raise "
                "--global-batch"
            )
        self.rows, self.ctx, self.micro_batch = rows, ctx, micro_batch
        self.order = data.ShardedBatches(rows, global_batch, seed=seed, position=position)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        whole = self.order.next_indices()
        mine = np.array_split(whole, self.ctx.world_size)[self.ctx.rank]
        cuts = range(0, len(mine), self.micro_batch)
        micro_batches = [self._place(self.rows.batch(mine[at : at + self.micro_batch])) for at in cuts]
        return StepBatch(micro_batches, self._token_count(whole), self.order.position, mine)

    def _token_count(self, whole: Indices) -> int:
        rows = self.rows
        return rows.token_count(whole) if isinstance(rows, Documents) else len(whole) * rows.seq_len  # type: ignore

    def _place(self, batch: Batch) -> Batch:
        """On the device. From pinned memory the copy runs beside the compute; from pageable memory Python waits."""
        if self.ctx.device.type != "cuda":
            return batch
        inputs, targets = (tensor.pin_memory().to(self.ctx.device, non_blocking=True) for tensor in batch)
        return inputs, targets


class Prefetched:
    """The same steps, the next ones made by a thread while the device computes.

    What is made ahead is not yet consumed: the position to save is that of the step last handed out.
    """

    def __init__(self, feed: Feed, ahead: int = 2) -> None:
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(feed,), daemon=True)
        self._thread.start()

    def _fill(self, feed: Feed) -> None:
        try:
            if feed.ctx.device.type == "cuda":
                torch.cuda.set_device(feed.ctx.device)  # a thread has a current device of its own
            for step in feed:
                while not self._stop.is_set():
                    try:
                        self._queue.put(step, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._queue.put(error)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        step = self._queue.get()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
