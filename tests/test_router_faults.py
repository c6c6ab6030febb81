"""The router where things go wrong at a bad moment: each was once a wrong answer, a second execution, or a leak."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from typing import Any

import pytest

from ch06_vllm.servers import HOST
from ch07_sglang_routing import router_load
from ch07_sglang_routing.router import http1, workers
from ch07_sglang_routing.router.client import Limits
from ch07_sglang_routing.router.running import Routing
from common import process
from common.ranks import free_port
from tests.test_router import (
    ASKED,
    Backend,
    Call,
    Handler,
    Json,
    answer,
    echo,
    in_flight,
    post,
    raw,
    routed,
    run,
    stalled,
    until,
)

GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


async def hang(call: Call) -> None:
    await call.left.wait()


def echo_after(go: asyncio.Event) -> Handler:
    async def wait(call: Call) -> None:
        await go.wait()
        await echo(call)

    return wait


# ---------------------------------------------------------------- the same request twice


@pytest.mark.parametrize("garbage", [False, True])
def test_a_request_that_kills_its_connection_is_sent_once_more_at_most(garbage: bool) -> None:
    go = asyncio.Event()

    async def poisoned(call: Call) -> None:
        if b"poison" not in call.body:
            await go.wait()
            await echo(call)
        elif garbage:
            call.writer.write(b"nonsense\r\n\r\n")
        else:
            call.reset()

    async def test() -> None:
        async with Backend(poisoned) as worker, routed(worker.url, limits=Limits(retries=0)) as router:
            together = [asyncio.create_task(raw(router, post(ASKED))) for _ in range(12)]
            await until(lambda: len(worker.calls) == 12, "twelve connections to the worker")
            go.set()
            await asyncio.gather(*together)
            assert (await raw(router, post(b'{"prompt": "poison"}')))[0] == 502
            assert len(worker.calls) - 12 == (1 if garbage else 2)
            assert router.metrics.retries["stale"] == (0 if garbage else 1)

    run(test())


def test_a_drains_time_limit_sends_what_waits_elsewhere() -> None:
    async def test() -> None:
        async with Backend(hang) as old, Backend() as new, routed(old.url) as router:
            old.handler = echo
            assert (await raw(router, post(ASKED)))[0] == 200  # its connection is kept
            old.handler = hang
            waiting = asyncio.create_task(raw(router, post(ASKED)))
            await until(lambda: len(old.calls) == 2, "the request at the worker")
            known = router.fleet.add(new.url)
            await until(lambda: known.healthy, "the new one up")
            old.handler = echo  # it would answer, if it were asked again
            drain = b"DELETE /workers/127.0.0.1:%d?timeout_s=0.05 HTTP/1.1\r\nHost: localhost\r\n\r\n" % old.port
            assert (await raw(router, drain))[0] == 202
            assert await waiting == (200, ASKED)
            assert (len(old.calls), len(new.calls)) == (2, 1)

    run(test())


# ---------------------------------------------------------------- prefill and decode


@pytest.mark.parametrize("status", [0, 400, 500])
def test_a_late_failure_of_a_prefill_worker_leaves_the_clients_next_request_alone(status: int) -> None:
    fail, answers = asyncio.Event(), asyncio.Event()

    async def late(call: Call) -> None:
        await fail.wait()
        call.say(status, b"{}") if status else call.reset()

    async def test() -> None:
        async with (
            Backend(late) as prefill,
            Backend() as decode,
            routed(prefill.url, decode.url, roles=("prefill", "decode")) as router,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(post(ASKED))
            assert (await answer(reader))[0] == 200
            prefill.handler = echo

            async def second(call: Call) -> None:
                await answers.wait()
                call.say(200, b'"second"')

            decode.handler = second
            writer.write(post(ASKED))
            await until(lambda: len(decode.calls) == 2, "the second request at the decode worker")
            fail.set()
            known = router.fleet.workers[f"127.0.0.1:{prefill.port}"]
            await until(lambda: known.in_flight == 0, "the first prefill's end")
            answers.set()
            assert await answer(reader) == (200, b'"second"')
            await until(lambda: in_flight(router) == (0, 0), "nothing in flight")
            writer.close()

    run(test())


def test_what_a_prefill_worker_says_is_wrong_with_a_request_reaches_the_client_once() -> None:
    async def refuse(call: Call) -> None:
        call.say(400, b'{"error": "no"}')

    async def test() -> None:
        async with (
            Backend(refuse) as prefill,
            Backend(hang) as decode,
            routed(prefill.url, decode.url, roles=("prefill", "decode")) as router,
        ):
            assert await raw(router, post(ASKED)) == (400, b'{"error": "no"}')
            assert (len(prefill.calls), len(decode.calls)) == (1, 1)
            await asyncio.wait_for(decode.calls[0].left.wait(), 10)
            assert router.metrics.retries == {}
            large = json.dumps({"prompt": ["x" * 2**20, "y"]}).encode()
            assert (await raw(router, post(large)))[0] == 413  # its prompts cannot be counted

    run(test())


def test_while_one_role_has_nobody_workers_of_any_role_answer() -> None:
    async def test() -> None:
        async with (
            Backend() as alone,
            Backend() as prefill,
            Backend() as decode,
            routed(alone.url, prefill.url, roles=("any", "prefill")) as router,
        ):
            assert await raw(router, post(ASKED)) == (200, ASKED)
            known = router.fleet.add(decode.url, "decode")
            await until(lambda: known.healthy, "the decode worker up")
            assert (await raw(router, post(ASKED)))[0] == 200
            assert [len(each.calls) for each in (alone, prefill, decode)] == [1, 1, 1]

    run(test())


# ---------------------------------------------------------------- silence


def test_what_waits_at_a_worker_that_fell_silent_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP looks like a lost host: connections stay, nothing comes."""
    monkeypatch.setattr(workers, "HEALTH_S", 0.3)
    port = free_port()

    async def test() -> None:
        async with Backend() as good, routed(f"http://{HOST}:{port}", good.url, policy="round_robin") as router:
            os.kill(engine.process.pid, signal.SIGSTOP)
            try:
                assert await raw(router, post(ASKED)) == (200, ASKED)
                assert len(good.calls) == 1
                assert router.metrics.retries["worker_lost"] == 1
            finally:
                os.kill(engine.process.pid, signal.SIGCONT)

    with process.Child([str(router_load.fake_engine()), str(port)]) as engine:
        run(test())


