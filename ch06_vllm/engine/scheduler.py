"""Continuous batching: at every step, which requests compute how many tokens.

There is no prefill phase and no decode phase: a request has tokens, and some of them are computed. A step hands out a
budget of tokens, first to the requests that run, then to those that wait. A generating request needs one; a prompt
takes as many as are left, and goes on at the next step (chunked prefill), so that it cannot stall the others. When
blocks run out, the running request that is served last gives its own up and waits again; its tokens are kept and their
keys and values recomputed (preemption by recompute).

Yu et al. 2022, "Orca" (iteration-level scheduling); Agrawal et al. 2023, "SARATHI" (chunked prefill).
"""

from __future__ import annotations

import bisect
import itertools
import time
from dataclasses import dataclass

from ch06_vllm.engine.block_pool import BlockPool, block_hash
from ch06_vllm.engine.request import Config, Request, Status


@dataclass(frozen=True)
class Share:
    """What a request computes in a step: `count` tokens from `start` on."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether its last token is the request's last, so that the next one can be chosen."""
        return self.start + self.count == len(self.request.tokens)


class Scheduler:
    def __init__(self, config: Config, pool: BlockPool) -> None:
        self.config, self.pool = config, pool
        self.waiting: list[Request] = []  # both in the order in which they are served
        self.running: list[Request] = []
        self.num_preemptions = self.prefix_queries = self.prefix_hits = 0  # the latter two in tokens

    def add(self, request: Request) -> None:
        bisect.insort(self.waiting, request, key=_order)

    def finish(self, request: Request) -> None:
        """Take it out, wherever it is; its blocks are free at once."""
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self._give_up_blocks(request)
        request.status = Status.FINISHED

    def schedule(self) -> list[Share]:
        """The next step. Blocks for its tokens are in the requests' tables."""
        budget = self.config.max_num_batched_tokens
        shares: list[Share] = []
        preempted = False
        for index, request in enumerate(list(self.running)):
            if request.status is not Status.RUNNING:
                break  # it and those after it were preempted
            still_to_come = len(self.running) - 1 - index  # a token is left for each of them, even by a long prompt
            count = self._count(request.num_pending, budget - still_to_come)
            while count and not self._reserve(request, count):
                victim = self.running[-1]
                self._preempt(victim)
                preempted = True
                if victim is request:
                    count = 0
            if count:
                shares.append(Share(request, request.num_computed, count))
                budget -= count
        while self.waiting and not preempted and len(self.running) < self.config.max_num_seqs:
            request = self.waiting[0]
            found = self.pool.match(self._hashes(request)[: (len(request.tokens) - 1) // self.pool.block_size])
            cached = len(found) * self.pool.block_size
            count = self._count(len(request.tokens) - cached, budget)
            if not count:
                break
            self.pool.share(found)
            request.blocks, request.num_computed = found, cached
            if not self._reserve(request, count):
                self._give_up_blocks(request)
                break
            if request.num_preemptions == 0:
                request.num_cached, request.scheduled_s = cached, time.perf_counter()
                self.prefix_queries += request.num_prompt
                self.prefix_hits += cached
            del self.waiting[0]
            request.status = Status.RUNNING
            bisect.insort(self.running, request, key=_order)
            shares.append(Share(request, cached, count))
            budget -= count
        return shares

    def computed(self, share: Share) -> None:
        """The step is over: its keys and values are in the cache, and full blocks can be found by others."""
        request = share.request
        before = request.num_computed // self.pool.block_size
        request.num_computed += share.count
        if self.pool.caching:
            after = request.num_computed // self.pool.block_size
            for index, digest in enumerate(self._hashes(request)[before:after], start=before):
                self.pool.publish(request.blocks[index], digest)

    def _count(self, pending: int, budget: int) -> int:
        """Tokens that a request gets: without chunked prefill all it needs, or none."""
        if pending > budget and not self.config.enable_chunked_prefill:
            return 0
        return min(pending, budget)

    def _reserve(self, request: Request, count: int) -> bool:
        """Blocks for its next `count` tokens; False, and nothing is taken, if there are not enough."""
        needed = -(-(request.num_computed + count) // self.pool.block_size) - len(request.blocks)
        if needed > self.pool.num_free:
            return False
        request.blocks += self.pool.allocate(max(0, needed))
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_up_blocks(request)
        request.status = Status.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.add(request)

    def _give_up_blocks(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.num_computed = [], 0

    def _hashes(self, request: Request) -> list[bytes]:
        """Of all its full blocks. Tokens are only ever added, so known hashes stay."""
        if self.pool.caching:
            size = self.pool.block_size
            for end in range((len(request.hashes) + 1) * size, len(request.tokens) + 1, size):
                parent = request.hashes[-1] if request.hashes else b""
                request.hashes.append(block_hash(parent, request.tokens[end - size : end]))
        return request.hashes

    def check(self) -> None:
        """What must hold between two steps.

        Raises:
            AssertionError: what does not.
        """
        self.pool.check(request.blocks for request in self.running)
        for request in self.waiting:
            assert request.status is Status.WAITING, request.request_id
            assert not request.blocks, request.request_id
        for request in self.running:
            assert request.status is Status.RUNNING, request.request_id
            assert len(request.blocks) * self.pool.block_size >= request.num_computed, request.request_id
            assert request.num_computed < len(request.tokens), request.request_id
            digests = self._hashes(request)[: request.num_computed // self.pool.block_size]
            for block, digest in itertools.zip_longest(request.blocks, digests):
                assert self.pool.hash_of[block] in (None, digest), f"block {block} is cached as what it does not hold"
        assert len(self.running) <= self.config.max_num_seqs
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_order)


def _order(request: Request) -> tuple[int, int]:
    return request.order
