"""Policies of our router before real engines, beside sglang-router: who finds its prefix, and how long one waits.

You learn   why spreading requests evenly throws caches away, and what it takes to use them without making a hot spot
Laptop      python -m ch07_sglang_routing.route
            python -m ch07_sglang_routing.route --serve vllm:nano --policy joint,sglang-router   (make setup-routers)
GPU node    python -m ch07_sglang_routing.route --serve vllm:1b --prefix-tokens 2048 --cache-tokens 16384 --rate 20
Cluster     start engines where you like, then python -m ch07_sglang_routing.router --worker URL … --policy joint
You see     for each policy the hit rate of the prefix caches, by the engines' own count, and TTFT of the same trace

Each request is one of some prefixes, as system prompts or documents are, and a tail of its own. One engine's cache does
not hold all prefixes, all engines' together do. In a round every contestant has its turn before the same engines, with
the same lengths, order and arrivals (the next round has others), and with words of its own, so that none finds what
another left. A turn that does not count goes before all: whoever came first would pay for cold engines. Prompts are
text, as sglang-router takes no token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ch06_vllm import load
from ch06_vllm.client import Client, Retry
from ch06_vllm.scrape import scrape
from ch06_vllm.servers import Server
from ch06_vllm.started import HELP, engine_and_model, folder_of, server
from ch07_sglang_routing.router.policies import POLICIES, named
from ch07_sglang_routing.router.running import Routing, peer_installed
from common import script
from common.script import UserError

Json = dict[str, Any]
BLOCK = 32  # the least that vLLM takes on a CPU
WARM = 16  # requests of the turn that does not count
PEER = "sglang-router"  # with its own policy, cache_aware
COUNTS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", "vllm:request_success_total")
FIGURES = ("hit_rate", "ttft_ms_p50", "ttft_ms_p99", "largest_share")


def contestant(text: str) -> str:
    """argparse type: a name of POLICIES, or PEER."""
    return text if text == PEER else named(text)


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
    """[engine, count]: prefix cache hits and queries in tokens, requests answered."""
    return np.array([[scrape(engine.url).values.get(name, 0.0) for name in COUNTS] for engine in engines])


def single_token_words(folder: Path) -> list[str]:
    """Words with a space in front that are one token wherever they stand: text of a known length in tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [tokenizer.decode([token_id]) for token_id in load.usable_ids(folder).tolist()]
    spaced = [word for word in words if re.fullmatch(" [a-z]+", word)]
    return [word for word in spaced if len(tokenizer.encode(word * 2, add_special_tokens=False).ids) == 2]


def trace(args: Any, words: list[str], number: int, which: int) -> tuple[list[load.Request], np.ndarray]:
    """Requests and arrivals. Order and arrivals hang on the round, `number`; the words on `which` contestant too."""
    shape, own = np.random.default_rng([args.seed, number]), np.random.default_rng([args.seed, number, which])

    def text(tokens: int) -> str:
        return "".join(own.choice(words, tokens))

    order, times = shape.integers(args.prefixes, size=args.requests), load.arrivals(args.rate, args.requests, shape)
    prefixes = [text(args.prefix_tokens) for _ in range(args.prefixes)]
    return [load.Request(prefixes[which] + text(args.tail_tokens), args.output_tokens) for which in order], times


def turn(engines: list[Server], name: str, requests: list[load.Request], times: np.ndarray) -> Json:
    """One contestant on its trace."""
    kind = {"kind": "sglang"} if name == PEER else {"policy": name}
    before = counted(engines)
    with Routing([engine.url for engine in engines], **kind) as routing:
        records = asyncio.run(ask(routing, engines[0].model, requests, times))
        routed = routing.stop()
    hits, queries, answered = (counted(engines) - before).T
    figures = load.summary(records)
    return {
        "policy": name, "hit_rate": hits.sum() / queries.sum(), "failed": figures["failed"],
        "in_flight": routed.get("in_flight", 0), "ttft_ms_p50": figures["ttft_ms_p50"],
        "ttft_ms_p99": figures["ttft_ms_p99"], "largest_share": answered.max() / answered.sum(),
    }  # fmt: skip


def paired(ours: list[Json], theirs: list[Json], what: str) -> float:
    """The median of ours / theirs within a round."""
    return statistics.median(one[what] / max(other[what], 1e-9) for one, other in zip(ours, theirs, strict=True))


def main(argv: list[str] | None = None) -> Json:
    parser = script.parser(__doc__)
    parser.add_argument("--serve", type=engine_and_model, default=("ours", "nano"), help=HELP)
    parser.add_argument("--engines", type=script.at_least(2), default=2)
    parser.add_argument("--policy", type=script.comma_list(contestant), default=None,
                        help=f"some of {', '.join(POLICIES)}, {PEER}")  # fmt: skip
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="turns of each; the medians are told")
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
    names = args.policy or ["round_robin", "least_in_flight", "joint", *([PEER] if peer_installed() else [])]
    longest = args.prefix_tokens + args.tail_tokens + args.output_tokens
    if longest > args.cache_tokens:
        raise UserError(f"a request of {longest} tokens does not fit into --cache-tokens {args.cache_tokens}; raise it")
    words, rng = single_token_words(folder_of(model)), np.random.default_rng(args.seed)
    if not words:
        raise UserError(
            f"the tokenizer of {model} has no words with a space in front; take a model with byte-level BPE"
        )
    seen: dict[str, list[Json]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        options = engine_options(engine, args.cache_tokens, longest)
        starting = [server(args.serve, options) for _ in range(args.engines)]
        engines = [stack.enter_context(each) for each in starting]
        requests, times = trace(args, words, args.rounds, 0)
        turn(engines, names[0], requests[:WARM], times[:WARM])
        for number in range(args.rounds):
            for which in rng.permutation(len(names)).tolist():
                row = turn(engines, names[which], *trace(args, words, number, which))
                seen[names[which]].append(row)
                run.log(round=number, **row)
    rows = {
        name: {what: statistics.median(row[what] for row in turns) for what in FIGURES} for name, turns in seen.items()
    }
    print(f"{'policy':16} {'hit rate':>8} {'TTFT p50':>9} {'p99 ms':>8} {'largest share':>14}")
    for name, row in rows.items():
        print(f"{name:16} {row['hit_rate']:8.0%} {row['ttft_ms_p50']:9.0f} {row['ttft_ms_p99']:8.0f} "
              f"{row['largest_share']:14.0%}")  # fmt: skip
    turns = [row for each in seen.values() for row in each]
    result: Json = {
        "engine": engine, "requests": args.requests, "rounds": args.rounds,
        "failed": sum(row["failed"] for row in turns), "in_flight": sum(row["in_flight"] for row in turns),
    }  # fmt: skip
    for name, row in rows.items():
        result |= {f"{name.replace('-', '_')}_{what}": row[what] for what in FIGURES[:3]}
    if {"round_robin", "joint"} <= set(names):
        result["hit_rate_times"] = paired(seen["joint"], seen["round_robin"], "hit_rate")
    if {PEER, "joint"} <= set(names):
        result |= {f"joint_over_peer_{what}": paired(seen["joint"], seen[PEER], what) for what in FIGURES[:3]}
    return result


if __name__ == "__main__":
    script.run(main)
