"""Chapter 6's measurements: what a KV cache takes, the two phases, batches that change at every step, tuning."""

from __future__ import annotations

import argparse
import http.server
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ch06_vllm import batching, kv_policies, kv_run, load, phases, scrape, stall, tune
from ch06_vllm.batching import Arrival
from ch06_vllm.engine import Config
from ch06_vllm.engine.engine import Engine
from ch06_vllm.kv_policies import Held
from ch06_vllm.servers import Server
from common import exercises, lm
from common.script import UserError
from tests.inprocess import run_script

CONTEXT = 256


def engine_of(model: Path, **wanted: object) -> Engine:
    own = {
        "max_model_len": CONTEXT,
        "num_blocks": 4 * CONTEXT // 16,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 4096,
    }
    return Engine(Config(str(model), **{**own, **wanted}))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ids(served_model: Path) -> np.ndarray:
    return load.usable_ids(served_model)


@pytest.fixture(scope="module")
def engine(served_model: Path) -> Engine:
    return engine_of(served_model)


def requests(ids: np.ndarray, lengths: list[tuple[int, int]], shared: int = 0, seed: int = 0) -> list[load.Request]:
    rng = np.random.default_rng(seed)
    prompts, outputs = zip(*lengths, strict=True)
    return load.workload(ids, prompts, outputs, rng, shared_prefix=shared)


# ---------------------------------------------------------------- the KV cache, by formula


