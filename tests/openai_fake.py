"""A server with OpenAI's API that does as it is told: answers by a script, waits at gates, writes down what it saw."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web


@dataclass
class Seen:
    """A request as the server had it. written_s: when each token was written (perf_counter, one clock for all)."""

    path: str
    body: dict[str, Any]
    arrived_s: float
    written_s: list[float] = field(default_factory=list)
    ended: str = "running"  # then "answered", "refused", "dropped" or "disconnected"


@dataclass(frozen=True)
class Does:
    """What to do with one request; without any, it is answered with max_tokens tokens.

    status and headers refuse it. drop closes the connection at once; after_tokens then breaks off: the connection is
    closed, or with `error` an error event is sent. raw is sent as the stream's bytes, as they are.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    after_tokens: int | None = None
    error: dict[str, Any] | None = None
    raw: bytes | None = None


class FakeServer:
    """In a thread of its own, with its own event loop.

    ttft_s and gap_s are slept before the first and between later tokens. `gate`, once cleared, holds every request
    before its first token until it is set again; it closes by itself with request number `close_gate_at`. `tokens` is what it writes: token i of an answer is tokens[i mod n].
    """

    def __init__(self, *, ttft_s: float = 0.0, gap_s: float = 0.0) -> None:
        self.ttft_s, self.gap_s = ttft_s, gap_s
        self.tokens = ["a", "b ", "ç", "\n", ""]
        self.close_gate_at: int | None = None
        self.script: deque[Does] = deque()
        self.contents: deque[str] = deque()  # what unstreamed chats say, instead of tokens
        self.seen: list[Seen] = []
        self.changed = threading.Condition()  # notified at each arrival and end
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.open_gate()
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    async def _start(self) -> int:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self._runner.addresses[0][1]

    def close_gate(self) -> None:
        self._loop.call_soon_threadsafe(self._open.clear)

    def open_gate(self) -> None:
        self._loop.call_soon_threadsafe(self._open.set)

    def wait_for(self, condition: Any, timeout_s: float = 20) -> None:
        """Until condition(self.seen) holds, looked at whenever a request comes or ends."""
        with self.changed:
            if not self.changed.wait_for(lambda: condition(self.seen), timeout_s):
                raise TimeoutError(f"the fake server has seen {[(s.path, s.ended) for s in self.seen]}")

    def _note(self, seen: Seen, ended: str) -> None:
        with self.changed:
            seen.ended = ended
            self.changed.notify_all()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        seen = Seen(request.path, await request.json(), time.perf_counter())
        does = self.script.popleft() if self.script else Does()
        with self.changed:
            self.seen.append(seen)
            self.changed.notify_all()
        if len(self.seen) == self.close_gate_at:
            self._open.clear()
        try:
            return await self._do(request, seen, does)
        except (asyncio.CancelledError, ConnectionError):
            self._note(seen, "disconnected")
            raise

    async def _do(self, request: web.Request, seen: Seen, does: Does) -> web.StreamResponse:
        if does.drop:
            self._note(seen, "dropped")
            request.transport.close()
            return web.Response()
        if does.status != 200:
            self._note(seen, "refused")
            error = {"message": f"scripted {does.status}", "type": "scripted", "code": does.status}
            return web.json_response({"error": error}, status=does.status, headers=does.headers)
        await self._open.wait()
        chat, count = "chat" in request.path, int(seen.body.get("max_tokens") or 4)
        texts = [self.tokens[i % len(self.tokens)] for i in range(count)]
        prompt = seen.body.get("prompt")
        asked = len(prompt) if isinstance(prompt, list) else 7
        usage = {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}
        if not seen.body.get("stream"):
            await asyncio.sleep(self.ttft_s + (count - 1) * self.gap_s)
            text = self.contents.popleft() if chat and self.contents else "".join(texts)
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            self._note(seen, "answered")
            choice = {"index": 0, "finish_reason": "length", **said}
            if "prompt_logprobs" in seen.body:  # -0.5 for each character but the first
                choice["prompt_logprobs"] = [None] + [{"9": {"logprob": -0.5}}] * (len(prompt) - 1)
            return web.json_response(
                {"id": "x", "choices": [choice], "usage": usage}, headers={"x-request-id": "fake-1"}
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if does.raw is not None:
            await response.write(does.raw)
            self._note(seen, "answered")
            return response

        async def write(value: Any) -> None:
            await response.write(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

        if chat:
            await write({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for i, text in enumerate(texts):
            if i == does.after_tokens:
                if does.error is not None:
                    await write({"error": does.error})
                self._note(seen, "dropped")
                request.transport.close()
                return response
            await asyncio.sleep(self.gap_s if i else self.ttft_s)
            said = {"delta": {"content": text}} if chat else {"text": text}
            finish = "length" if i == count - 1 else None
            seen.written_s.append(time.perf_counter())
            await write({"choices": [{"index": 0, **said, "finish_reason": finish}]})
        await write({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self._note(seen, "answered")
        return response
