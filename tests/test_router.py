"""The router over HTTP: real sockets, workers that do what a test tells them to."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from ch06_vllm.client import Client, RequestFailed
from ch06_vllm.scrape import scrape
from ch06_vllm.servers import Server, models
from ch07_sglang_routing import router_chaos, router_load
from ch07_sglang_routing.router.client import Limits
from ch07_sglang_routing.router.policies import POLICIES
from ch07_sglang_routing.router.radix import RadixTree
from ch07_sglang_routing.router.router import Router
from ch07_sglang_routing.router.running import Routing
from common import process
from common.exercises import missing_for
from tests.openai_fake import Does, FakeServer

Json = dict[str, Any]
Handler = Callable[["Call"], Awaitable[None]]


def run(work: Coroutine[Any, Any, None], timeout_s: float = 60) -> None:
    failed: list[Json] = []  # exceptions in callbacks, which nobody would see

    async def limited() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        async with asyncio.timeout(timeout_s):
            await work

    uvloop.run(limited())
    assert not failed, failed


async def until(condition: Callable[[], object], what: str, timeout_s: float = 20) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"after {timeout_s} s still not: {what}") from None


class Call:
    """A request that came to a Backend: `head` and `body` as bytes. `left` is set when the other side closes."""

    def __init__(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.head, self.body, self.writer = head, body, writer
        self.left = asyncio.Event()

    @property
    def path(self) -> str:
        return self.head.split(b" ")[1].decode()

    def reset(self) -> None:
        self.writer.transport.abort()

    def say(self, status: int, body: bytes, more: bytes = b"") -> None:
        self.writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(body), more, body))

    def begin_stream(self) -> None:
        self.writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))


async def echo(call: Call) -> None:
    call.say(200, call.body or b"{}")


class Backend:
    """A worker in this event loop. Health checks are answered while `healthy`; the rest is the handler's."""

    def __init__(self, handler: Handler = echo) -> None:
        self.handler, self.healthy = handler, True
        self.calls: list[Call] = []
        self.connections = 0

    async def __aenter__(self) -> Backend:
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await until(lambda: not self._writers, "all handlers ended")  # else they are cancelled with the loop

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        tasks = []
        call = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.I)
                call = Call(head, await reader.readexactly(int(length[1])) if length else b"", writer)
                if call.path == "/health":
                    call.say(200 if self.healthy else 500, b"")
                    continue
                self.calls.append(call)
                tasks = [asyncio.create_task(self._handle(call))]
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            if call:
                call.left.set()
            for task in tasks:
                await asyncio.wait([task])
            self._writers.discard(writer)
            writer.close()

    async def _handle(self, call: Call) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # uvloop's word for a connection that is gone
            await self.handler(call)


@contextlib.asynccontextmanager
async def routed(*urls: str, policy: str = "joint", roles: tuple[str, ...] = (), **options: Any) -> AsyncIterator[Any]:
    """A router in this loop before these workers, when all of them are up. `.url` is where it answers."""
    router = Router(POLICIES[policy](), **{"health_s": 0.05, "seed": 0} | options)
    for url, role in zip(urls, roles or ["any"] * len(urls), strict=True):
        router.fleet.add(url, role, 8998 if role == "prefill" else None)
    router.port = await router.listen(host="127.0.0.1", port=0)
    router.url = f"http://127.0.0.1:{router.port}"
    try:
        await until(lambda: all(worker.healthy for worker in router.fleet.workers.values()), "all workers up")
        yield router
        await until(lambda: in_flight(router) == (0, 0), "in flight back to zero")
    finally:
        await router.stop()


@contextlib.asynccontextmanager
async def stalled(size: int, requests: int) -> AsyncIterator[tuple[Backend, Any, asyncio.StreamReader, Any]]:
    """Somebody has asked a worker for answers of `size` bytes, so many times at once, and reads nothing: worker,
    router, reader, writer."""

    async def large(call: Call) -> None:
        call.say(200, bytes(size))

    async with Backend(large) as worker, routed(worker.url) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=2**16)
        writer.transport.pause_reading()
        writer.write(post(ASKED) * requests)
        await until(lambda: any(client._stalled for client in router.clients), "a stalled client")
        yield worker, router, reader, writer


