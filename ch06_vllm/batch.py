"""Many prompts, one file in and one file out: bounded concurrency, order kept, goes on after kill -9 where it was.

You learn   what a batch needs beyond a loop: a limit on what is in flight, a journal that survives kill -9 (append,
            fsync, tolerate a torn last line), an output that appears complete or not at all, failures kept as rows
Laptop      python -m ch06_vllm.batch ch06_vllm/configs/prompts.jsonl --serve vllm:nano
            python -m ch06_vllm.batch prompts.jsonl answers.jsonl --url http://127.0.0.1:8000 --concurrency 16
GPU node    python -m ch06_vllm.batch prompts.jsonl answers.jsonl --concurrency 256
You see     answers.jsonl in the order of prompts.jsonl. Kill it and start it again: it goes on where it was

The format is that of OpenAI's batch files: one line a request, {"custom_id": …, "method": "POST", "url":
"/v1/chat/completions", "body": {"model": …, …}}. An answer is {"id", "custom_id", "response": {"status_code",
"request_id", "body"}, "error"}, error null where it went well. answers.jsonl.journal keeps what is answered so far:
what it has is not sent again unless it was changed, or failed and --retry-failed is given. Remove the journal to begin
anew. A kill repeats at most the requests that were in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ch06_vllm.client import Client, RequestFailed, Retry
from ch06_vllm.started import HELP, engine_and_model, server
from common import logs, script
from common.script import UserError

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")


@dataclass(frozen=True)
class Request:
    custom_id: str
    path: str
    body: dict[str, Any]

    @functools.cached_property
    def id(self) -> str:
        """A hash of what is asked: an answer in the journal counts only for the same question."""
        asked = json.dumps([self.custom_id, self.path, self.body], sort_keys=True)
        return f"batch_req_{hashlib.sha256(asked.encode()).hexdigest()[:24]}"


def read_requests(path: Path) -> list[Request]:
    """All requests of a batch file. UserError names every bad line, before anything is sent."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028, which JSON may hold
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a JSONL file of requests") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    requests: list[Request] = []
    bad: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = parse(line)
            if request.custom_id in first_line:
                raise ValueError(f"custom_id {request.custom_id!r} is that of line {first_line[request.custom_id]} too")
            first_line[request.custom_id] = number
            requests.append(request)
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        more = f" (and {len(bad) - 5} lines more)" if len(bad) > 5 else ""
        raise UserError(f"{', '.join(bad[:5])}{more}; nothing was sent, mend the file")
    if not requests:
        raise UserError(f"{path} holds no request; one line is one request")
    return requests


