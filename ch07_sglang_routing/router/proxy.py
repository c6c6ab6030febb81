"""A request's way through the router: read whole, sent to a worker, tried again if that fails, its answer passed on.

Exchange  one request, from its last byte to the last of its answer
Attempt   one try of an exchange at one worker: holds the lease on its load
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from ch07_sglang_routing.router import http1, prompt
from ch07_sglang_routing.router.connection import Connection
from ch07_sglang_routing.router.http1 import BadMessage, Chunked, Head
from ch07_sglang_routing.router.policies import Ask
from ch07_sglang_routing.router.workers import Lease, Worker

if TYPE_CHECKING:
    from ch07_sglang_routing.router.client import Client
    from ch07_sglang_routing.router.router import Router

ELSEWHERE = (429, 502, 503)  # another worker may do better: this one is full, or not up


class Attempt:
    def __init__(self, exchange: Exchange, worker: Worker, tokens: int, data: bytes) -> None:
        self.exchange, self.worker, self._data = exchange, worker, data
        self.over = False
        self.head: Head | None = None
        self._chunked: Chunked | None = None
        self._connection: Connection | None = None
        self._lease = Lease(worker, tokens)
        self._epoch = worker.breaker.begin()
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
        except (OSError, TimeoutError, ValueError):  # the last of a host that cannot be a name
            self._failed("the worker cannot be reached")
            return
        if self.over or self.worker.removed:  # the client has left meanwhile: the next may use it
            self.worker.put_back(connection)
            self._failed("the worker was removed")
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

    def broken(self, why: str, stale: bool = False) -> None:
        if self.over or self._connection is None:
            return
        self._connection = None
        if stale and not self.worker.removed:  # once more, on a new connection: that one cannot be stale
            self.exchange.router.metrics.retries["stale"] += 1
            self.exchange.router.start(self._connect())
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
            breaker.given_up(self._epoch)
        elif good:
            breaker.succeeded(self._epoch)
        else:
            breaker.failed(self._epoch)


class Exchange:
    def __init__(self, router: Router, client: Client, head: Head, body: bytes) -> None:
        self.router, self.client, self.head, self.body = router, client, head, body
        self.begun = router.loop.time()
        self.main: Attempt | None = None  # whose answer the client gets
        self.prefill: Attempt | None = None  # beside it where prefill has workers of its own
        self.ask: Ask | None = None  # what the policy knows of it, once read
        self.fields: prompt.Json = {}
        self.counts = (0.0, 0.0)  # tokens of the prompt, and those that the chosen worker was thought to have
        self.passing: Head | None = None  # the head that the client got
        self._failures = 0
        self._tried: set[Worker] = set()
        self._timer: asyncio.TimerHandle | None = None

    def attempt(self) -> None:
        """Choose a worker and send the request there."""
        self._timer = None
        self.client.wait(self.router.limits.first_byte_s)
        begun = time.perf_counter()
        try:
            sent = self.router.route(self, self._tried)
        except BadMessage as error:
            self._fail(error.status, str(error))
            return
        if not sent:
            self._again(None, "no worker is up", "no_worker", 503)
            return
        self.router.metrics.choose_s.observe(time.perf_counter() - begun)
        *before, (worker, tokens, data) = sent
        for other, other_tokens, other_data in before:
            self.prefill = Attempt(self, other, other_tokens, other_data)
        self.main = Attempt(self, worker, tokens, data)

    def answered(self, attempt: Attempt, head: Head, body: bytes) -> None:
        if attempt is self.prefill:
            if head.status < 400:
                return  # its own answer nobody reads
            if head.status >= 500 or head.status in ELSEWHERE or self.passing:
                attempt.cancel(head.status < 500)
                self.failed(attempt, f"the prefill worker {attempt.worker.name} answers {head.status}")
                return
            assert self.main
            self.main.cancel()  # the request itself is wrong: the client gets to know what the prefill worker says
            self.main, self.prefill = attempt, None
        elif attempt is not self.main:
            return  # a prefill worker's, after the end
        if head.status in ELSEWHERE and self._failures < self.router.limits.retries:
            attempt.cancel(head.status == 429)
            self._again(attempt, f"the worker answers {head.status}", str(head.status), head.status)
            return
        self.passing = head
        metrics = self.router.metrics
        metrics.first_byte_s.observe(self.router.loop.time() - self.begun)
        metrics.prompt_tokens += self.counts[0]
        metrics.matched_tokens += self.counts[1]
        self.client.wait(self.router.limits.idle_s)
        close = self.head.close or self.router.stopping
        self.client.write(_answer_start(head, attempt.worker.name, self.head.method, close) + body)

    def more(self, attempt: Attempt, data: bytes) -> None:
        if attempt is self.main:
            self.client.wait(self.router.limits.idle_s)
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
            attempt.worker.answered += 1
            self.main = self.prefill = None  # no cycle: nothing is left for the garbage collector
            self.client.finished(self.head.close or unframed)

    def failed(self, attempt: Attempt, why: str) -> None:
        """An attempt came to nothing."""
        if self.main is None or attempt not in (self.main, self.prefill):
            return  # a prefill worker's, after the end
        if self.passing is None:
            self._again(attempt, why, "worker_lost", 502)
        else:
            self._break(why, "worker_lost", self.main.at_chunk())

    def expired(self) -> None:
        """The answer does not begin, or does not go on."""
        at_chunk = self.main is not None and self.main.at_chunk()
        for attempt in (self.main, self.prefill):
            if attempt:
                attempt.cancel(False)
        limits = self.router.limits
        if self.passing is None:
            self.router.metrics.broken["timeout"] += 1
            self._fail(504, f"no answer within {limits.first_byte_s:g} s")
        else:
            self._break(f"nothing more for {limits.idle_s:g} s", "timeout", at_chunk)

    def cancel(self) -> None:
        """The client has left."""
        self.stop()
        self.router.metrics.broken["client_left"] += 1

    def pause(self, paused: bool) -> None:
        if self.main:
            self.main.pause(paused)

    def _again(self, failed: Attempt | None, why: str, reason: str, status: int) -> None:
        """Once more after a while, elsewhere if possible: nothing has been sent to the client yet."""
        self.stop()
        limits = self.router.limits
        if self._failures >= limits.retries:
            self._fail(status, f"{why} (after {self._failures + 1} attempts)")
            return
        if failed:
            self._tried.add(failed.worker)
        self.main = self.prefill = None
        self._failures += 1
        self.router.metrics.retries[reason] += 1
        longest_s = min(limits.backoff_cap_s, limits.backoff_s * 2 ** (self._failures - 1))
        self._timer = self.router.loop.call_later(self.router.rng.uniform(0, longest_s), self.attempt)

    def _fail(self, status: int, why: str) -> None:
        self.stop()
        self.client.answer(self.head, status, http1.error_body(status, f"{why}; see GET /workers"))

    def _break(self, why: str, reason: str, at_chunk: bool) -> None:
        """The answer ends in its middle. A stream says so in an event; what is framed otherwise is too short."""
        self.stop()
        self.router.metrics.broken[reason] += 1
        assert self.passing
        if at_chunk and b"text/event-stream" in self.passing.fields.get(b"content-type", b""):
            event = b"\n\ndata: " + http1.error_body(502, f"{why} in the middle of the answer") + b"\n\n"
            self.client.write(b"%x\r\n%s\r\n" % (len(event), event))  # and no last chunk: it is not complete
        self.client.close()

    def stop(self) -> None:
        """Leave the workers."""
        if self._timer:
            self._timer.cancel()
        for attempt in (self.main, self.prefill):
            if attempt:
                attempt.cancel()


def _answer_start(head: Head, worker: str, method: bytes, close: bool) -> bytes:
    if head.chunked:
        framing = b"transfer-encoding: chunked\r\n"
    elif method == b"HEAD" or head.status in (204, 304):
        length = head.fields.get(b"content-length")
        framing = b"content-length: %s\r\n" % length if length else b""
    elif head.length is None:
        framing, close = b"", True
    else:
        framing = b"content-length: %d\r\n" % head.length
    reason = http1.REASONS.get(head.status, "").encode()
    return b"HTTP/1.1 %d %s%s\r\n%s%sx-router-worker: %s\r\n\r\n" % (
        head.status, reason, head.own, framing, b"connection: close\r\n" if close else b"", worker.encode()
    )  # fmt: skip