def test_slots_of_each_layout() -> None:
    held = Held(prompt=30, output=33, tokens=33)
    slots = {name: of(held) for name, of in kv_policies.policies(16, 1024).items()}
    assert slots == {"paged": 48, "known": 63, "pow2": 30 + 64, "max": 1024}
    assert [kv_policies.power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


def test_peak_by_hand() -> None:
    # after steps 1, 2, 3: the first holds 4, 5, 6 tokens; the second 9, and is gone after the second step
    assert kv_policies.peak_blocks([(4, 4), (9, 2)], 4) == 1 + 3
    assert kv_policies.peak_blocks([(4, 4), (9, 3)], 4) == 2 + 3
    assert kv_policies.peak_blocks([(8, 2), (9, 2)], 4, shared=2) == 2 + 0 + 1
    assert kv_policies.peak_blocks([(8, 1)], 4) == 0  # it never outlives a step


def test_a_whole_prompt_is_never_a_hit() -> None:
    assert kv_policies.prefix_hits([32, 33, 100], prefix=40, block_size=16) == 16 + 32 + 32


LENGTHS = st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS)
def test_the_engine_takes_what_the_lengths_say(engine: Engine, ids: np.ndarray, lengths: list[tuple[int, int]]) -> None:
    engine.pool.forget_all()
    size = engine.config.block_size
    trace = kv_run.on_ours(engine, requests(ids, lengths), kv_policies.policies(size, CONTEXT))
    assert trace.peak_blocks == kv_policies.peak_blocks(lengths, size)
    assert [sample.taken for sample in trace.samples] == [sample.needed["paged"] for sample in trace.samples]
    assert [sample.held for sample in trace.samples] == [
        sum(held.tokens for held in kv_policies.after_step(lengths, step)) for step in range(1, len(trace.samples) + 1)
    ]
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("size", [1, 16, 64])
def test_half_a_block_is_empty_on_average(served_model: Path, ids: np.ndarray, size: int) -> None:
    lengths = [(1 + 13 * i % 97, 2 * size + 2) for i in range(16)]  # each passes through every fill of a block, twice
    engine = engine_of(served_model, block_size=size, num_blocks=16 * 256 // size)
    trace = kv_run.on_ours(engine, requests(ids, lengths), kv_policies.policies(size, CONTEXT))
    assert trace.empty_a_request == pytest.approx((size - 1) / 2, abs=0.05 * size)


@pytest.mark.parametrize("prefix", [15, 16, 50])
def test_a_shared_prefix_saves_its_full_blocks(served_model: Path, ids: np.ndarray, prefix: int) -> None:
    tails = [(3, 9), (20, 5), (11, 12), (16, 7)]
    asked = requests(ids, tails, shared=prefix)
    lengths = [(len(request.prompt), request.max_tokens) for request in asked][1:]
    full = prefix // 16
    peaks = {}
    for caching in (True, False):
        engine = engine_of(served_model, enable_prefix_caching=caching)
        rules = kv_policies.policies(16, CONTEXT)
        kv_run.on_ours(engine, asked[:1], rules)
        trace = kv_run.on_ours(engine, asked[1:], rules)
        assert trace.peak_blocks == kv_policies.peak_blocks(lengths, 16, full if caching else 0)
        expected = kv_policies.prefix_hits([prompt for prompt, _ in lengths], prefix, 16)
        assert trace.hits == (expected if caching else 0)
        assert trace.queries == sum(prompt for prompt, _ in lengths)
        peaks[caching] = trace.peak_blocks
    assert peaks[False] - peaks[True] == (len(lengths) - 1) * full


def test_a_block_of_the_longest_request_is_preallocation(served_model: Path, ids: np.ndarray) -> None:
    asked = requests(ids, [(20, 12)] * 12)
    paged = kv_run.on_ours(engine_of(served_model), asked, kv_policies.policies(16, CONTEXT))
    in_one_piece = engine_of(served_model, block_size=CONTEXT, num_blocks=4)
    pieces = kv_run.on_ours(in_one_piece, asked, kv_policies.policies(CONTEXT, CONTEXT))
    assert (paged.running_peak, pieces.running_peak) == (12, 4)
    assert pieces.waste("paged") == pieces.waste("max") > 0.8


@pytest.mark.alone  # vLLM's threads are bound to all cores: who shares one holds up all
def test_vllm_takes_what_the_lengths_say_to_the_block(served_model: Path, ids: np.ndarray) -> None:
    if lacking := exercises.missing_for("vllm"):
        pytest.skip(f"needs {lacking}")
    rules = kv_policies.policies(32, 1024)
    options = {"kv_cache_memory_bytes": 512 << 20, "max_model_len": 1024, "block_size": 32}
    with kv_run.vllm_in_steps(served_model, options) as engine:
        lengths = [(12 + 40 * number, 60 + 48 * number) for number in range(6)]
        trace = kv_run.on_vllm(engine, requests(ids, lengths, seed=7), rules)
        assert (trace.block_size, trace.running_peak, trace.hits) == (32, len(lengths), 0)
        assert trace.peak_blocks == kv_policies.peak_blocks(lengths, 32)
        assert trace.samples[-1].taken == 0
        held = [sum(held.tokens for held in kv_policies.after_step(lengths, step + 1)) for step in range(60)]
        assert [step.held for step in trace.samples[:60]] == held

        shared = requests(ids, [(5, 2)] * 4, shared=67, seed=8)
        kv_run.on_vllm(engine, shared[:1], rules)
        trace = kv_run.on_vllm(engine, shared[1:], rules)
        assert trace.hits == kv_policies.prefix_hits([len(r.prompt) for r in shared[1:]], 67, 32) == 3 * 64
        assert trace.queries == sum(len(request.prompt) for request in shared[1:])

        prefill, decode = phases.Shape("prefill", 2, 64), phases.Shape("decode", 2, 64)
        times: phases.Times = {prefill: [], decode: []}
        began = time.perf_counter()
        phases.on_vllm(engine, prefill, requests(ids, [(64, 1)] * 2, seed=3), times)
        phases.on_vllm(engine, decode, requests(ids, [(64, 20)] * 2, seed=4), times)
        assert (len(times[prefill]), len(times[decode])) == (1, 19)
        assert 0 < sum(times[prefill] + times[decode]) < time.perf_counter() - began


# ---------------------------------------------------------------- /metrics

TEXT = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0
"""


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers /metrics `left` times, then with an error."""

    protocol_version = "HTTP/1.1"
    left = 0

    def do_GET(self) -> None:
        type(self).left -= 1
        body = TEXT.encode()
        self.send_response(200 if type(self).left >= 0 else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metrics_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_metrics_are_summed_over_replicas(metrics_url: str) -> None:
    Scripted.left = 1
    metrics = scrape.scrape(metrics_url)
    assert metrics["vllm:num_requests_running"] == 7
    assert metrics.samples["vllm:cache_config_info"][-1].labels["num_gpu_blocks"] == "100"
    with pytest.raises(UserError, match="has no vllm:other"):
        metrics["vllm:other"]
    with pytest.raises(UserError, match="metrics says 503"):
        scrape.scrape(metrics_url)


# ---------------------------------------------------------------- phases


def test_a_prefill_is_one_step_and_a_decode_step_one_token_of_each(
    engine: Engine, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    run = engine.runner.run
    monkeypatch.setattr(
        engine.runner, "run", lambda shares: computed.append(sum(s.count for s in shares)) or run(shares)
    )
    prefill, decode = phases.Shape("prefill", 3, 40), phases.Shape("decode", 3, 40)
    times: phases.Times = {prefill: [], decode: []}
    phases.on_ours(engine, prefill, requests(ids, [(40, 1)] * 3, seed=1), times)
    assert (computed, len(times[prefill])) == ([prefill.computed], 1)
    computed.clear()
    phases.on_ours(engine, decode, requests(ids, [(40, 6)] * 3, seed=2), times)
    assert computed[1:] == [decode.computed] * 5 == [3] * 5
    assert len(times[decode]) == 5


def test_prefill_reads_the_weights_once_for_all_tokens_and_decode_for_each() -> None:
    config = lm.config("small")
    config.dtype = __import__("torch").bfloat16
    long, one, many = (
        phases.Shape(*shape).work(config, 1.0)
        for shape in (("prefill", 1, 1024), ("decode", 1, 64), ("decode", 64, 64))
    )
    assert one.intensity == pytest.approx(1, abs=0.1)  # two FLOPs for each weight of two bytes
    assert many.intensity > 20 * one.intensity
    assert long.intensity > 300 * one.intensity
    far = phases.Shape("decode", 64, 4096).work(config, 1.0)
    assert far.intensity < 3 * one.intensity  # the cache is each request's own: batching does not help with it


def test_shapes() -> None:
    names = [shape.name for shape in phases.shapes([128, 32], [4, 1])]
    assert names == ["prefill, 1 x 32", "prefill, 1 x 128", "prefill, 4 x 32", "decode, 1 x 32", "decode, 1 x 128",
                     "decode, 4 x 32", "decode, 4 x 128"]  # fmt: skip


# ---------------------------------------------------------------- continuous and static batching


def arrivals(
    ids: np.ndarray, outputs: list[int], gap_s: float = 0.0, priorities: list[int] | None = None
) -> list[Arrival]:
    asked = requests(ids, [(5 + 3 * i, tokens) for i, tokens in enumerate(outputs)])
    ranks = priorities or [0] * len(outputs)
    return [Arrival(gap_s * i, r.prompt, r.max_tokens, p) for i, (r, p) in enumerate(zip(asked, ranks, strict=True))]


def check(served: list[batching.Served], slots: int) -> None:
    """In order, and no slot has two requests at the same time."""
    for one in served:
        assert one.arrived_s <= one.admitted_s < one.first_s <= one.done_s <= one.released_s
    for slot in range(slots):
        spans = sorted((one.admitted_s, one.released_s) for one in served if one.slot == slot)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert {one.slot for one in served} <= set(range(slots))


def test_who_is_done_makes_room_at_once(served_model: Path, ids: np.ndarray) -> None:
    engine = engine_of(served_model, max_num_seqs=2)
    served = batching.continuous(engine, arrivals(ids, [40, 2, 3, 4], gap_s=0.01))
    check(served, slots=2)
    assert [one.slot for one in served] == [0, 1, 1, 1]
    assert max(one.done_s for one in served[1:]) < served[0].done_s  # the others pass beside the long one


def test_a_static_batch_waits_for_its_longest(served_model: Path, ids: np.ndarray) -> None:
    static = batching.Static(lm.load(str(served_model)), batch_size=2)
    served = static(arrivals(ids, [20, 2, 3, 4]))
    check(served, slots=2)
    assert served[0].released_s == served[1].released_s == served[0].done_s > served[1].done_s
    assert min(served[2].admitted_s, served[3].admitted_s) >= served[0].released_s
    assert len(static.generate(arrivals(ids, [3, 7]))) == 7


def test_priorities_decide_who_is_next(served_model: Path, ids: np.ndarray) -> None:
    engine = engine_of(served_model, max_num_seqs=1)
    asked = arrivals(ids, [3] * 4, priorities=[2, 1, 0, 1])
    for priorities, order in ((True, [2, 1, 3, 0]), (False, [0, 1, 2, 3])):
        served = batching.continuous(engine, asked, priorities=priorities)
        assert sorted(range(4), key=lambda index: served[index].admitted_s) == order


def test_a_workload_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    rows = [
        {"arrival_s": 2, "prompt": "ab", "max_tokens": 3, "priority": -1},
        {"arrival_s": 0.5, "prompt": [7, 8], "max_tokens": 1},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert batching.read(path, lambda text: [ord(c) for c in text], 100) == [
        Arrival(0.5, [7, 8], 1, 0),
        Arrival(2.0, [97, 98], 3, -1),
    ]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"arrival_s": 0, "prompt": "a"}', '{"arrival_s": -1, "prompt": "a", "max_tokens": 1}',
     '{"arrival_s": NaN, "prompt": "a", "max_tokens": 1}', '{"arrival_s": 0, "prompt": "", "max_tokens": 1}',
     '{"arrival_s": 0, "prompt": [1.5], "max_tokens": 1}', '{"arrival_s": 0, "prompt": 5, "max_tokens": 1}',
     '{"arrival_s": 0, "prompt": "a", "max_tokens": 0}', '{"arrival_s": 0, "prompt": "a", "max_tokens": true}',
     '{"arrival_s": 0, "prompt": "a", "max_tokens": 1, "priority": "high"}'],
)  # fmt: skip
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text('{"arrival_s": 0, "prompt": "a", "max_tokens": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=r"work\.jsonl:2: no request; a line has arrival_s"):
        batching.read(path, lambda text: [1] * len(text), 100)


def test_workloads_that_cannot_be_run(tmp_path: Path) -> None:
    encode: Callable[[str], list[int]] = lambda text: [1] * len(text)  # noqa: E731
    path = tmp_path / "work.jsonl"
    with pytest.raises(UserError, match="cannot read"):
        batching.read(path, encode, 100)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        batching.read(path, encode, 100)
    path.write_text('{"arrival_s": 0, "prompt": "aaaa", "max_tokens": 7}\n')
    assert len(batching.read(path, encode, 11)) == 1
    with pytest.raises(UserError, match="1: 4 prompt and 7 new tokens exceed the context of 10"):
        batching.read(path, encode, 10)


def test_the_workload_of_the_chapter_fits(served_model: Path) -> None:
    path = Path(batching.__file__).parent / "workloads/interactive.jsonl"
    read = batching.read(path, lm.load_tokenizer(str(served_model)).encode, 2048)
    assert {arrival.priority for arrival in read} == {0, 1}


@pytest.mark.parametrize("way", ["whole", "chunks"])
def test_a_long_prompt_takes_one_step_or_many(
    served_model: Path, ids: np.ndarray, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = argparse.Namespace(max_model_len=CONTEXT, running=3, chunk=32)
    engine = engine_of(served_model, **stall.settings(args)[way])
    steps: list[list[int]] = []
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda shares: steps.append([s.count for s in shares]) or run(shares))
    running, (long,) = requests(ids, [(8, 60)] * 3), requests(ids, [(200, 2)], seed=1)
    gaps, ttft_ms = stall.on_ours(engine, running, long)
    with_long = [counts for counts in steps[3:] if max(counts) > 1]
    assert [max(counts) for counts in with_long] == ([200] if way == "whole" else [29] * 6 + [26])
    assert all(sorted(counts)[:3] == [1, 1, 1] for counts in with_long)  # the others get their token in each of them
    assert len(gaps) == 3 * 59
    assert ttft_ms > 0
    assert sum(at_s <= 0 for at_s, _ in gaps) == 3 * (stall.BEFORE - 1)


def test_the_stall_seen_from_outside(vllm_server: Server, ids: np.ndarray) -> None:
    import asyncio

    running, (long,) = requests(ids, [(8, 600)] * 2, seed=5), requests(ids, [(300, 2)], seed=6)  # seconds, not bursts
    gaps, ttft_ms = asyncio.run(stall.on_server(vllm_server.url, running, long))
    figures = stall.figures(gaps, ttft_ms)
    assert len(gaps) <= 2 * 599
    assert figures["itl_ms_max"] > 0  # tokens may come in bursts: then the median gap is none
    assert figures["long_ttft_ms"] == ttft_ms > 0


# ---------------------------------------------------------------- tuning

SLO = {"ttft": 100.0, "tpot": 10.0}


def point(options: tune.Options, within: float, ttft: float = 100, tokens: float = 1, tpot: float = 1) -> tune.Point:
    paced = {"within_slo": within, "ttft_scheduled_ms_p95": ttft, "tpot_ms_p95": 1.0, "e2e_scheduled_ms_p95": 1.0}
    return tune.Point(options, {"output_tokens_per_s": tokens, "tpot_ms_p95": tpot}, paced)


def test_a_better_point_is_one_beyond_the_noise() -> None:
    here = point({}, 0.90)
    assert point({}, 0.93).beats(here, SLO, step=0.02)
    assert not point({}, 0.91).beats(here, SLO, step=0.02)
    assert point({}, 0.90, ttft=90).beats(here, SLO, step=0.02)
    assert not point({}, 0.90, ttft=97).beats(here, SLO, step=0.02)
    assert not point({}, 0.80, ttft=50).beats(here, SLO, step=0.02)
    assert not tune.Point({}, error="no").beats(here, SLO, step=0.02)


def test_the_pareto_front() -> None:
    points = [point({}, 1, tokens=t, tpot=l) for t, l in ((100, 5), (200, 9), (150, 9), (90, 5), (50, 1))]  # noqa: E741
    points.append(tune.Point({}, error="no"))
    front = {(p.at_once["output_tokens_per_s"], p.at_once["tpot_ms_p95"]) for p in tune.pareto(points)}
    assert front == {(100, 5), (200, 9), (50, 1)}


def test_the_search_finds_the_best_of_each_axis_and_measures_nothing_twice(
    ids: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tune.Options] = []

    def measured(
        args: argparse.Namespace, model: Path, options: tune.Options, ids: np.ndarray, seed: int
    ) -> tune.Point:
        asked.append(options)
        if error := tune.impossible(options, args.max_model_len):
            return tune.Point(options, error=error)
        better = (
            (options["max-num-seqs"] == 16) + (options["max-num-batched-tokens"] == 512) + (options["block-size"] == 16)
        )
        return point(options, 0.5 + 0.1 * better)

    monkeypatch.setattr(tune, "measure", measured)
    args = tune.arguments([])
    best, tried = tune.search(args, Path(), ids)
    assert best.options == tune.START | {"max-num-seqs": 16, "max-num-batched-tokens": 512, "block-size": 16}
    assert len(asked) == len(tried) == len({tuple(options.items()) for options in asked})
    assert [p.options for p in tried if p.error] == [tune.START | {"max-num-seqs": 16, "max-num-batched-tokens": 512,
                                                                   "enable-chunked-prefill": False}]  # fmt: skip
    assert "not possible: without chunks a step must take a prompt of 2048" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slo", "ttft=5"], "is no objective"),
        (["--enable-chunked-prefill", "yes"], "'yes' is neither on nor off"),
        (["--rate", "inf"], "tuning needs arrivals at a --rate"),
        (["--attainment", "95"], "is a share; take at most 1"),
        (["--max-num-seqs", "0"], "0 is below 1"),
    ],
)
def test_mistakes_in_tuning_are_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tune.arguments(flags)


