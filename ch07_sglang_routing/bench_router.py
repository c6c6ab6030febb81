"""What a router costs: requests/s, added latency and memory of ours and of sglang-router, workers costing nothing.

You learn   how to measure a proxy: the client and the workers must be faster than it, contestants take turns, and what
            counts is the difference from no proxy at all
Laptop      python -m ch07_sglang_routing.bench_router              (make setup-routers; make system-deps for wrk)
GPU node    the same: no GPU is used, more cores help sglang-router, which has threads
Cluster     the same on one node
You see     requests/s, p50 and p99 of each and what it adds to the direct p50; ratios of one round, the median of all

The workers are a C program that answers at once (fake_engine.c). wrk keeps 16 connections busy; where it is missing, a
client in Python does, which is slower than the routers and narrows all differences. All features of ours are on: the
joint policy reads each prompt, checks health, counts, times.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ch07_sglang_routing.router.policies import named
from ch07_sglang_routing.router.running import Routing, peer_installed
from ch07_sglang_routing.router_load import LONGEST_PROMPT, UNIQUE, fake_engines, prompt_body, with_python, with_wrk
from common import script
from common.script import UserError

COLUMNS = ("requests_per_s", "p50_ms", "p99_ms", "added_p50_ms", "cpu_us")
Json = dict[str, Any]


def scrapes_ms(url: str, times: int = 51) -> list[float]:
    """Some scrapes, each from asking to the last byte: no other request can be held up by one for longer."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            answer.read()
        took.append((time.perf_counter() - began) * 1e3)
    return took


