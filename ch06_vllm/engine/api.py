"""The engine's routes: from a request's body to tokens, from tokens to an answer, whole or event by event.

Who closes the connection cancels what it asked for. A full queue, a shutdown and a dead engine each have their answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import signal
import socket
import time
from collections.abc import AsyncIterator, Generator, Sequence
from typing import Any

import uvicorn
import uvloop
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ch06_vllm.disconnect import gone, unless_gone
from ch06_vllm.engine.async_engine import AsyncEngine, EngineDead, Mailbox
from ch06_vllm.engine.protocol import (
    DONE,
    ChatBody,
    ChatReply,
    CompletionBody,
    Reply,
    RequestError,
    StreamOptions,
    error_body,
    parse,
    sse,
    usage,
)
from ch06_vllm.engine.request import Output, SamplingParams

Json = dict[str, Any]
Wanted = tuple[Sequence[int], SamplingParams]
INLINE_CHARACTERS = 4096  # so much text is tokenised at once; more of it in a thread, which others need not wait for


class Service:
    """The routes of one engine."""

    def __init__(self, engine: AsyncEngine, args: argparse.Namespace) -> None:
        self.engine, self.args, self.model = engine, args, args.served_model_name
        self.tokenizer = engine.engine.tokenizer
        self.encoder = self.tokenizer.backend_tokenizer
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.max_len = engine.engine.max_len
        self.longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)  # in characters
        self.draining = False
        self.started = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        handlers = {
            RequestError: self.refuse,
            EngineDead: self.refuse,
            HTTPException: self.refuse,
            ClientDisconnect: gone,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def refuse(self, request: Request, error: Exception) -> Response:
        if isinstance(error, RequestError):
            headers = {503: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(error.status)
            return JSONResponse(error.body, error.status, headers)
        if isinstance(error, HTTPException):
            return JSONResponse(error_body(error.detail, error.status_code), error.status_code, error.headers)
        return JSONResponse(error_body(str(error), 500, kind="InternalServerError"), 500)

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self.draining or self.engine.dead else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self.engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        card = {"id": self.model, "object": "model", "created": self.started, "owned_by": "ch06_vllm", "parent": None}
        card |= {"root": self.args.model, "max_model_len": self.max_len}
        return JSONResponse({"object": "list", "data": [card]})

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self.read(request))
        self.check_model(body.model)
        limit = 16 if body.max_tokens is None else body.max_tokens
        params = body.sampling(limit, body.logprobs, self.engine.engine.default_sampling)
        prompts: Any = body.prompts()
        if isinstance(prompts[0], str):
            prompts = await self.tokens(prompts)
        wanted = [(prompt, each) for prompt in prompts for each in body.choices(params)]
        return await self.answer(request, body, Reply(self.model, self.encoder), wanted)

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self.read(request))
        self.check_model(body.model)
        (prompt,) = await self.tokens([self.render(body)], special=False)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        rest = max(1, self.max_len - len(prompt))
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = body.sampling(rest if limit is None else limit, logprobs, self.engine.engine.default_sampling)
        wanted = [(prompt, each) for each in body.choices(params)]
        return await self.answer(request, body, ChatReply(self.model, self.encoder), wanted)

    # ------------------------------------------------------------ from a body to tokens

    async def read(self, request: Request) -> bytes:
        """
        Raises:
            RequestError: the body is too large, of which no more is read, or does not come.
        """
        limit = int(self.args.max_body_mib * 2**20)
        too_large = RequestError(
            f"the body is larger than {self.args.max_body_mib:g} MiB", 413, kind="Content Too Large"
        )
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.args.request_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError("the body did not come in time", 408, kind="Request Timeout") from None
        return bytes(body)

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            raise RequestError(f"The model `{name}` does not exist.", 404, "model", "NotFoundError")

    async def tokens(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """
        Raises:
            RequestError: so many characters do not fit the context, whatever tokens they make.
        """
        longest = max(map(len, texts))
        if longest > self.max_len * self.longest_token:
            raise RequestError(
                f"the prompt's {longest} characters are more tokens than the model's context of {self.max_len}; "
                "shorten it",
                param="prompt",
            )
        encode = functools.partial(self.encoder.encode_batch, texts, add_special_tokens=special)
        inline = sum(map(len, texts)) <= INLINE_CHARACTERS
        return [encoded.ids for encoded in (encode() if inline else await asyncio.to_thread(encode))]

    def render(self, body: ChatBody) -> str:
        """
        Raises:
            RequestError: the model has no chat template, or it refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        options = {"tokenize": False, "add_generation_prompt": True, **(body.chat_template_kwargs or {})}
        try:
            text: str = self.tokenizer.apply_chat_template(body.plain_messages(), **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from None
        return text

    # ------------------------------------------------------------ from tokens to an answer

    async def answer(
        self, request: Request, body: CompletionBody | ChatBody, reply: Reply, wanted: Sequence[Wanted]
    ) -> Response:
        limit = self.args.max_num_queued_reqs
        if self.draining:
            raise RequestError("the server is shutting down", 503, kind="ServiceUnavailableError")
        if limit and self.engine.num_requests + len(wanted) > limit:
            raise RequestError(f"{limit} requests are in flight already", 503, kind="Service Unavailable")
        try:
            outputs = self.engine.submit(wanted, body.priority or 0)
        except ValueError as error:
            raise RequestError(str(error), param="prompt") from None
        if body.stream:
            return EventStream(self.events(body, reply, wanted, outputs), outputs)
        return JSONResponse(await unless_gone(request.receive, self.whole(body, reply, wanted, outputs)))

    async def whole(
        self, body: CompletionBody | ChatBody, reply: Reply, wanted: Sequence[Wanted], outputs: Mailbox
    ) -> Json:
        answers = [Output("") for _ in wanted]
        with outputs:
            async for number, output in outputs:
                answers[number].add(output)
        ids = body.return_token_ids
        extras = [
            {"token_ids": answer.token_ids, "prompt_token_ids": list(prompt)} if ids else {}
            for answer, (prompt, _) in zip(answers, wanted, strict=True)
        ]
        count = sum(len(answer.token_ids) for answer in answers)
        prompts = range(0, len(wanted), body.n or 1)  # each counts once, however many answers it has
        told = sum(len(wanted[first][0]) for first in prompts)
        return reply.complete(
            answers, extras, usage(told, count, sum(answers[first].cached_tokens for first in prompts))
        )

    async def events(
        self, body: CompletionBody | ChatBody, reply: Reply, wanted: Sequence[Wanted], outputs: Mailbox
    ) -> AsyncIterator[bytes]:
        """Server-sent events, up to [DONE]; of an engine that dies, its error before that."""
        options = body.stream_options or StreamOptions()
        counts, cached = [0] * len(wanted), [0] * len(wanted)
        prompts = range(0, len(wanted), body.n or 1)
        extra: Json = {}
        try:
            if opening := reply.opening(len(wanted)):
                yield opening
            async for number, output in outputs:
                if body.return_token_ids:
                    extra = {"token_ids": output.token_ids}
                    if not counts[number]:
                        extra["prompt_token_ids"] = list(wanted[number][0])
                counts[number] += len(output.token_ids)
                cached[number] = output.cached_tokens
                yield reply.event(number, output, extra)
            if options.include_usage:
                told = sum(len(wanted[first][0]) for first in prompts)
                yield reply.closing(usage(told, sum(counts), sum(cached[first] for first in prompts)))
        except EngineDead as error:
            yield sse(error_body(str(error), 500, kind="InternalServerError"))
        yield DONE


class EventStream(Response):
    """Writes events as they come, until the client leaves."""

    def __init__(self, events: AsyncIterator[bytes], outputs: Mailbox) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.events, self.outputs = events, outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.outputs, contextlib.suppress(ClientDisconnect):
            await unless_gone(receive, self.write(send))

    async def write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


# ---------------------------------------------------------------- the process


class Connection(HttpToolsProtocol):
    """uvicorn's, but one that sends no whole head of a request in time is closed: such ones would pile up for ever."""

    patience_s = 30.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.patience_s, lambda: self.cycle or transport.close())


