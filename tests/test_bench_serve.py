"""Chapter 6's load generator: arrivals, workloads, metrics against a server that wrote down its own times."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from ch06_vllm import agree, bench_serve, compare_models, load, turns
from ch06_vllm.client import Answer, Client, Retry
from common.script import UserError
from tests.conftest import needs_vllm
from tests.openai_fake import Does, FakeServer

SPECIAL = [3, 64]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 65 ids of which two are special, and a model that knows the first 60."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.add_special_tokens([AddedToken("w3", special=True), AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"vocab_size": 60}')
    return folder


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        running.tokens = ["x"]
        yield running


def bench(server: FakeServer, model: Path, folder: Path, *flags: str) -> dict[str, Any]:
    fixed = ["--url", server.url, "--model", str(model), "--run-dir", str(folder), "--warmup", "2"]
    return bench_serve.main([*fixed, *flags])


# ---------------------------------------------------------------- arrivals and workloads


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (math.inf, 0.0)])
def test_gaps_have_the_rate_and_the_variation_of_their_process(burstiness: float, variation: float) -> None:
    times = load.arrivals(8.0, 20_000, np.random.default_rng(1), burstiness)
    gaps = np.diff(times, prepend=0.0)
    assert times[-1] == pytest.approx(20_000 / 8)
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05, abs=1e-9)


def test_a_poisson_process_has_poisson_counts_and_no_memory() -> None:
    times = load.arrivals(5.0, 50_000, np.random.default_rng(2))
    counts = np.bincount(times.astype(int))[:-1]  # in each second
    assert counts.mean() == pytest.approx(5, rel=0.02)
    assert counts.var() == pytest.approx(5, rel=0.05)
    gaps = np.diff(times)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.02
    assert np.mean(gaps > 0.2) == pytest.approx(math.exp(-1), rel=0.02)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert load.arrivals(math.inf, 3, np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_usable_ids_are_those_that_the_model_knows_and_are_not_special(model: Path, tmp_path: Path) -> None:
    assert load.usable_ids(model).tolist() == [i for i in range(60) if i not in SPECIAL]
    with pytest.raises(UserError, match=r"no .*tokenizer\.json; --model is the folder that the server loads"):
        load.usable_ids(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json"):
        load.usable_ids(tmp_path)


def test_lengths() -> None:
    rng = np.random.default_rng(3)
    assert load.lengths("7")(rng, 3).tolist() == [7, 7, 7]
    drawn = load.lengths("2-4")(rng, 3000)
    assert sorted(set(drawn)) == [2, 3, 4]
    assert drawn.mean() == pytest.approx(3, abs=0.1)
    skewed = load.lengths("lognormal:100,0.8")(rng, 20_000)
    assert np.median(skewed) == pytest.approx(100, rel=0.03)
    assert np.log(skewed).std() == pytest.approx(0.8, rel=0.03)
    assert load.lengths("lognormal:1,3")(rng, 1000).min() == 1
    for wrong in ("", "0", "4-2", "x", "lognormal:3", "lognormal:0,1", "-3"):
        with pytest.raises(UserError, match="is no length in tokens"):
            load.lengths(wrong)


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    ids = np.arange(1000, 2000)
    made = load.workload(ids, [20] * 50, [5] * 50, np.random.default_rng(4), shared_prefix=16, prefixes=3)
    assert {len(request.prompt) for request in made} == {36}
    assert len({tuple(request.prompt[:16]) for request in made}) == 3
    assert len({tuple(request.prompt[16:]) for request in made}) == 50
    again = load.workload(ids, [20] * 50, [5] * 50, np.random.default_rng(4), shared_prefix=16, prefixes=3)
    assert made == again


def test_a_trace_gives_its_arrivals_lengths_and_shared_blocks(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [(0, 1030, 3, [7, 8, 9]), (500, 1500, 4, [7, 8, 10]), (500, 40, 1, [11])]
    file.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": h}) + "\n"
            for t, i, o, h in rows
        )
    )
    requests, times = load.read_trace(file, np.arange(5, 500), np.random.default_rng(5))
    assert times.tolist() == [0, 0.5, 0.5]
    assert [(len(r.prompt), r.max_tokens) for r in requests] == [(1030, 3), (1500, 4), (40, 1)]
    assert requests[0].prompt[:1024] == requests[1].prompt[:1024]
    assert requests[0].prompt[1024:1030] != requests[1].prompt[1024:1030]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"timestamp": 9, "input_length": 3}', '{"timestamp": 1, "input_length": 3, "output_length": 1}',
     '{"timestamp": 9, "input_length": 0, "output_length": 1}'],
)  # fmt: skip
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 5, "input_length": 3, "output_length": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"trace\.jsonl:2: no arrival"):
        load.read_trace(file, np.arange(9), np.random.default_rng(0))


# ---------------------------------------------------------------- metrics


def record(index: int, scheduled_s: float, sent_s: float, arrivals_s: list[float], tokens: int) -> load.Record:
    return load.Record(index, scheduled_s, scheduled_s, sent_s, arrivals_s, 10, tokens)


def test_the_definitions_on_one_request() -> None:
    one = record(0, 1.0, 1.5, [2.0, 2.25, 2.75], 5)  # five tokens in three chunks
    assert (one.ttft_s, one.e2e_s, one.itl_s) == (0.5, 1.25, [0.25, 0.5])
    assert one.tpot_s == (1.25 - 0.5) / 4
    assert (one.ttft_scheduled_s, one.e2e_scheduled_s) == (1.0, 1.75)
    assert record(0, 0, 0, [1.0], 1).tpot_s is None


def test_goodput_and_throughput_of_a_known_trace() -> None:
    records = [
        record(0, 0.0, 0.0, [0.1, 0.2, 0.3], 3),  # TTFT 100, TPOT 100, E2E 300 ms
        record(1, 0.0, 0.5, [0.6, 0.7, 0.8], 3),  # sent late: TTFT 600 from its schedule
        record(2, 1.0, 1.0, [1.1, 1.5, 1.9], 3),  # TPOT 400
        record(3, 1.0, 1.0, [1.1], 1),  # one token: no TPOT, which is within any bound
        load.Record(4, 1.0, 1.0, error="HTTP 503"),
        record(5, 2.0, 2.0, [2.2, 4.0], 2),  # TTFT 200: a bound is included
    ]
    figures = load.summary(records, {"ttft": 200.0, "tpot": 300.0})
    assert (figures["completed"], figures["failed"], figures["duration_s"]) == (5, 1, 4.0)
    assert figures["requests_per_s"] == 5 / 4
    assert figures["output_tokens_per_s"] == 12 / 4
    assert figures["total_tokens_per_s"] == (12 + 50) / 4
    assert figures["goodput_per_s"] == 2 / 4  # requests 0 and 3
    assert figures["within_slo"] == 2 / 6
    assert load.summary(records, {"ttft": 700.0, "e2e": 1000.0})["goodput_per_s"] == 4 / 4
    assert figures["ttft_ms_p50"] == pytest.approx(100)
    assert figures["ttft_scheduled_ms_p99"] == pytest.approx(np.percentile([100, 600, 100, 100, 200], 99))
    assert figures["itl_ms_mean"] == pytest.approx((4 * 100 + 2 * 400 + 1800) / 7)
    assert figures["tpot_ms_mean"] == pytest.approx((100 + 100 + 400 + 1800) / 4)
    assert "goodput_per_s" not in load.summary(records)


def test_objectives() -> None:
    assert load.slo("tpot:12.5") == ("tpot", 12.5)
    for wrong in ("ttft", "itl:3", "ttft:0", "ttft:nan", "e2e:x"):
        with pytest.raises(UserError, match="is no objective"):
            load.slo(wrong)


# ---------------------------------------------------------------- against a server with known delays


def test_measured_times_agree_with_those_that_the_server_wrote_down(
    server: FakeServer, model: Path, tmp_path: Path
) -> None:
    server.ttft_s, server.gap_s = 0.1, 0.04
    flags = ("--rate", "20", "--requests", "20", "--output-tokens", "8", "--slo", "e2e:100000")
    result = bench(server, model, tmp_path, *flags)
    rows = [json.loads(line) for line in next(tmp_path.glob("requests-*.jsonl")).read_text().splitlines()]
    seen = server.seen[2:]  # after the warm-up
    assert (result["completed"], len(seen), len(rows)) == (20, 20, 20)
    assert (result["completion_tokens"], result["prompt_tokens"], result["exact_lengths"]) == (160, 20 * 128, True)
    assert result["goodput_per_s"] == result["requests_per_s"]
    assert {len(row["arrivals_s"]) for row in rows} == {len(one.written_s) for one in seen} == {8}
    client_s = {
        "itl": [gap for row in rows for gap in np.diff(row["arrivals_s"])],
        "tpot": [(row["arrivals_s"][-1] - row["arrivals_s"][0]) / 7 for row in rows],
        "ttft": [row["arrivals_s"][0] - row["sent_s"] for row in rows],
        "e2e": [row["arrivals_s"][-1] - row["sent_s"] for row in rows],
    }
    for name, times in client_s.items():
        assert result[f"{name}_ms_p50"] == pytest.approx(1e3 * median(times), rel=1e-4)
    server_s = {
        "ttft": [one.written_s[0] - one.arrived_s for one in seen],
        "e2e": [one.written_s[-1] - one.arrived_s for one in seen],
    }
    for name, took in server_s.items():  # a client waits no less than the server took, which is no less than it should
        assert all(waited >= served for waited, served in zip(sorted(client_s[name]), sorted(took), strict=True))
        assert min(took) > server.ttft_s + (7 * server.gap_s if name == "e2e" else 0) - 1e-3
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_an_open_loop_does_not_wait_for_answers_and_a_closed_one_does(server: FakeServer, model: Path) -> None:
    requests = [load.Request([5, 6], 2)] * 6

    class Counting(Client):
        def __init__(self, **options: Any) -> None:
            super().__init__(server.url, retry=Retry(attempts=1), **options)
            self.called, self.all_called = 0, asyncio.Event()

        async def complete(self, *args: Any, **options: Any) -> Answer:
            self.called += 1
            if self.called == len(requests):
                self.all_called.set()
            return await super().complete(*args, **options)

    async def run(concurrency: int, times: np.ndarray | None) -> list[load.Record]:
        async with Counting(concurrency=concurrency) as client:
            sender = load.Sender(client, "fake", lambda _: None)
            if times is None:
                return await sender.closed_loop(requests, concurrency)
            task = asyncio.create_task(sender.open_loop(requests, times))
            await asyncio.wait_for(client.all_called.wait(), 20)
            await asyncio.to_thread(server.wait_for, lambda seen: len(seen) == concurrency)
            server.open_gate()
            return await task

    server.close_gate()
    times = np.arange(6) / 100
    records = asyncio.run(run(6, times))  # all six reach the server before one is answered
    assert [r.scheduled_s for r in records] == times.tolist()
    assert max(r.called_s for r in records) < min(r.arrivals_s[0] for r in records)

    server.seen.clear()
    server.close_gate()
    limited = asyncio.run(run(1, times))  # the wait for a turn is no part of TTFT, but of what a user sees
    for before, after in pairwise(limited):
        assert after.sent_s >= before.arrivals_s[-1]
        assert after.called_s < limited[0].arrivals_s[0]
    assert limited[-1].e2e_scheduled_s >= limited[-1].e2e_s + (limited[-2].arrivals_s[-1] - limited[-1].called_s)

    closed = asyncio.run(run(2, None))
    flight = sorted([(r.sent_s, 1) for r in closed] + [(r.arrivals_s[-1], -1) for r in closed])
    assert max(np.cumsum([step for _, step in flight])) == 2


def test_the_clients_own_lateness_is_measured(server: FakeServer) -> None:
    async def run() -> tuple[list[load.Record], list[float]]:
        async with Client(server.url) as client, load.loop_lag() as late:
            blocked = load.Sender(client, "fake", lambda _: time.sleep(0.3))  # after the first answer
            times = np.array([0.0, 0.1])
            return await blocked.open_loop([load.Request([5], 1)] * 2, times), late

    server.ttft_s = 0.05
    records, late = asyncio.run(run())
    assert max(late) > 0.2
    assert records[1].called_s - records[1].scheduled_s > 0.15
    assert load.summary(records)["lag_ms_p99"] > 150


def test_failures_are_counted_and_only_a_run_of_nothing_else_is_an_error(
    server: FakeServer, model: Path, tmp_path: Path
) -> None:
    ok = Does()
    server.script.extend([ok, ok, ok, Does(status=503), Does(after_tokens=1)])
    result = bench(server, model, tmp_path, "--concurrency", "1", "--requests", "5", "--slo", "ttft:100000")
    assert (result["completed"], result["failed"]) == (3, 2)
    assert "HTTP 503: scripted 503" in result["first_error"]
    assert result["within_slo"] == 3 / 5
    server.script.extend([Does(status=503)] * 5)
    with pytest.raises(UserError, match=r"no request was answered: .*HTTP 503"):
        bench(server, model, tmp_path, "--requests", "3")


def test_answers_of_another_length_are_told(server: FakeServer, model: Path, tmp_path: Path) -> None:
    stream = (
        b'data: {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
    )
    server.script.extend([Does(), Does(), Does(raw=stream)])
    result = bench(server, model, tmp_path, "--requests", "1", "--prompt-tokens", "4", "--output-tokens", "9")
    assert (result["exact_lengths"], result["completion_tokens"]) == (False, 1)


def test_several_servers_get_the_same_load_in_one_table(
    server: FakeServer, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as other:
        flags = ("--url", f"other={other.url}", "--requests", "4", "--prompt-tokens", "2-9", "--shared-prefix", "3")
        result = bench(server, model, tmp_path, *flags)
        asked = [sorted(seen.body["prompt"] for seen in running.seen[2:]) for running in (server, other)]
    assert list(result["servers"]) == [server.url, "other"]
    assert asked[0] == asked[1]
    assert all(5 <= len(prompt) <= 12 for prompt in asked[0])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["ms", server.url, "other"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rate", "0"), "--rate and --burstiness are above 0"),
        (("--rate", "3", "--concurrency", "2"), "not allowed with"),
        (("--slo", "itl:3"), "is no objective"),
        (("--trace", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
        (("--serve", "nano"), "'nano' is not ENGINE:MODEL; ENGINE is ours or vllm"),
    ],
)
def test_wrong_flags_are_one_line(
    server: FakeServer, model: Path, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        bench(server, model, tmp_path, *flags)
    assert server.seen == []


def test_models_are_compared_one_server_after_the_other(
    server: FakeServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    up: list[str] = []

    @contextmanager
    def one_at_a_time(asked: tuple[str, str], options: dict[str, Any]) -> Iterator[SimpleNamespace]:
        assert up == []
        up.append(asked[1])
        yield SimpleNamespace(url=server.url, model=Path(asked[1]).name, start_s=2.5)
        up.pop()

    other = tmp_path / "other"
    shutil.copytree(model, other)
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}, other / "model.safetensors")
    monkeypatch.setattr(compare_models, "server", one_at_a_time)
    flags = ["--server", f"ours:{model}", "--server", f"ours:{other}", "--requests", "3", "--warmup", "1"]
    result = compare_models.main([*flags, "--prompt-tokens", "4", "--run-dir", str(tmp_path / "run")])
    one, two = result["servers"].values()
    assert (result["compared"], result["failed"], one["parameters"], two["parameters"]) == (2, 0, None, 22)
    assert one["start_s"] == 2.5
    assert [seen.body["model"] for seen in server.seen] == [model.name] * 4 + ["other"] * 4
    assert [seen.body["prompt"] for seen in server.seen[:4]] == [seen.body["prompt"] for seen in server.seen[4:]]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert len(list((tmp_path / "run").glob("requests-*.jsonl"))) == 2


# ---------------------------------------------------------------- beside vllm bench serve


def test_vllms_own_code_makes_the_same_figures_of_our_records() -> None:
    """On records with answers of one token and chunks of several: nothing but a definition could differ."""
    needs_vllm()
    rng = np.random.default_rng(6)
    records = []
    for index in range(40):
        chunks = int(rng.integers(1, 9))
        times = index / 9 + np.cumsum(rng.gamma(1.0, 0.03, chunks + 1))
        tokens = chunks if index % 3 else 2 * chunks
        records.append(record(index, index / 9, times[0], times[1:].tolist(), tokens))

    with turns.Process("vllm bench serve", "ch06_vllm.vllm_bench:main") as judge:
        judge.ready(280)
        assert asyncio.run(agree.definitions(judge, records, load.summary(records))) < 1e-9


def test_a_process_that_ends_or_cannot_start_is_told_by_its_own_words() -> None:
    with turns.Process("it", "ch06_vllm.offline:wait_for_turns", "ours", "/nowhere", "{}", engine="ours") as it:
        with pytest.raises(UserError, match="it cannot run: exit"):
            it.ready(60)
        with pytest.raises(UserError, match="it cannot run: exit"):
            it.ask([], 60)


def test_agreement_is_the_median_of_the_rounds() -> None:
    def figures(names: Any, value: float) -> dict[str, float]:
        return {"failed": 0, **dict.fromkeys(names, value)}

    rounds = [
        (figures(agree.METRICS, ours), figures(agree.METRICS.values(), theirs))
        for ours, theirs in ((1.0, 2.0), (1.1, 1.0), (1.04, 1.0))
    ]
    found = agree.summarise(rounds)
    assert (found["rounds"], found["failed"]) == (3, 0)
    assert found["ttft_ratio"] == found["output_tokens_per_s_ratio"] == 1.04
    assert found["ttft_ratio_range"] == [0.5, 1.1]
    assert found["ttft_theirs_range"] == [1.0, 2.0]
    assert found["largest_difference"] == pytest.approx(0.04)
    for _, theirs in rounds:
        theirs["median_itl_ms"] = 0.0  # one read brought them: no time to compare with
    found = agree.summarise(rounds)
    assert found["itl_ratio"] is None
    assert found["largest_difference"] == pytest.approx(0.04)