@contextlib.contextmanager
def scraper(url: str) -> Iterator[None]:
    """Scrapes twenty times a second meanwhile."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(0.05):
            scrapes_ms(url, 1)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def grown_mib(router: Routing, prompts: int, turn: Callable[[str], int]) -> float:
    """What its memory grows by over so many prompts that are all different, after a fifth of them has filled its tree.

    turn: sends some to a URL, says how many.
    """
    process_of, sent, full = psutil.Process(router.child.process.pid), 0, 0
    while sent < prompts:
        sent += turn(router.url)
        if not full and sent >= prompts / 5:
            full = process_of.memory_info().rss
    return (process_of.memory_info().rss - full) / 2**20 if full else float("nan")


def draw(path: Path, seen: dict[str, list[Json]]) -> None:
    """Each round of each router: requests/s against what it adds to the p50."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, turns in seen.items():
        axes.scatter(
            [turn["added_p50_ms"] for turn in turns], [turn["requests_per_s"] for turn in turns],
            label="sglang-router" if name == "sglang" else name,
        )  # fmt: skip
    axes.set(xlabel="added p50 (ms)", ylabel="requests/s", title="One point a round; up and left is better")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> Json:
    parser = script.parser(__doc__)
    parser.add_argument("--rounds", type=script.at_least(1), default=7)
    parser.add_argument("--seconds", type=script.positive, default=3, help="of a turn")
    parser.add_argument("--connections", type=script.at_least(1), default=16)
    parser.add_argument("--workers", type=script.at_least(1), default=2)
    parser.add_argument("--policy", type=named, default="joint")
    parser.add_argument("--unique", type=script.at_least(0), default=1_000_000, metavar="PROMPTS",
                        help="at the end, all different: what memory ours gains by them")  # fmt: skip
    parser.add_argument("--prompt-characters", type=script.at_least(1), default=48)
    args = parser.parse_args(argv)
    if args.prompt_characters > LONGEST_PROMPT:
        raise UserError(f"the fake engines take no longer prompt; give --prompt-characters up to {LONGEST_PROMPT}")
    run = script.start(__file__, args)
    rng, body = random.Random(args.seed), prompt_body(args.prompt_characters)
    wrk = shutil.which("wrk") is not None
    peer = peer_installed()
    print(f"client: {'wrk' if wrk else 'Python (make system-deps for wrk)'}; sglang-router: "
          f"{'installed' if peer else 'missing (make setup-routers)'}")  # fmt: skip

    def measure(url: str, seconds: float) -> Json:
        if wrk:
            return with_wrk(url, body, args.connections, seconds, run.folder)
        return asyncio.run(with_python(url, body, args.connections, seconds))

    def measured(router: Routing | None, url: str) -> Json:
        """One turn, and the CPU time that the router's own process took for a request."""
        process_of = psutil.Process(router.child.process.pid) if router else None
        before = sum(process_of.cpu_times()[:2]) if process_of else 0.0
        seen = measure(url, args.seconds)
        used_s = sum(process_of.cpu_times()[:2]) - before if process_of else 0.0
        return seen | {"cpu_us": used_s * 1e6 / (seen["requests_per_s"] * args.seconds)}

    def unique_turn(url: str) -> int:
        unique = prompt_body(args.prompt_characters).replace("the", UNIQUE, 1)
        turn = (with_wrk(url, unique, args.connections, 2, run.folder) if wrk
                else asyncio.run(with_python(url, unique, args.connections, 2)))  # fmt: skip
        return int(turn["requests_per_s"] * 2)

    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(fake_engines(args.workers))
        routers = {"ours": stack.enter_context(Routing(workers, policy=args.policy))}
        if peer:
            routers["sglang"] = stack.enter_context(Routing(workers, kind="sglang"))
        urls = {"direct": workers[0]} | {name: router.url for name, router in routers.items()}
        for url in urls.values():
            measure(url, min(1.0, args.seconds))  # warm
        rounds: list[dict[str, Json]] = []
        scraped_turns: list[Json] = []
        for number in range(args.rounds):
            order = rng.sample(list(urls), len(urls))
            rounds.append({name: measured(routers.get(name), urls[name]) for name in order})
            with scraper(urls["ours"]):
                scraped_turns.append(measured(routers["ours"], urls["ours"]))
            for name, seen in rounds[-1].items():
                seen["added_p50_ms"] = seen["p50_ms"] - rounds[-1]["direct"]["p50_ms"]
                run.log(round=number, router=name, **seen)
        scraped = scrapes_ms(routers["ours"].url)
        rss = {
            name: psutil.Process(router.child.process.pid).memory_info().rss / 2**20 for name, router in routers.items()
        }

        growth_mib = grown_mib(routers["ours"], args.unique, unique_turn)

    def median(name: str, what: str) -> float:
        return statistics.median(seen[name][what] for seen in rounds)

    def ratio(what: str) -> float:
        return statistics.median(seen["ours"][what] / seen["sglang"][what] for seen in rounds) if peer else float("nan")

    def paired(what: str) -> float:
        return statistics.median(
            turn[what] / seen["ours"][what] for turn, seen in zip(scraped_turns, rounds, strict=True)
        )

    print(f"{'':8} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8} {'added p50':>10} {'CPU us':>7} {'RSS MiB':>8}")
    for name in urls:
        rate, p50, p99, added, cpu = (median(name, what) for what in COLUMNS)
        print(
            f"{name:8} {rate:11,.0f} {p50:8.2f} {p99:8.2f} {added:10.2f} {cpu:7.0f} {rss.get(name, float('nan')):8.0f}"
        )
    draw(run.path("routers.png"), {name: [seen[name] for seen in rounds] for name in routers})
    found: Json = {
        "client": "wrk" if wrk else "python", "rounds": args.rounds,
        "scrape_ms_p50": statistics.median(scraped), "scrape_ms_max": max(scraped),
        # what others wait while somebody scrapes, beside the same without
        "scraped_p99_ratio": paired("p99_ms"), "scraped_max_ratio": paired("max_ms"),
    }  # fmt: skip
    for name in urls:
        found |= {f"{name}_{what}": median(name, what) for what in COLUMNS}
    found |= {f"{name}_rss_mib": mib for name, mib in rss.items()}
    return found | {
        "failed": sum(seen["failed"] for each in rounds for seen in each.values()),
        "unique_prompts": args.unique,
        "rss_growth_mib": growth_mib,
        "requests_ratio": ratio("requests_per_s"),
        "added_p50_ratio": ratio("added_p50_ms"),
        "cpu_ratio": ratio("cpu_us"),
    }


if __name__ == "__main__":
    script.run(main)
