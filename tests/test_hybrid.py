"""The hybrid exercise: its prediction against a step-by-step engine, its policies, its figures, the throttled engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch06_vllm import servers
from ch06_vllm.client import Client, Retry
from ch06_vllm.engine.request import Config
from ch07_sglang_routing import hybrid, hybrid_report, throttled, tiers
from ch07_sglang_routing.hybrid_report import Done
from ch07_sglang_routing.simulator.physics import Physics
from ch07_sglang_routing.tiers import Ask, Flight, Prediction, Replica
from common.script import UserError
from tests.openai_fake import Does, FakeServer

rates = st.floats(1e-7, 1e-2)
physics = st.builds(Physics, st.floats(1e-5, 1e-1), rates, rates, rates, rates, st.floats(0, 0.1))
configs = st.tuples(st.integers(1, 6), st.integers(0, 60)).map(
    lambda drawn: Config("", max_num_seqs=drawn[0], max_num_batched_tokens=drawn[0] + drawn[1])
)
flights = st.lists(st.builds(Flight, st.integers(1, 90), st.integers(1, 40), st.integers(0, 50)), max_size=8)


def step_by_step(
    physics: Physics, config: Config, flying: list[Flight], prompt: int, output: int
) -> tuple[float, float]:
    """One engine step after the other, a token each: what predict does in jumps."""
    queue = [
        {"prompt": 0 if f.came else f.prompt, "output": max(1, f.output - f.came) if f.came else f.output,
         "known": f.prompt + f.came if f.came else 0, "own": 0}
        for f in flying
    ]  # fmt: skip
    queue.append({"prompt": prompt, "output": output, "known": 0, "own": 1})
    time_s, first_s = physics.request_s, math.nan
    while True:
        seats = queue[: config.max_num_seqs]
        decoders = [one for one in seats if one["prompt"] == 0]
        context = sum(one["known"] for one in decoders)
        tokens_left, prefilled, pairs, got = config.max_num_batched_tokens - len(decoders), 0, 0, list(decoders)
        for one in seats:
            while one not in decoders and one["prompt"] and tokens_left:
                one["prompt"], tokens_left, prefilled = one["prompt"] - 1, tokens_left - 1, prefilled + 1
                one["known"] += 1
                pairs += one["known"]
                if not one["prompt"]:
                    got.append(one)
        time_s += physics.step(len(decoders), context, prefilled, pairs)
        for one in got:
            one["output"], one["known"] = one["output"] - 1, one["known"] + 1
            if one["own"]:
                first_s = time_s if math.isnan(first_s) else first_s
                if not one["output"]:
                    return first_s, time_s
        queue = [one for one in queue if one["output"]]


@settings(max_examples=200, deadline=None)
@given(physics, configs, flights, st.integers(1, 120), st.integers(1, 40))
def test_the_prediction_is_that_of_an_engine_played_step_by_step(
    physics: Physics, config: Config, flying: list[Flight], prompt: int, output: int
) -> None:
    before = [(f.prompt, f.output, f.came) for f in flying]
    found = tiers.predict(physics, config, flying, prompt, output)
    assert (found.ttft_s, found.e2e_s) == pytest.approx(step_by_step(physics, config, flying, prompt, output))
    assert [(f.prompt, f.output, f.came) for f in flying] == before


@settings(max_examples=50, deadline=None)
@given(physics, st.integers(2, 2000), st.integers(1, 200))
def test_alone_hindsight_is_the_prediction_and_what_comes_later_delays_it(
    physics: Physics, prompt: int, output: int
) -> None:
    """Two ways to play an engine, this one and the simulator's."""
    config = Config("", max_num_batched_tokens=4096)
    alone = tiers.predict(physics, config, [], prompt, output)
    (known,) = tiers.hindsight(physics, config, [(7.0, prompt, output)])
    assert (known.ttft_s, known.e2e_s) == pytest.approx((alone.ttft_s, alone.e2e_s))
    if output > 3:  # one that comes after the first token, in the second's step, is computed in the third's
        later_s = 7.0 + alone.ttft_s - physics.request_s + (alone.e2e_s - alone.ttft_s) / output / 2
        known, _ = tiers.hindsight(physics, config, [(7.0, prompt, output), (later_s, 500, 3)])
        assert known.ttft_s == pytest.approx(alone.ttft_s)
        assert known.e2e_s > alone.e2e_s + 499 * physics.prefill_token_s


