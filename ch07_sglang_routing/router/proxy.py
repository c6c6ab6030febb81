"""A request's way through the router: read whole, sent to a worker, tried again if that fails, its answer passed on.

Client    a connection of a client: reads requests, one after the other
Exchange  one request, from its last byte to the last of its answer
Attempt   one try of an exchange at one worker: holds the lease on its load
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ch07_sglang_routing.router import http1, prompt
from ch07_sglang_routing.router.http1 import BadMessage, Chunked, Head
from ch07_sglang_routing.router.policies import Ask
from ch07_sglang_routing.router.workers import Connection, Lease, Worker

if TYPE_CHECKING:
    from ch07_sglang_routing.router.router import Router

ELSEWHERE = (429, 502, 503)  # another worker may do better: this one is full, or not up
NEVER = float("inf")


@dataclass(frozen=True)
class Limits:
    """What a client or a worker may take, in seconds and bytes."""

    connections: int = 4096
    body_bytes: int = 16 * 2**20
    keep_alive_s: float = 75  # between requests
    request_s: float = 30  # to send one in
    connect_s: float = 3
    answer_s: float = 600  # from the request to the last byte
    stall_s: float = 60  # a client that reads nothing
    retries: int = 3
    backoff_s: float = 0.05  # before retry n: uniform(0, min(cap, backoff x 2^(n-1))) seconds, "full jitter"
    backoff_cap_s: float = 1.0


class Attempt:
    def __init__(self, exchange: Exchange, worker: Worker, tokens: int, data: bytes) -> None:
        self.exchange, self.worker, self._data = exchange, worker, data
        self.over = False
        self.head: Head | None = None
        self._chunked: Chunked | None = None
        self._connection: Connection | None = None
        self._lease = Lease(worker, tokens)
        worker.breaker.begin()
        self._send(worker.take())

    def _send(self, connection: Connection | None) -> None:
        if connection is None:
            self.exchange.router.start(self._connect())
        else:
            self._connection = connection
            connection.send(self, self.exchange.head.method, self._data)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self.exchange.router.limits.connect_s):
                connection = await self.worker.connect()
        except (OSError, TimeoutError):
            self._failed("the worker cannot be reached")
            return
        if self.over:  # the client has left meanwhile; the next may use it
            self.worker.put_back(connection)
        else:
            self._send(connection)

    def answered(self, head: Head, body: bytes) -> None:
        assert self._connection
        self.head, self._chunked = head, self._connection.chunked
        self.exchange.answered(self, head, body)
        if body and not self.over:
            self._lease.first_token()

    def more(self, data: bytes) -> None:
        self._lease.first_token()
        self.exchange.more(self, data)

    def ended(self) -> None:
        assert self.head
        self._connection = None
        self._end(self.head.status < 500)
        self.exchange.ended(self)

    def broken(self, why: str) -> None:
        if self.over or self._connection is None:
            return
        used, self._connection = self._connection.used, None
        if used and self.head is None:
            self._send(self.worker.take())  # it was closed just as we sent: as good as not sent
        else:
            self._failed(why)

    def pause(self, paused: bool) -> None:
        if self._connection:
            transport = self._connection.transport
            transport.pause_reading() if paused else transport.resume_reading()

    def at_chunk(self) -> bool:
        """Whether what was passed on ends with a whole chunk."""
        return self._chunked is not None and self._chunked.between

    def _failed(self, why: str) -> None:
        if not self.over:
            self._end(False)
            self.exchange.failed(self, why)

    def cancel(self, good: bool | None = None) -> None:
        """Leave the worker; the engine hears of it by the closed connection. good: a verdict on the worker."""
        if not self.over:
            if self._connection:
                self._connection.drop()
            self._end(good)

    def _end(self, good: bool | None) -> None:
        self.over = True
        self._lease.release()
        breaker = self.worker.breaker
        if good is None:
            breaker.given_up()
        elif good:
            breaker.succeeded()
        else:
            breaker.failed()


class Exchange:
    def __init__(self, router: Router, client: Client, head: Head, body: bytes) -> None:
        self.router, self.client, self.head, self.body = router, client, head, body
        self.begun = router.loop.time()
        self.main: Attempt | None = None  # whose answer the client gets
        self.prefill: Attempt | None = None  # beside it where prefill has workers of its own
        self.ask: Ask | None = None  # what the policy knows of it, once read
        self.fields: prompt.Json = {}
        self.passing: Head | None = None  # the head that the client got
        self._failures = 0
        self._tried: set[Worker] = set()
        self._timer: asyncio.TimerHandle | None = None

    def attempt(self) -> None:
        """Choose a worker and send the request there."""
        self._timer = None
        begun = time.perf_counter()
        try:
            sent = self.router.route(self, self._tried)
        except BadMessage as error:
            self._fail(error.status, str(error))
            return
        if not sent:
            self._again("no worker is up", "no_worker", 503)
            return
        self.router.metrics.choose_s.observe(time.perf_counter() - begun)
        *before, (worker, tokens, data) = sent
        for other, other_tokens, other_data in before:
            self.prefill = Attempt(self, other, other_tokens, other_data)
        self.main = Attempt(self, worker, tokens, data)

    def answered(self, attempt: Attempt, head: Head, body: bytes) -> None:
        if attempt is not self.main:
            if head.status >= 400:  # the prefill worker will not do it
                attempt.cancel(head.status < 500)
                self.failed(attempt, f"the prefill worker {attempt.worker.name} answers {head.status}")
            return
        if head.status in ELSEWHERE and self._failures < self.router.limits.retries:
            attempt.cancel(head.status == 429)
            self._again(f"the worker answers {head.status}", str(head.status), head.status)
            return
        self.passing = head
        self.router.metrics.first_byte_s.observe(self.router.loop.time() - self.begun)
        self.client.write(_answer_start(head, attempt.worker.name, self.head.method) + body)

    def more(self, attempt: Attempt, data: bytes) -> None:
        if attempt is self.main:
            self.client.write(data)

    def ended(self, attempt: Attempt) -> None:
        if attempt is self.main:
            assert self.passing
            if self.prefill:  # it sent its KV cache; its own answer, which nobody reads, is a moment behind
                self.router.loop.call_later(5, self.prefill.cancel)
            metrics = self.router.metrics
            metrics.answers[attempt.worker.name, self.passing.status] += 1
            metrics.request_s.observe(self.router.loop.time() - self.begun)
            unframed = self.passing.length is None and not self.passing.chunked
            self.client.finished(self.head.close or unframed)

    def failed(self, attempt: Attempt, why: str) -> None:
        """An attempt came to nothing."""
        at_chunk = attempt.at_chunk()
        self._tried.add(attempt.worker)
        if self.passing is None:
            self._again(why, "worker_lost", 502)
        else:
            self._break(why, "worker_lost", at_chunk)

    def expired(self) -> None:
        """The answer's time is up."""
        at_chunk = self.main is not None and self.main.at_chunk()
        for attempt in (self.main, self.prefill):
            if attempt:
                attempt.cancel(False)
        why = f"no answer within {self.router.limits.answer_s:g} s"
        if self.passing is None:
            self.router.metrics.broken["timeout"] += 1
            self._fail(504, why)
        else:
            self._break(why, "timeout", at_chunk)

    def cancel(self) -> None:
        """The client has left."""
        self._stop()
        self.router.metrics.broken["client_left"] += 1

    def pause(self, paused: bool) -> None:
        if self.main:
            self.main.pause(paused)

    def _again(self, why: str, reason: str, status: int) -> None:
        """Once more after a while, elsewhere if possible: nothing has been sent to the client yet."""
        self._stop()
        limits = self.router.limits
        if self._failures >= limits.retries:
            self._fail(status, f"{why} (after {self._failures + 1} attempts)")
            return
        if self.main:
            self._tried.add(self.main.worker)
        self.main = self.prefill = None
        self._failures += 1
        self.router.metrics.retries[reason] += 1
        longest_s = min(limits.backoff_cap_s, limits.backoff_s * 2 ** (self._failures - 1))
        self._timer = self.router.loop.call_later(random.uniform(0, longest_s), self.attempt)

    def _fail(self, status: int, why: str) -> None:
        self._stop()
        self.client.answer(status, http1.error_body(status, f"{why}; see GET /workers"), close=self.head.close)

    def _break(self, why: str, reason: str, at_chunk: bool) -> None:
        """The answer ends in its middle. A stream says so in an event; what is framed otherwise is too short."""
        self._stop()
        self.router.metrics.broken[reason] += 1
        assert self.passing
        if at_chunk and b"text/event-stream" in self.passing.fields.get(b"content-type", b""):
            event = b"\n\ndata: " + http1.error_body(502, f"{why} in the middle of the answer") + b"\n\n"
            self.client.write(b"%x\r\n%s\r\n" % (len(event), event))  # and no last chunk: it is not complete
        self.client.close()

    def _stop(self) -> None:
        if self._timer:
            self._timer.cancel()
        for attempt in (self.main, self.prefill):
            if attempt:
                attempt.cancel()


