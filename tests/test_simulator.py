"""The routing simulator: its engine decides what chapter 6's scheduler decides, its queues obey queueing theory."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from ch06_vllm.engine.block_pool import BlockPool
from ch06_vllm.engine.request import Config, Request, SamplingParams
from ch06_vllm.engine.scheduler import Scheduler
from ch07_sglang_routing.simulator import run, traces
from ch07_sglang_routing.simulator.engine import IDLE, Engine, Physics, Sequence
from ch07_sglang_routing.simulator.traces import Asked

PHYSICS = Physics(step_s=1e-3, prefill_token_s=20e-6, prefill_pair_s=3e-8, decode_seq_s=1e-4, decode_context_s=7e-7)


def small_trace(rng: np.random.Generator, size: int, requests: int = 60) -> list[Asked]:
    """Short prompts with shared beginnings, whose length is no multiple of the block's."""
    options = {"systems": 3, "system_tokens": int(rng.integers(size, 5 * size)), "turns": 2.0, "think_s": 0.05}
    longest = options["system_tokens"] + 12 * size
    lengths = {"new_tokens": f"1-{3 * size}", "output_tokens": f"1-{3 * size}", "longest": longest}
    return traces.sessions(requests, float(rng.choice([50, 300, 3000])), rng, **options, **lengths)


def small_config(rng: np.random.Generator, size: int, trace: list[Asked]) -> Config:
    """Often so small a cache that requests are preempted and prefixes thrown out."""
    longest = max(asked.prompt + asked.output for asked in trace)
    seqs = int(rng.integers(1, 9))
    chunked = bool(rng.random() < 0.7)
    return Config(
        "", block_size=size, num_blocks=-(-longest // size) + int(rng.choice([0, 1, 4, 40])), max_num_seqs=seqs,
        max_num_batched_tokens=seqs + int(rng.choice([0, 3, 20, 200])) if chunked else longest + seqs,
        enable_prefix_caching=bool(rng.random() < 0.8), enable_chunked_prefill=chunked,
    )  # fmt: skip


def step_by_step(trace: list[Asked], config: Config, physics: Physics) -> dict[str, list]:
    """The same requests on chapter 6's own scheduler, with real tokens, one step after another."""
    assert config.num_blocks
    scheduler = Scheduler(config, BlockPool(config.num_blocks, config.block_size, caching=config.enable_prefix_caching))
    requests = [
        Request(str(i), list(asked.tokens()), SamplingParams(asked.output), 0, i, 0) for i, asked in enumerate(trace)
    ]
    first_s, finish_s = [np.nan] * len(trace), [np.nan] * len(trace)
    arriving, now_s, tokens = 0, 0.0, itertools.count(2**40)
    while arriving < len(trace) or scheduler.waiting or scheduler.running:
        if not (scheduler.waiting or scheduler.running):
            now_s = max(now_s, trace[arriving].at_s)
        while arriving < len(trace) and trace[arriving].at_s <= now_s:
            scheduler.add(requests[arriving])
            arriving += 1
        shares = scheduler.schedule()
        if not shares:
            continue
        singles = [share for share in shares if share.count == 1]
        chunks = [share for share in shares if share.count > 1]
        now_s += physics.step(
            len(singles),
            sum(share.start + 1 for share in singles),
            sum(share.count for share in chunks),
            sum(share.count * (share.start + (share.count + 1) / 2) for share in chunks),
        )
        for share in shares:
            scheduler.computed(share)
        for share in shares:
            request = share.request
            if share.start + share.count == len(request.tokens):
                index = int(request.request_id)
                if request.num_output == 0:
                    first_s[index] = now_s
                request.tokens.append(next(tokens))
                if request.num_output == request.params.max_tokens:
                    finish_s[index] = now_s
                    scheduler.finish(request)
        scheduler.check()
    return {
        "first_s": first_s, "finish_s": finish_s, "cached": [request.num_cached for request in requests],
        "preemptions": [request.num_preemptions for request in requests], "hits": [scheduler.prefix_hits],
    }  # fmt: skip


def in_runs(trace: list[Asked], config: Config, physics: Physics) -> dict[str, list]:
    """On the simulator's engine."""
    first_s, finish_s = [np.nan] * len(trace), [np.nan] * len(trace)
    engine = Engine(physics, config, first_s.__setitem__, finish_s.__setitem__)
    sequences = [
        Sequence(i, asked.prompt, asked.output, asked.hashes(i, config.block_size)) for i, asked in enumerate(trace)
    ]
    for asked, sequence in zip(trace, sequences, strict=True):
        while engine.wake_s <= asked.at_s:
            engine.fire()
            engine.check()
        engine.submit(sequence, asked.at_s)
    while engine.wake_s < IDLE:
        engine.fire()
        engine.check()
    assert engine.num_requests == 0 and engine.pool.num_free == config.num_blocks
    return {
        "first_s": first_s, "finish_s": finish_s, "cached": [sequence.cached for sequence in sequences],
        "preemptions": [sequence.preemptions for sequence in sequences], "hits": [engine.prefix_hits],
    }  # fmt: skip


@pytest.mark.parametrize("block", range(8))
def test_runs_of_steps_decide_what_single_steps_decide(block: int) -> None:
    """Token for token what chapter 6's scheduler does: hits, preemptions, and every time to rounding."""
    seen = {"cached": 0, "preemptions": 0}
    for seed in range(block * 12, block * 12 + 12):
        rng = np.random.default_rng(seed)
        size = int(rng.choice([1, 2, 4, 7]))
        trace = small_trace(rng, size)
        config = small_config(rng, size, trace)
        slow, fast = step_by_step(trace, config, PHYSICS), in_runs(trace, config, PHYSICS)
        for key in ("cached", "preemptions", "hits"):
            assert fast[key] == slow[key], (seed, key)
        for key in ("first_s", "finish_s"):
            np.testing.assert_allclose(fast[key], slow[key], rtol=1e-9, err_msg=f"{seed} {key}")
        for key in seen:
            seen[key] += sum(fast[key])
    assert min(seen.values()) > 0, seen