def test_requests_that_are_too_long_are_told_before_a_server_starts(served_model: Path, ids: np.ndarray) -> None:
    args = tune.arguments(["--max-model-len", "300", "--prompt-tokens", "200"])
    with pytest.raises(UserError, match="raise --max-model-len 300 to that"):
        tune.measure(args, served_model, tune.START | {"max-num-batched-tokens": 300}, ids, 0)


# ---------------------------------------------------------------- the scripts


def test_kv_memory_script(tmp_path: Path) -> None:
    flags = ["--requests", "16", "--cache-tokens", "2048", "--max-model-len", "256", "--prefix-tokens", "70",
             "--sweep", "8,32", "--rounds", "1", "--run-dir", tmp_path]  # fmt: skip
    done = run_script("ch06_vllm/kv_memory.py", flags)
    assert done.result, done.stderr
    assert done.result["ours_largest_error"] == 0
    assert done.result["ours_blocks_saved"] > 0 == done.result["ours_hits_without_cache"]
    assert done.result["ours_most_running_in_one_piece"] == 2048 // 256 < done.result["ours_most_running_paged"]
    assert [(row["engine"], row["block_size"]) for row in done.result["sweep"]] == [("ours", 8), ("ours", 32)]
    assert (tmp_path / "kv_memory.png").stat().st_size > 10_000