FAST = Physics(0.01, 1e-4, 0, 1e-3, 0, 0)
SLOW = FAST.times(4)
LIMITS = Config("", max_num_seqs=256)


def fleet(gpu: int = 0, cpu: int = 0) -> list[Replica]:
    """One GPU replica and two of CPUs, with so many requests of 50 tokens in flight on the first of each."""
    return [
        Replica("g", "gpu", FAST, LIMITS, [Flight(8, 51, 1) for _ in range(gpu)]),
        Replica("c0", "cpu", SLOW, LIMITS, [Flight(8, 51, 1) for _ in range(cpu)]),
        Replica("c1", "cpu", SLOW, LIMITS),
    ]


def test_policies_keep_to_their_tier_and_take_its_idler_replica() -> None:
    batch, asked = Ask(tiers.BATCH, 100, 50), Ask(tiers.INTERACTIVE, 20, 10)
    assert tiers.all_gpu(batch, fleet())[0].name == tiers.by_class(asked, fleet(gpu=50))[0].name == "g"
    assert tiers.all_cpu(asked, fleet(cpu=3))[0].name == tiers.by_class(batch, fleet(cpu=3))[0].name == "c1"
    assert tiers.by_class(Ask(tiers.SHORT, 8, 4), fleet())[0].tier == "cpu"


def test_spill_over_leaves_home_only_for_a_tier_that_meets_the_objective() -> None:
    asked = Ask(tiers.INTERACTIVE, 20, 10, ttft_s=0.06)
    on_cpu = tiers.predict(SLOW, LIMITS, [], 20, 10)
    assert on_cpu.meets(asked)
    assert tiers.with_spill(asked, fleet())[0].name == "g"
    assert tiers.with_spill(asked, fleet(gpu=200))[0].tier == "cpu"  # a step of 200 sequences is 0.21 s
    hopeless = Ask(tiers.INTERACTIVE, 20, 10, ttft_s=0.001)
    assert tiers.with_spill(hopeless, fleet(gpu=200))[0].name == "g"
    late = Ask(tiers.BATCH, 100, 50, e2e_s=1.5)
    assert tiers.predict(SLOW, LIMITS, [], 100, 50).e2e_s > 1.5
    assert tiers.with_spill(late, fleet())[0].name == "g"
    assert tiers.with_spill(Ask(tiers.BATCH, 100, 50), fleet())[0].tier == "cpu"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_busy_time_counts_every_moment_once(spans: list[tuple[int, int]]) -> None:
    told = [(begin, begin + length) for begin, length in spans]
    moments = {moment for begin, end in told for moment in range(begin, end)}
    assert tiers.busy_s(told) == len(moments)


def test_dollars() -> None:
    assert tiers.usd_per_mtok(3.6, 100, 50_000) == pytest.approx(2.0)  # 0.1 dollars for a twentieth of a million


# ---------------------------------------------------------------- the trace on a fleet that does as it is told


ARGUMENTS = hybrid.parse_args(["--requests", "16"])


