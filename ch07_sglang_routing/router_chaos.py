"""A bad day for a router: one of two engines is killed in the middle of a trace, another is added, nothing is lost.

You learn   what a router can try again (a request of which the client has seen nothing) and what it cannot (a stream
            that has begun), and how each looks to the client
Laptop      python -m ch07_sglang_routing.router_chaos
            python -m ch07_sglang_routing.router_chaos --serve vllm:nano --added ours:nano
GPU node    python -m ch07_sglang_routing.router_chaos --serve vllm:1b --added vllm:1b
Cluster     the same on one node
You see     all requests answered by as many tokens as were asked for, some at the second attempt; of the streams that
            ran, those on the dead engine end with an error that says so; the added engine takes its share
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ch06_vllm.client import Client, RequestFailed, Retry
from ch06_vllm.servers import Server
from ch06_vllm.started import HELP, engine_and_model, server
from ch07_sglang_routing.router.policies import Ask, Worker, session
from ch07_sglang_routing.router.running import Routing
from common import script

Json = dict[str, Any]
OPTIONS = {"max-num-seqs": 16, "max-num-batched-tokens": 512}
STREAM_TOKENS = 600
PATIENCE_S = 60.0


def sessions_of(name: str, names: Sequence[str]) -> Iterator[str]:
    """Sessions that the policy `session` sends to the worker of this name."""
    idle = [Worker(each, 0, 0) for each in names]
    return (text for text in map(str, itertools.count()) if names[session(Ask(session=text), idle)] == name)


async def stream(client: Client, model: str, user: str, begun: asyncio.Semaphore) -> str:
    """One long stream of a session; how it ended: whole, or cut."""
    body = {"model": model, "prompt": "A long story: ", "max_tokens": STREAM_TOKENS, "ignore_eos": True, "user": user}
    last, seen = None, 0
    try:
        async with client.stream("/v1/completions", body) as chunks:
            async for chunk in chunks:
                seen += 1
                if seen == 3:
                    begun.release()
                last = chunk.finish_reason or last
    except RequestFailed as error:
        return "cut: the client is told" if seen and error.error else "failed"
    return "whole" if last == "length" else "cut in silence"


async def trace(client: Client, model: str, requests: int, on_answer: Any) -> list[str]:
    """Requests that are not streamed, eight at a time; what went wrong with them."""
    numbers, answered, wrong = iter(range(requests)), itertools.count(1), []

    async def one_after_another() -> None:
        for number in numbers:
            body = {"model": model, "prompt": f"Request {number}: ", "max_tokens": 8, "ignore_eos": True}
            try:
                reply = await client.post("/v1/completions", body)
                if reply.body["usage"]["completion_tokens"] != 8:
                    wrong.append(f"{number}: {reply.body['usage']}")
            except RequestFailed as error:
                wrong.append(f"{number}: {error}")
            await on_answer(next(answered))

    await asyncio.gather(*(one_after_another() for _ in range(8)))
    return wrong


async def suffer(routing: Routing, victim: Server, added: Server, *, requests: int, streams: int) -> Json:
    """Send the trace; after a third of it, with streams running on each engine, kill the victim and add another.

    The kill comes as soon as the victim's streams have begun: it must not have ended them when those of a slower engine
    begin. The client itself tries nothing again.
    """
    begun, other, running = asyncio.Semaphore(0), asyncio.Semaphore(0), []
    names = [worker["name"] for worker in routing.known()]
    users = [sessions_of(name, names) for name in names]

    async def on_answer(count: int) -> None:
        if count == requests // 3:
            for number in range(streams):
                turn = number % len(names)
                said = stream(client, added.model, next(users[turn]), other if turn else begun)
                running.append(asyncio.create_task(said))
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(0, streams, len(names)):
                    await begun.acquire()
            await asyncio.to_thread(victim.child.kill)
            await asyncio.to_thread(routing.add, added.url)

    async with Client(routing.url, concurrency=64, retry=Retry(attempts=1), timeout_s=PATIENCE_S) as client:
        wrong = await trace(client, added.model, requests, on_answer)
        ends = Counter(await asyncio.gather(*running))
    return {"answered": requests - len(wrong), "wrong": wrong, "streams": dict(ends)}


def came_back(routing: Routing, added: Server) -> Json:
    """What the router says of itself and its workers at the end."""
    known = {worker["name"]: worker for worker in routing.known()}
    return {
        "in_flight": sum(worker["in_flight"] + worker["pending_tokens"] for worker in known.values()),
        "added_answered": known[added.url.removeprefix("http://")]["answered"],
        "retries": int(routing.metrics().values.get("router_retries_total", 0)),
    }


def run_day(servers: Sequence[Server], added: Server, requests: int, streams: int) -> Json:
    """The day of a router before these servers, of which the first dies."""
    with Routing([each.url for each in servers], policy="session") as routing:
        suffered = asyncio.run(suffer(routing, servers[0], added, requests=requests, streams=streams))
        return suffered | came_back(routing, added)


def main(argv: list[str] | None = None) -> Json:
    parser = script.parser(__doc__)
    parser.add_argument("--serve", type=engine_and_model, default=("ours", "nano"), help=f"two of these; {HELP}")
    parser.add_argument("--added", type=engine_and_model, default=("ours", "nano"), help="the one that is added")
    parser.add_argument("--requests", type=script.at_least(30), default=200)
    parser.add_argument("--streams", type=script.at_least(2), default=4)
    args = parser.parse_args(argv)
    run = script.start(__file__, args)
    asked = (args.serve, args.serve, args.added)
    with contextlib.ExitStack() as stack:
        first, second, added = (stack.enter_context(server(each, OPTIONS)) for each in asked)
        day = run_day([first, second], added, args.requests, args.streams)
    run.log(**day)
    for text in day.pop("wrong"):
        print(f"not answered: request {text}")
    ends = day.pop("streams")
    print(f"answered {day['answered']} of {args.requests}, {day['retries']} attempts were repeated; streams: {ends}; "
          f"the added engine answered {day['added_answered']}")  # fmt: skip
    result = {"requests": args.requests, **day, "streams": args.streams, "streams_whole": ends.get("whole", 0),
              "streams_told": ends.get("cut: the client is told", 0)}  # fmt: skip
    told = result["streams_whole"] + result["streams_told"]
    if not (day["answered"] == args.requests and told == args.streams and day["in_flight"] == 0):
        raise script.CheckFailed("a request was lost, or a stream was cut in silence, or something was left", result)
    return result


if __name__ == "__main__":
    script.run(main)
