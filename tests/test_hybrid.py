"""The hybrid exercise's arithmetic against a step-by-step engine, its policies, and the throttled engine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch07_sglang_routing import tiers
from ch07_sglang_routing.tiers import Ask, Flight, Probe, Replica, Speed

rates = st.floats(1e-5, 1e-1)
speeds = st.builds(
    Speed, rates, rates, rates, st.floats(0, 0.1), max_seqs=st.integers(1, 6), max_tokens=st.integers(8, 64)
)
flights = st.lists(st.builds(Flight, st.integers(0, 90), st.integers(1, 40)), max_size=8)


def step_by_step(speed: Speed, flying: list[Flight], prompt: int, output: int) -> tuple[float, float]:
    """One engine step after the other, a token each: what predict does in jumps."""
    queue = [{"prompt": f.prompt_left, "output": f.output_left, "own": False} for f in flying]
    queue.append({"prompt": prompt, "output": output, "own": True})
    time_s, first_s = speed.overhead_s, math.nan
    while True:
        seats = queue[: speed.max_seqs]
        decoders = [one for one in seats if one["prompt"] == 0]
        tokens_left, prefilled, got = speed.max_tokens - len(decoders), 0, list(decoders)
        for one in seats:
            while one not in decoders and one["prompt"] and tokens_left:
                one["prompt"], tokens_left, prefilled = one["prompt"] - 1, tokens_left - 1, prefilled + 1
                if not one["prompt"]:
                    got.append(one)
        time_s += speed.base_s + speed.sequence_s * len(decoders) + speed.prefill_s * prefilled
        for one in got:
            one["output"] -= 1
            if one["own"]:
                first_s = time_s if math.isnan(first_s) else first_s
                if not one["output"]:
                    return first_s, time_s
        queue = [one for one in queue if one["output"]]


@settings(max_examples=200, deadline=None)
@given(speeds, flights, st.integers(1, 120), st.integers(1, 40))
def test_the_prediction_is_that_of_an_engine_played_step_by_step(
    speed: Speed, flying: list[Flight], prompt: int, output: int
) -> None:
    before = [(f.prompt_left, f.output_left) for f in flying]
    found = tiers.predict(speed, flying, prompt, output)
    assert (found.ttft_s, found.e2e_s) == pytest.approx(step_by_step(speed, flying, prompt, output))
    assert [(f.prompt_left, f.output_left) for f in flying] == before


@settings(max_examples=50, deadline=None)
@given(rates, rates, rates, st.floats(0, 0.1))
def test_calibration_finds_the_rates_that_made_the_probes(
    base_s: float, sequence_s: float, prefill_s: float, overhead_s: float
) -> None:
    true = Speed(base_s, sequence_s, prefill_s, overhead_s)
    probes = []
    for batch, prompt, output in ((1, 16, 2), (1, 512, 2), (1, 16, 33), (4, 64, 33)):
        # all prompts in one step, then steps of the whole batch
        ttft_s = overhead_s + base_s + prefill_s * batch * prompt
        probes.append(Probe(batch, prompt, output, ttft_s, ttft_s + (output - 1) * (base_s + sequence_s * batch)))
    found = tiers.fit(probes)
    for name in ("base_s", "sequence_s", "prefill_s", "overhead_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6, abs=1e-9)


FAST, SLOW = Speed(0.01, 0.001, 0.0001), Speed(0.04, 0.004, 0.0004)


def fleet(gpu: int = 0, cpu: int = 0) -> list[Replica]:
    """One GPU replica and two of CPUs, with so many requests of 50 tokens in flight on the first of each."""
    return [
        Replica("g", "gpu", FAST, [Flight(0, 50) for _ in range(gpu)]),
        Replica("c0", "cpu", SLOW, [Flight(0, 50) for _ in range(cpu)]),
        Replica("c1", "cpu", SLOW),
    ]


def test_policies_keep_to_their_tier_and_take_its_idler_replica() -> None:
    batch, asked = Ask(tiers.BATCH, 100, 50), Ask(tiers.INTERACTIVE, 20, 10)
    assert tiers.all_gpu(batch, fleet())[0].name == tiers.by_class(asked, fleet(gpu=50))[0].name == "g"
    assert tiers.all_cpu(asked, fleet(cpu=3))[0].name == tiers.by_class(batch, fleet(cpu=3))[0].name == "c1"
    assert tiers.by_class(Ask(tiers.SHORT, 8, 4), fleet())[0].tier == "cpu"


def test_spill_over_leaves_home_only_for_a_tier_that_meets_the_objective() -> None:
    asked = Ask(tiers.INTERACTIVE, 20, 10, ttft_s=0.06)
    on_cpu = tiers.predict(SLOW, [], 20, 10)
    assert on_cpu.meets(asked)
    assert tiers.with_spill(asked, fleet())[0].name == "g"
    assert tiers.with_spill(asked, fleet(gpu=200))[0].tier == "cpu"  # a step of 200 sequences is 0.21 s
    hopeless = Ask(tiers.INTERACTIVE, 20, 10, ttft_s=0.001)
    assert tiers.with_spill(hopeless, fleet(gpu=200))[0].name == "g"
    late = Ask(tiers.BATCH, 100, 50, e2e_s=1.5)
    assert tiers.predict(SLOW, [], 100, 50).e2e_s > 1.5
    assert tiers.with_spill(late, fleet())[0].name == "g"
    assert tiers.with_spill(Ask(tiers.BATCH, 100, 50), fleet())[0].tier == "cpu"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_busy_time_counts_every_moment_once(spans: list[tuple[int, int]]) -> None:
    told = [(begin, begin + length) for begin, length in spans]
    moments = {moment for begin, end in told for moment in range(begin, end)}
    assert tiers.busy_s(told) == len(moments)


def test_dollars_and_paired_differences() -> None:
    assert tiers.usd_per_mtok(3.6, 100, 50_000) == pytest.approx(2.0)  # 0.1 dollars for a twentieth of a million
    mean, low, high = tiers.paired([1.0] * 40, [3.0] * 40)
    assert mean == low == high == 2.0
    mean, low, high = tiers.paired([0.0] * 100, [0.0, 2.0] * 50)
    assert mean == 1.0
    assert low < 1.0 < high


def test_the_throttled_engine_says_the_same_and_takes_longer(
    served_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ch06_vllm.engine import Config, SamplingParams, engine
    from ch07_sglang_routing import throttled

    slept: list[float] = []
    monkeypatch.setattr(throttled.time, "sleep", slept.append)
    config, said = Config(str(served_model), num_blocks=16, max_model_len=128, device="cpu"), []
    for kind in (engine.Engine, throttled.slowed(4)):
        one = kind(config)
        one.add([5, 6, 7], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
        said.append([output.token_ids for _ in range(6) for output in one.step()])
    assert said[0] == said[1]
    assert len(slept) == 6
    assert min(slept) > 0
