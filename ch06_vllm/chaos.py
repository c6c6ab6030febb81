"""What clients and machines do to a server on a bad day, one fault after the other: what comes back, what is left.

You learn   which HTTP status each mistake gets, that a client which has left must not cost a block or a token, what
            becomes of running requests when a rank is killed
Laptop      python -m ch06_vllm.chaos --serve ours:nano
            python -m ch06_vllm.chaos --serve vllm:nano --tensor-parallel-size 2
GPU node    python -m ch06_vllm.chaos --serve ours:1b
You see     a row for each fault. `left`: requests and KV cache that its server still holds; `same`: whether it then
            answers as it did before
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

from ch06_vllm.client import Client, RequestFailed, Retry
from ch06_vllm.scrape import Metrics
from ch06_vllm.servers import Server
from ch06_vllm.started import HELP, engine_and_model, folder_of
from common import script

Json = dict[str, Any]
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
LONG = 3000  # tokens of an answer that nobody waits for
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Came:
    """What came back of a fault, in words, and whether that is right."""

    what: str
    right: bool


class Victim:
    """A server, and what it answers while all is well."""

    def __init__(self, server: Server) -> None:
        self.server = server
        parts = urlsplit(server.url)
        self.address = parts.hostname, parts.port
        self.client = Client(server.url, retry=Retry(attempts=1), concurrency=1000, timeout_s=PATIENCE_S)
        self.expected: list[int] = []

    async def __aenter__(self) -> Victim:
        await self.client.__aenter__()
        self.expected = await self.greedy()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.__aexit__()

    async def greedy(self) -> list[int]:
        """Tokens of the answer that must not change."""
        body = self.body(max_tokens=16, return_token_ids=True)
        reply = await self.client.post("/v1/completions", body)
        ids: list[int] = reply.body["choices"][0]["token_ids"]
        return ids

    def body(self, **fields: Any) -> Json:
        same = {"model": self.server.model, "prompt": "def fibonacci(", "temperature": 0, "ignore_eos": True}
        return same | fields

    async def gauges(self) -> dict[str, float]:
        """Requests that run, that wait, and the share of the KV cache that they hold, all ranks together."""
        async with await self.send(b"", "GET /metrics") as connection:
            text = (await connection.answer())[1].decode()
        metrics = Metrics(text)
        return {name: metrics[f"vllm:{name}"] for name in GAUGES}

    async def until(self, what: str, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The gauges, once they are as wanted.

        Raises:
            TimeoutError: they do not become so.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not holds(found := await self.gauges()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come in {PATIENCE_S:g} s: {found}")
            await asyncio.sleep(0.02)
        return found

    async def send(
        self, body: Json | bytes, what: str = "POST /v1/completions", length: int | None = None
    ) -> Connection:
        """A connection of its own, on which the request has been written."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{what} HTTP/1.1\r\nHost: chaos\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Content-Length: {len(data) if length is None else length}\r\n\r\n"
        return await self.connect(head.encode() + data)

    async def connect(self, written: bytes) -> Connection:
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(written)
        return Connection(reader, writer)

    async def refused(self, body: Json | bytes, *statuses: int) -> Came:
        """The server must answer with one of these, and an error in OpenAI's shape."""
        async with await self.send(body) as connection:
            status, answer = await connection.answer()
        try:
            error = json.loads(answer)["error"]
            right = status in statuses and error["code"] == status and bool(error["message"]) and bool(error["type"])
            return Came(f"{status} {error['message'].splitlines()[0][:60]}", right)
        except (ValueError, LookupError, TypeError):
            return Came(f"{status} {answer[:60]!r}", False)


@dataclass(frozen=True)
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def answer(self) -> tuple[int, bytes]:
        """Status and body, up to the end of the connection."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            return int(head.split()[1]), await self.reader.read()


# ---------------------------------------------------------------- the faults


async def leaves_stream(victim: Victim) -> Came:
    async with await victim.send(victim.body(max_tokens=LONG, stream=True)) as connection:
        for _ in range(5):
            await connection.reader.readuntil(b"\n\n")
    return Came("it was streaming, and we left", True)


async def leaves_waiting(victim: Victim) -> Came:
    async with await victim.send(victim.body(max_tokens=LONG)):
        await victim.until("a running request", lambda gauges: gauges["num_requests_running"] == 1)
    return Came("nothing yet, and we left", True)


async def leaves_queue(victim: Victim) -> Came:
    """More requests than run at once: some never had a step."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(40):
            await stack.enter_async_context(await victim.send(victim.body(max_tokens=LONG)))
        gauges = await victim.until("a queue", lambda gauges: gauges["num_requests_waiting"] > 0)
    return Came(f"{gauges['num_requests_waiting']:.0f} were waiting, and we left", True)


async def cancels_batch(victim: Victim) -> Came:
    tasks = [
        asyncio.create_task(
            victim.client.complete("import", model=victim.server.model, max_tokens=LONG, ignore_eos=True)
        )
        for _ in range(32)
    ]
    await victim.until("a running request", lambda gauges: gauges["num_requests_running"] > 0)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    cancelled = sum(isinstance(one, asyncio.CancelledError) for one in ended)
    return Came(f"{cancelled} of 32 cancelled", cancelled == 32)