def in_flight(router: Router) -> tuple[int, int]:
    workers = router.fleet.workers.values()
    return sum(worker.in_flight for worker in workers), sum(worker.pending_tokens for worker in workers)


async def raw(router: Any, data: bytes) -> tuple[int, bytes]:
    """Send these bytes; the status and body of the answer, after which the router closes or the client does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(data)
    try:
        return await answer(reader)
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length, head
    return int(head.split(b" ")[1]), await reader.readexactly(int(length[1]))


def post(body: bytes, *fields: str, path: str = "/v1/completions") -> bytes:
    head = "".join(f"{field}\r\n" for field in ("Host: x", *fields, f"Content-Length: {len(body)}"))
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


ASKED = b'{"model": "fake", "prompt": "Once upon a time", "max_tokens": 4}'


# ---------------------------------------------------------------- passing on


def test_bytes_go_through_as_they_are_and_nothing_of_the_connection_does() -> None:
    body = b'{ "prompt":  "caf\\u00e9", "x": 1e400, "a": [1,2 ,3] }'

    async def test() -> None:
        async with Backend() as worker, routed(worker.url) as router:
            said = await raw(router, post(body, "X-Own: 1", "Connection: close, x-hop", "X-Hop: 2", "TE: trailers"))
            assert said == (200, body)
            (call,) = worker.calls
            fields = call.head.lower().split(b"\r\n")
            assert b"x-own: 1" in fields
            assert not [field for field in fields if field.startswith((b"connection", b"x-hop", b"te:"))]

    run(test())


def test_a_chunked_request_reaches_the_worker_with_a_length() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url) as router:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert await raw(router, head + b'5;x=y\r\n{"a":\r\n2\r\n1}\r\n0\r\nT: 1\r\n\r\n') == (200, b'{"a":1}')
            assert b"content-length: 7" in worker.calls[0].head
            assert b"transfer-encoding" not in worker.calls[0].head.lower()

    run(test())


def test_requests_that_come_in_pieces_or_several_at_once_are_answered_in_order() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url) as router:
            bodies = [b'{"n": %d}' % number for number in range(5)]
            sent = b"".join(post(body) for body in bodies)
            for step in (1, 7, len(sent)):
                reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
                for at in range(0, len(sent), step):
                    writer.write(sent[at : at + step])
                    await asyncio.sleep(0)
                assert [await answer(reader) for _ in bodies] == [(200, body) for body in bodies]
                writer.close()
            assert worker.calls[0].writer is worker.calls[-1].writer  # one connection to the worker for all

    run(test())


def test_a_stream_is_passed_on_chunk_by_chunk() -> None:
    go = asyncio.Event()

    async def stream(call: Call) -> None:
        call.begin_stream()
        call.chunk(b"data: 1\n\n")
        await go.wait()
        call.chunk(b"data: 2\n\n")
        call.chunk(b"")  # the last

    async def test() -> None:
        async with Backend(stream) as worker, routed(worker.url) as router, aiohttp.ClientSession() as session:
            response = await session.post(f"{router.url}/v1/completions", data=ASKED)
            assert await response.content.readany() == b"data: 1\n\n"  # while the worker waits
            (known,) = router.fleet.workers.values()
            assert (known.in_flight, known.pending_tokens) == (1, 0)  # its prompt is computed
            assert response.headers["x-router-worker"] == known.name
            go.set()
            assert await response.content.read() == b"data: 2\n\n"

    run(test())


def test_an_answer_that_ends_with_its_connection_and_one_without_a_body() -> None:
    async def handler(call: Call) -> None:
        if call.head.startswith(b"HEAD"):
            call.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        elif call.path == "/v1/nothing":
            call.writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        else:
            call.writer.write(b"HTTP/1.1 200 OK\r\n\r\nto the end")
            call.writer.close()

    async def test() -> None:
        async with Backend(handler) as worker, routed(worker.url) as router, aiohttp.ClientSession() as session:
            for _ in range(2):
                async with session.post(f"{router.url}/v1/x", data=b"1") as response:
                    assert await response.read() == b"to the end"
                async with session.post(f"{router.url}/v1/nothing", data=b"1") as response:
                    assert (response.status, await response.read()) == (204, b"")
                async with session.head(f"{router.url}/v1/x") as response:
                    assert (response.headers["content-length"], await response.read()) == ("5", b"")

    run(test())


def test_the_engines_own_client_streams_through_it() -> None:
    async def test(url: str) -> None:
        async with routed(url, health_path="/v1/models") as router, Client(router.url) as client:
            told = await client.complete("p", model="fake", max_tokens=6)
            assert (told.text, told.completion_tokens, told.attempts) == ("ab ç\na", 6, 1)
            assert await client.models() == ["fake"]

    with FakeServer() as worker:
        run(test(worker.url))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 3\r\n\r\nabc"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length : 3\r\n\r\nabc"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nX: 1\r\n folded\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nX: a\nContent-Length: 3\r\n\r\nabc"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
        (501, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
        (501, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n"),
        (400, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n"),
        (400, b"POST http://x/v1/c HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, b"\x16\x03\x01\x00\xa5\r\n\r\n"),
        (505, b"GET /v1/models HTTP/1.0\r\n\r\n"),
        (413, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n"),
        (413, b"POST /v1/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"a" * 2000),
        (431, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"),
        (404, b"POST /flush_cache HTTP/1.1\r\nHost: x\r\n\r\n"),
        (404, b"POST /v1/../flush_cache HTTP/1.1\r\nHost: x\r\n\r\n"),
        (404, b"POST /v1/%2e./flush_cache HTTP/1.1\r\nHost: x\r\n\r\n"),
        (404, b"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"),
        (404, b"POST /v1/unload%5flora_adapter HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"),
        (404, b"POST /generate_secret HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_reaches_no_worker(status: int, request_bytes: bytes) -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url, limits=Limits(body_bytes=1000)) as router:
            said, body = await raw(router, request_bytes)
            assert said == status
            assert json.loads(body)["error"]["code"] == status
            assert worker.calls == []

    run(test())


def test_a_client_that_sends_its_request_forever_is_told_to_stop() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url, limits=Limits(request_s=0.1)) as router:
            said, _ = await raw(router, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
            assert said == 408
            said, _ = await raw(router, post(ASKED)[:-2])
            assert said == 408
        async with routed(limits=Limits(keep_alive_s=0.1)) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            assert await reader.read() == b""  # one that says nothing is only closed
            writer.close()
            await until(lambda: not router.clients, "no connection left")

    run(test())


# ---------------------------------------------------------------- workers that fail


def test_failures_before_the_first_byte_are_tried_again_elsewhere() -> None:
    async def test(first: FakeServer, second: FakeServer) -> None:
        urls = (first.url, second.url)
        async with (
            routed(*urls, policy="round_robin", health_path="/v1/models") as router,
            Client(router.url) as client,
        ):
            for does in (Does(status=503), Does(drop=True), Does(status=429)):
                first.script.append(does)  # round robin: each goes to the first, then to the second
                told = await client.complete("p", model="fake", max_tokens=2)
                assert (told.text, told.attempts) == ("ab ", 1)  # the client saw nothing of it
            assert [len(first.seen), len(second.seen)] == [3, 3]
            assert dict(router.metrics.retries) == {"503": 1, "worker_lost": 1, "429": 1}

    with FakeServer() as first, FakeServer() as second:
        run(test(first, second))


def test_an_error_of_the_engine_itself_is_passed_on_and_not_tried_again() -> None:
    async def test() -> None:
        async def fail(call: Call) -> None:
            call.say(500 if b"five" in call.body else 400, b'{"error": {}}')

        async with Backend(fail) as worker, routed(worker.url) as router:
            assert await raw(router, post(b'{"prompt": "four"}')) == (400, b'{"error": {}}')
            assert await raw(router, post(b'{"prompt": "five"}')) == (500, b'{"error": {}}')
            assert len(worker.calls) == 2

    run(test())


def test_who_dies_in_the_middle_of_an_answer_is_not_tried_again_and_the_client_is_told() -> None:
    async def test(first: FakeServer, second: FakeServer) -> None:
        first.script.append(Does(after_tokens=2))
        async with routed(first.url, second.url, policy="round_robin", health_path="/v1/models") as router:
            async with aiohttp.ClientSession() as session:
                body = {"model": "fake", "prompt": "p", "max_tokens": 4, "stream": True}
                read = b""
                with pytest.raises(aiohttp.ClientPayloadError):  # no last chunk: it is not complete
                    async with session.post(f"{router.url}/v1/completions", json=body) as response:
                        async for data in response.content.iter_any():
                            read += data
                events = [json.loads(line[6:]) for line in read.decode().splitlines() if line.startswith("data: ")]
                assert [event["choices"][0]["text"] for event in events[:2]] == ["a", "b "]
                assert "in the middle of the answer" in events[2]["error"]["message"]
            assert (len(first.seen), len(second.seen)) == (1, 0)
            assert router.metrics.broken["worker_lost"] == 1
            first.script.append(Does(after_tokens=2))
            async with Client(router.url) as client:
                with pytest.raises(RequestFailed):
                    for _ in range(2):  # the second goes to the first worker again
                        await client.complete("p", model="fake", max_tokens=4)
            first.script.append(Does(after_tokens=2))
            async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="-", max_retries=0) as theirs:
                texts = []
                with pytest.raises(openai.APIError, match="in the middle of the answer"):
                    for _ in range(2):
                        options = {"model": "fake", "prompt": "p", "max_tokens": 4, "stream": True}
                        async for chunk in await theirs.completions.create(**options):
                            texts += [choice.text for choice in chunk.choices]
                assert texts[-2:] == ["a", "b "]

    with FakeServer() as first, FakeServer() as second:
        run(test(first, second))


def test_when_nobody_can_answer_the_error_says_so_in_openais_shape() -> None:
    async def test() -> None:
        async def never(call: Call) -> None:
            await call.left.wait()

        limits = Limits(first_byte_s=0.2, backoff_s=0.001)
        async with Backend(never) as worker, routed(worker.url, limits=limits) as router:
            said, body = await raw(router, post(ASKED))
            assert (said, json.loads(body)["error"]["type"]) == (504, "timeout_error")
            await asyncio.wait_for(worker.calls[0].left.wait(), 10)  # and the worker need not go on
            worker.handler = lambda call: asyncio.sleep(0, call.reset())
            said, body = await raw(router, post(ASKED))
            assert said == 502
            assert "after 4 attempts" in json.loads(body)["error"]["message"]
        async with routed(limits=limits) as router:
            said, body = await raw(router, post(ASKED))
            assert said == 503
            assert "no worker is up" in json.loads(body)["error"]["message"]
            assert (await raw(router, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 503

    run(test())


def test_a_kept_connection_that_the_worker_has_closed_is_no_failure() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url, limits=Limits(retries=0)) as router:
            for number in range(20):
                assert (await raw(router, post(ASKED)))[0] == 200
                if number % 2:
                    worker.calls[-1].reset()  # now, or when the next request is under way
            (known,) = router.fleet.workers.values()
            assert known.breaker.failures == 0

    run(test())


def test_health_takes_a_worker_out_and_back_in_and_its_cache_is_forgotten() -> None:
    async def test() -> None:
        async with Backend() as first, Backend() as second, routed(first.url, second.url) as router:
            known = next(iter(router.fleet.workers.values()))
            first.healthy = False
            await until(lambda: known.healthy is False, "the first worker down")
            before = len(first.calls)
            for _ in range(10):
                assert (await raw(router, post(ASKED)))[0] == 200
            assert len(first.calls) == before
            assert router.policy.tree.match("Once upon a time") == {f"127.0.0.1:{second.port}": 16}
            first.healthy = True
            await until(lambda: known.healthy, "the first worker up")
            for number in range(10):
                await raw(router, post(b'{"prompt": "%d"}' % number))
            assert len(first.calls) > before

    run(test())


def test_a_worker_that_only_fails_is_left_alone_by_its_breaker() -> None:
    async def test() -> None:
        async def refuse(call: Call) -> None:
            call.say(503, b"{}")

        options = {"policy": "round_robin", "base_s": 1000, "cap_s": 1000, "limits": Limits(backoff_s=0.001)}
        async with Backend(refuse) as bad, Backend() as good, routed(bad.url, good.url, **options) as router:
            for _ in range(40):
                assert (await raw(router, post(ASKED)))[0] == 200
            assert len(bad.calls) == 5  # the breaker's threshold
            assert len(good.calls) == 40
            states = {worker["name"]: worker["breaker"] for worker in json.loads((await raw(
                router, b"GET /workers HTTP/1.1\r\nHost: x\r\n\r\n"))[1])["workers"]}  # fmt: skip
            assert states == {f"127.0.0.1:{bad.port}": "open", f"127.0.0.1:{good.port}": "closed"}

    run(test())


# ---------------------------------------------------------------- clients that fail


def test_a_client_that_leaves_ends_the_work_at_the_worker() -> None:
    async def stream(call: Call) -> None:
        call.begin_stream()
        call.chunk(b"data: 1\n\n")
        await call.left.wait()

    async def test() -> None:
        async with Backend(stream) as worker, routed(worker.url) as router:
            for read_first in (True, False):
                reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
                writer.write(post(ASKED))
                await until(lambda: in_flight(router)[0] == 1, "a request in flight")
                if read_first:
                    await reader.readuntil(b"data: 1")
                else:
                    await until(lambda: len(worker.calls) == 2, "the request at the worker")
                writer.close()
                await asyncio.wait_for(worker.calls[-1].left.wait(), 10)
                await until(lambda: in_flight(router) == (0, 0), "nothing in flight")
            assert router.metrics.broken["client_left"] == 2

    run(test())


def test_a_client_that_does_not_read_holds_up_the_worker_and_not_memory() -> None:
    total = 64 * 2**20

    async def flood(call: Call) -> None:
        call.writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(total // 2**16):
            call.writer.write(bytes(2**16))
            await call.writer.drain()

    async def test() -> None:
        async with Backend(flood) as worker, routed(worker.url, limits=Limits(stall_s=0.5)) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.transport.pause_reading()
            writer.write(post(ASKED))
            await until(lambda: any(client._stalled for client in router.clients), "a stalled client")
            (client,) = router.clients
            assert client.transport.get_write_buffer_size() < 2 * 2**20
            await until(lambda: in_flight(router) == (0, 0), "the limit for one that does not read")
            assert client not in router.clients
            await asyncio.wait_for(worker.calls[0].left.wait(), 10)
            # one that is slow, but reads, gets all of it
            async with aiohttp.ClientSession() as session, session.post(f"{router.url}/v1/x", data=b"1") as response:
                got = 0
                async for data in response.content.iter_chunked(2**20):
                    got += len(data)
                    await asyncio.sleep(0)
                assert got == total
            del reader

    run(test())


def test_who_does_not_read_leaves_the_connection_to_the_worker_as_it_was() -> None:
    """Answers that come in one piece: the last of them stops the reading, and its connection goes back for others."""
    size = 200_000

    async def test() -> None:
        async with stalled(size, requests=100) as (worker, router, reader, writer):
            await until(lambda: in_flight(router) == (0, 0) or len(worker.calls) > 90, "no request begun for it")
            (client,) = router.clients
            assert client.transport.get_write_buffer_size() < 2**20
            assert len(worker.calls) < 90
            for _ in range(3):
                assert (await raw(router, post(ASKED))) == (200, bytes(size))
            writer.transport.resume_reading()  # and it goes on where it was
            for _ in range(100):
                assert await answer(reader) == (200, bytes(size))
            writer.close()

    run(test())


@pytest.mark.parametrize(
    ("roles", "number_of_requests"),
    [(("any",) * 3, 10_000), (("prefill", "prefill", "decode", "decode"), 3000)],
    ids=["ten_thousand", "pairs"],
)
def test_in_flight_is_zero_after_requests_of_which_most_go_wrong(
    roles: tuple[str, ...], number_of_requests: int
) -> None:
    stalled: list[asyncio.StreamWriter] = []

    async def chaotic(call: Call) -> None:
        number = int(re.search(rb"\d+", call.body)[0])
        match number % 8:
            case 0 | 1:
                call.say(200, b"{}")
            case 2:
                call.say((500, 503, 429)[number % 3], b"{}")
            case 3:
                call.reset()
            case 4:  # dies in the middle
                call.begin_stream()
                call.chunk(b"data: 1\n\n")
                await asyncio.sleep(0)
                call.reset()
            case 5:
                call.begin_stream()
                for _ in range(3):
                    call.chunk(b"data: 1\n\n" * 10)
                    await asyncio.sleep(0)
                call.chunk(b"")
            case 6:
                call.writer.write(b"HTTP/1.1 nonsense\r\n\r\n")
            case 7:  # answers when its client has left, if ever
                await asyncio.sleep(0.01)
                call.say(200, b"{}" + bytes(100_000 if number % 3 else 0))

    async def ask(router: Any, number: int, rng: random.Random) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        try:
            request = post(b'{"prompt": "%d", "max_tokens": 3}' % number)
            if rng.random() < 0.05:
                writer.write(request[: rng.randrange(len(request))])  # leaves in the middle of its request
                return "left"
            writer.write(request)
            if rng.random() < 0.25:  # leaves at some moment
                for _ in range(rng.randrange(20)):
                    await asyncio.sleep(0)
                return "left"
            if rng.random() < 0.01 and len(stalled) < 50:  # reads nothing, and does not leave either
                writer.transport.pause_reading()
                stalled.append(writer)
                return "stalled"
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if length:
                await reader.readexactly(int(length[1]))
            else:
                await reader.readuntil(b"0\r\n\r\n")
            return head.split(b" ")[1].decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return "broken"
        finally:
            if writer not in stalled:
                writer.transport.abort() if rng.random() < 0.5 else writer.close()

    async def test() -> None:
        rng, outcomes, numbers = random.Random(0), dict[str, int](), iter(range(number_of_requests))
        gone: list[Any] = []

        async def churn(router: Any) -> None:
            """One worker after the other is drained, hardly waited for, and added again."""
            names = itertools.cycle(list(router.fleet.workers))
            while sum(outcomes.values()) < number_of_requests - 64:
                worker = router.fleet.workers[name := next(names)]
                router.fleet.drain(worker, 0.02)
                await until(lambda: name not in router.fleet.workers, "the worker gone")
                gone.append(worker)
                router.fleet.add(name, worker.role, worker.bootstrap_port)
                await until(lambda name=name: router.fleet.workers[name].healthy, "the worker back")

        async def client(router: Any) -> None:
            for number in numbers:
                outcome = await ask(router, number, rng)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1

        limits = Limits(retries=2, backoff_s=0.001, backoff_cap_s=0.002)
        async with contextlib.AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(Backend(chaotic)) for _ in roles]
            options = {"limits": limits, "threshold": 20, "base_s": 0.01, "cap_s": 0.02}
            urls = [worker.url for worker in workers]
            router = await stack.enter_async_context(routed(*urls, roles=roles, **options))
            await asyncio.gather(churn(router), *(client(router) for _ in range(64)))
            assert stalled
            for writer in stalled:
                writer.transport.abort()
            await until(lambda: in_flight(router) == (0, 0), "nothing in flight")
            await until(lambda: not router.clients, "no client left")
            assert len(gone) > 5
            for worker in (*router.fleet.workers.values(), *gone):
                assert worker.in_flight == worker.pending_tokens == 0
            assert sum(outcomes.values()) == number_of_requests
            assert {"200", "502", "left", "broken"} <= set(outcomes), outcomes
            assert outcomes["200"] > number_of_requests / 10
            broken = router.metrics.broken
            assert broken["client_left"] > number_of_requests / 20
            assert broken["worker_lost"] > number_of_requests / 20

    run(test(), timeout_s=120)


# ---------------------------------------------------------------- workers that come and go


def test_workers_are_added_and_drained_while_it_runs() -> None:
    go = asyncio.Event()

    async def wait(call: Call) -> None:
        await go.wait()
        call.say(200, b'"waited"')

    async def test() -> None:
        async with (
            Backend(wait) as old,
            Backend() as new,
            routed(old.url) as router,
            aiohttp.ClientSession() as session,
        ):
            waiting = asyncio.create_task(raw(router, post(ASKED)))
            await until(lambda: old.calls, "the request at the worker")
            async with session.post(f"{router.url}/workers", json={"url": new.url}) as response:
                assert response.status == 200
            async with session.post(f"{router.url}/workers", json={"url": new.url}) as response:
                assert response.status == 400
                assert "already" in await response.text()
            name = f"127.0.0.1:{old.port}"
            async with session.delete(f"{router.url}/workers/{name}") as response:
                assert (response.status, (await response.json())["state"]) == (202, "draining")
            await until(lambda: router.fleet.workers[f"127.0.0.1:{new.port}"].healthy, "the new one up")
            for _ in range(5):
                assert await raw(router, post(ASKED)) == (200, ASKED)
            assert len(old.calls) == 1
            assert name in router.fleet.workers  # it has a request still
            go.set()
            assert await waiting == (200, b'"waited"')
            await until(lambda: name not in router.fleet.workers, "the old one gone")
            async with session.delete(f"{router.url}/workers/{name}") as response:
                assert response.status == 404

    run(test())


def test_only_who_may_can_change_the_workers() -> None:
    async def test() -> None:
        body = b'{"url": "http://127.0.0.1:9"}'
        async with Backend() as worker, routed(worker.url, admin_key="secret") as router:
            add = {"path": "/workers"}
            json_type = "Content-Type: application/json"
            assert (await raw(router, post(body, json_type, **add)))[0] == 403
            assert (await raw(router, post(body, json_type, "Authorization: Bearer secre", **add)))[0] == 403
            assert (await raw(router, post(body, "Authorization: Bearer secret", **add)))[0] == 400  # as a form could
            assert (await raw(router, post(b"{", json_type, "Authorization: Bearer secret", **add)))[0] == 400
            assert list(router.fleet.workers) == [f"127.0.0.1:{worker.port}"]
            assert (await raw(router, post(body, json_type, "Authorization: Bearer secret", **add)))[0] == 200
            assert "127.0.0.1:9" in router.fleet.workers

    run(test())


def test_prefill_and_decode_workers_get_the_same_request_and_one_room() -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            prefill, decode = [await stack.enter_async_context(Backend()) for _ in range(2)]
            roles = ("prefill", "decode")
            async with routed(prefill.url, decode.url, roles=roles) as router:
                for body, batch in ((ASKED, None), (b'{"prompt": ["a", "b"]}', 2)):
                    status, said = await raw(router, post(body))
                    first, second = prefill.calls[-1].body, decode.calls[-1].body
                    assert (status, said) == (200, second)
                    assert first == second
                    told = json.loads(second)
                    assert {**told, **json.loads(body)} == told  # all that was asked is still there
                    room = told["bootstrap_room"]
                    if batch:
                        assert told["bootstrap_host"] == ["127.0.0.1"] * 2
                        assert len(set(room)) == 2
                    else:
                        assert (told["bootstrap_host"], told["bootstrap_port"]) == ("127.0.0.1", 8998)
                        assert 0 <= room < 2**63
                await until(lambda: in_flight(router) == (0, 0), "both released")
                # a prefill worker that fails ends the pair's attempt; the decode worker hears of it
                prefill.handler = lambda call: asyncio.sleep(0, call.say(500, b"{}"))

                async def never(call: Call) -> None:
                    await call.left.wait()

                decode.handler = never
                status, said = await raw(router, post(ASKED))
                assert status == 502
                assert "prefill" in json.loads(said)["error"]["message"]
                await asyncio.wait_for(decode.calls[-1].left.wait(), 10)
                assert (await raw(router, post(b"[]")))[0] == 400

    run(test())


# ---------------------------------------------------------------- metrics, memory, the program


def test_metrics_are_prometheus_text_and_ask_nobody() -> None:
    async def test() -> None:
        async def never(call: Call) -> None:
            await call.left.wait()

        async with Backend() as worker, routed(worker.url) as router:
            long = json.dumps({"prompt": "0123456789" * 10}).encode()
            for _ in range(3):
                await raw(router, post(long))
            router.metrics.prompt_tokens += 12_345_678
            worker.handler = never
            hanging = asyncio.create_task(raw(router, post(b'{"prompt": "another one, longer"}')))
            await until(lambda: in_flight(router)[0] == 1, "a request that hangs")
            status, text = await raw(router, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            families = {family.name: family for family in text_string_to_metric_families(text.decode())}
            assert status == 200
            assert all(name.startswith("router_") for name in families)
            name = f"127.0.0.1:{worker.port}"
            values = {sample.name: sample.value for family in families.values() for sample in family.samples
                      if sample.labels.get("worker", name) == name and "le" not in sample.labels}  # fmt: skip
            assert values["router_requests_total"] == 3
            assert values["router_in_flight"] == 1
            assert values["router_pending_tokens"] == 4
            assert values["router_matched_tokens_total"] == 2 * 16  # twice again: of 100 characters one whole block
            assert values["router_prompt_tokens_total"] == 12_345_678 + 3 * 25  # to the last digit; one has no answer
            assert values["router_request_seconds_count"] == 3
            hanging.cancel()

    run(test())


def test_memory_is_flat_over_unique_prompts_through_the_router() -> None:
    """The tree's own million is in test_router_policies; here is all else that a request leaves behind."""

    async def test() -> None:
        async with Backend() as worker, routed(worker.url) as router:
            router.policy.tree = RadixTree(2**14)
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)

            async def blocks(numbers: range) -> int:
                for number in numbers:
                    writer.write(post(b'{"prompt": "%08x and what of it?"}' % (number * 2654435761 % 2**32)))
                    assert (await answer(reader))[0] == 200
                    worker.calls.clear()
                gc.collect()
                return sys.getallocatedblocks()

            full = await blocks(range(2000))
            assert await blocks(range(2000, 8000)) < full + 500
            assert router.policy.tree.size <= 2**14
            writer.close()

    run(test())


