"""Chapter 6's endpoints by the openai client on a real socket: in front of a scripted engine, and of real vLLM."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn

from ch06_vllm import endpoints
from ch06_vllm.client import Client, Retry
from ch06_vllm.servers import Server
from common.ranks import free_port
from common.script import UserError
from tests.openai_fake import Does, FakeServer

HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def served(engine_url: str, model: str, blocklist: Path, concurrency: int = 3) -> Iterator[openai.OpenAI]:
    """The application in a thread, on a port of its own, and a client of it."""
    engine = Client(engine_url, concurrency=concurrency, retry=Retry(attempts=1))
    app = endpoints.make_app(engine, model, endpoints.blocklist(blocklist))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:  # uvicorn has no event for it; the test's own timeout bounds this
            assert thread.is_alive()
            time.sleep(0.005)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def blocklist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moderation") / "blocklist"
    path.write_text("# words that nobody may say\nbad\\s*word\n\n^secret$\n")
    return path


@pytest.fixture(scope="module")
def shared(blocklist: Path) -> Iterator[tuple[FakeServer, openai.OpenAI]]:
    with FakeServer() as engine, served(engine.url, "fake", blocklist) as client:
        yield engine, client


@pytest.fixture
def engine(shared: tuple[FakeServer, openai.OpenAI]) -> FakeServer:
    engine, _ = shared
    engine.script.clear()
    engine.seen.clear()
    engine.contents.clear()
    engine.open_gate()
    engine.gap_s = 0.0
    return engine


@pytest.fixture
def client(shared: tuple[FakeServer, openai.OpenAI]) -> openai.OpenAI:
    return shared[1]


def extract(client: openai.OpenAI, kind: str, text: str = "It crashes, again and again") -> dict:
    return client.post(f"/extract/{kind}", cast_to=object, body={"text": text})


# ---------------------------------------------------------------- chat, passed on


def test_chat_is_passed_on_whole(engine: FakeServer, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=HELLO, max_tokens=3, temperature=0.25)
    assert answer.choices[0].message.content == "ab ç"
    assert answer.usage.completion_tokens == 3
    assert engine.seen[0].body == {"model": "m", "messages": HELLO, "max_tokens": 3, "temperature": 0.25}


def test_streamed_chat_is_passed_on_chunk_by_chunk(engine: FakeServer, client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="m", messages=HELLO, max_tokens=3, stream=True))
    assert [c.choices[0].delta.content for c in chunks if c.choices] == ["", "a", "b ", "ç"]
    assert engine.seen[0].body["stream_options"] == {"include_usage": False}
    options = {"include_usage": True}
    with_usage = list(
        client.chat.completions.create(model="m", messages=HELLO, max_tokens=3, stream=True, stream_options=options)
    )
    assert with_usage[-1].usage.completion_tokens == 3


def test_a_streams_first_token_comes_before_the_answer_is_complete(engine: FakeServer, client: openai.OpenAI) -> None:
    engine.gap_s = 0.001
    stream = client.chat.completions.create(model="m", messages=HELLO, max_tokens=100_000, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    assert engine.seen[0].ended == "running"
    stream.close()
    engine.wait_for(lambda seen: seen[0].ended == "disconnected")  # the engine's request ends with the caller's


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_before_the_first_token_is_passed_on_too(
    engine: FakeServer, client: openai.OpenAI, stream: bool
) -> None:
    engine.close_gate()

    async def leave() -> None:
        body = {"model": "m", "messages": HELLO, "stream": stream}
        async with Client(str(client.base_url)) as caller:
            call = asyncio.create_task(caller.post("/v1/chat/completions", body))
            await asyncio.to_thread(engine.wait_for, len)
            call.cancel()
            await asyncio.wait({call})

    asyncio.run(leave())
    engine.wait_for(lambda seen: [s.ended for s in seen] == ["disconnected"])


@pytest.mark.parametrize("stream", [True, False])
def test_the_engines_errors_are_passed_on_in_openais_shape(
    engine: FakeServer, client: openai.OpenAI, stream: bool
) -> None:
    engine.script.append(Does(status=404))
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HELLO, stream=stream)
    assert missing.value.body == {"message": "scripted 404", "type": "scripted", "param": None, "code": 404}
    engine.script.append(Does(drop=True))
    with pytest.raises(openai.InternalServerError, match="the engine did not answer") as gone:
        client.chat.completions.create(model="m", messages=HELLO, stream=stream)
    assert (gone.value.status_code, gone.value.type) == (502, "engine_unavailable")


def test_an_engine_that_dies_amid_a_stream_is_an_error_in_the_stream(engine: FakeServer, client: openai.OpenAI) -> None:
    engine.script.append(Does(after_tokens=2))
    received = []
    with pytest.raises(openai.APIError, match=r"the connection broke|ended before"):
        for chunk in client.chat.completions.create(model="m", messages=HELLO, stream=True):
            received.append(chunk.choices[0].delta.content)  # noqa: PERF401 - kept up to the error
    assert received == ["", "a", "b "]


# ---------------------------------------------------------------- moderation


def test_what_is_moderated_never_reaches_the_engine(engine: FakeServer, client: openai.OpenAI) -> None:
    def refused(call: object, *args: object, **options: object) -> None:
        with pytest.raises(openai.BadRequestError, match="refused before the engine saw it") as why:
            call(*args, **options)  # type: ignore[operator]
        assert why.value.type == "moderation"

    earlier = [{"role": "user", "content": "a BAD  word"}, {"role": "assistant", "content": "no"}, *HELLO]
    parts = [{"role": "user", "content": [{"type": "text", "text": "fine"}, {"type": "text", "text": "badword"}]}]
    for stream in (True, False):
        for messages in (earlier, parts):
            refused(client.chat.completions.create, model="m", messages=messages, stream=stream)
    refused(extract, client, "ticket", "badword")
    refused(client.post, "/score", cast_to=object, body={"inputs": ["fine", "secret"]})
    refused(client.embeddings.create, model="m", input=["fine", "badword"])
    assert engine.seen == []
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "no secret"}])
    assert len(engine.seen) == 1


def test_a_wrong_blocklist_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("fine\n[\n")
    with pytest.raises(UserError, match=r"list:2 is no regular expression"):
        endpoints.blocklist(tmp_path / "list")
    with pytest.raises(UserError, match="cannot read"):
        endpoints.blocklist(tmp_path / "nothing")
    assert endpoints.blocklist(None)("anything") is None


# ---------------------------------------------------------------- extraction


def test_extraction_asks_for_the_schema_and_checks_what_comes(engine: FakeServer, client: openai.OpenAI) -> None:
    engine.contents.append('{"category": "bug", "urgency": 4, "reproducible": true}')
    found = extract(client, "ticket")
    assert found["data"] == {"category": "bug", "urgency": 4, "reproducible": True}
    wanted = engine.seen[0].body["response_format"]["json_schema"]
    assert wanted["schema"] == endpoints.Ticket.model_json_schema()
    assert engine.seen[0].body["messages"][0]["content"].endswith("It crashes, again and again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("I think it is a bug.", "the engine's answer is no ticket: Invalid JSON"),
        ('{"category": "bug", "urgency": 9, "reproducible": true}', "less than or equal to 5"),
        ('{"category": "bug", "urgency": 1, "reproducible": true, "more": 1}', "Extra inputs"),
        ('{"category": "bug", "urg', "cut off at max_tokens, allow more"),
    ],
)
def test_an_engine_that_answers_something_else_is_a_502(
    engine: FakeServer, client: openai.OpenAI, content: str, message: str
) -> None:
    engine.contents.append(content)
    with pytest.raises(openai.InternalServerError, match=message) as wrong:
        extract(client, "ticket")
    assert wrong.value.status_code == 502


def test_what_the_caller_got_wrong_is_said_before_the_engine_is_asked(
    engine: FakeServer, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError, match="no kind 'poem'; there are ticket, function"):
        extract(client, "poem")
    with pytest.raises(openai.UnprocessableEntityError, match="text: String should have at least 1 character"):
        extract(client, "ticket", "")
    with pytest.raises(openai.UnprocessableEntityError, match="inputs: List should have at least 1 item"):
        client.post("/score", cast_to=object, body={"inputs": []})
    with pytest.raises(openai.UnprocessableEntityError):
        client.post("/score", cast_to=object, body={"inputs": [{"a": 1}]})
    assert engine.seen == []


# ---------------------------------------------------------------- scores of many


def test_scores_come_in_order_and_at_most_three_are_at_the_engine(engine: FakeServer, client: openai.OpenAI) -> None:
    texts = ["x" * n for n in (5, 1, 9, 3, 2, 7, 4)]
    engine.close_gate()
    answers: list[dict] = []
    call = threading.Thread(
        target=lambda: answers.append(client.post("/score", cast_to=object, body={"inputs": texts}))
    )
    call.start()
    engine.wait_for(lambda seen: len(seen) == 3)
    engine.open_gate()
    call.join(20)
    rows = answers[0]["data"]
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["scored_tokens"] for row in rows] == [len(text) - 1 for text in texts]
    assert rows[0]["logprob"] == pytest.approx(-2.0)
    assert rows[0]["perplexity"] == pytest.approx(2.718281828**0.5)
    assert rows[1]["perplexity"] is None


def test_one_failed_input_fails_the_request_and_stops_the_others(engine: FakeServer, client: openai.OpenAI) -> None:
    engine.script.extend([Does(status=400)])
    engine.close_gate()
    with pytest.raises(openai.BadRequestError, match="scripted 400"):
        client.post("/score", cast_to=object, body={"inputs": ["a", "b", "c", "d", "e"]})
    engine.wait_for(lambda seen: all(s.ended in ("refused", "disconnected") for s in seen))
    assert len(engine.seen) <= 4


def test_no_engine_is_one_line(tmp_path: Path) -> None:
    with FakeServer() as gone:
        pass
    with pytest.raises(UserError, match="cannot connect"):
        endpoints.main(["--engine", gone.url, "--port", str(free_port()), "--run-dir", str(tmp_path)])


# ---------------------------------------------------------------- in front of real vLLM


def metric(engine: Server, name: str) -> float:
    with urllib.request.urlopen(f"{engine.url}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))


@pytest.mark.timeout(600)
def test_on_real_vllm_a_random_model_fills_the_schema_scores_agree_and_a_caller_who_leaves_frees_it(
    vllm_server: Server, blocklist: Path
) -> None:
    with served(vllm_server.url, vllm_server.model, blocklist) as client:
        ticket = extract(client, "ticket")["data"]  # random weights: only the schema can have made it one
        assert endpoints.Ticket.model_validate(ticket)
        assert endpoints.Function.model_validate(extract(client, "function")["data"])

        texts = ["def f(x):\n    return x\n", "import os"]
        both = client.post("/score", cast_to=object, body={"inputs": texts})["data"]
        alone = client.post("/score", cast_to=object, body={"inputs": texts[1:]})["data"]
        assert both[1]["logprob"] == pytest.approx(alone[0]["logprob"], rel=0.02)
        assert both[0]["scored_tokens"] > both[1]["scored_tokens"] > 0

        with pytest.raises(openai.APIStatusError) as no_embeddings:
            client.embeddings.create(model=vllm_server.model, input="x")
        assert 400 <= no_embeddings.value.status_code < 502

        # vLLM's first chat holds its front end up for a second, in which the engine goes on: here it is over.
        client.chat.completions.create(model=vllm_server.model, messages=HELLO, max_tokens=1)
        before = metric(vllm_server, "generation_tokens_total")
        endless = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(model=vllm_server.model, messages=HELLO, stream=True, **endless)
        for _ in range(5):
            next(iter(stream))
        stream.close()
        deadline = time.monotonic() + 60
        while metric(vllm_server, "num_requests_running") > 0:
            assert time.monotonic() < deadline, "the engine's request goes on"
            time.sleep(0.02)
        assert 0 < metric(vllm_server, "generation_tokens_total") - before < 1900  # it did not end by itself
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="nope", messages=HELLO, stream=True)