def test_a_trace_has_its_classes_and_objectives_by_the_idle_home_and_its_batches_at_once() -> None:
    trace = hybrid.make_trace(
        fleet(), hybrid.parse_args(["--requests", "48", "--load", "0.5"]), np.random.default_rng(1)
    )
    kinds = [planned.ask.kind for planned in trace]
    assert {kind: kinds.count(kind) for kind in hybrid.CLASSES} == {"interactive": 24, "short": 12, "batch": 12}
    assert [planned.at_s for planned in trace] == sorted(planned.at_s for planned in trace)
    for planned in trace:
        ask = planned.ask
        (low, high), (least, most), _, slack = hybrid.CLASSES[ask.kind]
        assert low <= ask.prompt <= high
        assert least <= ask.output <= most
        idle = tiers.predict(FAST if ask.kind == tiers.INTERACTIVE else SLOW, LIMITS, [], high, most)
        wanted = (slack * idle.ttft_s, math.inf) if ask.kind == tiers.INTERACTIVE else (math.inf, slack * idle.e2e_s)
        assert (ask.ttft_s, ask.e2e_s) == pytest.approx(wanted)
    assert len({planned.at_s for planned in trace if planned.ask.kind == tiers.BATCH}) == 2  # of six each
    work_s = sum(tiers.work_s(FAST, planned.ask) for planned in trace)
    assert trace[-1].at_s <= work_s / 0.5