def parse(line: str) -> Request:
    """One line. ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    custom_id, path, body = row.get("custom_id"), row.get("url"), row.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id is not a string")
    if row.get("method") != "POST":
        raise ValueError(f"method is {row.get('method')!r}, not POST")
    if path not in PATHS:
        raise ValueError(f"url is {path!r}, not one of {' '.join(PATHS)}")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise ValueError("body is no object with a model")
    if body.get("stream"):
        raise ValueError("a batch does not stream")
    return Request(custom_id, path, body)


class Journal:
    """Answers as they came, one JSON line each, on the disk before `append` returns. One process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}); choose another output") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            raise UserError(f"another run is writing {path}; wait for it, or choose another output") from None
        script.sync(path.parent)  # the name itself
        self._lock = asyncio.Lock()
        self._waiting: list[bytes] = []

    def read(self) -> Iterator[dict[str, Any]]:
        """Its entries. What a kill left of a last line is cut off first."""
        self._file.seek(0)
        written = self._file.read()
        whole = written.rfind(b"\n") + 1
        self._file.truncate(whole)
        for number, line in enumerate(written[:whole].splitlines(), 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise UserError(f"{self.path}:{number} is no entry of a journal; move the file away") from None

    async def append(self, entry: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(entry).encode() + b"\n")
        async with self._lock:  # whoever has it writes for all who wait behind it: one fsync for many lines
            lines, self._waiting = self._waiting, []
            if lines:
                await asyncio.to_thread(self._write, b"".join(lines))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


async def answer(client: Client, request: Request) -> tuple[dict[str, Any], int]:
    """The output line of a request, and the attempts that it took."""
    row: dict[str, Any] = {"id": request.id, "custom_id": request.custom_id}
    try:
        reply = await client.post(request.path, request.body)
    except RequestFailed as error:
        code = error.error.get("code") or error.error.get("type") or "no_answer"
        response = error.status and {"status_code": error.status, "request_id": "", "body": {"error": error.error}}
        return {**row, "response": response, "error": {"code": str(code), "message": str(error)}}, error.attempts
    response = {"status_code": 200, "request_id": reply.request_id or "", "body": reply.body}
    return {**row, "response": response, "error": None}, reply.attempts


async def run_batch(client: Client, requests: Sequence[Request], journal: Journal, concurrency: int) -> int:
    """Answer all requests into the journal; returns the number of attempts.

    A request is finished when its answer is on the disk, and only then is another begun: a kill loses, and the next run
    repeats, at most `concurrency` requests.
    """
    waiting = iter(requests)
    began = time.monotonic()
    done = failed = attempts = 0
    with logs.Progress(len(requests), "requests") as progress:

        async def one_after_another() -> None:
            nonlocal done, failed, attempts
            for request in waiting:
                row, tries = await answer(client, request)
                await journal.append(row)
                done, failed, attempts = done + 1, failed + (row["error"] is not None), attempts + tries
                progress.update(done, f"{done / (time.monotonic() - began):.1f}/s, {failed} failed")

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return attempts


async def send(url: str, args: argparse.Namespace, requests: Sequence[Request], journal: Journal) -> int:
    limits = {"concurrency": args.concurrency, "timeout_s": args.timeout_s, "retry": Retry(attempts=args.attempts)}
    async with Client(url, api_key=os.environ.get("OPENAI_API_KEY"), seed=args.seed, **limits) as client:
        await client.models()  # a wrong address is one error, not one for each request
        return await run_batch(client, requests, journal, args.concurrency)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path, nargs="?", help="default: answers.jsonl in the run folder")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--serve", type=engine_and_model, help=f"start this first, instead of --url: {HELP}")
    parser.add_argument("--concurrency", type=script.at_least(1), default=16, help="requests in flight")
    parser.add_argument("--attempts", type=script.at_least(1), default=5, help="for one request, with backoff between")
    parser.add_argument("--timeout-s", type=script.positive, default=600.0, help="for one attempt")
    parser.add_argument("--retry-failed", action="store_true", help="send again what the journal has as failed")
    args = parser.parse_args(argv)
    requests = read_requests(args.input)
    if args.output and (args.output.is_dir() or args.output.resolve() == args.input.resolve()):
        raise UserError(f"{args.output} cannot be the output; name a new file")
    run = script.start(__file__, args)
    output = args.output or run.path("answers.jsonl")
    journal = Journal(output.with_name(output.name + ".journal"))
    rows = {row["id"]: row for row in journal.read()}
    finished = {key for key, row in rows.items() if not (row["error"] and args.retry_failed)}
    left = [request for request in requests if request.id not in finished]
    with server(args.serve) if args.serve and left else contextlib.nullcontext() as running:
        began = time.monotonic()
        attempts = asyncio.run(send(running.url if running else args.url, args, left, journal)) if left else 0
        seconds = time.monotonic() - began
    rows |= {row["id"]: row for row in journal.read()}
    answers = [rows[request.id] for request in requests]
    with script.atomic_write(output) as file:
        file.writelines(json.dumps(row) + "\n" for row in answers)
    journal.close()
    failed = [row for row in answers if row["error"]]
    if failed:
        logs.get_logger().warning(
            "some requests failed; --retry-failed sends them again", first=failed[0]["error"]["message"]
        )
    usage = [(row["response"]["body"].get("usage") or {}) for row in answers if not row["error"]]
    return {
        "requests": len(requests),
        "answered": len(answers) - len(failed),
        "failed": len(failed),
        "sent": len(left),
        "from_journal": len(requests) - len(left),
        "attempts": attempts,
        "seconds": seconds,
        "requests_per_s": len(left) / seconds if left else 0.0,
        "completion_tokens": sum(u.get("completion_tokens") or 0 for u in usage),
    }


if __name__ == "__main__":
    script.run(main)
