"""An inference engine without a model: chapter 6's scheduler, step for step, in virtual time.

What is computed when, what hits the prefix cache and who is preempted are decided as ch06_vllm/engine/scheduler.py
decides (tests play both on the same requests); its block pool is used as it is. How long a step takes is a formula
(physics.py). Steps in which nothing is decided, all requests generating, are taken at once (decoding.py).

Two things differ: a request's answer enters the prefix cache when it ends, not block by block; and arrivals all have
the same priority.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator

from ch06_vllm.engine.block_pool import BlockPool
from ch06_vllm.engine.request import Config
from ch07_sglang_routing.simulator.decoding import Decoding, Sequence
from ch07_sglang_routing.simulator.physics import Physics

IDLE = math.inf


class Engine:
    """
    Args:
        on_first: called with a request's index and the time of its first token.
        on_finish: the same for its last.

    Attributes:
        wake_s: when something is decided next: call `fire` then.
    """

    def __init__(
        self,
        physics: Physics,
        config: Config,
        on_first: Callable[[int, float], None],
        on_finish: Callable[[int, float], None],
    ) -> None:
        assert config.num_blocks is not None
        self.physics, self.config = physics, config
        self.on_first, self.on_finish = on_first, on_finish
        self.pool = BlockPool(config.num_blocks, config.block_size, caching=config.enable_prefix_caching)
        self.size = config.block_size
        self.waiting: list[Sequence] = []  # all three by number
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []  # those of `running` that do not decode
        self.wake_s = IDLE
        self.num_preemptions = self.prefix_queries = self.prefix_hits = self.steps = 0
        self.busy_s = 0.0
        self._number = 0
        self.decoding = Decoding(self.size)
        # What goes on until wake_s: so many steps that only decode, or one step with other shares too.
        self._began_s = 0.0
        self._planned = 0
        self._shares: list[tuple[Sequence, int]] = []
        self._admitted: list[Sequence] = []

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    def context(self) -> int:
        """Tokens that those that decode attend to at the next step."""
        return self.decoding.context(self.steps + 1)

    def rests(self) -> Iterator[tuple[int, int]]:
        """(tokens still to come, tokens of context) of each running request that decodes."""
        for sequence in self.running:
            if sequence.decoding:
                yield sequence.ends_at - self.steps, sequence.computed + self.steps

    # ------------------------------------------------------------ from outside

    def submit(self, sequence: Sequence, now_s: float) -> None:
        """A request comes in. All that happens before now_s must have been fired."""
        if sequence.prompt + sequence.output > self.config.num_blocks * self.size:
            raise ValueError(f"a cache of {self.config.num_blocks} blocks does not hold request {sequence.index}")
        self._number += 1
        sequence.number = self._number
        self.waiting.append(sequence)
        if self.wake_s == IDLE:
            self._plan(now_s)
        elif self._planned > 1 and len(self.waiting) == 1 and len(self.running) < self.config.max_num_seqs:
            # It is looked at when the step that now runs is over. (Behind others that wait it would change nothing.)
            elapsed_s, singles, context = now_s - self._began_s, self.decoding.number, self.context()
            if (steps := self.physics.steps_until(singles, context, elapsed_s)) < self._planned:
                self._planned = steps
                self.wake_s = self._began_s + self.physics.run(singles, context, steps)

    def fire(self) -> None:
        """What was planned is over, at wake_s."""
        now_s = self.wake_s
        self.busy_s += now_s - self._began_s
        steps = self._planned or 1
        self.decoding.take_blocks(
            self.pool, self.steps + 1, self.steps + steps
        )  # for the first step they were taken when it was planned
        self.steps += steps
        ended = self._end_shares(now_s)
        for sequence in self.decoding.ended(self.steps):
            self._settle(sequence)
            ended.append(sequence)
        ended.sort(key=_number)
        for sequence in [*ended, *self._admitted]:  # the order in which blocks become free is that of the shares
            if sequence.tokens == sequence.prompt + sequence.output and sequence.blocks:
                self._finish(sequence, now_s)
        self._plan(now_s)

    # ------------------------------------------------------------ a step begins

    def _plan(self, now_s: float) -> None:
        """Decide on the next steps."""
        self._began_s, self._planned, self._shares, self._admitted = now_s, 0, [], []
        preempted, budget = self._share_out()
        singles, context = self.decoding.number, self.context()
        while self.waiting and not preempted and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            found = self.pool.match(sequence.hashes[: (sequence.tokens - 1) // self.size]) if self.pool.caching else []
            cached = len(found) * self.size
            count = self._count(sequence.tokens - cached, budget)
            if not count:
                break
            self.pool.share(found)
            sequence.blocks, sequence.computed, sequence.published = found, cached, len(found)
            if not self._reserve(sequence, count):
                self._give_up_blocks(sequence)
                break
            if sequence.preemptions == 0:
                sequence.cached = cached
                self.prefix_queries += sequence.prompt
                self.prefix_hits += cached
            del self.waiting[0]
            bisect.insort(self.running, sequence, key=_number)
            bisect.insort(self.prefilling, sequence, key=_number)
            self._shares.append((sequence, count))
            self._admitted.append(sequence)
            budget -= count
        if self._shares:
            self._start_step(singles, context)
        elif singles:
            self._start_run(context)
        elif preempted:
            self._plan(now_s)  # the only one that ran was preempted, and nothing was computed
        else:
            self.wake_s = IDLE

    def _share_out(self) -> tuple[bool, int]:
        """Tokens and blocks for those that run: whether one was preempted, and what is left of the budget."""
        budget = self.config.max_num_batched_tokens - len(self.running)  # a token for each is set aside
        needed = self.decoding.needed(self.steps, self.steps + 1)
        for sequence in self.prefilling:
            count = self._count(sequence.tokens - sequence.computed, budget + 1)
            budget -= count - 1
            needed += -(-(sequence.computed + count) // self.size) - len(sequence.blocks)
            self._shares.append((sequence, count))
        if needed > self.pool.num_free:
            return self._share_out_one_by_one()
        self.decoding.take_blocks(self.pool, self.steps, self.steps + 1)
        for sequence, count in self._shares:
            self._reserve(sequence, count)
        return False, budget

    def _share_out_one_by_one(self) -> tuple[bool, int]:
        """The same where blocks run out: who is served last gives its own up."""
        self._shares = []
        for sequence in self.running:
            if sequence.decoding:
                self._settle(sequence)
        self.prefilling = list(self.running)
        budget, preempted = self.config.max_num_batched_tokens, False
        for index, sequence in enumerate(self.prefilling[:]):
            if not sequence.blocks:
                break  # it and those after it were preempted
            still_to_come = len(self.running) - 1 - index
            count = self._count(sequence.tokens - sequence.computed, budget - still_to_come)
            while count and not self._reserve(sequence, count):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    count = 0
            if count:
                self._shares.append((sequence, count))
                budget -= count
        return preempted, budget

    def _start_step(self, singles: int, context: int) -> None:
        tokens, pairs = 0, 0.0
        for sequence, count in self._shares:
            if count == 1:
                singles += 1
                context += sequence.computed + 1
            else:
                tokens += count
                pairs += count * (sequence.computed + (count + 1) / 2)
        self.wake_s = self._began_s + self.physics.step(singles, context, tokens, pairs)

    def _start_run(self, context: int) -> None:
        """Steps without a decision: until the first request ends, or blocks may be short."""
        steps, free = self.decoding.next_end() - self.steps, self.pool.num_free
        if self.decoding.needed(self.steps + 1, self.steps + steps) > free:
            fit = 1  # the first has its blocks
            while steps - fit > 1:
                middle = (fit + steps) // 2
                fit, steps = (
                    (middle, steps)
                    if self.decoding.needed(self.steps + 1, self.steps + middle) <= free
                    else (fit, middle)
                )
            steps = fit
        self._planned = steps
        self.wake_s = self._began_s + self.physics.run(self.decoding.number, context, steps)

    # ------------------------------------------------------------ a step ends

    def _end_shares(self, now_s: float) -> list[Sequence]:
        """Those that ran before, and are at their end."""
        ended = []
        for sequence, count in self._shares:
            sequence.computed += count
            self._publish(sequence)
        for sequence, _ in self._shares:
            if sequence.computed == sequence.tokens:
                if sequence.tokens == sequence.prompt:
                    self.on_first(sequence.index, now_s)
                sequence.tokens += 1
                if sequence.tokens < sequence.prompt + sequence.output:
                    self.prefilling.remove(sequence)
                    self.decoding.add(sequence, self.steps)
                elif sequence not in self._admitted:
                    ended.append(sequence)
        return ended

    def _settle(self, sequence: Sequence) -> None:
        self.decoding.remove(sequence, self.steps)
        self._publish(sequence)

    def _finish(self, sequence: Sequence, now_s: float) -> None:
        self.running.remove(sequence)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        self._give_up_blocks(sequence)
        self.on_finish(sequence.index, now_s)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.prefilling.remove(sequence)
        self._give_up_blocks(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, sequence, key=_number)

    # ------------------------------------------------------------ blocks

    def _count(self, pending: int, budget: int) -> int:
        if pending > budget and not self.config.enable_chunked_prefill:
            return 0
        return min(pending, budget)

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        needed = -(-(sequence.computed + count) // self.size) - len(sequence.blocks)
        if needed > self.pool.num_free:
            return False
        if needed > 0:
            sequence.blocks += self.pool.allocate(needed)
        return True

    def _publish(self, sequence: Sequence) -> None:
        if self.pool.caching:
            full = sequence.computed // self.size
            for index in range(sequence.published, full):
                self.pool.publish(sequence.blocks[index], sequence.hashes[index])
            sequence.published = full

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.published = [], 0, 0

    def check(self) -> None:
        """What must hold between two events.

        Raises:
            AssertionError: what does not.
        """
        self.pool.check([*(sequence.blocks for sequence in self.running), self.decoding.spare])
        assert self.decoding.number == sum(sequence.decoding for sequence in self.running)
        assert len(self.running) <= self.config.max_num_seqs
        assert [s for s in self.running if not s.decoding] == self.prefilling
        assert not any(sequence.blocks for sequence in self.waiting)


def _number(sequence: Sequence) -> int:
    return sequence.number
