"""An asynchronous client of any OpenAI-compatible server: streams, retries, gives up in time, lets go when cancelled.

    async with Client("http://127.0.0.1:8000", concurrency=8) as client:
        answer = await client.complete("Once upon a time", model="nano", max_tokens=32)      # streamed, timed
        reply = await client.post("/v1/chat/completions", {"model": …, "messages": […]})     # JSON in, JSON out
        async with client.stream("/v1/completions", {"model": …, "prompt": …}) as chunks:    # as the tokens come
            async for chunk in chunks: …

Times are time.perf_counter() seconds of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import os
import random
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from ch06_vllm import sse
from common.script import UserError

Json = dict[str, Any]
T = TypeVar("T")


class RequestFailed(UserError):
    """One request's failure, in one line: the last of a script that does not expect it.

    `status` is None where no HTTP answer came; `error` is the server's object.

    `retryable`: another attempt may do better. It is never so for an answer of which a token has been handed on.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        error: Json | None = None,
        retryable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.error, self.retryable, self.retry_after_s = status, error or {}, retryable, retry_after_s
        self.attempts = 1

    def __str__(self) -> str:
        tried = f" (after {self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{super().__str__()}{tried}"


@dataclass(frozen=True)
class Retry:
    """Exponential backoff with full jitter (Brooker, "Exponential Backoff And Jitter", AWS 2015).

    Before attempt n + 1 it waits uniform(0, min(cap_s, base_s · 2^(n-1))): clients that were refused together do not
    come back together. A server's Retry-After is added in front of that; one beyond `longest_s` is not waited for.
    """

    attempts: int = 5
    base_s: float = 0.5
    cap_s: float = 30.0
    longest_s: float = 120.0

    def wait_s(self, failed: int, retry_after_s: float | None, rng: random.Random) -> float:
        """Seconds to wait after the `failed`-th attempt."""
        return (retry_after_s or 0.0) + rng.uniform(0, min(self.cap_s, self.base_s * 2 ** (failed - 1)))

    def allows(self, failed: int, error: RequestFailed) -> bool:
        return error.retryable and failed < self.attempts and (error.retry_after_s or 0.0) <= self.longest_s


@dataclass(frozen=True)
class Reply:
    """A server's JSON answer to an unstreamed request."""

    body: Json
    request_id: str | None
    attempts: int


@dataclass(frozen=True)
class Chunk:
    """One event of a stream. `tokens` is how many tokens it brings, as far as it tells (see `token_count`)."""

    at_s: float
    text: str
    tokens: int
    finish_reason: str | None
    body: Json


@dataclass
class Answer:
    """A streamed answer and when its parts came.

    arrivals_s[i] is when the i-th chunk with tokens came, and tokens[i] how many it held: 1 where the server does not
    say. A server that falls behind sends several tokens in one chunk: then there are fewer arrivals than
    completion_tokens, which is the server's own count.
    """

    called_s: float  # the caller asked; then it may have waited for its turn (concurrency) and for retries
    sent_s: float = 0.0  # the attempt that was answered left
    attempts: int = 1
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    arrivals_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def token_count(choice: Json) -> int:
    """How many tokens a chunk's choice brings: by its token ids or logprobs where asked for, else 1 or 0.

    No text is still one token (a special one, or a part of a character), except where the chunk is there to say
    something else: the role that opens a chat, the finish reason that closes an answer.
    """
    if (ids := choice.get("token_ids")) is not None:
        return len(ids)
    logprobs = choice.get("logprobs") or {}
    if (listed := logprobs.get("tokens") or logprobs.get("content")) is not None:
        return len(listed)
    delta = choice.get("delta") or {}
    said = choice.get("text") or any(value for key, value in delta.items() if key != "role")
    return 1 if said or not (choice.get("finish_reason") or "role" in delta) else 0