class HttpServer(uvicorn.Server):
    """uvicorn's, but signals are ours, and it says when it answers."""

    ready = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)


def run(engine: AsyncEngine, args: argparse.Namespace, bound: socket.socket) -> str:
    """Serve until SIGTERM, SIGINT or a fault. Returns what the fault was."""
    return uvloop.run(_serve(engine, args, bound))


async def _serve(engine: AsyncEngine, args: argparse.Namespace, bound: socket.socket) -> str:
    service = Service(engine, args)
    Connection.patience_s = args.request_timeout_s
    server = HttpServer(
        uvicorn.Config(
            service.app(), http=Connection, ws="none", lifespan="off", log_level="warning", access_log=False,
            timeout_keep_alive=75, timeout_graceful_shutdown=2, backlog=4096, server_header=False,
        )
    )  # fmt: skip
    server.ready = f"ready: http://{args.host}:{args.port}  model {service.model}"
    fault = ""

    def end(why: str) -> None:
        nonlocal fault
        fault = why
        server.should_exit = True

    async def drain() -> None:
        deadline = time.monotonic() + args.shutdown_timeout
        while engine.num_requests and time.monotonic() < deadline and not engine.dead:
            await asyncio.sleep(0.02)
        engine.on_death = None
        engine.fail("the server is shutting down")
        server.should_exit = True

    def stop() -> None:
        if service.draining:  # asked twice: at once
            args.shutdown_timeout = 0
            engine.fail("the server is shutting down")
        service.draining = True
        tasks.append(asyncio.create_task(drain()))

    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGUSR1, engine.fail, "another rank ended")
    engine.on_death = end
    engine.start()
    await server.serve([bound])
    await engine.stop(1 if fault else 10)
    return fault
