"""Autoscaling on real servers: the HPA's controller, Prometheus, and Redis with workers that are killed."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from ch08_kubernetes.autoscaling import hpa_live, keda_queries
from ch08_kubernetes.autoscaling.queue_worker import Queue
from common import process, script
from common.exercises import missing_for
from common.ranks import free_port
from tests.openai_fake import Does, FakeServer

WORKER = [sys.executable, "-m", "ch08_kubernetes.autoscaling.queue_worker", "--list", "prompts"]


def need(what: str) -> None:
    if lacking := missing_for(what):
        pytest.skip(f"needs {lacking}")


def test_the_real_controller_goes_up_and_down_as_computed(tmp_path: Path) -> None:
    need("kube")
    result = hpa_live.main(["--run-dir", str(tmp_path)])
    assert result["path"] == [1, 3, 2, 1]
    assert result["disagreements"] == 0
    assert result["scale_down_after_s"] < hpa_live.WINDOW_S + 60


def test_each_keda_query_is_one_series_however_many_replicas(tmp_path: Path) -> None:
    need("prometheus")
    result = keda_queries.main(["--run-dir", str(tmp_path)])
    assert result["always_one_series"]
    assert result["values_right"]
    assert result["series_without_sum"] == [1, 2, 5]
    assert result["rules"] > 0
    assert result["monitoring_queries"] > result["rules"]


def test_prometheus_says_what_is_wrong_with_a_query() -> None:
    need("prometheus")
    text = keda_queries.REPLICAS[0].text()
    with keda_queries.served(text) as port, keda_queries.Prometheus([port]) as prometheus:
        prometheus.wait()
        with pytest.raises(script.UserError, match="parse error"):
            prometheus.ask("sum(")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[tuple[str, redis.Redis]]:
    """A real Redis with a password."""
    need("redis")
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", "pass-word"]
    with process.Child([*command, "--dir", str(tmp_path)]):
        client = redis.Redis(port=port, password="pass-word", decode_responses=True)
        until(lambda: answers(client), "redis-server does not answer")
        yield f"redis://127.0.0.1:{port}", client


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def until(there: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def worker(url: str, engine: str, *more: str) -> process.Child:
    return process.Child([*WORKER, "--redis", url, "--engine", engine, *more], env={"REDIS_PASSWORD": "pass-word"})


def put(client: redis.Redis, count: int) -> set[str]:
    keys = [f"r{number}" for number in range(count)]
    client.lpush("prompts", *(json.dumps({"id": key, "prompt": "def f(", "max_tokens": 4}) for key in keys))
    return set(keys)


def in_work(client: redis.Redis) -> int:
    return sum(int(client.llen(key)) for key in client.keys("prompts:taken:*"))


def test_killed_workers_lose_nothing_and_each_request_is_answered_once(store: tuple[str, redis.Redis]) -> None:
    url, client = store
    answered = 0
    with FakeServer() as engine:
        keys = put(client, 20)
        for _ in range(2):
            engine.close_gate()
            with worker(url, engine.url, "--lease-s", "1") as victim:
                until(lambda: in_work(client) == 1, "no worker has taken a request")
                (held,) = client.keys("prompts:taken:*")
                victim.process.kill()
                victim.process.wait(10)
            assert client.keys("prompts:taken:*") == [held]
            assert client.llen("prompts") + 1 + client.hlen("prompts:results") == 20  # it is in none but its list
            until(lambda: not client.keys("prompts:lease:*"), "the lease of a dead worker does not run out")
            with worker(url, engine.url) as other:
                until(lambda h=held: client.keys("prompts:taken:*") not in ([], [h]), "nothing was taken back")
                other.process.send_signal(signal.SIGTERM)  # with the dead one's request in its hands
                engine.open_gate()
                drained = other.wait(60)
            assert drained.result is not None, drained.stderr
            assert {name: drained.result[name] for name in ("answered", "reclaimed", "told_to_stop")} == {
                "answered": 1,
                "reclaimed": 1,
                "told_to_stop": True,
            }
            answered += drained.result["answered"]
        with worker(url, engine.url, "--idle-exit", "1", "--lease-s", "1") as last:
            done = last.wait(90)
    assert done.result is not None, done.stderr
    assert answered + done.result["answered"] == 20
    assert set(client.hkeys("prompts:results")) == keys
    assert set(client.keys("prompts*")) == {"prompts:results"}


def test_a_worker_that_lost_its_lease_writes_no_second_result(store: tuple[str, redis.Redis]) -> None:
    _, client = store
    slow, quick = (Queue(client, "prompts", name) for name in ("slow", "quick"))
    put(client, 1)
    slow.beat()
    request = slow.take(1)
    assert request
    assert quick.reclaim() == 0  # it lives
    client.delete(slow.lease)
    assert quick.reclaim() == 1
    assert quick.take(1) == request
    assert not slow.done(request, "r0", "of slow")
    assert quick.done(request, "r0", "of quick")
    assert client.hgetall("prompts:results") == {"r0": "of quick"}


def test_poison_ends_in_the_dead_letters(store: tuple[str, redis.Redis]) -> None:
    url, client = store
    client.lpush("prompts", "no json", json.dumps({"id": "ok", "prompt": "x", "max_tokens": 4}))
    client.lpush("prompts", json.dumps({"id": "killer", "prompt": "x", "max_tokens": 4}))
    client.hset("prompts:tries", "killer", "3")  # three workers have died of it
    with FakeServer() as engine, worker(url, engine.url, "--idle-exit", "1", "--lease-s", "1") as child:
        done = child.wait(60)
    assert done.result is not None, done.stderr
    assert (done.result["answered"], done.result["dead"]) == (1, 2)
    assert client.hkeys("prompts:results") == ["ok"]
    assert client.llen("prompts:dead") == 2
    assert any("taken 3 times" in str(why) for why in client.hvals("prompts:reasons"))


def test_a_workers_mistakes_are_one_line(store: tuple[str, redis.Redis]) -> None:
    url, _ = store
    nobody = f"127.0.0.1:{free_port()}"
    cases = [
        (url, "wrong", "refuses the password"),
        (f"redis://{nobody}", "", "does not answer"),
        ("http://x", "", "it is redis://HOST:PORT"),
        (url, "pass-word", "no engine answers"),
    ]
    for address, password, said in cases:
        words = [*WORKER, "--redis", address, "--engine", f"http://{nobody}"]
        done = process.run(words, timeout_s=60, env={"REDIS_PASSWORD": password})
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_an_engine_that_is_away_makes_no_dead_letters(store: tuple[str, redis.Redis]) -> None:
    """Its refusals are not the request's fault, however many there are."""
    url, client = store
    keys = put(client, 1)
    with FakeServer() as engine:
        engine.script.extend([Does(status=503)] * 3)
        with worker(url, engine.url, "--max-tries", "1", "--idle-exit", "1", "--lease-s", "1") as child:
            done = child.wait(60)
    assert done.result is not None, done.stderr
    assert {name: done.result[name] for name in ("answered", "given_back", "dead")} == {
        "answered": 1, "given_back": 3, "dead": 0,
    }  # fmt: skip
    assert set(client.hkeys("prompts:results")) == keys
    assert set(client.keys("prompts*")) == {"prompts:results"}
