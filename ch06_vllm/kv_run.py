"""Requests that all come at once, on our engine or on a vLLM server, and what their KV cache took meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ch06_vllm import load
from ch06_vllm.client import Client, Retry
from ch06_vllm.engine import SamplingParams
from ch06_vllm.engine.engine import Engine
from ch06_vllm.kv_policies import Held
from ch06_vllm.scrape import Sampler, scrape
from common.script import UserError

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


def sample(at_s: float, running: Sequence[Held], taken: int, policies: Policies, count: int | None = None) -> Sample:
    needed = {name: sum(map(slots, running)) for name, slots in policies.items()}
    held = sum(request.tokens for request in running)
    return Sample(at_s, len(running) if count is None else count, held, taken, needed)


def on_vllm(url: str, requests: Sequence[load.Request], policies: Policies) -> Trace:
    """Samples of /metrics; which tokens were held then is told by the answers' streams (a token more or less each).

    Raises:
        UserError: a request was not answered.
    """
    # The front end, whose the gauges are, is held up by a server's first requests, while the engine goes on.
    asyncio.run(send(url, [load.Request([1, 2, 3], 64)] * 4))
    before = scrape(url)
    info = before.labels["vllm:cache_config_info"]
    block_size = int(info["block_size"])
    usable = int(info["num_gpu_blocks"]) - 1  # block 0 pads tables, and is not lent
    with Sampler(url, interval_s=0.02) as sampler:
        began, records = asyncio.run(send(url, requests))
    if failed := [record.error for record in records if record.error]:
        raise UserError(f"{len(failed)} requests failed: {failed[0]}; mend that first")
    trace = Trace(block_size, tokens=sum(record.completion_tokens for record in records))
    trace.seconds = max(record.arrivals_s[-1] for record in records)
    for at_s, metrics in sampler.samples:
        seen = (progress(record, request, at_s - began) for record, request in zip(records, requests, strict=True))
        taken = round(metrics["vllm:kv_cache_usage_perc"] * usable) * block_size
        count = int(metrics["vllm:num_requests_running"])
        trace.samples.append(sample(at_s - began, [held for held in seen if held], taken, policies, count))
    now = scrape(url)
    trace.hits, trace.queries, trace.preemptions = (
        now[f"vllm:{name}_total"] - before[f"vllm:{name}_total"]
        for name in ("prefix_cache_hits", "prefix_cache_queries", "num_preemptions")
    )
    return trace


async def send(url: str, requests: Sequence[load.Request]) -> tuple[float, list[load.Record]]:
    """All at once; the run's zero on perf_counter, and a record of each."""
    async with Client(url, concurrency=len(requests), retry=Retry(attempts=1)) as client:
        sender = load.Sender(client, (await client.models())[0], lambda _: None, temperature=0.0)
        records = await sender.open_loop(requests, np.zeros(len(requests)))
    return sender.began, records


def progress(record: load.Record, request: load.Request, at_s: float) -> Held | None:
    """What the cache holds of a request, by the tokens that have come; None before the first and after the last."""
    came = bisect_right(record.arrivals_s, at_s)
    if not 0 < came < len(record.arrivals_s):
        return None
    tokens = round(record.completion_tokens * came / len(record.arrivals_s))
    return Held(len(request.prompt), request.max_tokens, len(request.prompt) + tokens - 1)