def allow_files(wanted: int) -> None:
    """Raise the limit of open files, a socket being one, to `wanted` or as near as the hard limit lets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))


class Client:
    """At most `concurrency` requests are in flight; the others wait their turn, in order.

    `connect_timeout_s` is for the connection, `timeout_s` for one attempt from sending to the last byte. The first is
    retried, the second is not: the server was there and still busy.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        connect_timeout_s: float = 10.0,
        timeout_s: float = 600.0,
        retry: Retry | None = None,
        seed: int | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url!r} is no address of a server; give it as http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.retry = retry or Retry()
        self._random = random.Random(seed)
        self._turn = asyncio.Semaphore(concurrency)
        allow_files(concurrency + 64)
        self._timeouts = (connect_timeout_s, timeout_s)
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        connect_s, total_s = self._timeouts
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the limit is ours: a wait inside aiohttp would hide in TTFT
            timeout=aiohttp.ClientTimeout(total=total_s, sock_connect=connect_s),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session
        await self._session.close()

    # ------------------------------------------------------------ what one calls

    async def complete(self, prompt: str | Sequence[int], *, model: str, **options: Any) -> Answer:
        """POST /v1/completions, streamed: one answer. `prompt` is text or token ids, `options` the API's own fields."""
        return await self._collect("/v1/completions", {"model": model, "prompt": prompt, **options})

    async def chat(self, messages: Sequence[Json], *, model: str, **options: Any) -> Answer:
        """POST /v1/chat/completions, streamed."""
        return await self._collect("/v1/chat/completions", {"model": model, "messages": messages, **options})

    async def models(self) -> list[str]:
        """Names of what the server serves."""
        reply = await self.get("/v1/models")
        return [model["id"] for model in reply.body["data"]]

    async def get(self, path: str) -> Reply:
        return await self._json("GET", path, None)

    async def post(self, path: str, body: Json) -> Reply:
        return await self._json("POST", path, body)

    def stream(self, path: str, body: Json) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Chunk]]:
        """The chunks of an answer as they come.

        Leaving the block, at the end, by `break`, an error or cancellation, closes the connection of an answer that is
        not complete: that is how the server learns that nobody wants the rest. Until the first chunk with a token, a
        failure is retried like any other; after it, it is raised from the iteration.
        """
        return self._opened(path, body, Answer(time.perf_counter()))

    # ------------------------------------------------------------ how it is done

    async def _collect(self, path: str, body: Json) -> Answer:
        answer = Answer(time.perf_counter())
        parts: list[str] = []
        closed_s: float | None = None  # by a chunk that only tells the finish reason, or so it seems
        async with self._opened(path, body, answer) as chunks:
            async for chunk in chunks:
                parts.append(chunk.text)
                if chunk.tokens:
                    answer.arrivals_s.append(chunk.at_s)
                    answer.tokens.append(chunk.tokens)
                elif chunk.finish_reason:
                    closed_s = chunk.at_s
                answer.finish_reason = chunk.finish_reason or answer.finish_reason
                if usage := chunk.body.get("usage"):
                    answer.prompt_tokens = usage.get("prompt_tokens")
                    answer.completion_tokens = usage.get("completion_tokens")
        if closed_s is not None and sum(answer.tokens) < (answer.completion_tokens or 0):
            answer.arrivals_s.append(closed_s)  # it brought the last token, of which nothing can be shown
            answer.tokens.append(1)
        answer.text = "".join(parts)
        return answer

    @contextlib.asynccontextmanager
    async def _opened(self, path: str, body: Json, answer: Answer) -> AsyncIterator[AsyncIterator[Chunk]]:
        options = {"include_usage": True, **(body.get("stream_options") or {})}
        data = json.dumps({**body, "stream": True, "stream_options": options}).encode()

        async def begin() -> tuple[aiohttp.ClientResponse, AsyncIterator[Chunk], list[Chunk]]:
            answer.sent_s = time.perf_counter()
            response = await self._send("POST", path, data)
            try:
                chunks = _chunks(response, what)
                read: list[Chunk] = []
                async for chunk in chunks:
                    read.append(chunk)
                    if chunk.tokens:
                        break
            except BaseException:
                response.close()
                raise
            return response, chunks, read

        async def all_chunks() -> AsyncIterator[Chunk]:
            for chunk in read:
                yield chunk
            async for chunk in rest:
                yield chunk

        what = f"POST {self.url}{path}"
        async with self._turn:
            (response, rest, read), answer.attempts = await self._retried(begin)
            try:
                yield all_chunks()
            finally:
                response.close()  # a no-op after the last byte: the connection has gone back to the pool

    async def _json(self, method: str, path: str, body: Json | None) -> Reply:
        data = None if body is None else json.dumps(body).encode()

        async def once() -> tuple[Json, str | None]:
            response = await self._send(method, path, data)
            try:
                with _one_line(f"{method} {self.url}{path}"):
                    return _parsed(await response.read()), response.headers.get("x-request-id")
            finally:
                response.close()

        async with self._turn:
            (answer, request_id), attempts = await self._retried(once)
        return Reply(answer, request_id, attempts)

    async def _send(self, method: str, path: str, data: bytes | None) -> aiohttp.ClientResponse:
        """The response, its body unread; RequestFailed unless it is a 200."""
        if self._session is None:
            raise RuntimeError("use the client inside `async with`")
        what = f"{method} {self.url}{path}"
        with _one_line(what):
            response = await self._session.request(method, self.url + path, data=data)
            if response.status == 200:
                return response
            try:
                raise _refused(response, await response.read())
            finally:
                response.close()

    async def _retried(self, once: Callable[[], Awaitable[T]]) -> tuple[T, int]:
        """What `once` returns, and the number of attempts. Who waits to try again keeps its turn: others wait too."""
        for attempt in itertools.count(1):
            try:
                return await once(), attempt
            except RequestFailed as error:
                error.attempts = attempt
                if not self.retry.allows(attempt, error):
                    raise
                wait_s = self.retry.wait_s(attempt, error.retry_after_s, self._random)
            await asyncio.sleep(wait_s)
        raise AssertionError


