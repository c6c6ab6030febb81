"""The router itself: who gets a request, its own few paths, and the clock that ends what takes too long."""

from __future__ import annotations

import asyncio
import hmac
import json
import random
from collections.abc import Coroutine
from typing import Any
from urllib.parse import parse_qs, unquote, unquote_to_bytes

from ch07_sglang_routing.router import http1, prompt
from ch07_sglang_routing.router.client import Client, Limits
from ch07_sglang_routing.router.http1 import BadMessage, Head
from ch07_sglang_routing.router.metrics import Metrics
from ch07_sglang_routing.router.policies import Ask, Policy, PrefillDecode, prompt_tokens
from ch07_sglang_routing.router.proxy import Exchange
from ch07_sglang_routing.router.workers import Fleet, Worker
from common.script import UserError

# What goes on to a worker. Not its other paths: on some, anybody could flush its cache or load other weights.
FORWARDED = {b"/generate", b"/tokenize", b"/detokenize", b"/score", b"/rerank", b"/pooling", b"/classify"}
REFUSED = (b"/v1/load_lora_adapter", b"/v1/unload_lora_adapter")  # of those under /v1/, which go on otherwise
SWEEP_S = 0.25
LOOPBACK = ("127.0.0.1", "::1")
LOCAL_NAMES = (b"127.0.0.1", b"localhost", b"[::1]")


def forwarded(target: bytes) -> bool:
    """Whether a request for this goes on to a worker, which will see the path without its percent signs."""
    path = unquote_to_bytes(target.partition(b"?")[0])
    if path in FORWARDED:
        return True
    return path.startswith(b"/v1/") and not path.startswith(REFUSED) and b"/.." not in path


