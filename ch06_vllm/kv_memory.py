"""The KV cache's memory under PagedAttention: what is taken, what is empty, and what one piece a request would take.

You learn   internal fragmentation (half a block a request, whatever its length); what reserving for the longest answer
            costs; why more requests run at once; what a block size decides; what a shared prefix saves
Laptop      python -m ch06_vllm.kv_memory
            python -m ch06_vllm.kv_memory --engine ours,vllm            (real vLLM too, three starts)
GPU node    python -m ch06_vllm.kv_memory --engine ours,vllm --preset 1b --cache-tokens 65536 --max-model-len 4096 \\
                --requests 256 --prompt-tokens lognormal:512,0.8 --output-tokens lognormal:256,0.8
Cluster     nothing more: each replica has a cache of its own
You see     peak blocks as the requests' lengths predict them, to the block; waste of each way to lay out a
            cache; how many requests run at once in the same memory; the block sizes; hits and blocks saved by a prefix;
            kv_memory.png

All requests of a run come at once, so that their lengths alone say what is held when. Both engines are stepped by hand
and counted after each step: a server's gauges at /metrics are read too seldom to show a peak. Pre-allocation is run,
not only computed: a block of max_model_len tokens is a request's one piece, on both engines.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ch01_intro.roofline import kv_bytes
from ch06_vllm import load
from ch06_vllm.engine import Config, SamplingParams
from ch06_vllm.engine.engine import Engine
from ch06_vllm.kv_drawn import NAMES, plot, table
from ch06_vllm.kv_policies import peak_blocks, policies, prefix_hits
from ch06_vllm.kv_run import Trace, on_ours, on_vllm, vllm_in_steps
from ch06_vllm.started import engine_name, folder_of
from common import lm, logs, script

log = logs.get_logger()
DECODING = 16  # requests of the block size sweep
Run = Callable[[Sequence[load.Request]], Trace]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--engine", type=script.comma_list(engine_name), default="ours", help="ours, vllm or both")
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano", help="a model folder is made of it, once")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--max-model-len", type=script.at_least(64), default=1024, help="longest request in tokens")
    parser.add_argument("--cache-tokens", type=script.at_least(64), default=8192, help="tokens the cache has room for")
    parser.add_argument("--block-size", type=script.at_least(1), default=32, help="vLLM on a CPU wants multiples of 32")
    parser.add_argument("--requests", type=script.at_least(2), default=96)
    parser.add_argument("--prompt-tokens", type=load.lengths, default="lognormal:96,0.7")
    parser.add_argument("--output-tokens", type=load.lengths, default="lognormal:64,0.8")
    parser.add_argument("--prefix-tokens", type=script.at_least(1), default=250, help="shared by the prefix requests")
    parser.add_argument("--sweep", type=script.comma_list(script.at_least(1)), default="1,2,4,8,16,32,64,128")
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="of the sweep's step times, interleaved")
    args = parser.parse_args(argv)
    for size in (args.block_size, args.max_model_len):
        if args.cache_tokens % size:
            raise script.UserError(f"--cache-tokens {args.cache_tokens} is no multiple of {size}; round it")
    if args.prefix_tokens > args.max_model_len // 2:
        raise script.UserError(f"--prefix-tokens is more than half of --max-model-len {args.max_model_len}; lower it")
    return args


@dataclass(frozen=True)
class Setup:
    """A cache of a size, on either engine."""

    args: argparse.Namespace
    model: Path
    step_tokens: int  # the prompts of all that fit at once are computed in one step

    @contextlib.contextmanager
    def ours(self, block_size: int, caching: bool = True) -> Iterator[Run]:
        engine = self.engine(block_size, caching)
        yield lambda requests: on_ours(engine, requests, policies(block_size, self.args.max_model_len))

    def engine(self, block_size: int, caching: bool = True) -> Engine:
        args = self.args
        return Engine(
            Config(
                str(self.model), device=args.device, block_size=block_size, num_blocks=args.cache_tokens // block_size,
                max_model_len=args.max_model_len, enable_prefix_caching=caching, max_num_seqs=args.requests,
                max_num_batched_tokens=self.step_tokens,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def vllm(self, block_size: int, caching: bool = True) -> Iterator[Run]:
        args, config = self.args, lm.config(str(self.model))
        size = kv_bytes(config, 1, args.cache_tokens + block_size, config.dtype.itemsize)  # and the block it keeps
        options = {
            "block_size": block_size, "kv_cache_memory_bytes": size, "max_model_len": args.max_model_len,
            "enable_prefix_caching": caching, "max_num_seqs": args.requests,
            "max_num_batched_tokens": self.step_tokens,
        }  # fmt: skip
        with vllm_in_steps(self.model, options) as engine:
            yield lambda requests: on_vllm(engine, requests, policies(block_size, args.max_model_len))


def lengths(requests: Sequence[load.Request]) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.max_tokens) for request in requests]


def ragged(args: argparse.Namespace, ids: np.ndarray, texts: int) -> list[load.Request]:
    """Prompts up to half of max_model_len, answers up to the rest of it; other `texts`, the same lengths."""
    rng = np.random.default_rng(args.seed)
    prompts = np.minimum(args.prompt_tokens(rng, args.requests), args.max_model_len // 2)
    outputs = np.maximum(2, np.minimum(args.output_tokens(rng, args.requests), args.max_model_len - prompts))
    return load.workload(ids, prompts, outputs, np.random.default_rng((args.seed, texts)))


def fitting(requests: list[load.Request], block_size: int, cache_tokens: int) -> list[load.Request]:
    """As many of the first requests as the cache has room for at once, by the formula."""
    count = len(requests)
    while count > 1 and peak_blocks(lengths(requests[:count]), block_size) > 0.95 * cache_tokens / block_size:
        count -= 1
    return requests[:count]


def with_prefix(args: argparse.Namespace, ids: np.ndarray) -> list[load.Request]:
    """Requests that begin alike, as many as fit without sharing."""
    rng = np.random.default_rng(args.seed + 1)
    count = min(args.requests, 16)
    tails, outputs = rng.integers(16, 64, count), rng.integers(16, 48, count)
    requests = load.workload(ids, tails, outputs, rng, shared_prefix=args.prefix_tokens)
    requests = fitting(requests, args.block_size, args.cache_tokens)
    if len(requests) < 3:
        raise script.UserError(f"--cache-tokens {args.cache_tokens} has no room for three with the prefix; raise it")
    return requests


def measure(
    name: str, setup: Setup, ids: np.ndarray, some: list[load.Request], alike: list[load.Request]
) -> dict[str, Any]:
    """One engine: paged, in one piece, with a shared prefix and without the cache of prefixes."""
    args, start = setup.args, getattr(setup, name)
    size = args.block_size
    requests = ragged(args, ids, texts=1)  # the same texts as in `some` would be found in the prefix cache
    first, others = alike[:1], alike[1:]
    with start(size) as run:
        log.info(f"{name}: requests that fit at once", requests=len(some))
        fits = run(some)
        log.info(f"{name}: more than fit", requests=len(requests))
        paged = run(requests)
        run(first)  # computes the prefix
        shared = run(others)
    with start(size, caching=False) as run:
        log.info(f"{name}: without the prefix cache")
        run(first)
        alone = run(others)
    with start(args.max_model_len) as run:
        log.info(f"{name}: one piece a request")
        run(first)
        pieces = run(requests)
    prefix = args.prefix_tokens // size
    expected = {
        "peak_blocks": peak_blocks(lengths(some), size),
        "shared_peak_blocks": peak_blocks(lengths(others), size, prefix),
        "alone_peak_blocks": peak_blocks(lengths(others), size),
        "prefix_hits": prefix_hits([len(request.prompt) for request in others], args.prefix_tokens, size),
    }
    found = {
        "peak_blocks": fits.peak_blocks, "shared_peak_blocks": shared.peak_blocks,
        "alone_peak_blocks": alone.peak_blocks, "prefix_hits": shared.hits,
    }  # fmt: skip
    return {
        "fits": fits, "paged": paged, "pieces": pieces, "expected": expected, "found": found,
        "largest_error": max(abs(found[key] / expected[key] - 1) for key in expected),
        "hit_rate": shared.hits / shared.queries, "hits_without_cache": alone.hits,
        "predicted_hit_rate": expected["prefix_hits"] / sum(prompt for prompt, _ in lengths(others)),
        "blocks_saved": alone.peak_blocks - shared.peak_blocks,
    }  # fmt: skip


def step_times(setup: Setup, sizes: list[int]) -> dict[int, float]:
    """Median milliseconds of a decode step of DECODING requests for each block size, on our engine; interleaved."""
    args = setup.args
    prompt = min(args.cache_tokens // DECODING, args.max_model_len) - 48
    ids = load.usable_ids(setup.model)
    steps = 16
    times: dict[int, list[float]] = {size: [] for size in sizes}
    engines = {size: setup.engine(size, caching=False) for size in sizes}
    for number in range(args.rounds):
        for size, engine in engines.items():
            rng = np.random.default_rng(number)
            for request in load.workload(ids, [prompt] * DECODING, [steps + 2] * DECODING, rng):
                engine.add(request.prompt, SamplingParams.exactly(request.max_tokens))
            while engine.scheduler.waiting or any(r.num_pending > 1 for r in engine.scheduler.running):
                engine.step()
            while engine.has_work:
                began = time.perf_counter()
                engine.step()
                times[size].append(time.perf_counter() - began)
    return {size: statistics.median(seconds) * 1e3 for size, seconds in times.items()}


def sweep(setup: Setup, some: list[load.Request]) -> list[dict[str, float]]:
    """For each block size: what is empty, by formula and run, and the step's time."""
    sizes = [size for size in setup.args.sweep if setup.args.cache_tokens % size == 0]
    log.info("ours: block sizes", sizes=len(sizes))
    times, rows = step_times(setup, sizes), []
    for size in sizes:
        with setup.ours(size) as run:
            trace = run(some)
        rows.append({
            "block_size": size, "waste": trace.waste("paged"), "empty_a_request": trace.empty_a_request,
            "predicted_empty": (size - 1) / 2, "step_ms": times[size],
        })  # fmt: skip
    return rows


