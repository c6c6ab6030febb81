"""The engines behind the router: connections kept open to them, what is in flight there, whether they are well.

Everything here runs in one event loop: nothing is locked, and what one callback does nobody sees half done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

from ch07_sglang_routing.router.breaker import Breaker
from ch07_sglang_routing.router.http1 import MAX_HEAD, BadMessage, Chunked, Head, answer_head
from common.script import UserError

log = logging.getLogger("router")
IDLE_S = 4.0  # a connection that nobody used for so long is closed: uvicorn does it after 5, just when we send
HEALTH_S = 5.0  # to answer a health check in: an engine in the middle of a long prefill step is slow, not ill
ROLES = ("any", "prefill", "decode")
Json = dict[str, Any]


class Reader(Protocol):
    """Who waits for an answer on a connection."""

    def answered(self, head: Head, body: bytes) -> None:
        """The head came, and this of the body."""

    def more(self, data: bytes) -> None:
        """More of the body, framed as it came."""

    def ended(self) -> None:
        """The answer is whole. The connection is no longer the reader's."""

    def broken(self, why: str) -> None:
        """The connection was lost, or what came is no answer."""


class Connection(asyncio.Protocol):
    """One to a worker; one request at a time."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.used = False  # before this request
        self.idle_since = 0.0
        self._reader: Reader | None = None
        self._buffer = b""
        self.head: Head | None = None
        self.chunked: Chunked | None = None
        self._left: int | None = None  # bytes of the body; None: until it is closed

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self.worker.connections.add(self)

    def send(self, reader: Reader, method: bytes, data: bytes) -> None:
        self._reader, self._method = reader, method
        self.head, self._buffer = None, b""
        self.transport.write(data)

    def drop(self) -> None:
        """Close it; the engine sees its client leave and stops computing. The reader hears nothing more."""
        self._reader = None
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            self.transport.abort()  # it speaks unasked, as some do before they close
            return
        try:
            if self.head is None:
                data = self._buffer + data if self._buffer else data
                while self.head is None:
                    end = data.find(b"\r\n\r\n")
                    if end < 0 or end > MAX_HEAD:
                        if len(data) > MAX_HEAD:
                            raise BadMessage(502, "the head of the worker's answer is too long")
                        self._buffer = data
                        return
                    head = answer_head(data[:end], self._method)
                    data = data[end + 4 :]
                    if head.status >= 200:  # others only announce it
                        self.head = head
                self._left = head.length
                self.chunked = Chunked() if head.chunked else None
                ended, extra = self._follow(data)
                reader.answered(head, data)
            else:
                ended, extra = self._follow(data)
                reader.more(data)
            if extra and self._reader is reader:
                raise BadMessage(502, "the worker sends more than its answer")
        except BadMessage as error:
            self.drop()
            reader.broken(str(error))
            return
        if ended and self._reader is reader:  # it may have left meanwhile
            self._finish()

    def _follow(self, data: bytes) -> tuple[bool, bool]:
        """Whether the answer ends with this, and whether more comes after its end."""
        if self.chunked:
            end = self.chunked.feed(data)
            return self.chunked.done, end < len(data)
        if self._left is None:
            return False, False
        self._left -= len(data)
        return self._left <= 0, self._left < 0

    def _finish(self) -> None:
        reader, self._reader = self._reader, None
        assert self.head
        if self.head.close:
            self.transport.close()
        else:
            self.used = True
            self.worker.put_back(self)
        assert reader
        reader.ended()

    def connection_lost(self, error: Exception | None) -> None:
        self.worker.lost(self)
        reader = self._reader
        if reader is None:
            return
        if self.head is not None and self._left is None and self.chunked is None and error is None:
            self._finish()  # closing it was the end of the body
            return
        self._reader = None
        reader.broken("the connection to the worker was lost")


def address(url: str) -> tuple[str, int, str]:
    """Host, port, and the worker's name: HOST:PORT. Raises UserError."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
    except ValueError:
        raise UserError(f"{url!r} is no worker's address; give it as http://HOST:PORT") from None
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise UserError(f"{url!r} is no worker's address; give it as http://HOST:PORT")
    return parts.hostname, port, f"[{parts.hostname}]:{port}" if ":" in parts.hostname else f"{parts.hostname}:{port}"


