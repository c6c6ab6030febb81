"""Policies of our router before real engines: who finds its prefix in the cache, and how long one waits for a token.

You learn   why spreading requests evenly throws caches away, and what it takes to use them without making a hot spot
Laptop      python -m ch07_sglang_routing.route
            python -m ch07_sglang_routing.route --serve vllm:nano --policy round_robin,joint
GPU node    python -m ch07_sglang_routing.route --serve vllm:1b --prefix-tokens 2048 --cache-tokens 16384 --rate 20
Cluster     start engines where you like, then python -m ch07_sglang_routing.router --worker URL … --policy joint
You see     for each policy the hit rate of the prefix caches, by the engines' own count, and TTFT of the same trace

Each request is one of some prefixes, as system prompts or documents are, and a tail of its own. One engine's cache does
not hold all prefixes, all engines' together do. Every policy gets prefixes of its own, so that none finds what another
left, and the same lengths, order and arrivals.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np

from ch06_vllm import load
from ch06_vllm.client import Client, Retry
from ch06_vllm.scrape import scrape
from ch06_vllm.servers import Server
from ch06_vllm.started import HELP, engine_and_model, folder_of, server
from ch07_sglang_routing.router.policies import POLICIES
from ch07_sglang_routing.router.running import Routing
from common import script
from common.script import UserError

Json = dict[str, Any]
BLOCK = 16
COUNTS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")


def policy(text: str) -> str:
    """argparse type: a name of POLICIES."""
    if text not in POLICIES:
        raise UserError(f"{text!r} is no policy; take some of {', '.join(POLICIES)}")
    return text


def engine_options(engine: str, cache_tokens: int, longest: int) -> Json:
    """A KV cache of so many tokens, in which a request of `longest` fits."""
    name = "num-gpu-blocks-override" if engine == "vllm" else "num-blocks"
    return {
        name: -(-cache_tokens // BLOCK), "block-size": BLOCK, "max-model-len": min(cache_tokens, longest + BLOCK),
        "max-num-seqs": 16, "max-num-batched-tokens": 512,
    }  # fmt: skip


async def ask(routing: Routing, model: str, requests: list[load.Request], times: np.ndarray) -> list[load.Record]:
    async with Client(routing.url, concurrency=256, retry=Retry(attempts=1)) as client:
        return await load.Sender(client, model, lambda _: None, temperature=0).open_loop(requests, times)


def counted(engines: list[Server]) -> np.ndarray:
    """Prefix cache hits and queries of all engines, in tokens."""
    told = [scrape(engine.url) for engine in engines]
    return np.array([sum(metrics[name] for metrics in told) for name in COUNTS])


def compare(args: Any, engines: list[Server], name: str, number: int, ids: np.ndarray) -> Json:
    """One policy on the trace. Lengths, order and arrivals hang on the seed, the prefixes' tokens on the policy too."""
    shape, words = np.random.default_rng(args.seed), np.random.default_rng([args.seed, number])
    order, times = shape.integers(args.prefixes, size=args.requests), load.arrivals(args.rate, args.requests, shape)
    prefixes = [words.choice(ids, args.prefix_tokens).tolist() for _ in range(args.prefixes)]
    requests = [
        load.Request(prefixes[which] + words.choice(ids, args.tail_tokens).tolist(), args.output_tokens)
        for which in order
    ]
    before = counted(engines)
    with Routing([engine.url for engine in engines], policy=name) as routing:
        records = asyncio.run(ask(routing, engines[0].model, requests, times))
        shares = [worker["answered"] for worker in routing.known()]
        routed = routing.stop()
    hits, queries = counted(engines) - before
    figures = load.summary(records)
    return {
        "policy": name, "hit_rate": hits / queries, "failed": figures["failed"], "in_flight": routed["in_flight"],
        "ttft_ms_p50": figures["ttft_ms_p50"], "ttft_ms_p99": figures["ttft_ms_p99"],
        "largest_share": max(shares) / sum(shares),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> Json:
    parser = script.parser(__doc__)
    parser.add_argument("--serve", type=engine_and_model, default=("ours", "nano"), help=HELP)
    parser.add_argument("--engines", type=script.at_least(2), default=2)
    parser.add_argument("--policy", type=script.comma_list(policy), default=["round_robin", "least_in_flight", "joint"])
    parser.add_argument("--requests", type=script.at_least(8), default=120)
    parser.add_argument("--rate", type=script.positive, default=8, help="requests/s of a Poisson process")
    parser.add_argument("--prefixes", type=script.at_least(1), default=12)
    parser.add_argument("--prefix-tokens", type=script.at_least(1), default=384)
    parser.add_argument("--tail-tokens", type=script.at_least(1), default=16)
    parser.add_argument("--output-tokens", type=script.at_least(1), default=8)
    parser.add_argument("--cache-tokens", type=script.at_least(256), default=2560, help="KV cache of an engine")
    args = parser.parse_args(argv)
    run = script.start(__file__, args)
    engine, model = args.serve
    longest = args.prefix_tokens + args.tail_tokens + args.output_tokens
    if longest > args.cache_tokens:
        raise UserError(f"a request of {longest} tokens does not fit into --cache-tokens {args.cache_tokens}; raise it")
    with contextlib.ExitStack() as stack:
        options = engine_options(engine, args.cache_tokens, longest)
        starting = [server(args.serve, options) for _ in range(args.engines)]
        engines = [stack.enter_context(each) for each in starting]
        ids = load.usable_ids(folder_of(model))
        print(f"{'policy':16} {'hit rate':>8} {'TTFT p50':>9} {'p99 ms':>8} {'largest share':>14}", flush=True)
        rows = []
        for number, name in enumerate(args.policy):
            row = compare(args, engines, name, number, ids)
            rows.append(row)
            run.log(**row)
            print(f"{name:16} {row['hit_rate']:8.0%} {row['ttft_ms_p50']:9.0f} {row['ttft_ms_p99']:8.0f} "
                  f"{row['largest_share']:14.0%}", flush=True)  # fmt: skip
    result: Json = {
        "engine": engine, "requests": args.requests, "failed": sum(row["failed"] for row in rows),
        "in_flight": sum(row["in_flight"] for row in rows),
    }  # fmt: skip
    for row in rows:
        result |= {f"{row['policy']}_{what}": row[what] for what in ("hit_rate", "ttft_ms_p50", "ttft_ms_p99")}
    if {"round_robin", "joint"} <= set(args.policy):
        result["hit_rate_times"] = result["joint_hit_rate"] / max(result["round_robin_hit_rate"], 1e-9)
    return result


if __name__ == "__main__":
    script.run(main)
