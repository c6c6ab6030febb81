"""The engines behind the router: connections kept open to them, what is in flight there, whether they are well.

Everything here runs in one event loop: nothing is locked, and what one callback does nobody sees half done.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from ch07_sglang_routing.router.breaker import Breaker
from ch07_sglang_routing.router.connection import Connection
from common.script import UserError

log = logging.getLogger("router")
IDLE_S = 4.0  # a connection that nobody used for so long is closed: uvicorn does it after 5, just when we send
HEALTH_S = 5.0  # to answer a health check in: an engine in the middle of a long prefill step is slow, not ill
HOST = re.compile(r"[\w.:%-]+", re.ASCII)  # so that a name needs no escapes in a header or a metric's label
ROLES = ("any", "prefill", "decode")
Json = dict[str, Any]


def address(url: str) -> tuple[str, int, str]:
    """Host, port, and the worker's name: HOST:PORT. Raises UserError."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = 80 if parts.port is None else parts.port
    except ValueError:
        raise UserError(f"{url!r} is no worker's address; give it as http://HOST:PORT") from None
    good = parts.scheme == "http" and port > 0 and HOST.fullmatch(parts.hostname or "")
    if not good or parts.path.strip("/") or parts.query or parts.username:
        raise UserError(f"{url!r} is no worker's address; give it as http://HOST:PORT")
    host = str(parts.hostname)
    return host, port, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Worker:
    """One engine. in_flight and pending_tokens are what the policies read; only a Lease changes them."""

    def __init__(self, url: str, role: str = "any", bootstrap_port: int | None = None, **breaker: Any) -> None:
        self.host, self.port, self.name = address(url)
        if role not in ROLES:
            raise UserError(f"{role!r} is no role of a worker; take one of {', '.join(ROLES)}")
        self.role, self.bootstrap_port = role, bootstrap_port
        self.in_flight = self.pending_tokens = 0
        self.healthy: bool | None = None  # None: not asked yet
        self.draining = self.removed = False
        self.breaker = Breaker(asyncio.get_running_loop().time, **breaker)
        self.connections: set[Connection] = set()
        self._idle: list[Connection] = []
        self.answered = 0  # requests, to the end

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
        if self.removed:
            connection.drop()
        elif not connection.transport.is_closing():
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
        """It is no longer one of the workers: what it has not answered yet may go elsewhere, never back to it."""
        self.removed = True
        for connection in list(self.connections):
            connection.transport.abort()

    def went_silent(self) -> None:
        """Who waits for an answer's beginning here need not wait for a timeout."""
        for connection in list(self.connections):
            connection.give_up("the worker has stopped answering")

    def describe(self) -> Json:
        state = "draining" if self.draining else {None: "starting", True: "up", False: "down"}[self.healthy]
        return {
            "name": self.name, "role": self.role, "state": state, "breaker": self.breaker.state,
            "in_flight": self.in_flight, "pending_tokens": self.pending_tokens, "answered": self.answered,
        }  # fmt: skip


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
                    worker.went_silent()
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
