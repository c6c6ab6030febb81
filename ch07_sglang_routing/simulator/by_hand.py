"""The same trace on chapter 6's real engines, stepped by hand, with a clock of CPU seconds.

The engines compute in this process: real model, real scheduler, real cache. Time is virtual: arrivals are at the
trace's moments, and a step takes the CPU seconds that this process spent on it. So engines do not take cores from each
other, and what else the machine does hardly counts. Not in it: the way through HTTP, the fight for cores (live.py).
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from ch06_vllm.engine import SamplingParams
from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.request import Output
from ch07_sglang_routing.simulator.live import Samples, prompt
from ch07_sglang_routing.simulator.run import Book, Chooser, Played
from ch07_sglang_routing.simulator.traces import Trace


def step(engine: Engine) -> tuple[list[Output], float]:
    """One step, and its CPU seconds."""
    began = time.process_time()
    outputs = engine.step()
    return outputs, time.process_time() - began


def play(trace: Trace, chooser: Chooser, engines: Sequence[Engine], ids: np.ndarray) -> Played:
    """As simulator.run.play, on real engines. Their prefix caches are emptied first."""
    book = Book(trace, len(engines))
    clocks, busy_s = [0.0] * len(engines), [0.0] * len(engines)  # when the engine's next step begins
    first_s, finish_s, cached = np.zeros(len(trace)), np.zeros(len(trace)), np.zeros(len(trace))
    known: list[tuple[float, int, bool]] = []  # (time, request, its end): what the router will learn then
    preempted = sum(engine.scheduler.num_preemptions for engine in engines)
    for engine in engines:
        engine.pool.forget_all()

    def advance(until_s: float) -> None:
        for worker, engine in enumerate(engines):
            while engine.has_work and clocks[worker] <= until_s:
                outputs, seconds = step(engine)
                clocks[worker] += seconds
                busy_s[worker] += seconds
                for output in outputs:
                    index = int(output.request_id)
                    if not first_s[index]:
                        first_s[index], cached[index] = clocks[worker], output.cached_tokens
                        heapq.heappush(known, (clocks[worker], index, False))
                    if output.finish_reason:
                        finish_s[index] = clocks[worker]
                        heapq.heappush(known, (clocks[worker], index, True))

    for index, asked in enumerate(trace):
        advance(asked.at_s)
        while known and known[0][0] <= asked.at_s:
            _, which, ended = heapq.heappop(known)
            (book.end if ended else book.first_token)(which)
        worker = book.send(index, chooser)
        if not engines[worker].has_work:
            clocks[worker] = max(clocks[worker], asked.at_s)  # its last step may still be running
        engines[worker].add(prompt(asked, ids), SamplingParams.exactly(asked.output), request_id=str(index))
    advance(np.inf)
    preempted = sum(engine.scheduler.num_preemptions for engine in engines) - preempted
    return book.close(first_s, finish_s, cached, preemptions=preempted, busy_s=busy_s)


def measure(
    engine: Engine,
    ids: np.ndarray,
    into: Samples,
    rng: np.random.Generator,
    *,
    prompts: Sequence[int] = (32, 96, 160, 240),
    batches: Sequence[int] = (1, 3, 8, 14),
    contexts: Sequence[int] = (48, 240),
    tokens: int = 6,
) -> None:
    """CPU seconds of single steps: a prompt alone, one whose beginning is cached, a batch that decodes, and both."""

    def add(length: int, output: int, known: list[int] | None = None) -> list[int]:
        tokens = [*(known or []), *rng.choice(ids, length).tolist()]
        engine.add(tokens, SamplingParams.exactly(output))
        return tokens

    def note(tokens: int, start: int, singles: int, context: float, seconds: float) -> None:
        terms = (1.0, tokens, tokens * (start + (tokens + 1) / 2), singles, context, 0.0)
        into.setdefault(terms, []).append(seconds)

    def run(last: Callable[[], bool]) -> None:
        while not last():
            engine.step()

    for length in prompts:
        add(length, 1)
        note(length, 0, 0, 0, step(engine)[1])
    for start, new in itertools.product((192, 480), (33, 129)):
        known = add(start, 1)
        run(lambda: not engine.has_work)
        add(new, 1, known)
        note(new, start, 0, 0, step(engine)[1])
    for batch, context in itertools.product(batches, contexts):
        for number in range(batch):
            add(context, tokens + 2 * batch + 4 - number)
        requests = list(engine.requests.values())
        run(lambda requests=requests: all(request.num_output for request in requests))  # type: ignore[misc]
        spent = [step(engine)[1] for _ in range(tokens)]
        middle = sum(len(request.tokens) - tokens / 2 for request in requests)
        note(0, 0, batch, middle, float(np.mean(spent)))
        add(96, 1)
        note(96, 0, batch, middle + batch * tokens / 2, step(engine)[1])
        run(lambda: not engine.has_work)
