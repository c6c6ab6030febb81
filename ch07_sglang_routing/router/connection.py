"""A connection to a worker: one request at a time, its answer handed on as it comes, kept open for the next."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from ch07_sglang_routing.router.http1 import MAX_HEAD, BadMessage, Chunked, Head, answer_head

if TYPE_CHECKING:
    from ch07_sglang_routing.router.workers import Worker


class Reader(Protocol):
    """Who waits for an answer on a connection."""

    def answered(self, head: Head, body: bytes) -> None:
        """The head came, and this of the body."""

    def more(self, data: bytes) -> None:
        """More of the body, framed as it came."""

    def ended(self) -> None:
        """The answer is whole. The connection is no longer the reader's."""

    def broken(self, why: str, stale: bool = False) -> None:
        """The connection was lost, or what came is no answer.

        stale: it was kept from an earlier request and not one byte came, so the worker may have closed it as we sent.
        """


class Connection(asyncio.Protocol):
    """One to a worker; one request at a time."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.used = False  # before this request
        self._heard = False  # anything of its answer
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
        self.head, self._buffer, self._heard = None, b"", False
        self.transport.write(data)

    def drop(self) -> None:
        """Close it; the engine sees its client leave and stops computing. The reader hears nothing more."""
        self._reader = None
        self.transport.abort()

    def give_up(self, why: str) -> None:
        """Wait no longer for a head. An answer that has begun goes on."""
        reader = self._reader
        if reader is not None and self.head is None:
            self.drop()
            reader.broken(why)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader is None:
            self.transport.abort()  # it speaks unasked, as some do before they close
            return
        self._heard = True
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
            if not self.transport.is_reading():  # its client was slow; the next need not be
                self.transport.resume_reading()
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
        reader.broken("the connection to the worker was lost", self.used and not self._heard)
