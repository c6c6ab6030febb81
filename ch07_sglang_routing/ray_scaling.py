"""Replicas up and down with the load, and one killed on the way: no request may be lost.

You learn   what the autoscaler looks at (requests in flight) and how late it is, what draining is for, and what a
            killed replica costs: Serve asks no other one by itself, so its clients have to
Laptop      python -m ch07_sglang_routing.ray_scaling                        (a Ray cluster of its own)
GPU node    the same: it is about CPUs
Cluster     python -m ch07_sglang_routing.ray_scaling --address HOST:6379 --url http://HOST:8000 --high 48
            (on a node of that cluster, as Ray connects to its own node's processes; the application is that of
            configs/ray_serve.yaml, and nothing is killed there)
You see     scaling.png: users, requests in flight, replicas and TTFT over time; a row for each stage. Half of the
            requests stream. Of a killed replica's requests those that do not stream are asked again by the client; a
            stream that has begun is cut, and counted

Each user has one request in flight and then asks the next. A stage ends when Serve has as many replicas as it is about
and --requests more have been answered: on a slow machine it takes longer, and shows the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ch06_vllm import load
from ch06_vllm.client import Client, RequestFailed, Retry
from ch06_vllm.started import folder_of
from ch07_sglang_routing import ray_local
from common import script

STATES = ("RUNNING", "STARTING", "STOPPING")


@dataclass
class Asked:
    """A request; seconds since the start. outcome: answered, cut (a stream that broke off) or failed."""

    stage: str
    streamed: bool
    sent_s: float
    first_s: float = float("nan")
    ended_s: float = float("nan")
    attempts: int = 1
    outcome: str = "running"
    error: str = ""


@dataclass
class Users:
    """So many as `wanted` ask one request after another."""

    client: Client
    model: str
    requests: list[load.Request]
    wanted: int = 0
    stage: str = ""
    asked: list[Asked] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.began

    @property
    def in_flight(self) -> int:
        return sum(one.outcome == "running" for one in self.asked)

    def answered(self) -> int:
        return sum(one.outcome == "answered" for one in self.asked)

    def set(self, stage: str, wanted: int) -> None:
        self.stage, self.wanted = stage, wanted
        for number in range(wanted):
            if number not in self._tasks or self._tasks[number].done():
                self._tasks[number] = asyncio.create_task(self._user(number))

    async def end(self) -> None:
        """Nobody asks any more; what was asked is answered."""
        self.wanted = 0
        await asyncio.gather(*self._tasks.values())

    async def _user(self, number: int) -> None:
        while number < self.wanted:
            count = len(self.asked)
            one = Asked(self.stage, count % 2 == 0, self.now_s)
            self.asked.append(one)
            request = self.requests[count % len(self.requests)]
            try:
                await self._ask(one, request)
                one.outcome = "answered"
            except RequestFailed as error:
                one.attempts, one.error = error.attempts, str(error)
                one.outcome = "failed" if math.isnan(one.first_s) else "cut"
            one.stage, one.ended_s = self.stage, self.now_s

    async def _ask(self, one: Asked, request: load.Request) -> None:
        body: dict[str, Any] = {"model": self.model, "prompt": request.prompt, "max_tokens": request.max_tokens}
        body |= {"ignore_eos": True, "temperature": 0}
        if not one.streamed:
            reply = await self.client.post("/v1/completions", body)
            one.attempts, got = reply.attempts, reply.body["usage"]["completion_tokens"]
        else:
            got = 0
            async with self.client.stream("/v1/completions", body) as chunks:
                async for chunk in chunks:
                    if chunk.tokens and math.isnan(one.first_s):
                        one.first_s = chunk.at_s - self.began
                    got = (chunk.body.get("usage") or {}).get("completion_tokens", got)
        if got != request.max_tokens:
            raise RequestFailed(f"the answer has {got} tokens of {request.max_tokens}")


@dataclass
class Seen:
    """What Serve says, again and again: (seconds, users, in flight, replicas that run, that start, that stop)."""

    users: Users
    rows: list[tuple[float, int, int, int, int, int]] = field(default_factory=list)

    def look(self) -> None:
        states, users = ray_local.states(), self.users
        self.rows.append((users.now_s, users.wanted, users.in_flight, *(states[name] for name in STATES)))

    @property
    def running(self) -> int:
        return self.rows[-1][3] if self.rows else 0

    @property
    def most(self) -> int:
        return max(row[3] for row in self.rows)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            self.look()
            return condition()

        await ray_local.until(met, what)

    async def more(self, count: int) -> None:
        """Until so many more requests have been answered."""
        goal = self.users.answered() + count
        await self.until(lambda: self.users.answered() >= goal, f"{count} more requests are answered")


async def run(args: argparse.Namespace, url: str, requests: list[load.Request]) -> tuple[Users, Seen, dict]:
    """The load up, a replica killed, the load down."""
    found: dict[str, Any] = {"killed": 0}
    retry = Retry(attempts=8, base_s=0.2, cap_s=5)
    async with Client(url, retry=retry, concurrency=args.high + args.low) as client:
        users = Users(client, (await client.models())[0], requests)
        seen = Seen(users)
        users.set("one replica", args.low)
        await seen.more(args.requests)
        users.set("scaling up", args.high)
        await seen.until(lambda: seen.running >= args.replicas, f"{args.replicas} replicas run")
        users.set("scaled up", args.high)
        await seen.more(args.requests)
        if processes := ray_local.processes():
            users.set("one killed", args.high)
            victim = processes[0]
            victim.kill()
            found["killed"] = 1

            def replaced() -> bool:
                alive = ray_local.processes()
                return victim not in alive and len(alive) >= args.replicas <= seen.running

            await seen.until(replaced, "another replica has taken its place")
            await seen.more(args.requests)
        users.set("scaling down", args.low)
        await seen.until(lambda: seen.running == 1, "one replica is left")
        found["replicas_last"] = seen.running
        users.set("one again", args.low)
        await seen.more(args.requests)
        await users.end()
    return users, seen, found | {"replicas_most": seen.most}


def figures(asked: list[Asked], found: dict[str, Any]) -> dict:
    """And a row for each stage; a request belongs to the stage in which it ended."""
    print(f"{'stage':<14}{'answered':>9}{'cut':>5}{'failed':>8}{'again':>7}{'TTFT p50 ms':>13}{'p99':>8}")
    for stage in dict.fromkeys(one.stage for one in asked):
        ended = [one for one in asked if one.stage == stage]
        count = {name: sum(one.outcome == name for one in ended) for name in ("answered", "cut", "failed")}
        again = sum(one.attempts > 1 for one in ended)
        ttft_ms = [1e3 * (one.first_s - one.sent_s) for one in ended if one.outcome == "answered" and one.streamed]
        p50, p99 = np.percentile(ttft_ms, (50, 99)) if ttft_ms else (float("nan"),) * 2
        print(
            f"{stage:<14}{count['answered']:>9}{count['cut']:>5}{count['failed']:>8}{again:>7}{p50:>13.0f}{p99:>8.0f}"
        )
    whole = [one for one in asked if not one.streamed]
    cut = [one for one in asked if one.outcome == "cut"]
    return found | {
        "requests": len(asked),
        "answered": sum(one.outcome == "answered" for one in asked),
        "unstreamed": len(whole),
        "unstreamed_lost": sum(one.outcome != "answered" for one in whole),
        "asked_again": sum(one.attempts > 1 for one in asked),
        "streams_cut": len(cut),
        "lost_while_scaling": sum(one.outcome != "answered" for one in asked if one.stage != "one killed"),
    }


def draw(path: Path, users: Users, seen: Seen) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    at_s, wanted, in_flight, running, starting, stopping = np.array(seen.rows).T
    figure, (load_axes, replica_axes, ttft_axes) = pyplot.subplots(
        3, 1, figsize=(9, 7), sharex=True, layout="constrained"
    )
    load_axes.step(at_s, wanted, where="post", label="users", color="0.6")
    load_axes.step(at_s, in_flight, where="post", label="requests in flight")
    replica_axes.step(at_s, running, where="post", label="replicas that run")
    replica_axes.step(at_s, starting, where="post", label="that start", linestyle="--")
    replica_axes.step(at_s, stopping, where="post", label="that drain", linestyle=":")
    firsts = [
        (one.sent_s, 1e3 * (one.first_s - one.sent_s))
        for one in users.asked
        if one.outcome == "answered" and one.streamed
    ]
    ttft_axes.plot(*zip(*firsts, strict=True), ".", label="TTFT of a stream")
    killed = [one.sent_s for one in users.asked if one.attempts > 1 or one.outcome != "answered"]
    ttft_axes.plot(killed, [1] * len(killed), "x", color="C3", label="asked again, or cut")
    load_axes.set(ylabel="count", ylim=(0, None))
    replica_axes.set(ylabel="replicas", ylim=(0, None))
    ttft_axes.set(ylabel="ms", xlabel="s", yscale="log")
    for axes in (load_axes, replica_axes, ttft_axes):
        axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    folder = args.model if Path(args.model).is_dir() else folder_of(args.model)
    rng = np.random.default_rng(args.seed)
    asked, answered = (each(rng, 64) for each in (args.prompt_tokens, args.output_tokens))
    requests = load.workload(load.usable_ids(Path(folder)), asked, answered, rng)
    running = script.start(__file__, args)
    with ray_local.cluster(args.replicas, args.address):
        from ch07_sglang_routing.ray_app import AUTOSCALING, Arguments

        own = ray_local.deployed(
            Arguments(model=args.model, settings={"num-blocks": 1024}),
            autoscaling_config=AUTOSCALING | {"max_replicas": args.replicas},
        )
        with contextlib.nullcontext(args.url) if args.url else own as url:
            users, seen, found = asyncio.run(run(args, url, requests))
    draw(running.path("scaling.png"), users, seen)
    for one in users.asked:
        running.log(**asdict(one))
    return figures(users.asked, found)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset (random weights, made once) or a model's folder")
    parser.add_argument("--replicas", type=script.at_least(2), default=2, help="at most, each with a CPU of its own")
    parser.add_argument("--low", type=script.at_least(1), default=2, help="users at the beginning and the end")
    parser.add_argument("--high", type=script.at_least(2), default=12, help="users between them")
    parser.add_argument("--requests", type=script.at_least(1), default=40, help="in each stage, at least")
    parser.add_argument("--prompt-tokens", type=load.lengths, default="32-96", help="128, 64-256, lognormal:128,0.8")
    parser.add_argument("--output-tokens", type=load.lengths, default="32-96", help="likewise")
    parser.add_argument("--address", help="HOST:6379 of the cluster that this node is in; with --url")
    parser.add_argument("--url", help="of the application there, http://HOST:8000")
    args = parser.parse_args(argv)
    if bool(args.address) != bool(args.url):
        raise script.UserError("--address and --url are of one running application; give both or neither")
    return args


if __name__ == "__main__":
    script.run(main)
