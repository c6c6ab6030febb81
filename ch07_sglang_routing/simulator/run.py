"""A router in front of engines in virtual time: each request of a trace in turn, by a policy of the router's.

The policies are the router's own (ch07_sglang_routing/router/policies.py). They see what the router would see: its own
counts, or, with `scrape_s`, the engines' gauges as they last were read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ch06_vllm.engine.request import Config
from ch07_sglang_routing.router import policies
from ch07_sglang_routing.router.policies import Ask
from ch07_sglang_routing.simulator.decoding import Sequence
from ch07_sglang_routing.simulator.engine import Engine
from ch07_sglang_routing.simulator.physics import Physics
from ch07_sglang_routing.simulator.traces import Asked, Trace

Seconds = Series[float] | np.ndarray


class Counts:
    """What a policy is told of a worker (router/policies.py, Worker)."""

    __slots__ = ("in_flight", "name", "pending_tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.in_flight = 0
        self.pending_tokens = 0.0


class Chooser(Protocol):
    matched: float

    def choose(self, ask: Ask, workers: list[Counts]) -> int: ...


NANO = Physics()
CONFIG = Config("", num_blocks=1024, max_num_seqs=32, max_num_batched_tokens=512)


@dataclass(frozen=True)
class Setting:
    """
    Args:
        workers: engines.
        config: of each; num_blocks must be given.
        scrape_s: None: policies see the router's own counts. Else the engines' gauges, read every so many seconds.
        leaks: (worker, share): so many of this worker's requests are never taken off the router's count.
        recur: a session's next prompt goes on with the answer that was given (Asked.hashes).
    """

    physics: Physics = NANO
    workers: int = 8
    config: Config = CONFIG
    scrape_s: float | None = None
    leaks: tuple[int, float] | None = None
    recur: bool = True


@dataclass
class Played:
    """A trace under a policy; arrays have one entry for each request, in the order of the trace."""

    ttft_s: np.ndarray
    e2e_s: np.ndarray
    worker: np.ndarray
    cached: np.ndarray  # tokens of the prompt found in the prefix cache
    prompt: np.ndarray
    output: np.ndarray
    at_s: np.ndarray
    preemptions: int
    busy: list[float]  # share of the time in which each engine computed

    @property
    def hit_rate(self) -> float:
        return float(self.cached.sum() / self.prompt.sum())

    @property
    def end_s(self) -> float:
        return float((self.at_s + self.e2e_s).max())

    @property
    def output_tokens_per_s(self) -> float:
        return float(self.output.sum() / self.end_s)


def policy(name: str, setting: Setting, request_tokens: float = 64.0) -> Chooser:
    """router.policies.make; those that look at caches are told how much the engines hold."""
    assert setting.config.num_blocks is not None
    keeps = setting.config.num_blocks * setting.config.block_size
    return policies.make(name, tree_size=2**24, keeps=keeps, request_tokens=request_tokens)


class Book:
    """The router's account of a trace that is played: where each request went, and what each worker has to do."""

    def __init__(self, trace: Trace, workers: int) -> None:
        self.trace, self.counts = trace, [Counts(f"worker-{number}") for number in range(workers)]
        self.sent_to, self._pending = [0] * len(trace), [0.0] * len(trace)

    def send(self, index: int, chooser: Chooser, seen: list[Counts] | None = None) -> int:
        """Choose by what is `seen`, else by the account itself, and enter it."""
        asked = self.trace[index]
        worker = chooser.choose(Ask(asked.tokens(), asked.session, asked.rank), seen or self.counts)
        self.enter(index, worker, chooser.matched)
        return worker

    def enter(self, index: int, worker: int, matched: float) -> None:
        self.sent_to[index], self._pending[index] = worker, self.trace[index].prompt - matched
        self.counts[worker].in_flight += 1
        self.counts[worker].pending_tokens += self._pending[index]

    def first_token(self, index: int) -> None:
        self.counts[self.sent_to[index]].pending_tokens -= self._pending[index]

    def end(self, index: int) -> None:
        self.counts[self.sent_to[index]].in_flight -= 1

    def close(
        self, first_s: Seconds, finish_s: Seconds, cached: Seconds, *, preemptions: int = 0, busy_s: Seconds = ()
    ) -> Played:
        """The trace as it was played; seconds since it began."""
        at_s = np.array([asked.at_s for asked in self.trace])
        return Played(
            ttft_s=np.array(first_s) - at_s,
            e2e_s=np.array(finish_s) - at_s,
            worker=np.array(self.sent_to),
            cached=np.array(cached),
            prompt=np.array([asked.prompt for asked in self.trace]),
            output=np.array([asked.output for asked in self.trace]),
            at_s=at_s,
            preemptions=preemptions,
            busy=[seconds / float(max(finish_s)) for seconds in busy_s],
        )


class Fixed:
    """Where each request goes is known beforehand."""

    matched = 0.0

    def __init__(self, workers: list[int]) -> None:
        self._workers = iter(workers)

    def choose(self, ask: Ask, workers: list[Counts]) -> int:
        return next(self._workers)


