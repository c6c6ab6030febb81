"""Our engine as a server: real sockets, the openai client, the same questions to real vLLM, and a bad day."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from ch06_vllm import chaos, make_model
from ch06_vllm.engine import LLM, SamplingParams, async_engine
from ch06_vllm.engine.async_engine import AsyncEngine, EngineDead
from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.request import Config, Output
from ch06_vllm.servers import Server
from common import dist, lm, process
from common.ranks import run_ranks, values

Json = dict[str, Any]
PROMPT = "def fibonacci("
TOKENS = 16
LIMIT = 600  # requests in flight, see OPTIONS
OPTIONS = {"max-num-seqs": 32, "max-num-batched-tokens": 512, "max-num-queued-reqs": LIMIT, "request-timeout-s": 3}
SERVER = [sys.executable, "-m", "ch06_vllm.engine.server"]


@pytest.fixture(scope="module")
def model() -> Path:
    """float32: in bfloat16 two tokens of random weights can be equally likely."""
    return make_model.model_folder(make_model.Recipe(dtype="float32"))


@pytest.fixture(scope="module")
def ours(model: Path) -> Iterator[Server]:
    with Server(model, "ours", OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def ours_tp2(model: Path) -> Iterator[Server]:
    with Server(model, "ours", OPTIONS | {"tensor-parallel-size": 2}) as server:
        yield server


@pytest.fixture(scope="module")
def reference(model: Path) -> list[int]:
    """What transformers' generate answers to PROMPT."""
    ids = torch.tensor([lm.load_tokenizer(str(model)).encode(PROMPT)])
    generated = lm.load(str(model)).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS
    )
    answer: list[int] = generated[0, ids.shape[1] :].tolist()
    return answer


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(server: Server, path: str, body: Json | bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def greedy(server: Server, **more: Any) -> Json:
    return {"model": server.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True} | more


# ---------------------------------------------------------------- what is answered


@pytest.mark.parametrize("name", ["ours", "ours_tp2"])
def test_a_greedy_answer_is_that_of_transformers(
    name: str, model: Path, reference: list[int], request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(name)
    status, answer = ask(server, "/v1/completions", greedy(server, return_token_ids=True))
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["token_ids"] == reference
    assert choice["text"] == lm.load_tokenizer(str(model)).decode(reference, skip_special_tokens=True)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == TOKENS
    assert answer["usage"]["prompt_tokens"] == len(choice["prompt_token_ids"])


def test_every_form_of_a_prompt_gets_the_same_answer(ours: Server, model: Path) -> None:
    ids = lm.load_tokenizer(str(model)).encode(PROMPT)
    completions = client(ours).completions
    texts = []
    for prompt in (PROMPT, ids, [PROMPT, PROMPT], [ids, ids]):
        answer = completions.create(
            model=ours.model, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.usage
        assert answer.usage.prompt_tokens == len(ids) * len(answer.choices)
        texts += [choice.text for choice in answer.choices]
    assert len(texts) == 6
    assert len(set(texts)) == 1


def test_a_stream_brings_what_a_whole_answer_has(ours: Server) -> None:
    completions = client(ours).completions
    asked: Json = {"model": ours.model, "prompt": [PROMPT, "import os"], "n": 2, "seed": 3, "max_tokens": TOKENS}
    whole = completions.create(**asked)
    streamed = {choice.index: "" for choice in whole.choices}
    reasons: dict[int, str] = {}
    usage = None
    for chunk in completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert [streamed[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage
    assert whole.usage
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert len(set(streamed.values())) == 4  # n answers to a seed differ


def test_chat_reads_the_template(ours: Server, model: Path) -> None:
    tokenizer = lm.load_tokenizer(str(model))
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "What does"}, {"type": "text", "text": " zip?"}]}
    ]
    plain = [{"role": "user", "content": "What does zip?"}]
    prompt = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    extra = {"ignore_eos": True}
    asked: Json = {"model": ours.model, "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    whole = client(ours).chat.completions.create(**asked, logprobs=True, top_logprobs=2, extra_body=extra)
    expected = client(ours).completions.create(
        model=ours.model, prompt=prompt, max_tokens=8, temperature=0, logprobs=1, extra_body=extra
    )
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.choices[0].text
    assert choice.logprobs
    assert choice.logprobs.content
    assert expected.choices[0].logprobs
    assert [one.token for one in choice.logprobs.content] == expected.choices[0].logprobs.tokens
    for one, logprob in zip(choice.logprobs.content, expected.choices[0].logprobs.token_logprobs or [], strict=True):
        assert one.logprob == pytest.approx(logprob)
        assert one.logprob == max(top.logprob for top in one.top_logprobs)
        assert len(one.top_logprobs) == 2
    chunks = list(client(ours).chat.completions.create(**asked, stream=True, extra_body=extra))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_a_stop_text_ends_the_answer_and_is_not_in_it(ours: Server) -> None:
    _, answer = ask(ours, "/v1/completions", greedy(ours))
    text = answer["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    _, answer = ask(ours, "/v1/completions", greedy(ours, stop=[stop, "never"]))
    (choice,) = answer["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


# ---------------------------------------------------------------- as vLLM answers


def shape(value: Any) -> Any:
    """The keys of nested objects, and the kinds of what they hold; of a list those of its first."""
    if isinstance(value, dict) and "top_logprobs" in value and "tokens" in value:  # here tokens are keys
        value = value | {"top_logprobs": [list(top.values()) for top in value["top_logprobs"]]}
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def extends(theirs: Any, own: Any) -> bool:
    """Whether `own` has nothing that theirs lacks; None can stand for anything."""
    if isinstance(own, dict) and isinstance(theirs, dict):
        return all(key in theirs and extends(theirs[key], inner) for key, inner in own.items())
    if isinstance(own, list) and isinstance(theirs, list):
        return all(extends(t, o) for t, o in zip(theirs, own, strict=False))
    return own == theirs or "NoneType" in (own, theirs)


def events(server: Server, path: str, body: Json) -> list[Json]:
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.strip() for line in answer if line.strip()]
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"prompt": PROMPT, "logprobs": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    ],
    ids=["completions", "chat"],
)
def test_answers_have_the_shape_of_vllms(ours: Server, vllm_server: Server, path: str, more: Json) -> None:
    asked: Json = {"max_tokens": 4, "temperature": 0, "ignore_eos": True} | more
    own, theirs = (ask(server, path, asked | {"model": server.model})[1] for server in (ours, vllm_server))
    own["usage"].pop("prompt_tokens_details")  # vLLM tells them with --enable-prompt-tokens-details
    assert extends(shape(theirs), shape(own)), f"{shape(own)}\n{shape(theirs)}"
    own, theirs = (events(server, path, asked | {"model": server.model}) for server in (ours, vllm_server))
    own[-1]["usage"].pop("prompt_tokens_details")
    for one, other in ((own[at], theirs[at]) for at in (0, -2, -1)):  # a busy server brings several tokens in one event
        assert extends(shape(other), shape(one)), f"{shape(one)}\n{shape(other)}"


REFUSED: list[tuple[str, Json | bytes, int, str | None]] = [
    ("/v1/completions", b"{", 400, None),
    ("/v1/completions", b"[1, 2]", 400, None),
    ("/v1/completions", {"prompt": ""}, 400, "prompt"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": -1}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": "many"}, 400, None),
    ("/v1/completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {"prompt": PROMPT, "top_p": 1.5}, 400, "top_p"),
    ("/v1/completions", {"prompt": PROMPT, "top_k": -5}, 400, "top_k"),
    ("/v1/completions", {"prompt": PROMPT, "n": 0}, 400, None),
    ("/v1/completions", {"prompt": [5] * 5000}, 400, None),
    ("/v1/completions", {"prompt": "word " * 30000}, 400, None),
    ("/v1/completions", {"prompt": [5, 10**9]}, 400, None),
    ("/v1/completions", {"prompt": ["a"] * 1025}, 400, "prompt"),
    ("/v1/completions", {"prompt": PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": PROMPT, "model": "none-such"}, 404, None),
    ("/v1/chat/completions", {"messages": [{"content": "no role"}]}, 400, None),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 100_000}, 400, None),
]  # fmt: skip


def test_a_path_that_is_not_there_gets_an_error_of_the_same_shape(ours: Server) -> None:
    assert ask(ours, "/v1/none-such") == (
        404,
        {"error": {"message": "Not Found", "type": "Not Found", "param": None, "code": 404}},
    )
    assert ask(ours, "/v1/completions")[0] == 405


@pytest.mark.parametrize("name", ["ours", "vllm_server"])
def test_what_cannot_be_answered_gets_its_status_and_an_error_that_says_why(
    name: str, request: pytest.FixtureRequest
) -> None:
    """By both engines alike: the same status, the same four fields; vLLM does not always say which parameter it was."""
    server = request.getfixturevalue(name)
    for path, body, status, param in REFUSED:
        asked = {"model": server.model} | body if isinstance(body, dict) else body
        got, answer = ask(server, path, asked)
        assert got == status, (body, answer)
        assert set(answer) == {"error"}, (body, answer)
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}, (body, answer)
        assert error["code"] == status
        assert all(isinstance(error[key], str) and error[key] for key in ("message", "type")), (body, answer)
        if name == "ours" and param:
            assert error["param"] == param, (body, answer)