def test_the_program_counts_what_a_load_test_sent() -> None:
    with router_load.fake_engines(2) as urls, Routing(urls) as routing:
        seen = asyncio.run(router_load.with_python(routing.url, router_load.prompt_body(100), 8, 0.3))
        assert seen["failed"] == 0
        assert seen["requests_per_s"] > 0
        end = time.monotonic() + 20  # it hears of clients that have left a moment later
        known = routing.known()
        while any(worker["in_flight"] for worker in known):
            assert time.monotonic() < end, known
            known = routing.known()
        assert all(worker["answered"] > 0 for worker in known)
        told = routing.stop()
    assert told["requests"] >= sum(worker["answered"] for worker in known)
    assert told["in_flight"] == 0


def test_the_program_says_what_is_wrong_in_one_line() -> None:
    start = "python -m ch07_sglang_routing.router --port 20000"
    for words, said in (
        ("--worker https://x", "give it as http://HOST:PORT"),
        ("--worker http://x:99999999", "give it as http://HOST:PORT"),
        ("--worker x:1 --worker http://x:1", "already"),
        ("--prefill x:1", "--prefill and --decode"),
        ("--policy random", "is no policy"),
        ("--worker http://x:0", "give it as http://HOST:PORT"),
        ("--worker x:1 --prefill x:2 --decode x:3", "one or the other"),
        ("--host 203.0.113.7", "cannot be taken"),
    ):
        done = process.run(f"{start} {words}", timeout_s=60)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- real engines