class Informed:
    """Knows what no router knows: every answer's length, and what is in every cache at this moment.

    It takes the worker at which the sum of all requests' E2E grows least, as if nothing came after: what this request
    waits and computes, and what it adds to the steps of those that are there (their number and lengths are known, too).
    What comes after it does not know, so it is not the optimum: see `oracle`.
    """

    def __init__(self, physics: Physics) -> None:
        self.physics = physics

    def choose(self, asked: Asked, hashes: list[int], engines: list[Engine]) -> int:
        costs = [self.cost(asked, hashes, engine) for engine in engines]
        best = min(costs)
        equal = [index for index, cost in enumerate(costs) if cost == best]
        return equal[int(asked.rank * len(equal))]

    def cost(self, asked: Asked, hashes: list[int], engine: Engine) -> float:
        """Seconds that it adds to the sum of E2E, at this worker."""
        physics, size = self.physics, engine.size
        cached = len(engine.pool.match(hashes[: (asked.prompt - 1) // size])) * size
        prefill_s = self._prefill(cached, asked.prompt)
        ahead_s, others, own_s, theirs_s = 0.0, 0, 0.0, 0.0
        mine = physics.decode_seq_s + physics.decode_context_s * (asked.prompt + asked.output / 2)
        rest: list[tuple[int, float]] = list(engine.rests())
        for sequence in [*engine.prefilling, *engine.waiting]:
            ahead_s += self._prefill(sequence.computed, sequence.tokens)
            rest.append((sequence.prompt + sequence.output - sequence.tokens, sequence.tokens))
        for left, context in rest:
            others += 1
            together = min(left, asked.output)
            own_s += together * (physics.decode_seq_s + physics.decode_context_s * context)
            theirs_s += together * mine
        behind = len(engine.running) + 1 - engine.config.max_num_seqs + len(engine.waiting)
        queue_s = 0.0
        if behind > 0:  # it waits until so many have ended
            ends = sorted(left for left, _ in rest)
            queue_s = ends[min(behind, len(ends)) - 1] * physics.step(len(engine.running), engine.context(), 0, 0)
        alone_s = asked.output * (physics.step_s + mine)
        return queue_s + ahead_s + prefill_s + alone_s + own_s + others * prefill_s + theirs_s

    def _prefill(self, start: int, end: int) -> float:
        count = end - start
        return self.physics.prefill_token_s * count + self.physics.prefill_pair_s * count * (start + count / 2)


def play(trace: Trace, chooser: Chooser | Informed, setting: Setting) -> Played:
    """The trace, to the last token of the last request."""
    requests, size = len(trace), setting.config.block_size
    first_s, finish_s = [math.nan] * requests, [math.nan] * requests
    cached, book = [0] * requests, Book(trace, setting.workers)
    gauges = book.counts if setting.scrape_s is None else [Counts(count.name) for count in book.counts]
    leaking, leak = setting.leaks or (-1, 0.0)
    sequences: dict[int, Sequence] = {}

    def on_first(index: int, now_s: float) -> None:
        first_s[index] = now_s + setting.physics.request_s
        book.first_token(index)

    def on_finish(index: int, now_s: float) -> None:
        finish_s[index] = now_s + setting.physics.request_s
        cached[index] = sequences.pop(index).cached
        # The request's own luck decides: a leak meets the same requests under each policy.
        if book.sent_to[index] != leaking or (trace[index].rank * 997) % 1 >= leak:
            book.end(index)

    engines = [Engine(setting.physics, setting.config, on_first, on_finish) for _ in book.counts]

    wakes = [engine.wake_s for engine in engines]

    def advance(until_s: float) -> None:
        while True:
            soonest_s = min(wakes)
            if soonest_s > until_s:
                return
            worker = wakes.index(soonest_s)
            engines[worker].fire()
            wakes[worker] = engines[worker].wake_s

    scraped = 0
    for index, asked in enumerate(trace):
        while setting.scrape_s is not None and scraped * setting.scrape_s <= asked.at_s:
            advance(scraped * setting.scrape_s)
            for gauge, engine in zip(gauges, engines, strict=True):
                gauge.in_flight = engine.num_requests
                gauge.pending_tokens = sum(s.tokens - s.computed for s in engine.waiting)
            scraped += 1
        advance(asked.at_s)
        hashes = asked.hashes(index, size, recur=setting.recur)
        if isinstance(chooser, Informed):
            worker = chooser.choose(asked, hashes, engines)
            book.enter(index, worker, matched=0.0)
        else:
            worker = book.send(index, chooser, gauges)
        sequences[index] = sequence = Sequence(index, asked.prompt, asked.output, hashes)
        engines[worker].submit(sequence, asked.at_s)
        wakes[worker] = engines[worker].wake_s
    advance(sys.float_info.max)

    preemptions = sum(engine.num_preemptions for engine in engines)
    return book.close(first_s, finish_s, cached, preemptions=preemptions, busy_s=[engine.busy_s for engine in engines])


def oracle(played: Iterable[Played]) -> Played:
    """In hindsight: of all that was played on a trace, the assignment with the least mean E2E.

    The optimum over all assignments can be found for a dozen requests, no more; with Informed among what was played
    this comes within some per cent of it (the tests say how near), and no policy that was played is below it.
    """
    return min(played, key=lambda one: float(one.e2e_s.mean()))