async def _chunks(response: aiohttp.ClientResponse, what: str) -> AsyncIterator[Chunk]:
    """The stream's events up to [DONE]. RequestFailed for an error event, and for an end before [DONE]."""
    parser = sse.Parser()
    with _one_line(what):
        async for piece in response.content.iter_any():
            at_s = time.perf_counter()
            for event in parser.feed(piece):
                if event.data == "[DONE]":
                    await response.read()  # the end of the body: the connection can be used again
                    return
                yield _chunk(event, at_s)
        raise RequestFailed("the stream ended before [DONE]: the server or a proxy cut it short", retryable=True)


def _chunk(event: sse.Event, at_s: float) -> Chunk:
    body = _parsed(event.data)
    if event.name == "error" or body.get("error"):
        error = body["error"] if isinstance(body.get("error"), dict) else {"message": str(body.get("error") or body)}
        code = error.get("code")
        status = code if isinstance(code, int) else None
        raise RequestFailed(
            f"the server broke the stream off: {error.get('message')}",
            status=status,
            error=error,
            retryable=status is not None and _worth_retrying(status),
        )
    choices = body.get("choices") or []
    if not choices:
        return Chunk(at_s, "", 0, None, body)
    choice = choices[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return Chunk(at_s, text, sum(token_count(c) for c in choices), choice.get("finish_reason"), body)


def _parsed(text: str | bytes) -> Json:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        shown = text if isinstance(text, str) else text.decode(errors="replace")
        raise RequestFailed(f"the server sent no JSON object but {shown[:100]!r}; is it an OpenAI-compatible server?")
    return value


def _worth_retrying(status: int) -> bool:
    return status == 429 or status >= 500


def _refused(response: aiohttp.ClientResponse, body: bytes) -> RequestFailed:
    """OpenAI's {"error": {"message": …}} or FastAPI's {"detail": …}, else the body's beginning."""
    error: Any = None
    with contextlib.suppress(ValueError):
        error = json.loads(body)
    if isinstance(error, dict):
        error = error.get("error") or error.get("detail") or error
    if not isinstance(error, dict):
        error = {"message": str(error or body[:300].decode(errors="replace").strip() or response.reason)}
    return RequestFailed(
        f"HTTP {response.status}: {error.get('message', error)}",
        status=response.status,
        error=error,
        retryable=_worth_retrying(response.status),
        retry_after_s=_retry_after_s(response.headers.get("Retry-After")),
    )


def _retry_after_s(header: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date. None for what is neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """aiohttp's errors as RequestFailed, each with what to look at; and every failure tells what was asked."""
    try:
        yield
    except RequestFailed as error:
        if not error.args[0].startswith(what):
            error.args = (f"{what}: {error.args[0]}",)
        raise
    except aiohttp.ConnectionTimeoutError:
        message = "no connection in time; check the address, and whether a firewall drops packets"
        raise RequestFailed(f"{what}: {message}", retryable=True) from None
    except TimeoutError:
        message = "no complete answer in time; ask for fewer tokens, allow more time, or see what keeps the server busy"
        raise RequestFailed(f"{what}: {message}") from None
    except aiohttp.ClientConnectorError as error:
        message = f"cannot connect ({os.strerror(error.errno) if error.errno else error.os_error}); is the server up?"
        raise RequestFailed(f"{what}: {message}", retryable=True) from None
    except (aiohttp.ClientError, OSError) as error:
        message = f"the connection broke ({type(error).__name__}: {error}); look at the server's log"
        raise RequestFailed(f"{what}: {message}", retryable=True) from None
