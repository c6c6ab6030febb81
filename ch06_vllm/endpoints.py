"""Endpoints of your own in front of an engine: extraction into a schema, scores of many texts, moderation, chat.

You learn   what an application server owes its callers: checked input, a checked answer of the engine (or a clear 502),
            streaming that ends at the engine when the caller leaves, errors in the shape that clients know
Laptop      python -m ch06_vllm.endpoints --engine http://127.0.0.1:8000 --port 9000
GPU node    the same; the engine may run on any host: --engine http://gpu1:8000
You see     GET /docs lists what it serves:
    POST /v1/chat/completions   OpenAI's chat, passed on, streamed or not
    POST /v1/extract/{kind}     {"text"} to a checked object; the engine may only write what the schema allows
    POST /v1/score              {"inputs": […]} to the log-probability of each, in order (what perplexity is made of)
    POST /v1/embeddings         passed on: works where the engine serves an embedding model, else the engine's own error

Every text is moderated before the engine sees any of it: --blocklist is a file of regular expressions, one a line.
JSON allows blanks without end between its parts, and a weak model writes them until max_tokens: start vLLM with
structured-outputs-config {"backend": "xgrammar", "disable_any_whitespace": true}.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from ch06_vllm.client import Client, Json, RequestFailed
from ch06_vllm.disconnect import gone, unless_gone
from ch06_vllm.servers import HOST, bind
from common import script
from common.script import UserError

Moderate = Callable[[str], str | None]  # why a text is refused, or None


class Ticket(BaseModel):
    """What a message to a help desk is about."""

    model_config = ConfigDict(extra="forbid")
    category: Literal["bug", "question", "feature"]
    urgency: int = Field(ge=1, le=5)
    reproducible: bool


class Function(BaseModel):
    """The signature of a Python function that a text describes."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-z_]{1,16}$")
    arguments: list[Annotated[str, Field(pattern=r"^[a-z_]{1,12}$")]] = Field(max_length=4)


KINDS: dict[str, type[BaseModel]] = {"ticket": Ticket, "function": Function}


class Extract(BaseModel):
    text: str = Field(min_length=1)
    max_tokens: int = Field(256, ge=1)


class Score(BaseModel):
    inputs: list[str] = Field(min_length=1, max_length=2048)


class Refused(Exception):
    """An answer of this server's own, in OpenAI's shape."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


def error(status: int, message: str, kind: str, **more: Any) -> JSONResponse:
    """{"error": {"message", "type", "param", "code"}}, as OpenAI's clients read it."""
    return JSONResponse({"error": {"param": None, "code": None, **more, "message": message, "type": kind}}, status)


def texts(body: Json) -> Iterable[str]:
    """Everything in a chat or embedding request that a person may have written."""
    for message in body.get("messages") or []:
        content = message.get("content") or ""
        parts = content if isinstance(content, list) else [{"text": content}]
        yield from (str(part.get("text") or "") for part in parts)
    asked = body.get("input") or []
    yield from map(str, [asked] if isinstance(asked, str) else asked)