@pytest.mark.parametrize(
    "more",
    [
        {"presence_penalty": 0.5}, {"frequency_penalty": 1}, {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}},
        {"min_p": 0.1}, {"echo": True}, {"suffix": "x"}, {"stop_token_ids": [5]}, {"min_tokens": 3}, {"best_of": 3},
        {"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a"}},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_what_would_change_the_answer_and_is_not_supported_is_refused_by_name(ours: Server, more: Json) -> None:
    (name,) = more
    with pytest.raises(openai.BadRequestError) as caught:
        client(ours).completions.create(model=ours.model, prompt=PROMPT, extra_body=more)
    assert caught.value.param == name
    assert name in caught.value.message


def test_usage_with_every_chunk_is_refused_and_not_left_out(ours: Server) -> None:
    wanted = greedy(ours, stream=True, stream_options={"continuous_usage_stats": True})
    status, answer = ask(ours, "/v1/completions", wanted)
    assert (status, answer["error"]["param"]) == (400, "stream_options")


def test_what_asks_for_nothing_is_accepted(ours: Server) -> None:
    nothing: Json = {
        "presence_penalty": 0,
        "n": 1,
        "logit_bias": {},
        "stop": None,
        "user": "me",
        "min_p": 0.0,
        "top_k": -1,
    }
    nothing |= {"response_format": {"type": "text"}, "min_tokens": TOKENS}  # it ignores the end anyway
    assert ask(ours, "/v1/completions", greedy(ours, **nothing))[0] == 200
    tools = {"tools": [], "tool_choice": "none", "reasoning_effort": None}
    assert ask(ours, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1} | tools)[0] == 200
    tools["tools"] = [{"type": "function", "function": {"name": "f"}}]
    assert ask(ours, "/v1/chat/completions", {"messages": MESSAGES} | tools)[1]["error"]["param"] == "tools"


