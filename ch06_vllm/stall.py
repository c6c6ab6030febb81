"""What a long prompt does to running requests: computed whole in one step, or in chunks beside their tokens."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ch06_vllm import load
from ch06_vllm.batching_drawn import draw_stall
from ch06_vllm.client import Client, Retry
from ch06_vllm.engine import Config, SamplingParams
from ch06_vllm.engine.engine import Engine
from ch06_vllm.servers import Server
from ch06_vllm.started import engine_name
from common import logs, script

log = logs.get_logger()
SHORT = 32  # prompt tokens of the running requests
BEFORE = 40  # tokens that each of them has when the long prompt comes
Gaps = list[tuple[float, float]]  # (seconds since the long prompt came, ms since the same request's last token)


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--stall: a long prompt comes while others run")
    group.add_argument("--stall", action="store_true", help="measure this instead")
    group.add_argument("--engine", type=engine_name, default="ours", help="ours or vllm")
    group.add_argument("--long-prompt", type=script.at_least(64), default=1536, help="tokens")
    group.add_argument("--running", type=script.at_least(1), default=8, help="requests that run meanwhile")
    group.add_argument("--chunk", type=script.at_least(16), default=128, help="max_num_batched_tokens with chunks")


def settings(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """vLLM's names. Whole: a step takes as many tokens as the longest request has."""
    same = {"max_model_len": args.max_model_len, "max_num_seqs": args.running + 1, "enable_prefix_caching": False}
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": args.max_model_len}
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": args.chunk}
    return {"whole": same | whole, "chunks": same | chunks}


def on_ours(engine: Engine, running: list[load.Request], long: load.Request) -> tuple[Gaps, float]:
    """The gaps of the running requests, and the long one's time to first token in ms."""
    names = [engine.add(r.prompt, SamplingParams.exactly(r.max_tokens)) for r in running]
    last: dict[str, float] = {}
    gaps: Gaps = []
    came, ttft_ms, steps = 0.0, 0.0, 0
    late = ""
    while engine.has_work:
        if steps == BEFORE:
            came = time.perf_counter()
            late = engine.add(long.prompt, SamplingParams.exactly(long.max_tokens))
        outputs = engine.step()
        steps += 1
        now = time.perf_counter()
        for output in outputs:
            if output.request_id == late:
                ttft_ms = ttft_ms or (now - came) * 1e3
            elif output.request_id in last:
                gaps.append((now, (now - last[output.request_id]) * 1e3))
            last[output.request_id] = now
    assert set(names) <= set(last)
    return [(at_s - came, ms) for at_s, ms in gaps], ttft_ms


async def on_server(url: str, running: list[load.Request], long: load.Request) -> tuple[Gaps, float]:
    """The same through HTTP; the long prompt is sent when the first of the others has BEFORE tokens."""
    async with Client(url, concurrency=len(running) + 1, retry=Retry(attempts=1)) as client:
        model = (await client.models())[0]
        options = {"temperature": 0.0, "ignore_eos": True}
        enough = asyncio.Event()

        async def one(request: load.Request) -> list[float]:
            body = {"model": model, "prompt": request.prompt, "max_tokens": request.max_tokens, **options}
            times = []
            try:
                async with client.stream("/v1/completions", body) as chunks:
                    async for chunk in chunks:
                        if chunk.tokens:
                            times.append(chunk.at_s)
                        if len(times) == BEFORE:
                            enough.set()
            finally:
                enough.set()  # it may have failed before
            return times

        tasks = [asyncio.create_task(one(request)) for request in running]
        await enough.wait()
        came = time.perf_counter()
        answer = await client.complete(long.prompt, model=model, max_tokens=long.max_tokens, **options)
        arrivals = [await task for task in tasks]
    gaps = [(after - came, (after - now) * 1e3) for times in arrivals for now, after in pairwise(times)]
    return sorted(gaps), (answer.arrivals_s[0] - came) * 1e3