def test_a_stream_may_last_while_it_goes_on_and_ends_when_it_does_not() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()

        async def stream(call: Call) -> None:
            call.begin_stream()
            end = loop.time() + 1.2  # several times either limit
            while loop.time() < end and b"stops" not in call.body:
                call.chunk(b"data: 1\n\n")
                await asyncio.sleep(0.02)
            if b"stops" in call.body:
                call.chunk(b"data: 1\n\n")
                await call.left.wait()
            call.chunk(b"")

        async with Backend(stream) as worker, routed(worker.url, limits=Limits(first_byte_s=0.5, idle_s=0.5)) as router:
            known = next(iter(router.fleet.workers.values()))
            for body, ends in ((b"goes on", b"0\r\n\r\n"), (b"stops", b"nothing more for 0.5 s")):
                reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
                writer.write(post(body))
                await reader.readuntil(ends)
                writer.close()
                await until(lambda: in_flight(router) == (0, 0), "nothing in flight")
                assert known.breaker.failures == (body == b"stops")
            assert router.metrics.broken["timeout"] == 1

    run(test())


# ---------------------------------------------------------------- clients


def test_blank_lines_before_a_request_are_not_kept() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            await until(lambda: router.clients, "the client")
            (client,) = router.clients
            writer.write(b"\r\n" * 100_000 + post(ASKED)[:1])
            await until(lambda: client._buffer.endswith(b"P"), "the first byte of a request")
            assert client._buffer == b"P"
            writer.write(post(ASKED)[1:])
            assert await answer(reader) == (200, ASKED)
            writer.close()

    run(test())


def test_a_large_request_may_come_while_another_is_answered() -> None:
    go = asyncio.Event()

    async def test() -> None:
        large = b'{"x": "%s"}' % (b"a" * 3_000_000)
        async with Backend(echo_after(go)) as worker, routed(worker.url) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=2**23)
            writer.write(post(ASKED) + post(large) + post(ASKED))
            await until(lambda: any(client._held for client in router.clients), "no more is read")
            (client,) = router.clients
            assert len(client._buffer) < 2**20
            go.set()
            assert [await answer(reader) for _ in range(3)] == [(200, ASKED), (200, large), (200, ASKED)]
            writer.close()

    run(test(), 120)


def test_own_paths_answer_head_without_a_body_and_say_what_is_allowed() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            for path in (b"/health", b"/metrics", b"/workers", b"/nothing"):
                writer.write((GET % path).replace(b"GET", b"HEAD") + GET % b"/health")
                head = await reader.readuntil(b"\r\n\r\n")
                assert re.search(rb"content-length: [1-9]", head)
                assert json.loads((await answer(reader))[1]) == {"workers": 1, "up": 1}
            writer.write(b"PUT /workers HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 405 ")
            assert b"allow: GET, HEAD, POST\r\n" in head
            writer.close()

    run(test())


def test_expect_100_continue_and_too_many_connections() -> None:
    async def test() -> None:
        async with Backend() as worker, routed(worker.url, limits=Limits(connections=1)) as router:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            head, _, body = post(ASKED, "Expect: 100-continue").partition(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            said, text = await raw(router, GET % b"/health")
            assert (said, "too many" in json.loads(text)["error"]["message"]) == (503, True)
            writer.write(body)
            assert await answer(reader) == (200, ASKED)
            writer.close()

    run(test())


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:30000", 200), ("127.0.0.1", 200), ("[::1]:1", 200), ("rebound.example", 403), ("localhost.x", 403)],
)
def test_without_a_key_the_hosts_name_must_be_this_machines(host: str, status: int) -> None:
    async def test() -> None:
        async with routed() as router:
            body = b'{"url": "http://127.0.0.1:9"}'
            request = post(body, "Content-Type: application/json", path="/workers").replace(b"Host: x", b"Host: %s" % (
                host.encode()))  # fmt: skip
            assert (await raw(router, request))[0] == status
            assert len(router.fleet.workers) == (status == 200)

    run(test())