def make_app(engine: Client, model: str, moderate: Moderate) -> FastAPI:
    """The application. `engine` is opened and closed with it; `model` is what its own endpoints ask for."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield

    app = FastAPI(title="Endpoints over an engine", lifespan=lifespan)

    def check(given: Iterable[str]) -> None:
        for text in given:
            if reason := moderate(text):
                raise Refused(400, "moderation", f"refused before the engine saw it: {reason}")

    app.add_exception_handler(ClientDisconnect, gone)

    @app.exception_handler(Refused)
    async def refused(_: Request, why: Refused) -> JSONResponse:
        return error(why.status, str(why), why.kind)

    @app.exception_handler(RequestFailed)
    async def engine_failed(_: Request, why: RequestFailed) -> JSONResponse:
        if why.status is None:
            return error(502, f"the engine did not answer: {why}", "engine_unavailable")
        told = {key: why.error.get(key) for key in ("param", "code")}
        return error(why.status, why.error.get("message") or str(why), why.error.get("type") or "engine_error", **told)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, why: RequestValidationError) -> JSONResponse:
        first = why.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return error(422, f"{where}: {first['msg']}", "invalid_request_error", param=where)

    @app.get("/health")
    async def health() -> Json:
        return {"engine": engine.url, "models": await engine.models()}

    @app.get("/v1/models")
    async def models() -> Json:
        return (await engine.get("/v1/models")).body

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: Annotated[Json, Body()]) -> Any:
        check(texts(body))
        if not body.get("stream"):
            return (await unless_gone(request.receive, engine.post("/v1/chat/completions", body))).body
        body["stream_options"] = body.get("stream_options") or {"include_usage": False}  # as the caller asked
        async with contextlib.AsyncExitStack() as opening:
            stream = engine.stream("/v1/chat/completions", body)
            # errors up to the first token have a status
            chunks = await unless_gone(request.receive, opening.enter_async_context(stream))
            opened = opening.pop_all()

        async def events() -> AsyncIterator[str]:
            async with opened:  # left when the caller leaves: the engine's request ends too
                try:
                    async for chunk in chunks:
                        yield f"data: {json.dumps(chunk.body)}\n\n"
                except RequestFailed as why:
                    broken = {"message": str(why), "type": "engine_error", "code": why.status or 502}
                    yield f"data: {json.dumps({'error': broken})}\n\n"
                yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: Annotated[Json, Body()]) -> Json:
        check(texts(body))
        return (await unless_gone(request.receive, engine.post("/v1/embeddings", body))).body

    @app.post("/v1/extract/{kind}")
    async def extract(request: Request, kind: str, asked: Extract) -> Json:
        if kind not in KINDS:
            raise Refused(404, "invalid_request_error", f"no kind {kind!r}; there are {', '.join(KINDS)}")
        check([asked.text])
        schema = {"name": kind, "schema": KINDS[kind].model_json_schema(), "strict": True}
        doc = " ".join((KINDS[kind].__doc__ or "").split())
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"{doc} Answer in JSON.\n\n{asked.text}"}],
            "response_format": {"type": "json_schema", "json_schema": schema},
            "max_tokens": asked.max_tokens,
            "temperature": 0.0,
        }
        reply = (await unless_gone(request.receive, engine.post("/v1/chat/completions", body))).body
        choice = reply["choices"][0]
        try:
            found = KINDS[kind].model_validate_json(choice["message"]["content"] or "")
        except ValidationError as wrong:
            cut = "; it was cut off at max_tokens, allow more" if choice.get("finish_reason") == "length" else ""
            raise Refused(
                502, "engine_error", f"the engine's answer is no {kind}: {wrong.errors()[0]['msg']}{cut}"
            ) from None
        return {"object": kind, "data": found.model_dump(), "usage": reply.get("usage")}

    @app.post("/v1/score")
    async def score(request: Request, asked: Score) -> Json:
        check(asked.inputs)

        async def one(index: int, text: str) -> Json:
            body = {"model": model, "prompt": text, "max_tokens": 1, "prompt_logprobs": 0}
            given = (await engine.post("/v1/completions", body)).body["choices"][0].get("prompt_logprobs")
            if given is None:
                raise Refused(502, "engine_error", "the engine knows no prompt_logprobs")
            found = [next(iter(token.values()))["logprob"] for token in given if token]  # the first token has none
            row = {"object": "score", "index": index, "logprob": sum(found), "scored_tokens": len(found)}
            return row | {"perplexity": math.exp(-sum(found) / len(found)) if found else None}

        async def all_of_them() -> list[Json]:
            tasks = [asyncio.create_task(one(index, text)) for index, text in enumerate(asked.inputs)]
            try:
                return await asyncio.gather(*tasks)  # in order; the client bounds how many are in flight
            finally:
                for task in tasks:
                    task.cancel()  # the others, where one has failed

        return {"object": "list", "model": model, "data": await unless_gone(request.receive, all_of_them())}

    return app


def blocklist(path: Path | None) -> Moderate:
    """Refuses what matches any of a file's regular expressions (one a line, # begins a comment); case is ignored."""
    patterns = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except OSError as why:
        raise UserError(f"cannot read {path} ({why.strerror}); --blocklist is a file of regular expressions") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                patterns.append(re.compile(line.strip(), re.IGNORECASE))
            except re.error as why:
                raise UserError(f"{path}:{number} is no regular expression ({why}); mend it") from None

    def moderate(text: str) -> str | None:
        return next(("it matches the blocklist" for pattern in patterns if pattern.search(text)), None)

    return moderate


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--engine", default="http://127.0.0.1:8000", help="an OpenAI-compatible server")
    parser.add_argument("--served-model", help="the name to ask it for (default: the first that it lists)")
    parser.add_argument("--port", type=script.at_least(1), default=9000)
    parser.add_argument("--blocklist", type=Path)
    parser.add_argument("--concurrency", type=script.at_least(1), default=64, help="requests at the engine at a time")
    args = parser.parse_args(argv)
    moderate = blocklist(args.blocklist)
    bind(HOST, args.port).close()
    engine = {"url": args.engine, "api_key": os.environ.get("OPENAI_API_KEY"), "concurrency": args.concurrency}

    async def first_model() -> str:
        async with Client(**engine) as client:
            return (await client.models())[0]

    model = args.served_model or asyncio.run(first_model())
    app = make_app(Client(**engine), model, moderate)
    uvicorn.Server(uvicorn.Config(app, host=HOST, port=args.port, log_level="warning")).run()
    return {"model": model, "port": args.port}


if __name__ == "__main__":
    script.run(main)
