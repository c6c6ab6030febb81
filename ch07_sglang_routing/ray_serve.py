"""Chapter 6's engine as a Ray Serve application on CPUs: asked, left, changed while it answers.

You learn   what Serve adds to an engine (proxy, replicas, health, drain) and what the engine must do for it: cancel for
            a client that leaves, let running answers finish, say when it is dead
Laptop      python -m ch07_sglang_routing.ray_serve               (a Ray cluster of its own, gone afterwards)
            python -m ch07_sglang_routing.ray_serve --keep        (and stay up until Ctrl-C)
GPU node    the same: it is about CPUs
Cluster     serve deploy ch07_sglang_routing/configs/ray_serve.yaml
You see     the tokens that the engine gives without Serve; blocks of the KV cache before, during and after a stream
            whose client has left; streams that go on to their last token while a new version takes over
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import openai

from ch06_vllm.client import Answer, Client
from ch06_vllm.scrape import scrape
from ch07_sglang_routing import ray_local
from common import script

if TYPE_CHECKING:
    from ch07_sglang_routing.ray_app import Arguments

PROMPTS = ["def main(", "class Reader:\n    def ", "import os\n", "for line in "]
GREEDY = {"temperature": 0, "ignore_eos": True}
USAGE, RUNNING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running"
STREAMED = 1000  # tokens of an answer during which the version changes


def without_serve(model: str, num_blocks: int, tokens: int) -> list[str]:
    """What the engine answers by itself, greedily."""
    from ch06_vllm.engine import LLM, SamplingParams
    from ch06_vllm.started import folder_of

    engine = LLM(str(folder_of(model)), device="cpu", num_blocks=num_blocks)
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return [output.text for output in engine.generate(PROMPTS, params)]


async def complete(client: Client, model: str, tokens: int) -> list[Answer]:
    """The prompts at once, streamed."""
    asked = [client.complete(prompt, model=model, max_tokens=tokens, **GREEDY) for prompt in PROMPTS]
    return await asyncio.gather(*asked)


def gauges(url: str) -> tuple[float, float]:
    """Requests that run, and the share of KV blocks in use, of the one replica there is."""
    metrics = scrape(url)
    return metrics[RUNNING], metrics[USAGE]


async def until(condition: Callable[[float, float], bool], url: str, what: str) -> tuple[float, float]:
    """The gauges, once they are so."""
    seen = []

    def met() -> bool:
        seen.append(gauges(url))
        return condition(*seen[-1])

    await ray_local.until(met, what)
    return seen[-1]


async def leave(client: Client, url: str, model: str) -> tuple[float, float, float]:
    """Begin a long answer and go: the share of blocks in use meanwhile, and what runs and is in use afterwards."""
    body = {"model": model, "prompt": PROMPTS[0], "max_tokens": 3000, **GREEDY}
    async with client.stream("/v1/completions", body) as chunks:
        async for _ in chunks:
            break
        _, during = await until(lambda running, used: running == 1 and used > 0.01, url, "the answer runs")
    running, after = await until(
        lambda running, _: running == 0, url, "the engine has noticed that its client has left"
    )
    return during, running, after


@dataclass
class Changed:
    """What came of a new version while answers streamed.

    Attributes:
        answers: the streams, to their end.
        replaced: another process serves afterwards.
        overlapped: streams that were not at their end while their replica already stopped: it drained.
    """

    answers: list[Answer]
    replaced: bool
    overlapped: int


async def change(client: Client, arguments: Arguments, tokens: int) -> Changed:
    """Deploy other settings while answers stream, of `tokens` tokens each."""
    before = {process.pid for process in ray_local.processes()}
    asked = [
        asyncio.create_task(client.complete(prompt, model=arguments.model, max_tokens=tokens, **GREEDY))
        for prompt in PROMPTS
    ]
    await until(lambda running, _: running == len(asked), client.url, "answers run")
    other = arguments.model_copy(update={"settings": arguments.settings | {"max-num-seqs": 16}})
    deploying = asyncio.create_task(asyncio.to_thread(ray_local.deploy, other, num_replicas=1, autoscaling_config=None))
    overlapped = 0
    while not deploying.done():
        states = await asyncio.to_thread(ray_local.states)
        if states["STOPPING"]:
            overlapped = max(overlapped, sum(not stream.done() for stream in asked))
        await asyncio.sleep(0.05)
    await deploying
    answers = await asyncio.gather(*asked)
    await ray_local.until(lambda: not ray_local.states()["STOPPING"], "the old replica has drained")
    after = {process.pid for process in ray_local.processes()}
    return Changed(answers, bool(after) and not before & after, overlapped)


async def show(url: str, arguments: Arguments, expected: list[str], tokens: int) -> dict:
    model = arguments.model
    async with Client(url) as client, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as other:
        answers = await complete(client, model, tokens)
        same = [answer.text for answer in answers] == expected
        print(f"{len(answers)} streamed answers, the engine's own tokens: {'yes' if same else 'no'}")
        messages = [{"role": "user", "content": "What is a block table?"}]
        chat = await other.chat.completions.create(
            model=model, messages=messages, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )  # fmt: skip
        during, running, after = await leave(client, url, model)
        print(f"a client leaves: {during:.1%} of the KV blocks were in use, {after:.1%} are")
        changed = await change(client, arguments, STREAMED)
        whole = sum(answer.completion_tokens == STREAMED for answer in changed.answers)
        print(
            f"a new version: {changed.overlapped} streams ran on the replica that stopped, {whole} came whole, "
            f"replica replaced: {changed.replaced}"
        )
    return {
        "same_tokens": same, "chat_tokens": chat.usage.completion_tokens, "kv_usage_during": during,
        "kv_usage_left": after, "running_left": running, "streams_overlapped": changed.overlapped,
        "streams_whole": whole, "replica_replaced": changed.replaced,
    }  # fmt: skip


def stay(url: str) -> None:
    print(f"ready: {url}/v1  (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        for _ in itertools.repeat(None):
            time.sleep(3600)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    script.start(__file__, args)
    from ch07_sglang_routing.ray_app import Arguments

    arguments = Arguments(model=args.model, settings={"num-blocks": args.num_blocks})
    expected = [] if args.keep else without_serve(args.model, args.num_blocks, args.max_tokens)
    start = time.perf_counter()
    with ray_local.cluster(args.cpus):
        up_s = time.perf_counter() - start
        how = {} if args.keep else {"num_replicas": 1, "autoscaling_config": None}
        with ray_local.deployed(arguments, **how) as url:
            times = {"ray_start_s": up_s, "serve_start_s": time.perf_counter() - start - up_s}
            print(f"Ray after {up_s:.1f} s, one replica {times['serve_start_s']:.1f} s later: {url}")
            if args.keep:
                stay(url)
                return times
            return times | asyncio.run(show(url, arguments, expected, args.max_tokens))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset (random weights, made once) or a model's folder")
    parser.add_argument("--max-tokens", type=script.at_least(1), default=24)
    parser.add_argument("--num-blocks", type=script.at_least(256), default=512, help="of each replica's KV cache")
    parser.add_argument("--cpus", type=script.at_least(2), default=4, help="of the Ray cluster; a replica asks for one")
    parser.add_argument("--keep", action="store_true", help="serve with autoscaling until Ctrl-C, and ask nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    script.run(main)