def _answer_start(head: Head, worker: str, method: bytes) -> bytes:
    if head.chunked:
        framing = b"transfer-encoding: chunked\r\n"
    elif method == b"HEAD" or head.status in (204, 304):
        length = head.fields.get(b"content-length")
        framing = b"content-length: %s\r\n" % length if length else b""
    elif head.length is None:
        framing = b"connection: close\r\n"
    else:
        framing = b"content-length: %d\r\n" % head.length
    reason = http1.REASONS.get(head.status, "").encode()
    return b"HTTP/1.1 %d %s%s\r\n%sx-router-worker: %s\r\n\r\n" % (
        head.status, reason, head.own, framing, worker.encode()
    )  # fmt: skip


class Client(asyncio.Protocol):
    def __init__(self, router: Router) -> None:
        self.router = router
        self.exchange: Exchange | None = None
        self.deadline = NEVER
        self._buffer = b""
        self._head: Head | None = None
        self._body = bytearray()
        self._chunked: Chunked | None = None
        self._leaving = False  # an error was sent; what still comes is thrown away
        self._stalled_from: float | None = None

    # ------------------------------------------------------------ reading

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self.router.clients.add(self)
        if len(self.router.clients) > self.router.limits.connections:
            self._refuse(503, "too many connections; come back later")
        else:
            self._wait(self.router.limits.keep_alive_s)

    def _wait(self, seconds: float) -> None:
        self.deadline = self.router.loop.time() + seconds

    def data_received(self, data: bytes) -> None:
        if self._leaving or self.transport.is_closing():
            return
        if self.exchange is not None:  # the next request already; there is seldom one
            self._buffer += data
            if len(self._buffer) > 2 * http1.MAX_HEAD:
                self.transport.abort()
            return
        if self._head is None:
            if not self._buffer or not data:  # a request begins
                self._wait(self.router.limits.request_s)
            self._buffer += data
        try:
            if self._head is None:
                self._read_head()
            elif self._chunked is not None:
                self._read_chunks(data)
            else:
                self._body += data
                self._read_body()
        except BadMessage as error:
            self._refuse(error.status, str(error))

    def _read_head(self) -> None:
        buffer = self._buffer.lstrip(b"\r\n") if self._buffer[:1] == b"\r" else self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end > http1.MAX_HEAD or (end < 0 and len(buffer) > http1.MAX_HEAD):
            raise BadMessage(431, f"the head is longer than {http1.MAX_HEAD} bytes")
        if end < 0:
            return
        head = http1.request_head(buffer[:end])
        rest = buffer[end + 4 :]
        self._buffer = b""
        length = 0 if head.length is None else head.length
        if length > self.router.limits.body_bytes:
            raise BadMessage(413, f"the body is longer than {self.router.limits.body_bytes} bytes")
        self._head = head
        if not head.chunked and len(rest) >= length:
            self._buffer = rest[length:]
            self._dispatch(head, rest[:length])
            return
        if head.fields.get(b"expect", b"").lower() == b"100-continue" and not rest:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.chunked:
            self._chunked = Chunked(keep=True)
            self._read_chunks(rest)
        else:
            self._body += rest

    def _read_body(self) -> None:
        assert self._head and self._head.length is not None
        length = self._head.length
        if len(self._body) >= length:
            body, self._buffer = bytes(self._body[:length]), bytes(self._body[length:])
            self._body = bytearray()
            self._dispatch(self._head, body)

    def _read_chunks(self, data: bytes) -> None:
        assert self._head and self._chunked
        end = self._chunked.feed(data)
        if len(self._chunked.body) > self.router.limits.body_bytes:
            raise BadMessage(413, f"the body is longer than {self.router.limits.body_bytes} bytes")
        if self._chunked.done:
            self._buffer = data[end:]
            body, self._chunked = bytes(self._chunked.body), None
            self._dispatch(self._head, body)

    def _dispatch(self, head: Head, body: bytes) -> None:
        self._head = None
        if not self.router.own(self, head, body):
            self._wait(self.router.limits.answer_s)
            self.exchange = Exchange(self.router, self, head, body)
            self.exchange.attempt()

    # ------------------------------------------------------------ answering

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def answer(self, status: int, body: bytes, *, close: bool = False, kind: bytes = b"application/json") -> None:
        """A whole answer of the router's own."""
        self.router.metrics.answers["", status] += 1
        self.write(http1.answer_bytes(status, body, close=close, kind=kind))
        self.finished(close)

    def finished(self, close: bool) -> None:
        """An answer is complete: now the next request, if the connection stays."""
        self.exchange = None
        if close or self.router.stopping:
            self.close()
            return
        if self._stalled_from is None:
            self._wait(self.router.limits.keep_alive_s)
        else:
            self._stalled_from = self.router.loop.time() + self.router.limits.keep_alive_s
        if self._buffer:
            self.router.loop.call_soon(self.data_received, b"")

    def close(self) -> None:
        """After what was written has been sent, or at the limit."""
        self.exchange = None
        self._leaving = True
        self._wait(min(5.0, self.router.limits.stall_s))
        self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        """Say what is wrong with a request and go on reading for a moment: closing at once could lose the answer."""
        self.router.metrics.answers["", status] += 1
        self.write(http1.answer_bytes(status, http1.error_body(status, why), close=True))
        self._leaving = True
        self._wait(1.0)

    # ------------------------------------------------------------ what happens to a connection

    def expired(self) -> None:
        if self._leaving or self._stalled_from is not None:
            self.transport.abort()
        elif self.exchange is not None:
            self.exchange.expired()
        elif self._buffer or self._head:
            self._refuse(408, f"the request was not complete after {self.router.limits.request_s:g} s")
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        self._stalled_from = self.deadline
        self._wait(self.router.limits.stall_s)
        if self.exchange:
            self.exchange.pause(True)

    def resume_writing(self) -> None:
        if self._stalled_from is not None:
            self.deadline, self._stalled_from = self._stalled_from, None
        if self.exchange:
            self.exchange.pause(False)

    def connection_lost(self, error: Exception | None) -> None:
        self.router.clients.discard(self)
        if self.exchange is not None:
            exchange, self.exchange = self.exchange, None
            exchange.cancel()