def on_fakes(work: Callable[[hybrid.Fleet, dict[str, FakeServer]], Awaitable[None]], gap_s: float = 0.0) -> None:
    """`work` with a fleet of three fake servers, of which those called cpu write a token every `gap_s`."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = {
                name: await stack.enter_async_context(Client(fake.url, concurrency=64, retry=Retry(attempts=1)))
                for name, fake in fakes.items()
            }
            await work(hybrid.Fleet(fleet(), clients, "fake", np.arange(5, 2000)), fakes)

    with FakeServer() as gpu, FakeServer(gap_s=gap_s) as c0, FakeServer(gap_s=gap_s) as c1:
        fakes = {"g": gpu, "c0": c0, "c1": c1}
        asyncio.run(run())


def test_each_policy_has_its_tiers_and_words_of_its_own() -> None:
    trace = hybrid.make_trace(fleet(), ARGUMENTS, np.random.default_rng(0))
    trace = [hybrid.Planned(0.01 * planned.at_s, planned.ask) for planned in trace]

    async def play(one: hybrid.Fleet, fakes: dict[str, FakeServer]) -> None:
        rng = np.random.default_rng(2)
        runs = {name: await one.replay(trace, policy, rng) for name, policy in tiers.POLICIES.items()}
        assert not any(replica.flights for replica in one.replicas)
        for done in runs.values():
            assert [(each.kind, each.prompt, each.output, each.error) for each in done] == [
                (planned.ask.kind, planned.ask.prompt, planned.ask.output, "") for planned in trace
            ]
        found = {
            name: hybrid_report.figures([done], {"gpu": 2.5, "cpu": 0.35}, one.replicas) for name, done in runs.items()
        }
        assert [found[name]["gpu_share"] for name in ("all-gpu", "all-cpu", "by-class")] == [1, 0, 0.5]
        for each in runs["by-class"]:
            assert each.tier == ("gpu" if each.kind == tiers.INTERACTIVE else "cpu")
        for each in runs["all-cpu"]:
            assert each.e2e_s >= 0.002 * (each.output - 1)  # it may be late, and is never early
        error = hybrid_report.prediction_error(list(runs.values()), one.replicas)
        assert all(value > 0 for value in error.values())
        prompts = [tuple(seen.body["prompt"]) for fake in fakes.values() for seen in fake.seen]
        assert len(prompts) == len(set(prompts)) == 4 * len(trace)

    on_fakes(play, gap_s=0.002)


def test_a_refused_request_and_one_without_a_token_are_told_and_leave_no_flight() -> None:
    trace = [hybrid.Planned(0.0, Ask(tiers.INTERACTIVE, 9, 4)) for _ in range(2)]

    async def play(one: hybrid.Fleet, fakes: dict[str, FakeServer]) -> None:
        fakes["g"].script.extend([Does(status=400), Does(raw=b"data: [DONE]\n\n")])
        done = await one.replay(trace, tiers.all_gpu, np.random.default_rng(0))
        assert not any(replica.flights for replica in one.replicas)
        assert sorted(each.within for each in done) == [False, False]
        told = " ".join(each.error for each in done)
        assert "scripted 400" in told
        assert "no token" in told
        with pytest.raises(UserError, match="no interactive request was answered"):
            hybrid_report.figures([done], {"gpu": 2.5, "cpu": 0.35}, one.replicas)

    on_fakes(play)


def done(kind: str, tier: str, sent_s: float, e2e_s: float, replica: str) -> Done:
    return Done(kind, tier, replica, sent_s, 0.0, e2e_s / 2, e2e_s, Prediction(e2e_s / 2, e2e_s), 400, 100, True)


def test_a_policy_pays_for_the_tiers_that_it_uses_and_busy_replicas_for_their_spans() -> None:
    prices, kinds = {"gpu": 3.6, "cpu": 0.36}, list(hybrid.CLASSES)
    on_gpu = [done(kind, "gpu", 2.0 * number, 1.0, "g") for number, kind in enumerate(kinds)]
    on_cpu = [done(kind, "cpu", 2.0 * number, 4.0, "c0") for number, kind in enumerate(kinds)]
    both = [done(kinds[0], "gpu", 0, 1.0, "g"), *on_cpu[1:]]
    one = hybrid_report.figures([on_gpu], prices, fleet())
    assert one["usd_per_mtok_rented"] == pytest.approx(3.6 * 5 / 3600 / 1500 * 1e6)
    assert one["usd_per_mtok_busy"] == pytest.approx(3.6 * 3 / 3600 / 1500 * 1e6)
    two = hybrid_report.figures([on_cpu], prices, fleet())
    assert two["usd_per_mtok_rented"] == pytest.approx(2 * 0.36 * 8 / 3600 / 1500 * 1e6)  # c1 idles, and costs
    assert two["usd_per_mtok_busy"] == pytest.approx(0.36 * 8 / 3600 / 1500 * 1e6)
    assert two["usd_per_mtok_rented"] < one["usd_per_mtok_rented"]
    assert two["short_e2e_ms_p50"] == 4 * one["short_e2e_ms_p50"] == 4000
    mixed = hybrid_report.figures([both], prices, fleet())
    assert mixed["usd_per_mtok_rented"] == pytest.approx((3.6 + 2 * 0.36) * 8 / 3600 / 1500 * 1e6)
    assert mixed["gpu_share"] == pytest.approx(1 / 3)


def test_replicas_on_cpus_beside_a_gpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict, dict]] = []

    class Recorded:
        url = "http://127.0.0.1:1"

        def __init__(self, folder: Path, engine: str, options: dict, env: dict) -> None:
            asked.append((engine, options, env))

        def __enter__(self) -> Recorded:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(servers, "Server", Recorded)
    monkeypatch.setattr(servers, "own_cores", lambda: list(range(12)))
    arguments = hybrid.parse_args(["--cpu-replicas", "3"])
    for real, wanted in ((False, ["1"] * 4), (True, [None, "4", "4", "4"])):
        monkeypatch.setattr(hybrid, "gpus_visible", lambda real=real: real)
        asked.clear()
        with contextlib.ExitStack() as stack:
            hybrid.start(stack, arguments)
        assert [env.get("OMP_NUM_THREADS") for *_, env in asked] == wanted
        assert [engine for engine, *_ in asked] == ["ours"] + (["ours"] if real else ["throttled"]) * 3
        assert [options.get("device") for _, options, _ in asked] == [None] + (["cpu"] if real else [None]) * 3


def test_the_throttled_engine_says_the_same_and_takes_so_many_times_as_long(
    served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ch06_vllm.engine import SamplingParams, engine

    assert "throttled" in servers.ENGINES
    slept: list[float] = []
    clock = itertools.count(0, 0.25)  # so long takes whatever lies between two looks at it
    monkeypatch.setattr(throttled, "time", SimpleNamespace(perf_counter=lambda: next(clock), sleep=slept.append))
    config, said = Config(str(served_model), num_blocks=16, max_model_len=128, device="cpu"), []
    for kind in (engine.Engine, throttled.slowed(4)):
        one = kind(config)
        one.add([5, 6, 7], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
        said.append([output.token_ids for _ in range(6) for output in one.step()])
    assert said[0] == said[1]
    assert slept == [3 * 0.25] * 6