def test_connection_options_are_a_list_over_all_its_fields() -> None:
    def head(*fields: str) -> http1.Head:
        return http1.request_head("\r\n".join(["GET /v1/x HTTP/1.1", "Host: x", *fields]).encode())

    both = head("Connection: close, X-Hop", "X-Hop: 1", "Connection: x-other", "X-Other: 2", "X-Own: 3")
    assert both.close
    assert both.own == b"\r\nHost: x\r\nX-Own: 3"
    assert not head("Connection: x-close").close


# ---------------------------------------------------------------- the end


def test_stopping_sends_what_was_answered_to_the_last_byte() -> None:
    size = 8 * 2**20

    async def test() -> None:
        async with stalled(size, requests=1) as (_, router, reader, writer):
            stopping = asyncio.create_task(router.stop(30))
            await until(lambda: router.stopping, "stopping")
            writer.transport.resume_reading()
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert len(await reader.readexactly(size)) == size
            assert await reader.read() == b""
            await stopping

    run(test())


def test_sigterm_lets_a_running_request_finish_and_says_that_the_connection_ends() -> None:
    go = asyncio.Event()

    async def test() -> None:
        async with Backend(echo_after(go)) as worker:
            routing = await asyncio.to_thread(Routing([worker.url]).__enter__)
            try:
                reader, writer = await asyncio.open_connection(HOST, int(routing.url.rpartition(":")[2]))
                writer.write(post(ASKED))
                await until(lambda: worker.calls, "the request at the worker")
                os.kill(routing.child.process.pid, signal.SIGTERM)

                async def refused() -> bool:
                    try:
                        _, other = await asyncio.open_connection(HOST, int(routing.url.rpartition(":")[2]))
                    except OSError:
                        return True
                    other.close()
                    return False

                async with asyncio.timeout(20):
                    while not await refused():
                        await asyncio.sleep(0.01)
                go.set()
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"connection: close\r\n" in head
                assert await reader.read() == ASKED
            finally:
                told: Json = await asyncio.to_thread(routing.stop)
            assert (told["in_flight"], told["broken"]) == (0, 0)

    run(test())


# ---------------------------------------------------------------- over HTTP


def test_a_session_stays_with_its_worker_over_http() -> None:
    async def test() -> None:
        async with contextlib.AsyncExitStack() as stack:
            three = [await stack.enter_async_context(Backend()) for _ in range(3)]
            router: Any = await stack.enter_async_context(routed(*(each.url for each in three), policy="session"))
            for number in range(12):
                for _ in range(3):
                    await raw(router, post(ASKED, f"X-Session-Id: {number}"))
            seen = [[re.search(rb"x-session-id: (\d+)", call.head, re.I)[1] for call in each.calls] for each in three]
            assert sum(len(set(names)) for names in seen) == 12  # each with one worker
            assert all(seen)

    run(test())


def test_a_breakers_one_trial_closes_it_again() -> None:
    go = asyncio.Event()

    async def refuse(call: Call) -> None:
        call.say(500, b"{}")

    async def test() -> None:
        options = {"policy": "round_robin", "threshold": 2, "base_s": 0.05, "limits": Limits(retries=0)}
        async with Backend(refuse) as worker, routed(worker.url, **options) as router:
            known = next(iter(router.fleet.workers.values()))
            for _ in range(2):
                await raw(router, post(ASKED))
            assert known.breaker.state == "open"
            assert (await raw(router, post(ASKED)))[0] == 503
            worker.handler = echo_after(go)
            await until(lambda: known.breaker.state == "half-open", "its turn to try")
            trial = asyncio.create_task(raw(router, post(ASKED)))
            await until(lambda: len(worker.calls) == 3, "the trial at the worker")
            assert (await raw(router, post(ASKED)))[0] == 503  # one at a time
            go.set()
            assert await trial == (200, ASKED)
            assert known.breaker.state == "closed"

    run(test())


def test_waits_between_attempts_are_drawn_up_to_a_bound_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        limits = Limits(retries=5, backoff_s=0.004, backoff_cap_s=0.02)
        async with (
            Backend(lambda call: asyncio.sleep(0, call.reset())) as worker,
            routed(worker.url, limits=limits, threshold=1000) as router,
        ):
            asked = []

            def uniform(low: float, high: float) -> float:
                asked.append((low, high))
                return low

            monkeypatch.setattr(router.rng, "uniform", uniform)
            assert (await raw(router, post(ASKED)))[0] == 502
            assert asked == [(0, most) for most in (0.004, 0.008, 0.016, 0.02, 0.02)]
            assert len(worker.calls) >= 6

    run(test())
