"""The requests of an engine that generate, as sums over them: a thousand steps of all of them cost what one costs.

Each computes one token a step. What a step needs to know of them is how many they are, how many tokens they attend to,
how many take a block, and when the first is at its end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from ch06_vllm.engine.block_pool import BlockPool


class Sequence:
    """A request in an engine. `hashes`: a name for the content of each full block, of the prompt and the answer."""

    __slots__ = ("blocks", "cached", "computed", "decoding", "ends_at", "hashes", "index", "number", "output",
                 "preemptions", "prompt", "published", "tokens")  # fmt: skip

    def __init__(self, index: int, prompt: int, output: int, hashes: list[int]) -> None:
        self.index, self.prompt, self.output, self.hashes = index, prompt, output, hashes
        self.number = 0
        self.tokens = prompt  # known: the prompt's and what was generated
        self.computed = 0  # of them with keys and values; while it decodes, less the step at which it began to
        self.cached = self.preemptions = self.published = 0
        self.decoding = False
        self.ends_at = 0  # while it decodes: after so many steps of the engine
        self.blocks: list[int] = []


class Decoding:
    """At step k each of them computes its token number k + `computed`. `number`: how many they are."""

    def __init__(self, block_size: int) -> None:
        self.size = block_size
        self.number = self._computed = 0
        self._crossing = [0] * block_size  # how many take a block at the steps of this remainder
        self.spare: list[int] = []  # blocks taken for them and not yet in their tables
        self._ends: list[tuple[int, int, Sequence]] = []  # a heap by step; those that left before are still in it
        self._pushed = 0

    def add(self, sequence: Sequence, steps: int) -> None:
        """It generates from the next step on, `steps` having been taken."""
        sequence.decoding = True
        sequence.ends_at = steps + sequence.prompt + sequence.output - sequence.tokens
        sequence.computed -= steps
        self.number += 1
        self._computed += sequence.computed
        self._crossing[-sequence.computed % self.size] += 1
        self._pushed += 1
        heapq.heappush(self._ends, (sequence.ends_at, self._pushed, sequence))

    def remove(self, sequence: Sequence, steps: int) -> None:
        """It generates no more: what it computed meanwhile is written down, and its blocks are its own."""
        self.number -= 1
        self._computed -= sequence.computed
        self._crossing[-sequence.computed % self.size] -= 1
        sequence.decoding = False
        sequence.computed += steps
        sequence.tokens = sequence.computed + 1
        lacking = -(-sequence.computed // self.size) - len(sequence.blocks)
        if lacking > 0:
            sequence.blocks += self.spare[-lacking:]
            del self.spare[-lacking:]

    def context(self, step: int) -> int:
        """Tokens that they attend to at this step."""
        return self._computed + self.number * step

    def needed(self, first: int, end: int) -> int:
        """Blocks that they take from step `first` on, before step `end`."""
        rounds, rest = divmod(end - first, self.size)
        needed = rounds * self.number
        for step in range(first, first + rest):
            needed += self._crossing[step % self.size]
        return needed

    def take_blocks(self, pool: BlockPool, first: int, end: int) -> None:
        if self.number and (needed := self.needed(first, end)):
            self.spare += pool.allocate(needed)

    def next_end(self) -> int:
        """The step after which the first of them is at its end; there must be one."""
        while not self._ends[0][-1].decoding or self._ends[0][-1].ends_at != self._ends[0][0]:
            heapq.heappop(self._ends)
        return self._ends[0][0]

    def ended(self, steps: int) -> Iterator[Sequence]:
        """Those that are at their end, `steps` having been taken; each is removed before the next is asked for."""
        while self._ends and self._ends[0][0] <= steps:
            sequence = heapq.heappop(self._ends)[-1]
            if sequence.decoding and sequence.ends_at <= steps:  # one that came back may be in it twice
                yield sequence
