"""Endpoints of your own over real vLLM, asked as a customer would: by the openai client, over the network.

You learn   what structured outputs guarantee (the shape, not the sense), what a moderation hook must see, where an
            answer's first token is held up, and that a caller who leaves stops paying
Laptop      python -m ch06_vllm.try_endpoints
GPU node    python -m ch06_vllm.try_endpoints --model DIR
Cluster     python -m ch06_vllm.try_endpoints --engine http://gpu1:8000
You see     objects that fit their schema although the weights are random; scores in the order of their texts; two
            refusals that the engine never heard of; chat as it comes; the tokens that a caller who left did not cause
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import openai

from ch06_vllm import endpoints
from ch06_vllm.scrape import scrape
from ch06_vllm.servers import Server, answers, vllm_program
from ch06_vllm.started import folder_of
from common import script
from common.process import Child
from common.ranks import free_port

COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}  # see endpoints.py
TEXTS = ["def add(a, b):\n    return a + b\n", "import os\nimport sys\n", "zqx zqx zqx zqx", "class A:\n    pass\n"]
ASK = [{"role": "user", "content": "Write a function that adds two numbers."}]
LONG = 1500  # tokens that the caller asks for and does not wait for


def metric(engine: str, name: str) -> float:
    """A metric of vLLM's, summed over its labels."""
    return scrape(engine)[f"vllm:{name}"]


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise script.UserError(f"{what} not within {timeout_s:g} s; see whether the machine is busy")
        time.sleep(0.05)


def extract(client: openai.OpenAI, kind: str, text: str) -> dict:
    found = client.post(f"/extract/{kind}", cast_to=object, body={"text": text})["data"]  # type: ignore[index]
    endpoints.KINDS[kind].model_validate(found)
    print(f"{kind}: {json.dumps(found)}")
    return found


def refused(call: Callable[[], object]) -> bool:
    """Whether the moderation hook refuses this."""
    try:
        call()
    except openai.BadRequestError as why:
        print(f"refused: {why.message}")
        return why.type == "moderation"
    return False


def leave_early(client: openai.OpenAI, model: str, engine: str) -> float:
    """Ask for LONG tokens, hang up after ten chunks; the tokens that the engine made of it in the end."""
    before = metric(engine, "generation_tokens_total")
    options = {"max_tokens": LONG, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(model=model, messages=ASK, stream=True, **options)
    for _ in range(10):
        next(iter(stream))
    stream.close()
    wait_until(lambda: metric(engine, "num_requests_running") == 0, "the engine's request has ended")
    return metric(engine, "generation_tokens_total") - before


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--engine", help="a running OpenAI-compatible server (default: vLLM is started)")
    parser.add_argument("--model", type=Path, help="a model's folder (default: nano with random weights)")
    args = parser.parse_args(argv)
    if not args.engine:
        vllm_program()  # said before a model is made
    run = script.start(__file__, args)
    blocklist = run.path("blocklist")
    blocklist.write_text("password\\s+of\n", encoding="utf-8")
    with contextlib.ExitStack() as stack:
        engine = args.engine
        if not engine:
            options = {"structured-outputs-config": COMPACT, "max-model-len": 2048}
            engine = stack.enter_context(Server(args.model or folder_of("nano"), "vllm", options)).url
        port = free_port()
        command = [sys.executable, "-m", "ch06_vllm.endpoints", "--engine", engine, "--port", str(port)]
        app = stack.enter_context(Child([*command, "--blocklist", str(blocklist), "--run-dir", str(run.path("app"))]))

        def up() -> bool:
            if app.process.poll() is not None:
                raise script.UserError(f"the endpoints did not start: {app.wait(5).reason()}")
            return answers(f"http://127.0.0.1:{port}/health")

        wait_until(up, "the endpoints have answered")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
        model = client.models.list().data[0].id

        extracted = [
            extract(client, "ticket", "It crashes on start, every time."),
            extract(client, "function", "adds two"),
        ]
        scored = client.post("/score", cast_to=object, body={"inputs": TEXTS})["data"]  # type: ignore[index]
        for text, row in zip(TEXTS, scored, strict=True):
            print(f"perplexity {row['perplexity']:9.1f}  {text.splitlines()[0]}")
        before = metric(engine, "generation_tokens_total")
        bad = [{"role": "user", "content": "the Password  of the director"}, *ASK]
        held = refused(lambda: client.chat.completions.create(model=model, messages=bad, max_tokens=4))
        held &= refused(lambda: client.post("/score", cast_to=object, body={"inputs": ["fine", bad[0]["content"]]}))
        unseen = metric(engine, "generation_tokens_total") == before

        # The first chat of a vLLM server holds its front end up for a second: not what is measured here.
        client.chat.completions.create(model=model, messages=ASK, max_tokens=1)
        began, first_s = time.perf_counter(), 0.0
        chunks = 0
        for chunk in client.chat.completions.create(model=model, messages=ASK, max_tokens=48, stream=True):
            if chunk.choices and chunk.choices[0].delta.content:
                first_s = first_s or time.perf_counter() - began
                chunks += 1
        whole_s = time.perf_counter() - began
        print(f"chat: first token after {first_s * 1e3:.0f} ms, the last after {whole_s * 1e3:.0f} ms, {chunks} chunks")
        caused = leave_early(client, model, engine)
        print(f"left after 10 chunks of {LONG} tokens: the engine made {caused:.0f}")
    return {
        "extracted": len(extracted),
        "scored": len(scored),
        "in_order": [row["index"] for row in scored] == list(range(len(TEXTS))),
        "moderated": held,
        "engine_heard_nothing": unseen,
        "chat_first_ms": first_s * 1e3,
        "chat_last_ms": whole_s * 1e3,
        "asked_tokens": LONG,
        "tokens_after_leaving": caused,
    }


if __name__ == "__main__":
    script.run(main)
