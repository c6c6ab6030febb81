"""Requests that all come at once, on our engine or on vLLM, and what their KV cache took meanwhile."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ch06_vllm import load, turns
from ch06_vllm.engine import SamplingParams
from ch06_vllm.engine.engine import Engine
from ch06_vllm.kv_policies import Held
from common.bootstrap import gpus_visible

Policies = dict[str, Callable[[Held], int]]


@dataclass(frozen=True)
class Sample:
    """Between two steps. `taken`: slots of blocks in use, by the engine's own count; `needed`: by policy."""

    at_s: float
    running: int
    held: int
    taken: int
    needed: dict[str, int]


@dataclass
class Trace:
    """A run. `tokens`: answered; `hits` and `queries`: prompt tokens found in the prefix cache, and looked up there."""

    block_size: int
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    hits: float = 0
    queries: float = 0
    preemptions: float = 0

    @property
    def peak_blocks(self) -> int:
        return max(sample.taken for sample in self.samples) // self.block_size

    @property
    def running_peak(self) -> int:
        return max(sample.running for sample in self.samples)

    @property
    def running_mean(self) -> float:
        """Over the time in which requests were running; a sample stands for the time up to the next one."""
        spans = [(after.at_s - now.at_s, now.running) for now, after in pairwise(self.samples)]
        return sum(span * running for span, running in spans) / max(
            sum(span for span, running in spans if running), 1e-9
        )

    def waste(self, policy: str) -> float:
        """Share of the slots that a policy takes in which no token is held, over the run."""
        needed = sum(sample.needed[policy] for sample in self.samples)
        return 1 - sum(sample.held for sample in self.samples) / needed

    @property
    def empty_a_request(self) -> float:
        """Slots of blocks in use that hold no token, for each running request, over the run."""
        busy = [sample for sample in self.samples if sample.running]
        return statistics.fmean((sample.taken - sample.held) / sample.running for sample in busy)


def on_ours(engine: Engine, requests: Sequence[load.Request], policies: Policies) -> Trace:
    """Every step is a sample."""
    pool, scheduler = engine.pool, engine.scheduler
    before = (scheduler.prefix_hits, scheduler.prefix_queries, scheduler.num_preemptions)
    for request in requests:
        engine.add(request.prompt, SamplingParams.exactly(request.max_tokens))
    trace = Trace(pool.block_size, tokens=sum(request.max_tokens for request in requests))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
        running = [Held(r.num_prompt, r.params.max_tokens, r.num_computed) for r in scheduler.running]
        taken = (pool.num_blocks - pool.num_free) * pool.block_size
        trace.samples.append(sample(time.perf_counter() - began, running, taken, policies))
    trace.seconds = time.perf_counter() - began
    now = (scheduler.prefix_hits, scheduler.prefix_queries, scheduler.num_preemptions)
    trace.hits, trace.queries, trace.preemptions = (after - start for after, start in zip(now, before, strict=True))
    return trace


def sample(at_s: float, running: Sequence[Held], taken: int, policies: Policies) -> Sample:
    needed = {name: sum(map(slots, running)) for name, slots in policies.items()}
    held = sum(request.tokens for request in running)
    return Sample(at_s, len(running), held, taken, needed)


@contextlib.contextmanager
def vllm_in_steps(model: Path, options: dict[str, Any]) -> Iterator[turns.Process]:
    """vLLM in a process of its own that steps it by hand (vllm_steps.py); `options` are those of vllm.LLM."""
    eager = {} if gpus_visible() else {"enforce_eager": True}
    with turns.Process("vllm", "ch06_vllm.vllm_steps:main", str(model), json.dumps(options | eager)) as engine:
        engine.ready()
        yield engine


def stepped(engine: turns.Process, requests: Sequence[load.Request]) -> dict[str, Any]:
    """What vllm_steps.py answers, for requests that all come at once."""
    return engine.ask([{"prompt": request.prompt, "max_tokens": request.max_tokens} for request in requests])


def on_vllm(engine: turns.Process, requests: Sequence[load.Request], policies: Policies) -> Trace:
    """The same on vLLM."""
    found = stepped(engine, requests)
    size = found["block_size"]
    trace = Trace(size, seconds=found["seconds"], tokens=sum(request.max_tokens for request in requests))
    for step in found["steps"]:
        running = [Held(*request) for request in step["running"]]
        trace.samples.append(sample(step["at_s"], running, step["taken"] * size, policies))
    trace.hits, trace.queries = found["prefix_cache_hits"], found["prefix_cache_queries"]
    trace.preemptions = found["num_preemptions"]
    return trace