def test_a_client_that_leaves_ends_the_work_of_a_real_engine(request: pytest.FixtureRequest) -> None:
    if missing := missing_for("vllm"):
        pytest.skip(missing)
    engine = request.getfixturevalue("vllm_server")

    def running() -> float:
        return scrape(engine.url).values["vllm:num_requests_running"]

    async def test() -> None:
        body = {"model": engine.model, "prompt": "A story: ", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        async with routed(engine.url) as router, aiohttp.ClientSession() as session:
            response = await session.post(f"{router.url}/v1/completions", json=body)
            await response.content.readany()
            assert await asyncio.to_thread(running) == 1
            response.close()
            await until(lambda: in_flight(router) == (0, 0), "nothing in flight")
            async with asyncio.timeout(30):
                while await asyncio.to_thread(running):
                    pass
            assert router.metrics.broken["client_left"] == 1

    run(test())


REAL = [engine for engine in ("vllm", "sglang") if not missing_for(engine)]


@pytest.fixture(scope="module", params=REAL or ["ours"])
def survivor(served_model: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Real vLLM, and real SGLang; an engine of ours for who has neither."""
    if REAL:
        yield request.getfixturevalue(f"{request.param}_server")
        return
    with Server(served_model, "ours", router_chaos.OPTIONS) as server:
        yield server


def test_a_trace_is_answered_whole_while_one_engine_is_killed_and_another_added(
    served_model: Path, survivor: Server
) -> None:
    with contextlib.ExitStack() as stack:
        victim, added = (
            stack.enter_context(Server(served_model, "ours", router_chaos.OPTIONS)) for _ in range(2)
        )  # fmt: skip
        day = router_chaos.run_day([victim, survivor], added, requests=200, streams=4)
        assert day["wrong"] == []
        assert day["answered"] == 200
        assert day["in_flight"] == 0
        assert day["added_answered"] > 0
        assert day["retries"] > 0
        # Streams in turn to the two: those on the victim are cut, and the client is told so.
        assert day["streams"] == {"whole": 2, "cut: the client is told": 2}
        assert victim.child.process.returncode == -9
        assert models(added.url) == [added.model]