class Worker:
    """One engine. in_flight and pending_tokens are what the policies read; only a Lease changes them."""

    def __init__(self, url: str, role: str = "any", bootstrap_port: int | None = None, **breaker: Any) -> None:
        self.host, self.port, self.name = address(url)
        if role not in ROLES:
            raise UserError(f"{role!r} is no role of a worker; take one of {', '.join(ROLES)}")
        self.role, self.bootstrap_port = role, bootstrap_port
        self.in_flight = self.pending_tokens = 0
        self.healthy: bool | None = None  # None: not asked yet
        self.draining = False
        self.breaker = Breaker(asyncio.get_running_loop().time, **breaker)
        self.connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self.answers: dict[int, int] = {}  # status -> how many
        self.failures = 0

    def take(self) -> Connection | None:
        """A connection that is open already, the one that was used last."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self), self.host, self.port)
        return connection

    def put_back(self, connection: Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        self.connections.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close_idle(self, now: float) -> None:
        """Close what has not been used for a while. The list is in that order."""
        for connection in itertools.takewhile(lambda known: known.idle_since < now - IDLE_S, list(self._idle)):
            connection.drop()

    def close(self) -> None:
        for connection in list(self.connections):
            connection.transport.abort()

    def describe(self) -> Json:
        state = "draining" if self.draining else {None: "starting", True: "up", False: "down"}[self.healthy]
        return {"name": self.name, "role": self.role, "state": state, "breaker": self.breaker.state,
                "in_flight": self.in_flight, "pending_tokens": self.pending_tokens}  # fmt: skip


class Lease:
    """One request's share of a worker's load: taken when made, given back once, however often it is released."""

    __slots__ = ("_released", "_tokens", "_worker")

    def __init__(self, worker: Worker, tokens: int) -> None:
        self._worker, self._tokens, self._released = worker, tokens, False
        worker.in_flight += 1
        worker.pending_tokens += tokens

    def first_token(self) -> None:
        """Its prompt is computed."""
        self._worker.pending_tokens -= self._tokens
        self._tokens = 0

    def release(self) -> None:
        if not self._released:
            self._released = True
            self.first_token()
            self._worker.in_flight -= 1


class Fleet:
    """The workers by name, and the tasks that look after them.

    gone: called with a worker's name when its cache is lost: it left, or no longer answers.
    """

    def __init__(self, gone: Callable[[str], None], *, health_path: str, interval_s: float, **breaker: Any) -> None:
        self.workers: dict[str, Worker] = {}
        self.disaggregated = False  # whether there are workers for prefill alone
        self._gone, self._breaker = gone, breaker
        self._path, self._interval_s = health_path, interval_s
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, url: str, role: str = "any", bootstrap_port: int | None = None) -> Worker:
        """Raises UserError: no address, or one that is there already."""
        worker = Worker(url, role, bootstrap_port, **self._breaker)
        if worker.name in self.workers:
            raise UserError(f"there is a worker {worker.name} already; remove it first")
        self.workers[worker.name] = worker
        self.disaggregated |= role == "prefill"
        self._tasks[worker.name] = asyncio.create_task(self._watch(worker))
        return worker

    def available(self, role: str | None) -> list[Worker]:
        """Those of a role (None: of any) that a request may go to now."""
        return [
            worker
            for worker in self.workers.values()
            if worker.healthy and not worker.draining and role in (None, worker.role) and worker.breaker.allows()
        ]

    def drain(self, worker: Worker, timeout_s: float) -> None:
        """No new requests for it; it goes when those in flight are answered, or at the limit."""
        if not worker.draining:
            worker.draining = True
            self._tasks.pop(worker.name).cancel()
            self._tasks[worker.name] = asyncio.create_task(self._remove(worker, timeout_s))

    async def _remove(self, worker: Worker, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while worker.in_flight:
                    await asyncio.sleep(0.02)
        del self.workers[worker.name], self._tasks[worker.name]
        self.disaggregated = any(known.role == "prefill" for known in self.workers.values())
        self._gone(worker.name)
        worker.close()  # requests that are still there break off

    async def _watch(self, worker: Worker) -> None:
        """Ask for its health: once a good answer makes it up, twice none makes it down."""
        failed = 0
        while True:
            if await self._answers(worker):
                failed = 0
                if not worker.healthy:
                    log.info("worker %s is up", worker.name)
                    worker.healthy = True
            else:
                failed += 1
                if failed >= 2 and worker.healthy is not False:
                    log.warning("worker %s does not answer %s; no requests go there", worker.name, self._path)
                    worker.healthy = False
                    self._gone(worker.name)  # when it comes back, it has been started anew
            pause_s = self._interval_s if worker.healthy else min(0.25, self._interval_s)
            await asyncio.sleep(pause_s)

    async def _answers(self, worker: Worker) -> bool:
        writer = None
        try:
            async with asyncio.timeout(HEALTH_S):
                reader, writer = await asyncio.open_connection(worker.host, worker.port)
                request = f"GET {self._path} HTTP/1.1\r\nhost: {worker.name}\r\nconnection: close\r\n\r\n"
                writer.write(request.encode())
                return (await reader.readline()).split(b" ")[1:2] == [b"200"]
        except (OSError, TimeoutError, ValueError):
            return False
        finally:
            if writer:
                writer.transport.abort()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for worker in self.workers.values():
            worker.close()