async def crowd(victim: Victim) -> Came:
    async def one() -> bool:
        async with await victim.send(victim.body(max_tokens=4)) as connection:
            status, answer = await connection.answer()
            return status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 4

    ended = await asyncio.gather(*(one() for _ in range(500)), return_exceptions=True)
    answered = sum(one is True for one in ended)
    return Came(f"{answered} of 500 answered", answered == 500)


async def slow_loris(victim: Victim) -> Came:
    """Heads and bodies that never end; others must be served meanwhile."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            body, head = (
                victim.send(b'{"prompt": "', length=1000),
                victim.connect(b"POST /v1/completions HTTP/1.1\r\nHost"),
            )
            await stack.enter_async_context(await body)
            await stack.enter_async_context(await head)
        same = await victim.greedy() == victim.expected
    return Came("another was served meanwhile" if same else "another was answered differently", same)


async def killed_rank(victim: Victim) -> Came:
    """SIGKILL to a rank that is not the first. The stream that runs must end with an error, not just end."""
    async with await victim.send(victim.body(max_tokens=LONG, stream=True)) as connection:
        for _ in range(5):
            await connection.reader.readuntil(b"\n\n")
        worker(victim.server).kill()
        async with asyncio.timeout(PATIENCE_S):
            rest = await connection.reader.read()
    errors = re.findall(rb'"error": ?{"message": ?"([^"]*)', rest)
    what = errors[0].decode()[:60] if errors else "the stream was cut short"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and victim.server.child.process.poll() is None:
        with contextlib.suppress(RequestFailed):
            await victim.greedy()
            return Came(f"{what}; serves again", bool(errors))
        await asyncio.sleep(0.1)
    return Came(f"{what}; the server ended", bool(errors))


def worker(server: Server) -> psutil.Process:
    """The process of rank 1."""
    for process in server.child.tree():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("RANK") == "1" or "Worker_TP1" in process.name() + " ".join(process.cmdline()):
                return process
    raise script.UserError("there is no second rank to kill; start it with --tensor-parallel-size 2")


Fault = Callable[[Victim], Awaitable[Came]]
FAULTS: dict[str, Fault] = {
    "client leaves a stream": leaves_stream,
    "client leaves while its request runs": leaves_waiting,
    "40 clients leave, some in the queue": leaves_queue,
    "batch of 32 cancelled": cancels_batch,
    "malformed JSON": lambda victim: victim.refused(b'{"model": "x", "prompt": "never clo', 400),
    "max_tokens -1": lambda victim: victim.refused(victim.body(max_tokens=-1), 400),
    "unknown model": lambda victim: victim.refused(victim.body(model="no-such-model"), 404),
    "10 MiB prompt": lambda victim: victim.refused(victim.body(prompt="x = 1\n" * (10 * 2**20 // 6)), 400, 413),
    "500 connections at once": crowd,
    "100 requests that never end (slow loris)": slow_loris,
}


async def suffer(victim: Victim, name: str, fault: Fault) -> Json:
    """One fault, then what is left of it."""
    began = time.perf_counter()
    came = await fault(victim)
    row: Json = {"fault": name, "came_back": came.what, "right": came.right, "same": False, "left": None}
    with contextlib.suppress(RequestFailed, TimeoutError):
        row["same"] = await victim.greedy() == victim.expected
        row["left"] = await victim.until("an idle server", lambda gauges: not any(gauges.values()))
    row["seconds"] = time.perf_counter() - began
    left, same = "nothing" if row["left"] else "?", "yes" if row["same"] else "NO"
    print(f"{name:42} {'ok   ' if came.right else 'WRONG'} {came.what:74} {left:8} {same}", flush=True)
    return row


async def suffer_all(server: Server, faults: dict[str, Fault]) -> list[Json]:
    async with Victim(server) as victim:
        return [await suffer(victim, name, fault) for name, fault in faults.items()]


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--serve", type=engine_and_model, default=("ours", "nano"), help=HELP)
    parser.add_argument("--tensor-parallel-size", type=script.at_least(1), default=1, metavar="N")
    args = parser.parse_args(argv)
    engine, model = args.serve
    # float32: two tokens of random weights can be equally likely in bfloat16, and the batch then decides between them
    folder = folder_of(model, dtype="float32")
    run = script.start(__file__, args)
    faults = FAULTS | ({"kill -9 of a rank": killed_rank} if args.tensor_parallel_size > 1 else {})
    wanted = {"tensor-parallel-size": args.tensor_parallel_size, "max-num-seqs": 32, "max-num-batched-tokens": 512}
    with Server(folder, engine, wanted) as server:
        print(f"{'fault':42} {'':5} {'what came back':74} {'left':8} same", flush=True)
        rows = asyncio.run(suffer_all(server, faults))
    for row in rows:
        run.log(**row)
    result = {
        "engine": engine, "faults": len(rows), "right": sum(row["right"] for row in rows),
        "nothing_left": sum(row["left"] is not None for row in rows), "same_answer": sum(row["same"] for row in rows),
    }  # fmt: skip
    if engine == "ours" and not result["faults"] == result["right"] == result["nothing_left"] == result["same_answer"]:
        raise script.CheckFailed("a fault was not answered rightly, or left something behind", result)
    return result


if __name__ == "__main__":
    script.run(main)