def names_of_metrics(server: Server) -> set[str]:
    """Names with their labels, without values and buckets' bounds."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        lines = answer.read().decode().splitlines()
    found = set()
    for line in lines:
        if match := re.match(r"(vllm:\w+){(.*)} ", line):
            labels = sorted(re.findall(r'(\w+)="', match[2]))
            found.add(f"{match[1]} {' '.join(labels)}")
    return found


def test_metrics_have_vllms_names_and_labels(ours: Server, vllm_server: Server) -> None:
    for server in (ours, vllm_server):
        ask(server, "/v1/completions", greedy(server))
    own = {name for name in names_of_metrics(ours) if not name.startswith("vllm:num_requests_waiting_by")}
    assert len(own) > 20
    assert own <= names_of_metrics(vllm_server)


def test_metrics_count_what_was_asked(ours: Server) -> None:
    def counters() -> dict[str, float]:
        with urllib.request.urlopen(f"{ours.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        found = [re.match(r'vllm:(\w+){(?:.*finished_reason="(\w+)")?.*?} (\S+)$', line) for line in lines]
        return {f"{m[1]} {m[2] or ''}".strip(): float(m[3]) for m in found if m and "bucket" not in m[1]}

    before = counters()
    _, answer = ask(ours, "/v1/completions", greedy(ours, n=2))
    after = counters()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    prompt = answer["usage"]["prompt_tokens"]
    assert grown.pop("prompt_tokens_total") == grown.pop("prefix_cache_queries_total") == 2 * prompt
    assert grown.pop("generation_tokens_total") == 2 * TOKENS
    assert grown.pop("request_success_total length") == 2
    assert grown.pop("inter_token_latency_seconds_count") == 2 * (TOKENS - 1)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time",
                 "request_decode_time"):  # fmt: skip
        assert grown.pop(f"{name}_seconds_count") == 2
        assert grown.pop(f"{name}_seconds_sum") > 0
    parts = ("request_queue_time", "request_prefill_time", "request_decode_time")
    total = sum(after[f"{name}_seconds_sum"] - before[f"{name}_seconds_sum"] for name in parts)
    whole = after["e2e_request_latency_seconds_sum"] - before["e2e_request_latency_seconds_sum"]
    assert total == pytest.approx(whole)


# ---------------------------------------------------------------- too much, too late


def test_more_requests_than_may_be_in_flight_are_sent_away(ours: Server) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client(ours).completions.create(model=ours.model, prompt=["a"] * (LIMIT // 100 + 1), n=100)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_body_that_is_too_large_is_refused_before_it_comes(ours: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(ours.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", int(ours.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(17):  # nowhere does it say how much will come
            connection.sendall(chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_request_that_does_not_come_to_its_end_is_let_go(ours: Server) -> None:
    address = ("127.0.0.1", int(ours.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=30) as head, socket.create_connection(address, timeout=30) as body:
        head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-")
        body.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert body.recv(100).startswith(b"HTTP/1.1 408 ")
        assert head.recv(100) == b""


# ---------------------------------------------------------------- a bad day


def with_queue(name: str, fault: str) -> bool:
    """The vLLM that the tests share runs more at once than that many."""
    return name != "vllm_server" or "in the queue" not in fault


@pytest.mark.parametrize(
    ("name", "fault"),
    [pair for pair in itertools.product(("ours", "ours_tp2", "vllm_server"), chaos.FAULTS) if with_queue(*pair)],
)
def test_a_fault_is_answered_rightly_and_leaves_nothing(
    name: str, fault: str, reference: list[int], request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(name)

    async def suffer() -> Json:
        async with chaos.Victim(server) as victim:
            if name != "vllm_server":
                assert victim.expected == reference
            return await chaos.suffer(victim, fault, chaos.FAULTS[fault])

    row = asyncio.run(suffer())
    assert row["right"], row
    assert row["left"] == {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
    assert row["same"], row


def test_kill_9_of_a_rank_is_told_at_once_and_the_ranks_start_anew(ours_tp2: Server, reference: list[int]) -> None:
    async def suffer() -> Json:
        async with chaos.Victim(ours_tp2) as victim:
            return await chaos.suffer(victim, "kill -9", chaos.killed_rank)

    row = asyncio.run(suffer())
    assert row["right"], row
    assert re.search("another rank.*; serves again", row["came_back"])
    assert row["same"], row
    assert row["left"], row
    _, answer = ask(ours_tp2, "/v1/completions", greedy(ours_tp2, return_token_ids=True))
    assert answer["choices"][0]["token_ids"] == reference


# ---------------------------------------------------------------- start and stop


def test_sigterm_lets_streams_finish_and_nobody_in(model: Path) -> None:
    with Server(model, "ours", {"shutdown-timeout": 200}) as server:
        tokens = 1000
        stream = client(server).completions.create(**greedy_for_client(server, tokens), stream=True)
        next(iter(stream))
        server.child.process.send_signal(signal.SIGTERM)
        while (status := health(server)) == 200:  # until it has got the signal
            next(iter(stream))
        assert status == 503
        status, answer = ask(server, "/v1/completions", greedy(server))
        assert status == 503, answer
        *_, last = [chunk.choices[0] for chunk in stream]
        assert last.finish_reason == "length"
        done = server.child.wait(200)
    assert done.returncode == 0, done.stderr
    assert done.result == {"requests": 1, "generation_tokens": tokens}
    with pytest.raises(urllib.error.URLError, match="refused"):
        health(server)


def health(server: Server) -> int:
    try:
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def greedy_for_client(server: Server, tokens: int) -> Json:
    return {"model": server.model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0,
            "extra_body": {"ignore_eos": True}}  # fmt: skip


def test_sigterm_tells_those_that_take_too_long(model: Path) -> None:
    with Server(model, "ours", {"shutdown-timeout": 0, "tensor-parallel-size": 2}) as server:
        stream = client(server).completions.create(**greedy_for_client(server, 4000), stream=True)
        next(iter(stream))
        server.child.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            for _ in stream:
                pass
        done = server.child.wait(200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_cannot_start_is_told_in_one_line(model: Path, tmp_path: Path, ranks: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for more, said in (
            (["--model", str(model), "--port", port], f"127.0.0.1:{port} cannot be taken (Address already in use)"),
            (["--model", str(tmp_path / "none")], "there is no model folder"),
            (["--model", str(model), "--max-num-seqs", "0"], "argument --max-num-seqs: 0 is below 1"),
            (["--model", str(model), "--num-blocks", "2"], "2 blocks of 16 tokens do not hold one request of 4096"),
        ):
            done = process.run([*SERVER, "--tensor-parallel-size", str(ranks), *more], timeout_s=60)
            assert done.returncode == 2, done.stderr
            (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
            assert said in line
            assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- the engine in its thread


@pytest.fixture
def engine(model: Path) -> Engine:
    return Engine(Config(str(model), num_blocks=64, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64))


def in_thread(engine: Engine, work: Callable[[AsyncEngine], Awaitable[None]]) -> AsyncEngine:
    async def run() -> AsyncEngine:
        running = AsyncEngine(engine, "nano")
        running.start()
        try:
            await asyncio.wait_for(work(running), 60)
        finally:
            await running.stop()
        return running

    return asyncio.run(run())


LONG = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)


def test_leaving_the_iterator_cancels_and_frees(engine: Engine) -> None:
    async def idle() -> None:
        while engine.requests or engine.pool.num_free < engine.pool.num_blocks:
            await asyncio.sleep(0.001)

    async def work(running: AsyncEngine) -> None:
        outputs = running.generate([5, 6, 7], LONG)
        async for _ in outputs:
            break
        await outputs.aclose()  # type: ignore[attr-defined]
        await idle()

        async def read(prompt: list[int]) -> None:
            async for _ in running.generate(prompt, LONG):
                pass

        tasks = [asyncio.create_task(read([number])) for number in range(1, 9)]  # half of them wait
        while len(engine.scheduler.running) < 4:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True)
        )
        await idle()
        assert running.num_requests == 0

    running = in_thread(engine, work)
    assert running.metrics.finished == {"stop": 0, "length": 0, "abort": 9, "error": 0}
    engine.scheduler.check()


def test_a_fault_in_a_step_is_told_to_all_and_ends_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = engine.step, iter(range(100))
    told: list[str] = []

    def breaks() -> list[Output]:
        if next(calls) == 20:
            raise RuntimeError("a bit fell over")
        return step()

    monkeypatch.setattr(engine, "step", breaks)

    async def work(running: AsyncEngine) -> None:
        running.on_death = told.append
        tokens = [0] * 6

        async def read(number: int) -> None:
            async for output in running.generate([number + 1], LONG):
                tokens[number] += len(output.token_ids)

        ended = await asyncio.gather(*(read(number) for number in range(6)), return_exceptions=True)
        why = "the engine died: RuntimeError: a bit fell over"
        assert [(type(one), str(one)) for one in ended] == [(EngineDead, why)] * 6
        assert tokens[0] > 0  # it came before the fault
        assert running.dead == told[0] == why
        with pytest.raises(EngineDead, match="a bit fell over"):
            await anext(aiter(running.generate([1], LONG)))

    assert in_thread(engine, work).metrics.finished["error"] == 6


def test_a_slow_reader_gets_all_in_few_pieces(engine: Engine) -> None:
    async def work(running: AsyncEngine) -> None:
        got: list[Output] = []
        async for output in running.generate([5, 6, 7], LONG):
            got.append(output)
            while running.num_requests:  # until its last token has come
                await asyncio.sleep(0.001)
        assert sum(len(output.token_ids) for output in got) == 200
        assert len(got) == 2
        assert got[-1].finish_reason == "length"

    in_thread(engine, work)


def test_the_other_ranks_get_a_sign_of_life_while_nothing_is_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "KEEP_ALIVE_S", 0.01)
    signs: list[None] = []
    monkeypatch.setattr(engine.runner, "keep_alive", lambda: signs.append(None))

    async def work(running: AsyncEngine) -> None:
        while len(signs) < 2:
            await asyncio.sleep(0.001)
        assert [output.finish_reason async for output in running.generate([5], LONG)][-1] == "length"

    in_thread(engine, work)


def test_requests_are_refused_where_they_are_made(engine: Engine) -> None:
    async def work(running: AsyncEngine) -> None:
        for prompt, said in (([], "empty"), ([5] * 100, "together more than"), ([10**6], "outside")):
            with pytest.raises(ValueError, match=said):
                await anext(aiter(running.generate(prompt, LONG)))
        assert running.num_requests == 0

    in_thread(engine, work)


# ---------------------------------------------------------------- several ranks, without a server


def generate_on_ranks(model: str) -> tuple[str, list[list[int]]]:
    """On each rank: what a refused prompt raises, then tokens."""
    with dist.session("cpu"):
        llm = LLM(model, max_model_len=256, num_blocks=64)
        try:
            llm.generate([[1] * 300], SamplingParams(max_tokens=8))
            refused = ""
        except ValueError as error:
            refused = str(error)
        outputs = llm.generate([PROMPT, [5, 6, 7]], SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True))
        return refused, [output.token_ids for output in outputs]


def test_llm_generates_alike_on_every_rank(model: Path, reference: list[int]) -> None:
    first, second = values(run_ranks(generate_on_ranks, 2, str(model)))
    assert first == second
    refused, tokens = first
    assert "more than the model's context of 256" in refused
    assert tokens[0] == reference
    alone = LLM(str(model), max_model_len=256, num_blocks=64)
    (output,) = alone.generate([[5, 6, 7]], SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True))
    assert tokens[1] == output.token_ids