class Router:
    """policy: which worker. reads: whether it wants to know prompt or session, for which bodies must be parsed.

    pairs: the policy for workers of the roles prefill and decode.

    admin_key: who sends it as a bearer token may add and remove workers; without one, who comes from this machine.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        reads: bool = True,
        pairs: PrefillDecode | None = None,
        limits: Limits | None = None,
        admin_key: str = "",
        drain_s: float = 60,
        health_path: str = "/health",
        health_s: float = 1.0,
        seed: int | None = None,
        **breaker: Any,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.policy, self.reads, self.limits = policy, reads, limits or Limits()
        self.pairs = pairs or PrefillDecode()
        self.metrics = Metrics()
        self.clients: set[Client] = set()
        self.stopping = False
        self.rng = random.Random(seed)
        self.fleet = Fleet(self._gone, health_path=health_path, interval_s=health_s, **breaker)
        self._admin_key, self._drain_s = admin_key, drain_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.start(self._sweep())

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it run beside everything else. (The loop alone would forget it.)"""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _gone(self, worker: str) -> None:
        self.policy.forget(worker)
        self.pairs.forget(worker)

    # ------------------------------------------------------------ who gets a request

    def route(self, exchange: Exchange, tried: set[Worker]) -> list[tuple[Worker, int, bytes]]:
        """Workers, the prompt tokens each has to compute, and what it is sent; the last one's answer counts.

        Empty if there is nobody. Workers that failed this request already come last. Raises BadMessage.
        """
        head = exchange.head
        generates = head.method == b"POST" and head.target.partition(b"?")[0] in prompt.GENERATES
        disaggregated = generates and self.fleet.disaggregated
        if exchange.ask is None or (disaggregated and not exchange.fields):
            exchange.fields = prompt.parsed(exchange.body) if generates and (self.reads or disaggregated) else {}
            exchange.ask = prompt.ask_of(head, exchange.fields, self.rng.random())
        if disaggregated and (sent := self._route_pair(exchange, exchange.ask, tried)):
            return sent  # while one of the two roles has nobody, workers of any role do it alone
        workers = self._fresh(self.fleet.available(None if not generates else "any"), tried)
        if not workers:
            return []
        worker = workers[self.policy.choose(exchange.ask, workers)]
        tokens = self._count(exchange, self.policy.matched)
        return [(worker, tokens, http1.request_bytes(head, exchange.body))]

    def _route_pair(self, exchange: Exchange, ask: Ask, tried: set[Worker]) -> list[tuple[Worker, int, bytes]]:
        """A prefill worker and a decode worker, which get the same request at once: SGLang's way of disaggregation."""
        prefills = self._fresh(self.fleet.available("prefill"), tried)
        decodes = self._fresh(self.fleet.available("decode"), tried)
        if not prefills or not decodes:
            return []
        if len(exchange.body) > prompt.LOOK_AT_MOST:
            raise BadMessage(
                413, f"the body is longer than {prompt.LOOK_AT_MOST} bytes, as prefill and decode can take"
            )
        first, second = self.pairs.choose(ask, prefills, decodes)
        prefill, decode = prefills[first], decodes[second]
        fields = prompt.bootstrap_fields(exchange.fields, prefill.host, prefill.bootstrap_port, self.rng)
        data = http1.request_bytes(exchange.head, prompt.with_fields(exchange.body, fields))
        return [(prefill, self._count(exchange, self.pairs.matched), data), (decode, 0, data)]

    @staticmethod
    def _fresh(workers: list[Worker], tried: set[Worker]) -> list[Worker]:
        if not tried:
            return workers
        return [worker for worker in workers if worker not in tried] or workers

    @staticmethod
    def _count(exchange: Exchange, matched: float) -> int:
        """Tokens of the prompt that the worker has to compute. The metrics count them when it answers."""
        assert exchange.ask
        tokens = prompt_tokens(len(exchange.ask.tokens), exchange.ask.tokens)
        exchange.counts = (tokens, matched)
        return int(tokens - matched)

    # ------------------------------------------------------------ paths of its own

    def own(self, client: Client, head: Head, body: bytes) -> bool:
        """Answer what is asked of the router itself, or say that it is not."""
        if forwarded(head.target):
            return False
        path, _, query = head.target.decode("ascii").partition("?")
        if path == "/metrics":
            text = self.metrics.text(self.fleet.workers.values(), len(self.clients))
            client.answer(head, 200, text, kind=b"text/plain; version=0.0.4")
            return True
        more = b""
        try:
            status, answer = self._administer(client, head, path, query, body)
            text = json.dumps(answer).encode()
        except BadMessage as error:
            status, text, more = error.status, http1.error_body(error.status, str(error)), error.more
        except UserError as error:
            status, text = 400, http1.error_body(400, str(error))
        client.answer(head, status, text, more=more)
        return True

    def _administer(self, client: Client, head: Head, path: str, query: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            up = sum(bool(worker.healthy) and not worker.draining for worker in self.fleet.workers.values())
            return (200 if up else 503), {"workers": len(self.fleet.workers), "up": up}
        if path != "/workers" and not path.startswith("/workers/"):
            raise BadMessage(404, f"{path} is not served here; see /v1/…, /health, /metrics, /workers")
        if head.method in (b"GET", b"HEAD") and path == "/workers":
            return 200, {"workers": [worker.describe() for worker in self.fleet.workers.values()]}
        if head.method == b"POST" and path == "/workers":
            self._check_admin(client, head)
            asked = prompt.parsed(body)
            port = asked.get("bootstrap_port")
            if not isinstance(asked.get("url"), str) or not (port is None or type(port) is int):
                raise BadMessage(400, 'no worker in the body; send {"url": "http://HOST:PORT"}')
            return 200, self.fleet.add(asked["url"], str(asked.get("role", "any")), port).describe()
        if head.method == b"DELETE" and path != "/workers":
            self._check_admin(client, head)
            worker = self.fleet.workers.get(unquote(path.removeprefix("/workers/")))
            if worker is None:
                raise BadMessage(404, "there is no such worker; see GET /workers for their names")
            self.fleet.drain(worker, self._timeout_s(query))
            return 202, worker.describe()
        allowed = b"GET, HEAD, POST" if path == "/workers" else b"DELETE"
        raise BadMessage(405, "GET or POST /workers, DELETE /workers/NAME", b"allow: %s\r\n" % allowed)

    def _timeout_s(self, query: str) -> float:
        try:
            timeout_s = float(parse_qs(query).get("timeout_s", [self._drain_s])[0])
            if 0 <= timeout_s < 1e9:
                return timeout_s
        except ValueError:
            pass
        raise BadMessage(400, "timeout_s is no number of seconds")

    def _check_admin(self, client: Client, head: Head) -> None:
        """Raises BadMessage. A page in a browser on this machine cannot ask for JSON elsewhere, nor use DELETE."""
        given = head.fields.get(b"authorization", b"")
        if self._admin_key:
            allowed = hmac.compare_digest(given, b"Bearer " + self._admin_key.encode())
        else:
            address = client.transport.get_extra_info("peername")
            # The name too: a page's own name may come to mean 127.0.0.1 after it was loaded (DNS rebinding).
            host = head.fields[b"host"].lower()
            named = host.removesuffix(b":" + host.rpartition(b":")[2]) if not host.endswith(b"]") else host
            allowed = bool(address) and address[0] in LOOPBACK and named in LOCAL_NAMES
        if head.method == b"POST" and head.fields.get(b"content-type", b"").partition(b";")[0] != b"application/json":
            raise BadMessage(400, "the body is no JSON; send it with content-type: application/json")
        if not allowed:
            raise BadMessage(403, "not yours to change; send the admin key, or come from the router's own machine")

    # ------------------------------------------------------------ its life

    async def listen(self, **where: Any) -> int:
        """Accept clients (host and port, or sock, as create_server takes them); the port."""
        self._server = await self.loop.create_server(lambda: Client(self), backlog=1024, **where)
        return int(self._server.sockets[0].getsockname()[1])

    async def _sweep(self) -> None:
        """One look at all deadlines now and then: cheaper than a timer for each request."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.loop.time()
            for client in [client for client in self.clients if client.deadline <= now]:
                client.expired()
            for worker in self.fleet.workers.values():
                worker.close_idle(now)

    async def stop(self, timeout_s: float = 0) -> None:
        """Take no more requests; those that run may go on for so long, to their last byte, then they break off."""
        self.stopping = True
        if self._server:
            self._server.close()
        for client in list(self.clients):
            if client.exchange is None:
                client.close()
        end = self.loop.time() + timeout_s
        while any(client.busy for client in self.clients) and self.loop.time() < end:
            await asyncio.sleep(0.02)
        for client in list(self.clients):
            client.transport.abort()
        await self.fleet.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