def test_phases_script(tmp_path: Path) -> None:
    flags = ["--prompts", "16,64", "--batches", "1,4", "--steps", "4", "--rounds", "1", "--run-dir", tmp_path]
    done = run_script("ch06_vllm/phases.py", flags)
    assert done.result, done.stderr
    assert done.result["intensity_prefill"] > 20 * done.result["intensity_decode"]
    assert len(done.result["steps"]) == 7
    assert (tmp_path / "phases.png").stat().st_size > 10_000


def test_continuous_batching_script(tmp_path: Path) -> None:
    flags = [
        "--requests",
        "8",
        "--max-num-seqs",
        "3",
        "--output-tokens",
        "2-24",
        "--rounds",
        "1",
        "--run-dir",
        tmp_path,
    ]
    done = run_script("ch06_vllm/continuous_batching.py", flags)
    assert done.result, done.stderr
    assert done.result["useful_tokens"] >= 16
    assert 0 < done.result["slots_busy_static"] <= 1
    assert math.isfinite(done.result["latency_times"])
    assert (tmp_path / "batching.png").stat().st_size > 10_000


def test_stall_script(tmp_path: Path) -> None:
    flags = [
        "--stall",
        "--rounds",
        "1",
        "--long-prompt",
        "300",
        "--max-model-len",
        "320",
        "--chunk",
        "64",
        "--running",
        "2",
    ]
    done = run_script("ch06_vllm/continuous_batching.py", [*flags, "--run-dir", tmp_path])
    assert done.result, done.stderr
    assert done.result["chunks_itl_ms_max"] > 0
    assert (tmp_path / "stall.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("kv_memory", ["--cache-tokens", "1000"], "is no multiple of 32"),
        ("kv_memory", ["--engine", "sglang"], "'sglang' is no engine; take ours or vllm"),
        ("kv_memory", ["--prefix-tokens", "600"], "more than half of --max-model-len"),
        ("kv_memory", ["--cache-tokens", "1024", "--prefix-tokens", "400"], "has no room for three with the prefix"),
        ("phases", ["--engine", "both"], "'both' is no engine"),
        ("continuous_batching", ["--workload", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        ("continuous_batching", ["--stall", "--chunk", "16", "--running", "20"], "leaves no token beside"),
        ("continuous_batching", ["--stall", "--long-prompt", "4000"], "exceeds --max-model-len"),
    ],
)
def test_mistakes_are_one_line(script: str, flags: list[str], said: str, tmp_path: Path) -> None:
    done = run_script(f"ch06_vllm/{script}.py", [*flags, "--run-dir", tmp_path])
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_tune_script_on_our_server(tmp_path: Path) -> None:
    flags = ["--requests", "6", "--rate", "20", "--warmup", "1", "--max-num-seqs", "2", "--max-num-batched-tokens", "",
             "--enable-chunked-prefill", "", "--enable-prefix-caching", "", "--block-size", "", "--slo", "ttft:60000",
             "--slo", "tpot:60000", "--run-dir", tmp_path]  # fmt: skip
    done = run_script("ch06_vllm/tune.py", flags, timeout_s=280)  # four servers
    assert done.result, done.stderr
    assert done.result["points"] == 2
    assert done.result["slo_holds"] is True
    assert done.result["within_slo"] == 1
    written = yaml.safe_load((tmp_path / "recommended.yaml").read_text())
    assert written["max-num-seqs"] == done.result["recommended"]["max-num-seqs"]
    assert len(json.loads((tmp_path / "points.json").read_text())) == 2