def figures(name: str, m: dict[str, Any]) -> dict[str, Any]:
    """RESULT's keys of one engine."""
    paged, pieces = m["paged"], m["pieces"]
    found = {
        "peak_blocks": m["found"]["peak_blocks"], "predicted_peak_blocks": m["expected"]["peak_blocks"],
        "largest_error": m["largest_error"],
        "empty_a_request": m["fits"].empty_a_request, **{f"waste_{key}": m["fits"].waste(key) for key in NAMES},
        "running_paged": paged.running_mean, "running_in_one_piece": pieces.running_mean,
        "running_times": paged.running_mean / pieces.running_mean,
        "most_running_paged": paged.running_peak, "most_running_in_one_piece": pieces.running_peak,
        "tokens_per_s_paged": paged.tokens / paged.seconds, "tokens_per_s_in_one_piece": pieces.tokens / pieces.seconds,
        "prefix_hits": m["found"]["prefix_hits"], "predicted_prefix_hits": m["expected"]["prefix_hits"],
        "hit_rate": m["hit_rate"], "predicted_hit_rate": m["predicted_hit_rate"],
        "hits_without_cache": m["hits_without_cache"], "blocks_saved": m["blocks_saved"],
    }  # fmt: skip
    return {f"{name}_{key}": value for key, value in found.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    run = script.start(__file__, args)
    model = args.model or folder_of(args.preset)
    ids = load.usable_ids(model)
    some = fitting(ragged(args, ids, texts=0), args.block_size, args.cache_tokens)
    alike = with_prefix(args, ids)
    prompts = max(sum(len(request.prompt) for request in group) for group in (some, alike))
    setup = Setup(args, model, max(prompts, args.max_model_len, args.requests))
    measured = {name: measure(name, setup, ids, some, alike) for name in args.engine}
    rows = sweep(setup, some)
    print(table(measured, rows))
    plot(measured, rows, DECODING, run.path("kv_memory.png"))
    result: dict[str, Any] = {"requests": args.requests, "requests_that_fit": len(some), "block_size": args.block_size}
    for name, m in measured.items():
        result |= figures(name, m)
    return result | {"sweep": rows}


if __name__ == "__main__":
    script.run(main)
