"""Load for a router: workers that answer at once (fake_engine.c), and clients that keep connections busy."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ch06_vllm.servers import HOST, answers
from common import process
from common.bootstrap import cache_dir
from common.ranks import free_port
from common.script import UserError

SOURCE = Path(__file__).with_name("fake_engine.c")
PATH = "/v1/completions"
LONGEST_PROMPT = 60_000  # characters: fake_engine.c has room for 64 KiB of a request
START_S = 20.0
UNITS_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
UNIQUE = "@@@@@@@@"  # in a body: eight digits, other ones for each request of 100 runs
_runs = itertools.count()
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
    """One run of wrk: requests_per_s, p50_ms, p99_ms, max_ms, failed. A body with UNIQUE is another each time."""
    lua = folder / "post.lua"
    each = (
        f"local n = {next(_runs) * 1_000_000}\nlocal before, after = wrk.body:match('(.*){UNIQUE}(.*)')\n"
        "function request()\n  n = n + 1\n"
        "  return wrk.format(nil, nil, nil, before .. string.format('%08d', n) .. after)\nend\n"
    )
    lua.write_text(
        f"wrk.method = 'POST'\nwrk.body = [==[{body}]==]\nwrk.headers['Content-Type'] = 'application/json'\n"
        + (each if UNIQUE in body else "")
    )
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(lua), url + PATH]
    done = process.run(words, timeout_s=seconds + 30)
    said = done.stdout
    if done.returncode or "Requests/sec" not in said:
        raise UserError(f"wrk {done.reason()}: {(done.stderr or said).strip()[-200:]}; see whether {url} answers")
    at = {p: float(value) * UNITS_MS[unit] for p, value, unit in re.findall(r"(\d\d)% +([\d.]+)(us|ms|s)\b", said)}
    most = re.search(r"Latency +\S+ +\S+ +([\d.]+)(us|ms|s)\b", said)
    failed = sum(map(int, re.findall(r"Non-2xx[^:]*: (\d+)", said)))
    failed += sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", said)))
    rate = float(re.search(r"Requests/sec: +([\d.]+)", said)[1])  # type: ignore[index]
    return {
        "requests_per_s": rate,
        "p50_ms": at["50"],
        "p99_ms": at["99"],
        "failed": failed,
        "max_ms": float(most[1]) * UNITS_MS[most[2]] if most else float("nan"),
    }


class Asking(asyncio.Protocol):
    """One connection of the client in Python: the next request when an answer is whole."""

    def __init__(self, request: bytes, numbers: Iterator[int], seen: list[float], failed: list[bytes]) -> None:
        self.request, self.numbers, self.seen, self.failed = request, numbers, seen, failed
        self.buffer, self.done = b"", False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self.transport.write(self.request.replace(UNIQUE.encode(), b"%08d" % next(self.numbers)))

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
    loop, numbers = asyncio.get_running_loop(), itertools.count(next(_runs) * 1_000_000)
    made = [await loop.create_connection(lambda: Asking(request, numbers, seen, failed), where.hostname, where.port)
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
        "max_ms": max(seen) * 1e3,
        "failed": len(failed),
    }