def figures(gaps: Gaps, ttft_ms: float) -> dict[str, float]:
    """The longest gap after the long prompt came, and the median one before it."""
    after = [ms for at_s, ms in gaps if at_s > 0]
    if not after:
        raise script.UserError("all answers had ended when the long prompt came; let them be longer (--tokens)")
    return {
        "itl_ms_max": max(after),
        "itl_ms_before": statistics.median(ms for at_s, ms in gaps if at_s <= 0),
        "long_ttft_ms": ttft_ms,
    }


class Rounds:
    """Each setting's rounds: --running short requests decode, then the prompt of --long-prompt tokens comes.

    Args:
        after: tokens that each of the short requests gets once the long one is there.

    Attributes:
        gaps: of each setting, what `figures` reads, a list for each round. The first round warms up.
    """

    def __init__(self, ids: np.ndarray, args: argparse.Namespace, after: int) -> None:
        self.ids, self.args, self.after = ids, args, after
        self.rng = np.random.default_rng(args.seed)
        self.gaps: dict[str, list[Gaps]] = {}
        self.found: dict[str, list[dict[str, float]]] = {}

    def add(self, name: str, once: Callable[[list[load.Request], load.Request], tuple[Gaps, float]]) -> None:
        count = self.args.running
        running = load.workload(self.ids, [SHORT] * count, [BEFORE + self.after] * count, self.rng)
        (long,) = load.workload(self.ids, [self.args.long_prompt], [2], self.rng)
        seen, ttft_ms = once(running, long)
        self.gaps.setdefault(name, []).append(seen)
        self.found.setdefault(name, []).append(figures(seen, ttft_ms))

    def on_servers(self, engine: str, model: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """All rounds of each setting on a server of its own."""
        for name, own in settings.items():
            log.info("starting", engine=engine, prefill=name)
            with Server(model, engine, own) as server:
                for _ in range(self.args.rounds + 1):
                    self.add(name, lambda running, long: asyncio.run(on_server(server.url, running, long)))

    def medians(self) -> dict[str, dict[str, float]]:
        """Of each setting, over its rounds but the first; printed."""
        middle = {
            name: {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
            for name, rows in self.found.items()
        }
        for name, row in middle.items():
            print(
                f"{name:<8} longest gap {row['itl_ms_max']:8.1f} ms   before {row['itl_ms_before']:6.1f} ms   "
                f"first token of the long prompt {row['long_ttft_ms']:8.1f} ms"
            )
        return middle


def measure(args: argparse.Namespace, model: Path, ids: np.ndarray, run: script.Run) -> dict[str, Any]:
    after = 4 * -(-args.long_prompt // args.chunk)  # tokens that cover the time of all chunks, and as much again
    if args.long_prompt + 2 > args.max_model_len:
        raise script.UserError(
            f"--long-prompt {args.long_prompt} exceeds --max-model-len {args.max_model_len}; raise that"
        )
    if args.chunk <= args.running:
        raise script.UserError(f"--chunk {args.chunk} leaves no token beside {args.running} running requests; raise it")
    rounds = Rounds(ids, args, after)
    if args.engine == "ours":
        engines = {name: Engine(Config(str(model), device=args.device, **own)) for name, own in settings(args).items()}
        for number in range(args.rounds + 1):
            log.info("round", number=number)
            for name, engine in engines.items():
                rounds.add(name, lambda running, long, engine=engine: on_ours(engine, running, long))
    else:
        rounds.on_servers(args.engine, model, settings(args))
    middle = rounds.medians()
    what = f"{args.running} running requests, a prompt of {args.long_prompt} tokens ({args.engine})"
    draw_stall({name: runs[-1] for name, runs in rounds.gaps.items()}, run.path("stall.png"), what)
    result: dict[str, Any] = {"engine": args.engine, "long_prompt": args.long_prompt, "chunk": args.chunk}
    for name, row in middle.items():
        result |= {f"{name}_{key}": value for key, value in row.items()}
    return result | {"jump_times": middle["whole"]["itl_ms_max"] / middle["chunks"]["itl_ms_max"]}
