"""A server of known truth: every token has its time, and so many requests fail. A benchmark can be held against it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web


@dataclass
class Truth:
    """What the server did. Seconds of time.perf_counter(); ttft_s and gaps_s as it wrote them, late or not."""

    arrived: int = 0
    completed: int = 0  # the others have failed, or their client has left
    failed: int = 0
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def error_rate(self) -> float:
        return self.failed / (self.completed + self.failed)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.last_s - self.first_s)


class KnownServer:
    """In a thread with a loop of its own. Token i of an answer is written at arrival + ttft_s + i x gap_s.

    An answer has max_tokens tokens; without ignore_eos, half as many: a model may end when it likes.
    Of each `fail_of` requests (0: none) the last `fail` get a 500 at once.
    """

    def __init__(self, ttft_s: float, gap_s: float, *, fail: int = 0, fail_of: int = 0) -> None:
        self.ttft_s, self.gap_s, self.fail, self.fail_of = ttft_s, gap_s, fail, fail_of
        self.truth = Truth()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> KnownServer:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{path:.*}", self._until_gone)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self._runner.addresses[0][1]

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "known", "object": "model"}]})

    async def _until_gone(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ConnectionError:
            return web.Response()  # which nobody reads

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        arrived_s, truth = time.perf_counter(), self.truth
        body = await request.json()
        number, truth.arrived = truth.arrived, truth.arrived + 1
        truth.first_s = truth.first_s or arrived_s
        if self.fail_of and number % self.fail_of >= self.fail_of - self.fail:
            truth.failed += 1
            return web.json_response({"error": {"message": "as arranged", "code": 500}}, status=500)
        count, chat = int(body.get("max_tokens") or 16), "chat" in request.path
        if not body.get("ignore_eos"):
            count = max(1, count // 2)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def write(value: Any) -> None:
            await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")

        before_s = arrived_s
        for i in range(count):
            await asyncio.sleep(max(0.0, arrived_s + self.ttft_s + i * self.gap_s - time.perf_counter()))
            said = {"delta": {"content": "a "}} if chat else {"text": "a "}
            await write({"choices": [{"index": 0, **said, "finish_reason": "length" if i == count - 1 else None}]})
            now_s = time.perf_counter()
            (truth.gaps_s if i else truth.ttft_s).append(now_s - before_s)
            before_s = now_s
            truth.tokens += 1
            truth.last_s = now_s
        asked = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 7
        await write(
            {
                "choices": [],
                "usage": {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count},
            }
        )
        await response.write(b"data: [DONE]\n\n")
        truth.completed += 1
        return response
