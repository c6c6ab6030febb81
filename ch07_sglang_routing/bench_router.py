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
import hashlib
import json
import random
import re
import shutil
import statistics
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from ch06_vllm.servers import HOST, answers
from ch07_sglang_routing.router.policies import named
from ch07_sglang_routing.router.running import Routing, peer_installed
from common import process, script
from common.bootstrap import cache_dir
from common.ranks import free_port
from common.script import UserError

SOURCE = Path(__file__).with_name("fake_engine.c")
PATH = "/v1/completions"
LONGEST_PROMPT = 60_000  # characters: fake_engine.c has room for 64 KiB of a request
START_S = 20.0
COLUMNS = ("requests_per_s", "p50_ms", "p99_ms", "added_p50_ms", "cpu_us")
UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
Json = dict[str, Any]


def fake_engine() -> Path:
    """The program, which takes ports. Compiled once, into the cache.

    Raises:
        UserError: no C compiler, or it does not compile.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise UserError("there is no C compiler for fake_engine.c; install gcc")
    program = cache_dir() / "kernels" / f"fake_engine-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(f".{time.time_ns()}")
        done = process.run([compiler, "-O2", "-o", str(partial), str(SOURCE)], timeout_s=120)
        if done.returncode:
            raise UserError(f"{compiler} {done.reason()}: {done.stderr.strip()[-200:]}; see whether it compiles at all")
        partial.replace(program)
    return program


@contextlib.contextmanager
def fake_engines(number: int) -> Iterator[list[str]]:
    """URLs of workers that answer at once, all of one process.

    Raises:
        UserError: they do not start.
    """
    ports = [free_port() for _ in range(number)]
    with process.Child([str(fake_engine()), *map(str, ports)]) as child:
        urls = [f"http://{HOST}:{port}" for port in ports]
        while not answers(f"{urls[-1]}/health"):
            if child.process.poll() is not None:
                raise UserError(f"the fake engines did not start ({' '.join(child.err).strip()}); start it again")
            if time.monotonic() > child.started + START_S:
                raise UserError(f"the fake engines do not answer after {START_S:g} s; see whether {urls[-1]} is taken")
            time.sleep(0.02)
        yield urls


def prompt_body(characters: int) -> str:
    words = "the quick brown fox jumps over the lazy dog and " * (characters // 48 + 1)
    return json.dumps({"model": "fake", "prompt": words[:characters], "max_tokens": 3, "temperature": 0})


def with_wrk(url: str, body: str, connections: int, seconds: float, folder: Path) -> Json:
    """One run of wrk: requests_per_s, p50_ms, p99_ms, failed."""
    lua = folder / "post.lua"
    lua.write_text(
        f"wrk.method = 'POST'\nwrk.body = [==[{body}]==]\nwrk.headers['Content-Type'] = 'application/json'\n"
    )
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(lua), url + PATH]
    done = process.run(words, timeout_s=seconds + 30)
    said = done.stdout
    if done.returncode or "Requests/sec" not in said:
        raise UserError(f"wrk {done.reason()}: {(done.stderr or said).strip()[-200:]}; see whether {url} answers")
    at = {p: float(value) * UNITS_MS[unit] for p, value, unit in re.findall(r"(\d\d)% +([\d.]+)(us|ms|s)\b", said)}
    failed = sum(map(int, re.findall(r"Non-2xx[^:]*: (\d+)", said)))
    failed += sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", said)))
    rate = float(re.search(r"Requests/sec: +([\d.]+)", said)[1])  # type: ignore[index]
    return {"requests_per_s": rate, "p50_ms": at["50"], "p99_ms": at["99"], "failed": failed}


class Asking(asyncio.Protocol):
    """One connection of the client in Python: the next request when an answer is whole."""

    def __init__(self, request: bytes, seen: list[float], failed: list[bytes]) -> None:
        self.request, self.seen, self.failed = request, seen, failed
        self.buffer, self.done = b"", False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if end and length and len(body) >= int(length[1]):
            self.seen.append(time.perf_counter() - self.asked)
            if not head.startswith(b"HTTP/1.1 200"):
                self.failed.append(head)
            self.buffer = b""
            self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done:
            self.failed.append(b"the connection was lost")


async def with_python(url: str, body: str, connections: int, seconds: float) -> Json:
    """The same as with_wrk."""
    seen: list[float] = []
    failed: list[bytes] = []
    where = urlsplit(url)
    head = f"POST {PATH} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Asking(request, seen, failed), where.hostname, where.port)
            for _ in range(connections)]  # fmt: skip
    began = len(seen)
    await asyncio.sleep(seconds)
    seen = seen[began:]
    for transport, asking in made:
        asking.done = True
        transport.abort()
    if len(seen) < 2:
        raise UserError(
            f"{url} answered {len(seen)} requests in {seconds:g} s; see whether it answers, or measure longer"
        )
    cuts = statistics.quantiles(seen, n=100)
    return {
        "requests_per_s": len(seen) / seconds,
        "p50_ms": cuts[49] * 1e3,
        "p99_ms": cuts[98] * 1e3,
        "failed": len(failed),
    }


def scrapes_ms(url: str, times: int = 51) -> list[float]:
    """Some scrapes, each from asking to the last byte: no other request can be held up by one for longer."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            answer.read()
        took.append((time.perf_counter() - began) * 1e3)
    return took


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

    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(fake_engines(args.workers))
        routers = {"ours": stack.enter_context(Routing(workers, policy=args.policy))}
        if peer:
            routers["sglang"] = stack.enter_context(Routing(workers, kind="sglang"))
        urls = {"direct": workers[0]} | {name: router.url for name, router in routers.items()}
        for url in urls.values():
            measure(url, min(1.0, args.seconds))  # warm
        rounds: list[dict[str, Json]] = []
        for number in range(args.rounds):
            order = rng.sample(list(urls), len(urls))
            rounds.append({name: measured(routers.get(name), urls[name]) for name in order})
            for name, seen in rounds[-1].items():
                seen["added_p50_ms"] = seen["p50_ms"] - rounds[-1]["direct"]["p50_ms"]
                run.log(round=number, router=name, **seen)
        scraped = scrapes_ms(routers["ours"].url)
        rss = {
            name: psutil.Process(router.child.process.pid).memory_info().rss / 2**20 for name, router in routers.items()
        }

    def median(name: str, what: str) -> float:
        return statistics.median(seen[name][what] for seen in rounds)

    def ratio(what: str) -> float:
        return statistics.median(seen["ours"][what] / seen["sglang"][what] for seen in rounds) if peer else float("nan")

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
    }  # fmt: skip
    for name in urls:
        found |= {f"{name}_{what}": median(name, what) for what in COLUMNS}
    found |= {f"{name}_rss_mib": mib for name, mib in rss.items()}
    return found | {
        "failed": sum(seen["failed"] for each in rounds for seen in each.values()),
        "requests_ratio": ratio("requests_per_s"),
        "added_p50_ratio": ratio("added_p50_ms"),
        "cpu_ratio": ratio("cpu_us"),
    }


if __name__ == "__main__":
    script.run(main)
