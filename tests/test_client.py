"""Chapter 6's client and batch: the SSE parser, retries, cancellation, timeouts, and resuming after kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch06_vllm import batch, client, sse
from ch06_vllm.client import Client, RequestFailed, Retry
from common import process
from common.process import Child
from common.script import UserError
from tests.openai_fake import Does, FakeServer

FAST = Retry(attempts=3, base_s=0.0)


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    """The one server, with nothing scripted and nothing seen."""
    shared.script.clear()
    shared.seen.clear()
    shared.open_gate()
    return shared


def ask(server: FakeServer, *, retry: Retry = FAST, **options: Any) -> client.Answer:
    async def one() -> client.Answer:
        async with Client(server.url, retry=retry) as asking:
            return await asking.complete("x", model="fake", max_tokens=5, **options)

    return asyncio.run(one())


# ---------------------------------------------------------------- server-sent events

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["", "message", "error", "ping"]),
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=0, max_size=12),
        st.integers(1, 3),
        st.sampled_from(["", ": a comment", "id: 7", "retry: 100", "unknown"]),
    ),
    max_size=6,
)


def parsed(pieces: list[bytes]) -> list[sse.Event]:
    parser = sse.Parser()
    return [event for piece in pieces for event in parser.feed(piece)]


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=1), st.booleans(), st.data())
def test_any_split_of_the_bytes_gives_the_events_that_were_written(
    events: list[tuple[str, str, int, str]], ends: list[bytes], bom: bool, data: st.DataObject
) -> None:
    lines: list[str] = []
    for name, text, parts, noise in events:
        lines += [noise] * bool(noise) + [f"event: {name}"] * bool(name) + [f"data: {text}"] * parts + [""]
    lines.append("data: never ended")
    stream = b"\xef\xbb\xbf" * bom
    for i, line in enumerate(lines):
        merges = not line and stream.endswith(b"\r")  # with a \n it would be one CRLF, and no line
        stream += line.encode() + (b"\r" if merges else ends[i % len(ends)])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    wanted = [sse.Event("\n".join([text] * parts), name or "message") for name, text, parts, _ in events]
    assert parsed(pieces) == wanted
    assert parsed([stream[i : i + 1] for i in range(len(stream))]) == wanted


def test_an_event_is_given_when_its_blank_line_is_there_and_not_a_byte_later() -> None:
    parser = sse.Parser()
    assert parser.feed(b"data: x\r\n") == []
    assert parser.feed(b"\r") == [sse.Event("x")]
    assert parser.feed(b"\ndata:y\n") == []
    assert parser.feed(b"\n") == [sse.Event("y")]


def test_events_without_data_are_none() -> None:
    assert parsed([b": ping\n\nevent: x\n\ndata\n\n"]) == [sse.Event("")]


# ---------------------------------------------------------------- answers


def test_a_streamed_answer_has_its_text_its_times_and_the_servers_counts(server: FakeServer) -> None:
    answer = ask(server, temperature=0.0)
    (seen,) = server.seen
    assert answer.text == "ab ç\n"
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("length", 7, 5)
    assert answer.tokens == [1] * 5  # the last one shows no text: usage tells of it
    assert all(came >= wrote for came, wrote in zip(answer.arrivals_s, seen.written_s, strict=True))
    assert answer.called_s <= answer.sent_s <= answer.arrivals_s[0]
    assert seen.body["temperature"] == 0.0
    assert seen.body["stream_options"] == {"include_usage": True}


def test_chat_counts_tokens_and_not_the_chunk_that_opens_it(server: FakeServer) -> None:
    async def chat() -> client.Answer:
        async with Client(server.url + "/v1/") as asking:
            return await asking.chat([{"role": "user", "content": "x"}], model="fake", max_tokens=3)

    answer = asyncio.run(chat())
    assert (answer.text, len(answer.arrivals_s)) == ("ab ç", 3)
    assert server.seen[0].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("choice", "tokens"),
    [
        ({"text": "x"}, 1),
        ({"text": ""}, 1),
        ({"text": "", "finish_reason": "stop"}, 0),
        ({"text": "x y", "finish_reason": "stop", "token_ids": [4, 5, 6]}, 3),
        ({"text": "xy", "logprobs": {"tokens": ["x", "y"]}}, 2),
        ({"delta": {"role": "assistant", "content": ""}}, 0),
        ({"delta": {"role": "assistant", "content": "x"}}, 1),
        ({"delta": {"content": ""}}, 1),
        ({"delta": {"reasoning_content": "hm"}}, 1),
        ({"delta": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}, 1),
        ({"delta": {}, "finish_reason": "stop"}, 0),
        ({"delta": {"content": "xy"}, "logprobs": {"content": [{}, {}]}}, 2),
    ],
)
def test_tokens_of_a_chunk(choice: dict[str, Any], tokens: int) -> None:
    assert client.token_count(choice) == tokens


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize("failures", [[Does(status=503)], [Does(drop=True)], [Does(status=429), Does(status=500)]])
def test_what_may_do_better_is_tried_again(server: FakeServer, failures: list[Does]) -> None:
    server.script.extend(failures)
    answer = ask(server)
    assert answer.text == "ab ç\n"
    assert answer.attempts == len(server.seen) == len(failures) + 1


def test_it_gives_up_after_its_attempts_with_the_servers_words(server: FakeServer) -> None:
    server.script.extend([Does(status=503)] * 9)
    with pytest.raises(RequestFailed, match=r"/v1/completions: HTTP 503: scripted 503 \(after 3 attempts\)$") as caught:
        ask(server)
    assert (caught.value.status, caught.value.error["type"], len(server.seen)) == (503, "scripted", 3)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_mistake_is_not_repeated(server: FakeServer, status: int) -> None:
    server.script.append(Does(status=status))
    with pytest.raises(RequestFailed, match=f"HTTP {status}: scripted {status}$"):
        ask(server)
    assert len(server.seen) == 1


@pytest.mark.parametrize("does", [Does(after_tokens=2), Does(after_tokens=2, error={"message": "died", "code": 500})])
def test_nothing_is_repeated_once_a_token_has_come(server: FakeServer, does: Does) -> None:
    server.script.append(does)
    with pytest.raises(RequestFailed, match=r"the connection broke|the stream ended|broke the stream off: died"):
        ask(server)
    assert len(server.seen) == 1


def test_a_stream_that_breaks_before_its_first_token_is_repeated(server: FakeServer) -> None:
    overloaded = {"message": "overloaded", "code": 503}
    server.script.extend([Does(after_tokens=0), Does(after_tokens=0, error=overloaded)])
    assert ask(server).attempts == 3


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'data: {"choices": [{"text": "x"}]}\n\n', r"the stream ended before \[DONE\]"),
        (b'data: {"error": {"message": "no memory", "code": 400}}\n\n', "broke the stream off: no memory"),
        (b'event: error\ndata: {"detail": 1}\n\n', "broke the stream off"),
        (b"data: <html>\n\n", "no JSON object but '<html>'"),
    ],
)
def test_errors_inside_a_stream_are_told(server: FakeServer, raw: bytes, message: str) -> None:
    server.script.append(Does(raw=raw))
    with pytest.raises(RequestFailed, match=message) as caught:
        ask(server)
    assert str(caught.value).startswith(f"POST {server.url}/v1/completions: ")


def test_backoff_is_exponential_with_full_jitter_and_retry_after_comes_on_top() -> None:
    retry, rng = Retry(base_s=0.5, cap_s=3.0), random.Random(0)
    for failed, top_s in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (30, 3.0)):
        waits = [retry.wait_s(failed, None, rng) for _ in range(2000)]
        assert 0 <= min(waits) < 0.02 * top_s
        assert 0.98 * top_s < max(waits) <= top_s
        assert sum(waits) / 2000 == pytest.approx(top_s / 2, rel=0.05)
    assert 7 <= retry.wait_s(1, 7.0, rng) <= 7.5


def test_retry_after_is_waited_for_and_a_very_long_one_is_not(server: FakeServer) -> None:
    told: list[float | None] = []

    class Watched(Retry):
        def wait_s(self, failed: int, retry_after_s: float | None, rng: random.Random) -> float:
            told.append(retry_after_s)
            return 0.05

    headers = ["3", "not a time", formatdate(0, usegmt=True)]
    server.script.extend(Does(status=429, headers={"Retry-After": header}) for header in headers)
    assert ask(server, retry=Watched()).attempts == 4
    assert told == [3.0, None, 0.0]
    came = [seen.arrived_s for seen in server.seen]
    assert all(later - earlier >= 0.05 for earlier, later in pairwise(came))
    server.script.append(Does(status=429, headers={"Retry-After": formatdate(4_000_000_000, usegmt=True)}))
    with pytest.raises(RequestFailed, match="HTTP 429"):
        ask(server, retry=Watched())
    assert len(told) == 3


def test_no_server_is_one_clear_line_after_all_attempts() -> None:
    with FakeServer() as gone:
        pass
    with pytest.raises(
        RequestFailed, match=r"cannot connect \(Connection refused\); is the server up\? \(after 3"
    ) as e:
        ask(gone)
    assert e.value.status is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    async def make() -> None:
        Client(url)

    with pytest.raises(UserError, match="is no address of a server"):
        asyncio.run(make())


# ---------------------------------------------------------------- letting go


def test_a_timeout_is_told_and_is_not_repeated(server: FakeServer) -> None:
    server.close_gate()

    async def one() -> None:
        async with Client(server.url, timeout_s=0.2) as asking:
            await asking.complete("x", model="fake")

    with pytest.raises(RequestFailed, match="no complete answer in time"):
        asyncio.run(one())
    server.wait_for(lambda seen: all(s.ended == "disconnected" for s in seen))
    assert len(server.seen) <= 1  # none, if not even the sending was in time


@pytest.mark.parametrize("streamed", [True, False])
def test_cancellation_reaches_the_server(server: FakeServer, streamed: bool) -> None:
    server.close_gate()

    async def cancelled() -> None:
        async with Client(server.url) as asking:
            body = {"model": "fake", "prompt": "x"}
            coroutine = asking.complete(**body) if streamed else asking.post("/v1/completions", body)
            task = asyncio.create_task(coroutine)
            await asyncio.to_thread(server.wait_for, len)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await asyncio.to_thread(server.wait_for, lambda seen: seen[0].ended == "disconnected")

    asyncio.run(cancelled())


def test_leaving_a_stream_early_closes_it_and_a_complete_one_keeps_its_connection(server: FakeServer) -> None:
    server.gap_s = 0.001
    body = {"model": "fake", "prompt": "x", "max_tokens": 100_000}

    async def read() -> None:
        async with Client(server.url, concurrency=1) as asking:
            async with asking.stream("/v1/completions", body) as chunks:
                async for chunk in chunks:
                    assert chunk.text == "a"
                    break
            await asyncio.to_thread(server.wait_for, lambda seen: seen[0].ended == "disconnected")
            for _ in range(3):
                await asking.complete("x", model="fake")
            assert asking._session
            assert len(asking._session.connector._conns) == 1

    try:
        asyncio.run(read())
    finally:
        server.gap_s = 0.0


def test_no_more_requests_are_in_flight_than_allowed(server: FakeServer) -> None:
    server.close_gate()

    async def many() -> int:
        async with Client(server.url, concurrency=3) as asking:
            tasks = [asyncio.create_task(asking.complete("x", model="fake")) for _ in range(8)]
            await asyncio.to_thread(server.wait_for, lambda seen: len(seen) == 3)
            held = len(server.seen)
            server.open_gate()
            await asyncio.gather(*tasks)
            return held

    assert asyncio.run(many()) == 3
    running = peak = 0
    for _, step in sorted([(s.arrived_s, 1) for s in server.seen] + [(s.written_s[-1], -1) for s in server.seen]):
        running += step
        peak = max(peak, running)
    assert (peak, len(server.seen)) == (3, 8)


# ---------------------------------------------------------------- batches


def write_batch(path: Path, count: int) -> list[str]:
    rows = [
        {
            "custom_id": f"request-{i}",
            "method": "POST",
            "url": "/v1/chat/completions" if i % 2 else "/v1/completions",
            "body": {"model": "fake", "prompt": [i], "messages": [{"role": "user", "content": "\u2028"}]},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return [row["custom_id"] for row in rows]


def run_batch(server: FakeServer, folder: Path, *flags: str) -> dict[str, Any]:
    fixed = ["--url", server.url, "--run-dir", str(folder / "run"), "--attempts", "1"]
    return batch.main([str(folder / "in.jsonl"), str(folder / "out.jsonl"), *fixed, *flags])


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_batch_keeps_the_order_and_a_second_run_sends_nothing(server: FakeServer, tmp_path: Path) -> None:
    ids = write_batch(tmp_path / "in.jsonl", 40)
    result = run_batch(server, tmp_path, "--concurrency", "7")
    assert [row["custom_id"] for row in answers(tmp_path)] == ids
    assert all(row["error"] is None and row["response"]["status_code"] == 200 for row in answers(tmp_path))
    assert answers(tmp_path)[0]["response"]["request_id"] == "fake-1"
    assert (result["answered"], result["sent"], result["completion_tokens"]) == (40, 40, 160)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run_batch(server, tmp_path)["from_journal"] == 40
    assert len(server.seen) == 40
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_failures_are_kept_as_rows_and_sent_again_when_asked(server: FakeServer, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 6)
    server.script.extend([Does(status=400), Does(drop=True)])
    assert run_batch(server, tmp_path, "--concurrency", "1")["failed"] == 2
    refused, dropped, *rest = answers(tmp_path)
    assert refused["response"] == {
        "status_code": 400, "request_id": "",
        "body": {"error": {"message": "scripted 400", "type": "scripted", "code": 400}},
    }  # fmt: skip
    assert "HTTP 400: scripted 400" in refused["error"]["message"]
    assert dropped["response"] is None
    assert "the connection broke" in dropped["error"]["message"]
    assert [row["error"] for row in rest] == [None] * 4
    assert run_batch(server, tmp_path)["sent"] == 0
    again = run_batch(server, tmp_path, "--retry-failed")
    assert (again["sent"], again["failed"], again["answered"]) == (2, 0, 6)
    assert [row["error"] for row in answers(tmp_path)] == [None] * 6


def test_a_changed_or_new_request_is_sent_and_the_rest_is_not(server: FakeServer, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 5)
    run_batch(server, tmp_path)
    lines = (tmp_path / "in.jsonl").read_text(encoding="utf-8").split("\n")
    lines[2] = lines[2].replace('"prompt": [2]', '"prompt": [200]')
    lines.insert(0, lines[4].replace("request-4", "request-new"))
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert run_batch(server, tmp_path)["sent"] == 2
    assert [row["custom_id"][8:] for row in answers(tmp_path)] == ["new", "0", "1", "2", "3", "4"]


BAD = [
    ("{", "not JSON"),
    ("[]", "not a JSON object"),
    ('{"custom_id": 3}', "custom_id is not a string"),
    ('{"custom_id": "a", "method": "GET"}', "method is 'GET', not POST"),
    ('{"custom_id": "a", "method": "POST", "url": "/v1/x"}', "url is '/v1/x', not one of /v1/completions"),
    ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}', "body is no object with a model"),
    (
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "stream": true}}',
        "stream",
    ),
]


def test_every_bad_line_is_named_before_anything_is_sent(server: FakeServer, tmp_path: Path) -> None:
    for line, message in BAD:
        write_batch(tmp_path / "in.jsonl", 2)
        with (tmp_path / "in.jsonl").open("a") as file:
            file.write(f"\n{line}\n")
        with pytest.raises(UserError, match=re.escape("in.jsonl:4: ") + ".*" + re.escape(message)):
            run_batch(server, tmp_path)
    write_batch(tmp_path / "in.jsonl", 2)
    text = (tmp_path / "in.jsonl").read_text(encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(text + text, encoding="utf-8")
    with pytest.raises(UserError, match=r"in.jsonl:3: custom_id 'request-0' is that of line 1 too, .*jsonl:4: "):
        run_batch(server, tmp_path)
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no request"):
        run_batch(server, tmp_path)
    (tmp_path / "in.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        run_batch(server, tmp_path)
    assert server.seen == []
    assert not list(tmp_path.glob("out*"))


def test_a_torn_last_line_is_cut_off_and_a_broken_one_is_named(server: FakeServer, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 3)
    run_batch(server, tmp_path)
    whole = (tmp_path / "out.jsonl").read_bytes()
    journal = tmp_path / "out.jsonl.journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert run_batch(server, tmp_path)["sent"] == 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    journal.write_bytes(b"{}x\n" + journal.read_bytes())
    with pytest.raises(UserError, match=r"out\.jsonl\.journal:1 is no entry"):
        run_batch(server, tmp_path)


def test_two_runs_do_not_write_one_journal(server: FakeServer, tmp_path: Path) -> None:
    write_batch(tmp_path / "in.jsonl", 1)
    held = batch.Journal(tmp_path / "out.jsonl.journal")
    try:
        with pytest.raises(UserError, match="another run is writing"):
            run_batch(server, tmp_path)
    finally:
        held.close()


def test_killed_at_any_moment_a_batch_loses_nothing_and_repeats_at_most_what_was_in_flight(
    server: FakeServer, tmp_path: Path
) -> None:
    """kill -9 again and again, each time when a random number of further requests have reached the server.

    A gate a little later keeps a kill that comes late from coming too late.
    """
    count, concurrency, rng = 200, 4, random.Random(7)
    ids = write_batch(tmp_path / "in.jsonl", count)
    command = [
        sys.executable, "-m", "ch06_vllm.batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"),
        "--url", server.url, "--concurrency", str(concurrency), "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    kills = 0
    while kills < 5:
        target = len(server.seen) + rng.randint(1, 25)
        server.close_gate_at = target + 10
        with Child(command) as child:
            server.wait_for(lambda seen, target=target: len(seen) >= target, 60)
            child.kill()
        kills += 1
        server.open_gate()
        assert not (tmp_path / "out.jsonl").exists()
    server.close_gate_at = None
    finished = process.run(command, timeout_s=60)
    assert finished.returncode == 0, finished.stderr
    assert finished.result
    assert finished.result["from_journal"] > 0
    assert [row["custom_id"] for row in answers(tmp_path)] == ids
    assert all(row["error"] is None for row in answers(tmp_path))
    times = Counter(seen.body["prompt"][0] for seen in server.seen)
    assert set(times) == set(range(count))
    assert sum(times.values()) - count <= kills * concurrency
    run_whole = tmp_path / "whole"
    run_whole.mkdir()
    write_batch(run_whole / "in.jsonl", count)
    run_batch(server, run_whole)
    assert (run_whole / "out.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
