"""A client's connection: requests are read from it one after the other, whole, within limits of size and time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ch07_sglang_routing.router import http1
from ch07_sglang_routing.router.http1 import BadMessage, Chunked, Head
from ch07_sglang_routing.router.proxy import Exchange

if TYPE_CHECKING:
    from ch07_sglang_routing.router.router import Router

NEVER = float("inf")


@dataclass(frozen=True)
class Limits:
    """What a client or a worker may take, in seconds and bytes."""

    connections: int = 4096
    body_bytes: int = 16 * 2**20
    keep_alive_s: float = 75  # between requests
    request_s: float = 30  # to send one in
    connect_s: float = 3
    first_byte_s: float = 600  # of an attempt: a whole answer that is not streamed takes as long
    idle_s: float = 120  # between two pieces of an answer
    stall_s: float = 60  # a client that reads nothing
    retries: int = 3
    backoff_s: float = 0.05  # before retry n: uniform(0, min(cap, backoff x 2^(n-1))) seconds, "full jitter"
    backoff_cap_s: float = 1.0


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
        self._stalled = False  # it does not read: nothing more is written, nor is another request begun
        self._held = False  # what it sends is not read either

    # ------------------------------------------------------------ reading

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self.router.clients.add(self)
        if len(self.router.clients) > self.router.limits.connections:
            self._refuse(503, "too many connections; come back later")
        else:
            self.wait(self.router.limits.keep_alive_s)

    def wait(self, seconds: float) -> None:
        """Something must happen within so long."""
        if not self._stalled:
            self.deadline = self.router.loop.time() + seconds

    def data_received(self, data: bytes) -> None:
        if self._leaving or self.transport.is_closing():
            return
        if self.exchange is not None or self._stalled:  # the next request already, which is rare
            self._buffer += data
            if len(self._buffer) > 2 * http1.MAX_HEAD and not self._held:
                self._held = True
                self.transport.pause_reading()
            return
        if self._head is None:
            begins = not self._buffer or not data
            self._buffer += data
            if begins:
                self._buffer = self._buffer.lstrip(b"\r\n")  # some send blank lines between requests
                if not self._buffer:
                    return
                self.wait(self.router.limits.request_s)
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
        buffer = self._buffer
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
        assert self._head
        length = self._head.length or 0
        if len(self._body) >= length:
            body, self._buffer = bytes(self._body[:length]), bytes(self._body[length:])
            self._body = bytearray()
            self._dispatch(self._head, body)

    def _read_chunks(self, data: bytes) -> None:
        assert self._head
        assert self._chunked
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
            self.exchange = Exchange(self.router, self, head, body)
            self.exchange.attempt()

    # ------------------------------------------------------------ answering

    @property
    def busy(self) -> bool:
        """Whether an answer is under way, or written and not sent yet."""
        return self.exchange is not None or self.transport.get_write_buffer_size() > 0

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def answer(self, to: Head, status: int, body: bytes, **fields: bytes) -> None:
        """A whole answer of the router's own. fields: kind and more, as of http1.answer_bytes."""
        self.router.metrics.answers["", status] += 1
        close = to.close or self.router.stopping
        self.write(http1.answer_bytes(status, body, method=to.method, close=close, **fields))
        self.finished(close)

    def finished(self, close: bool) -> None:
        """An answer is complete: now the next request, if the connection stays."""
        self.exchange = None
        if close or self.router.stopping:
            self.close()
            return
        self.wait(self.router.limits.keep_alive_s)
        if not self._stalled:  # else the next when this one has been read
            self._next()

    def _next(self) -> None:
        if self._held:
            self._held = False
            self.transport.resume_reading()
        if self._buffer:
            self.router.loop.call_soon(self.data_received, b"")

    def close(self) -> None:
        """After what was written has been sent, or at the limit."""
        if self.exchange is not None:
            self.exchange.stop()
        self.exchange, self._leaving, self._stalled = None, True, False
        self.wait(self.router.limits.stall_s)
        self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        """Say what is wrong with a request and go on reading for a moment: closing at once could lose the answer."""
        self.router.metrics.answers["", status] += 1
        self.write(http1.answer_bytes(status, http1.error_body(status, why), close=True))
        self._leaving = True
        self.wait(1.0)

    # ------------------------------------------------------------ what happens to a connection

    def expired(self) -> None:
        if self._leaving or self._stalled:
            self.transport.abort()
        elif self.exchange is not None:
            self.exchange.expired()
        elif self._buffer or self._head:
            self._refuse(408, f"the request was not complete after {self.router.limits.request_s:g} s")
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        self.wait(self.router.limits.stall_s)
        self._stalled = not self._leaving
        if self.exchange:
            self.exchange.pause(True)

    def resume_writing(self) -> None:
        self._stalled = False
        if self.exchange:
            self.wait(self.router.limits.idle_s)
            self.exchange.pause(False)
        elif not self._leaving:
            self.wait(self.router.limits.keep_alive_s)
            self._next()

    def connection_lost(self, error: Exception | None) -> None:
        self.router.clients.discard(self)
        if self.exchange is not None:
            exchange, self.exchange = self.exchange, None
            exchange.cancel()
