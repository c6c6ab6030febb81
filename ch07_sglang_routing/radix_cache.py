"""SGLang's radix cache: what of a prompt is found there, to the token, and what that does to the first token.

You learn   that every prompt and answer stays in a tree of token sequences until memory is wanted, so that whatever
            begins alike is computed once: a system prompt, a conversation's history, branches of a program
Laptop      python -m ch07_sglang_routing.radix_cache
GPU node    python -m ch07_sglang_routing.radix_cache --model 1b --prefix 2048 --requests 32
Cluster     --url of a server that runs there; how to share between replicas is the router's business
You see     for each workload the hit rate by formula, in whole pages, and as SGLang counts it (the same), and the time
            to first token with and without
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ch06_vllm.client import Client, Retry
from ch06_vllm.scrape import scrape
from ch07_sglang_routing import running
from common import script

UNIQUE = 16  # tokens of a prompt that no other has
WARM = "warm-up"
HIT, ASKED = "sglang:cached_tokens_total", "sglang:prompt_tokens_total"


@dataclass
class Seen:
    """Of one workload, a value for each request: prompt tokens, those found in the cache, those to be found."""

    prompt: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)


async def ask(client: Client, model: str, prompt: list[int], tokens: int, seen: Seen, expected: int) -> list[int]:
    """One request; the ids of its answer, exactly `tokens` of them.

    Raises:
        UserError: the server does not say what it found in its cache.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer: list[int] = []
    first_s, cached = 0.0, None
    loop = asyncio.get_running_loop()
    sent_s = loop.time()
    async with client.stream("/v1/completions", body | {"return_token_ids": True}) as chunks:
        async for chunk in chunks:
            if chunk.tokens and not first_s:
                first_s = loop.time()
            for choice in chunk.body.get("choices", ()):
                answer += choice.get("token_ids") or []
            if usage := chunk.body.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is None:
        raise script.UserError("the server does not say what it found; start SGLang with --enable-cache-report")
    seen.prompt.append(len(prompt))
    seen.cached.append(cached)
    seen.expected.append(expected)
    seen.ttft_ms.append(1e3 * (first_s - sent_s))
    return answer


async def shared_prefix(client: Client, model: str, ids: np.ndarray, args: Any, rng: np.random.Generator) -> Seen:
    """A system prompt of --prefix tokens in front of each request: found by all but the first."""
    seen, prefix = Seen(), rng.choice(ids, args.prefix).tolist()
    for number, own in enumerate(distinct(ids, args.requests, rng)):
        await ask(client, model, prefix + own, 4, seen, args.prefix if number else 0)
    return seen


async def nothing_shared(client: Client, model: str, ids: np.ndarray, args: Any, rng: np.random.Generator) -> Seen:
    """Prompts of the same length that differ from the first token on."""
    seen = Seen()
    for own in distinct(ids, args.requests, rng):
        await ask(client, model, own + rng.choice(ids, args.prefix).tolist(), 4, seen, 0)
    return seen


async def conversation(client: Client, model: str, ids: np.ndarray, args: Any, rng: np.random.Generator) -> Seen:
    """Each turn sends the whole conversation and a few tokens more. All of the last turn is found but its answer's last
    token: that was told, and never read by the model."""
    seen, history, known = Seen(), rng.choice(ids, args.prefix).tolist(), 0
    for own in distinct(ids, args.requests, rng):
        history = history + own
        answer = await ask(client, model, history, 8, seen, known)
        history, known = history + answer, len(history) + 8 - 1
    return seen


WORKLOADS = {"nothing shared": nothing_shared, "shared prefix": shared_prefix, "conversation": conversation}


def distinct(ids: np.ndarray, count: int, rng: np.random.Generator) -> list[list[int]]:
    """`count` pieces of UNIQUE tokens, no two with the same first one."""
    firsts = rng.permutation(ids)[:count]
    return [[int(first), *rng.choice(ids, UNIQUE - 1).tolist()] for first in firsts]


async def measure(url: str, model: str, args: Any) -> dict[str, Seen]:
    rng, ids, found = np.random.default_rng(args.seed), running.ids(args), {WARM: Seen()}
    async with Client(url, concurrency=1, retry=Retry(attempts=1)) as client:
        await ask(client, model, rng.choice(ids, args.prefix).tolist(), 4, found[WARM], 0)
        for name, workload in WORKLOADS.items():
            running.flush(url)
            found[name] = await workload(client, model, ids, args, rng)
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    running.add_flags(parser)
    parser.add_argument("--prefix", type=script.at_least(1), default=1024, help="tokens of the shared beginning")
    parser.add_argument("--requests", type=script.at_least(2), default=8, help="of each workload, one after another")
    args = parser.parse_args(argv)
    script.start(__file__, args)
    with running.sglang(args) as (url, model):
        page = running.info(url)["page_size"]  # tokens that the tree holds together; some GPU backends want 64 or 128
        before = scrape(url)
        workloads = asyncio.run(measure(url, model, args))
        after = scrape(url)
    counted = {name: after[name] - before.values.get(name, 0.0) for name in (ASKED, HIT)}
    asked, own = (sum(sum(getattr(seen, what)) for seen in workloads.values()) for what in ("prompt", "cached"))
    del workloads[WARM]

    print(f"{'':16}{'prompt tokens':>14}{'found':>9}{'by formula':>12}{'hit rate':>10}{'TTFT p50 of the rest':>22}")
    found: dict[str, Any] = {"requests": args.requests, "prefix": args.prefix, "page_tokens": page}
    for name, seen in workloads.items():
        rate, later = sum(seen.cached) / sum(seen.prompt), statistics.median(seen.ttft_ms[1:])
        expected = [tokens // page * page for tokens in seen.expected]
        print(f"{name:16}{sum(seen.prompt):14}{sum(seen.cached):9}{sum(expected):12}{rate:10.1%}{later:19.1f} ms")
        key = name.replace(" ", "_")
        found |= {
            f"{key}_hit_rate": rate,
            f"{key}_ttft_ms_p50": later,
            f"{key}_as_expected": seen.cached == expected,
        }
    found["ttft_times"] = found["nothing_shared_ttft_ms_p50"] / found["shared_prefix_ttft_ms_p50"]
    return found | {"metrics_agree": counted == {ASKED: asked, HIT: own}}


if __name__ == "__main__":
    script.run(main)
