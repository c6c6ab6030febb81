"""The routing simulator: its engine decides what chapter 6's scheduler decides, its queues obey queueing theory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ch06_vllm.engine.block_pool import BlockPool
from ch06_vllm.engine.engine import Engine as RealEngine
from ch06_vllm.engine.request import Config, Request, SamplingParams
from ch06_vllm.engine.scheduler import Scheduler
from ch07_sglang_routing.router.policies import POLICIES
from ch07_sglang_routing.simulator import by_hand, compare, live, run, traces
from ch07_sglang_routing.simulator.decoding import Sequence
from ch07_sglang_routing.simulator.engine import IDLE, Engine
from ch07_sglang_routing.simulator.physics import Physics
from ch07_sglang_routing.simulator.traces import Asked
from tests.tiny_models import build

PHYSICS = Physics(step_s=1e-3, prefill_token_s=20e-6, prefill_pair_s=3e-8, decode_seq_s=1e-4, decode_context_s=7e-7)


def small_trace(rng: np.random.Generator, size: int, requests: int = 60) -> list[Asked]:
    """Short prompts with shared beginnings, whose length is no multiple of the block's."""
    options = {"systems": 3, "system_tokens": int(rng.integers(size, 5 * size)), "turns": 2.0, "think_s": 0.05}
    longest = options["system_tokens"] + 12 * size
    lengths = {"new_tokens": f"1-{3 * size}", "output_tokens": f"1-{3 * size}", "longest": longest}
    return traces.sessions(requests, float(rng.choice([50, 300, 3000])), rng, **options, **lengths)


def small_config(rng: np.random.Generator, size: int, trace: list[Asked]) -> Config:
    """Often so small a cache that requests are preempted and prefixes thrown out."""
    longest = max(asked.prompt + asked.output for asked in trace)
    seqs = int(rng.integers(1, 9))
    chunked = bool(rng.random() < 0.7)
    return Config(
        "", block_size=size, num_blocks=-(-longest // size) + int(rng.choice([0, 1, 4, 40])), max_num_seqs=seqs,
        max_num_batched_tokens=seqs + int(rng.choice([0, 3, 20, 200])) if chunked else longest + seqs,
        enable_prefix_caching=bool(rng.random() < 0.8), enable_chunked_prefill=chunked,
    )  # fmt: skip


def step_by_step(trace: list[Asked], config: Config, physics: Physics) -> dict[str, list]:
    """The same requests on chapter 6's own scheduler, with real tokens, one step after another."""
    assert config.num_blocks
    scheduler = Scheduler(config, BlockPool(config.num_blocks, config.block_size, caching=config.enable_prefix_caching))
    requests = [
        Request(str(i), list(asked.tokens()), SamplingParams(asked.output), 0, i, 0) for i, asked in enumerate(trace)
    ]
    first_s, finish_s = [np.nan] * len(trace), [np.nan] * len(trace)
    arriving, now_s, tokens = 0, 0.0, itertools.count(2**40)
    while arriving < len(trace) or scheduler.waiting or scheduler.running:
        if not (scheduler.waiting or scheduler.running):
            now_s = max(now_s, trace[arriving].at_s)
        while arriving < len(trace) and trace[arriving].at_s <= now_s:
            scheduler.add(requests[arriving])
            arriving += 1
        shares = scheduler.schedule()
        if not shares:
            continue
        singles = [share for share in shares if share.count == 1]
        chunks = [share for share in shares if share.count > 1]
        now_s += physics.step(
            len(singles),
            sum(share.start + 1 for share in singles),
            sum(share.count for share in chunks),
            sum(share.count * (share.start + (share.count + 1) / 2) for share in chunks),
        )
        for share in shares:
            scheduler.computed(share)
        for share in shares:
            request = share.request
            if share.start + share.count == len(request.tokens):
                index = int(request.request_id)
                if request.num_output == 0:
                    first_s[index] = now_s
                request.tokens.append(next(tokens))
                if request.num_output == request.params.max_tokens:
                    finish_s[index] = now_s
                    scheduler.finish(request)
        scheduler.check()
    return {
        "first_s": first_s, "finish_s": finish_s, "cached": [request.num_cached for request in requests],
        "preemptions": [request.num_preemptions for request in requests], "hits": [scheduler.prefix_hits],
    }  # fmt: skip


def in_runs(trace: list[Asked], config: Config, physics: Physics) -> dict[str, list]:
    """On the simulator's engine."""
    first_s, finish_s = [np.nan] * len(trace), [np.nan] * len(trace)
    engine = Engine(physics, config, first_s.__setitem__, finish_s.__setitem__)
    sequences = [
        Sequence(i, asked.prompt, asked.output, asked.hashes(i, config.block_size, recur=False))
        for i, asked in enumerate(trace)
    ]
    for asked, sequence in zip(trace, sequences, strict=True):
        while engine.wake_s <= asked.at_s:
            engine.fire()
            engine.check()
        engine.submit(sequence, asked.at_s)
    while engine.wake_s < IDLE:
        engine.fire()
        engine.check()
    assert engine.num_requests == 0
    assert engine.pool.num_free == config.num_blocks
    return {
        "first_s": first_s, "finish_s": finish_s, "cached": [sequence.cached for sequence in sequences],
        "preemptions": [sequence.preemptions for sequence in sequences], "hits": [engine.prefix_hits],
    }  # fmt: skip


@pytest.mark.parametrize("block", range(8))
def test_runs_of_steps_decide_what_single_steps_decide(block: int) -> None:
    """Token for token what chapter 6's scheduler does: hits, preemptions, and every time to rounding."""
    seen = {"cached": 0, "preemptions": 0}
    for seed in range(block * 12, block * 12 + 12):
        rng = np.random.default_rng(seed)
        size = int(rng.choice([1, 2, 4, 7]))
        trace = small_trace(rng, size)
        config = small_config(rng, size, trace)
        slow, fast = step_by_step(trace, config, PHYSICS), in_runs(trace, config, PHYSICS)
        for key in ("cached", "preemptions", "hits"):
            assert fast[key] == slow[key], (seed, key)
        for key in ("first_s", "finish_s"):
            np.testing.assert_allclose(fast[key], slow[key], rtol=1e-9, err_msg=f"{seed} {key}")
        for key in seen:
            seen[key] += sum(fast[key])
    assert min(seen.values()) > 0, seen


# ---------------------------------------------------------------- a cluster


def setting(**options: object) -> run.Setting:
    config = Config("", num_blocks=1024, max_num_seqs=32, max_num_batched_tokens=512)
    return dataclasses.replace(run.Setting(config=config), **options)


@pytest.fixture(scope="module")
def shared() -> dict[str, run.Played]:
    trace = traces.named("shared", 2500, 70, seed=3)
    played = {name: run.play(trace, run.policy(name, setting()), setting()) for name in POLICIES}
    return played | {"informed": run.play(trace, run.Informed(setting().physics), setting())}


def test_every_request_is_answered_and_nothing_is_made_up(shared: dict[str, run.Played]) -> None:
    trace = traces.named("shared", 2500, 70, seed=3)
    for name, one in shared.items():
        assert np.isfinite(one.e2e_s).all(), name
        assert (one.e2e_s >= one.ttft_s).all()
        assert (one.ttft_s > setting().physics.request_s).all()
        assert (one.cached < one.prompt).all()
        assert (one.cached >= 0).all()
        # Nobody finds more than what was asked before: a session's earlier turn, or the system prompt.
        seen: dict[str, int] = {}
        systems: set[int] = set()
        for asked, cached in zip(trace, one.cached.tolist(), strict=True):
            known = max(seen.get(asked.session, 0), asked.shared if asked.system in systems else 0)
            assert cached <= known, name
            seen[asked.session] = max(seen.get(asked.session, 0), asked.prompt + asked.output)
            systems.add(asked.system)


def test_the_same_seed_gives_the_same_bytes() -> None:
    def once(seed: int) -> bytes:
        trace = traces.named("bursty", 400, 70, seed)
        one = run.play(trace, run.policy("joint", setting()), setting(scrape_s=2.0, leaks=(1, 0.1)))
        return one.e2e_s.tobytes() + one.worker.tobytes() + one.cached.tobytes()

    assert once(5) == once(5) != once(6)


def test_a_known_assignment_is_played_again_to_the_same_result(shared: dict[str, run.Played]) -> None:
    again = run.play(traces.named("shared", 2500, 70, seed=3), run.Fixed(shared["joint"].worker.tolist()), setting())
    assert again.e2e_s.tobytes() == shared["joint"].e2e_s.tobytes()


def test_tokens_and_hashes_say_the_same() -> None:
    """Two prompts have equal block names exactly as far as their tokens are equal."""
    trace = traces.sessions(60, 10, np.random.default_rng(0), systems=2, system_tokens=37, turns=3.0)
    for size in (1, 8, 16):
        for one, other in itertools.combinations(trace, 2):
            same = list(itertools.takewhile(lambda p: p[0] == p[1], zip(one.tokens(), other.tokens(), strict=False)))
            names = zip(one.hashes(0, size, recur=False), other.hashes(1, size, recur=False), strict=False)
            full = len(list(itertools.takewhile(lambda p: p[0] == p[1], names)))
            assert full == len(same) // size
        for asked, recur in itertools.product(trace, (True, False)):
            assert len(asked.hashes(0, size, recur=recur)) == (asked.prompt + asked.output) // size


def test_the_next_turn_finds_the_answer_before_it() -> None:
    config = dataclasses.replace(run.CONFIG, block_size=4, num_blocks=2**16)
    trace = traces.sessions(40, 0.01, np.random.default_rng(0), turns=4.0, think_s=1e4)  # nothing runs beside another
    before: dict[str, Asked] = {}
    found = run.play(trace, run.policy("round_robin", one := run.Setting(workers=1, config=config)), one)
    lost = run.play(trace, run.policy("round_robin", other := dataclasses.replace(one, recur=False)), other)
    for asked, cached, less in zip(trace, found.cached, lost.cached, strict=True):
        last = before.get(asked.session)
        known = last.prompt + last.output - 1 if last else 0  # the last token of an answer is not computed
        assert cached == known // 4 * 4
        assert less == (last.prompt // 4 * 4 if last else 0)
        before[asked.session] = asked
    assert len(before) < len(trace)


def test_a_queue_of_one_server_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: one request at a time, all alike. Mean wait = rho D / (2 (1 - rho)); M/G/1 with two lengths likewise."""
    physics = Physics(step_s=0.0, prefill_token_s=1e-3, prefill_pair_s=0.0, request_s=0.0)
    config = Config("", num_blocks=64, max_num_seqs=1, max_num_batched_tokens=512, enable_prefix_caching=False)
    alone = run.Setting(physics, 1, config)
    for lengths, rho in (((100, 100), 0.5), ((20, 180), 0.7)):
        seconds = np.array(lengths) * 1e-3
        waits = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            times = np.cumsum(rng.exponential(seconds.mean() / rho, 12_000))
            which = rng.choice(lengths, len(times))
            trace = [
                Asked(float(t), "", 0, 0, i, int(n), 1, 0.0) for i, (t, n) in enumerate(zip(times, which, strict=True))
            ]
            one = run.play(trace, run.policy("round_robin", alone), alone)
            waits.append(float((one.ttft_s - which * 1e-3).mean()))
        expected = rho * (seconds**2).mean() / seconds.mean() / (2 * (1 - rho))
        assert np.mean(waits) == pytest.approx(expected, rel=0.06), (lengths, rho)


def test_a_run_of_steps_is_as_long_as_its_steps() -> None:
    for singles, context in ((1, 5), (7, 900)):
        ends = np.cumsum([PHYSICS.step(singles, context + singles * step, 0, 0) for step in range(400)])
        for steps in (1, 2, 17, 400):
            assert PHYSICS.run(singles, context, steps) == pytest.approx(ends[steps - 1], rel=1e-12)
            assert PHYSICS.steps_until(singles, context, ends[steps - 1] - 1e-7) == steps
            assert steps == 400 or PHYSICS.steps_until(singles, context, ends[steps - 1] + 1e-7) == steps + 1


# ---------------------------------------------------------------- policies


def test_joint_hits_more_than_round_robin_without_a_longer_tail(shared: dict[str, run.Played]) -> None:
    joint, robin = shared["joint"], shared["round_robin"]
    assert compare.ratio("hit_rate", joint, robin).low > 1.5
    assert compare.difference("ttft_ms_p99", joint, robin).high < 0
    assert compare.difference("e2e_ms", joint, shared["least_in_flight"]).high < 0


@pytest.mark.parametrize("seed", range(3))
def test_joint_is_no_worse_than_least_in_flight_where_nothing_is_shared(seed: int) -> None:
    trace = traces.named("unshared", 2500, 70, seed)
    one, other = (run.play(trace, run.policy(name, setting()), setting()) for name in ("joint", "least_in_flight"))
    assert one.hit_rate == other.hit_rate == 0
    assert compare.ratio("e2e_ms", one, other).high < 1.01
    assert compare.ratio("ttft_ms_p99", one, other).high < 1.05


def test_pure_prefix_routing_makes_a_hot_spot_and_joint_does_not() -> None:
    """aibrix issue 842."""
    trace = traces.named("hot", 1500, 70, seed=0)
    busiest, tails = {}, {}
    for name in ("prefix", "joint"):
        one = run.play(trace, run.policy(name, setting()), setting())
        busiest[name] = np.bincount(one.worker, minlength=8).max() * 8 / len(trace)
        tails[name] = np.percentile(one.ttft_s, 99)
    assert busiest["prefix"] > 3
    assert busiest["joint"] < 1.5
    assert tails["prefix"] > 10 * tails["joint"]


def test_old_gauges_make_herds_and_two_choices_soften_them() -> None:
    """vLLM issue 49538: gauges lag by 3 to 6 s, in which everything goes to who looked idle."""
    trace = traces.named("shared", 1500, 70, seed=0)

    def most_in_a_second(name: str, lag_s: float | None) -> float:
        seen = setting(scrape_s=lag_s)
        one = run.play(trace, run.policy(name, seen), seen)
        seconds = one.at_s.astype(int)
        return float(
            np.mean([np.bincount(one.worker[seconds == s]).max() / (seconds == s).sum() for s in set(seconds)])
        )

    own, old = most_in_a_second("least_in_flight", None), most_in_a_second("least_in_flight", 3.0)
    assert own < 0.25
    assert old > 2 * own
    assert most_in_a_second("power_of_two", 3.0) < old


def test_a_counter_that_leaks_starves_its_worker() -> None:
    trace = traces.named("shared", 3000, 70, seed=0)
    leaky = setting(leaks=(0, 0.1))
    one = run.play(trace, run.policy("least_in_flight", leaky), leaky)
    assert (one.worker[:200] == 0).mean() > 0.08
    assert (one.worker[-500:] == 0).mean() < 0.01


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("seed", range(3))
def test_informed_comes_near_the_optimum_that_can_be_found(seed: int) -> None:
    """Two workers and nine requests: all 512 assignments are played. None is below the best; Informed is near it."""
    trace = traces.sessions(9, 60, np.random.default_rng(seed), systems=2, system_tokens=128, turns=1.5, think_s=0.1)
    two = setting(workers=2)
    costs = [
        run.play(trace, run.Fixed(list(workers)), two).e2e_s.mean()
        for workers in itertools.product(range(2), repeat=len(trace))
    ]
    policies = {name: run.play(trace, run.policy(name, two), two).e2e_s.mean() for name in POLICIES}
    informed = run.play(trace, run.Informed(two.physics), two).e2e_s.mean()
    assert min(costs) <= min(informed, *policies.values()) + 1e-12
    assert informed <= 1.1 * min(costs)


def test_informed_is_never_above_a_policy_where_caches_matter(shared: dict[str, run.Played]) -> None:
    costs = {name: one.e2e_s.mean() for name, one in shared.items()}
    assert min(costs, key=costs.__getitem__) == "informed", costs
    assert run.oracle(shared.values()) is shared["informed"]


# ---------------------------------------------------------------- intervals


def means_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda at: float(values[at].mean())


def test_intervals_cover_a_planted_difference_and_independent_ones_do_not() -> None:
    """Two policies whose latencies differ by 2 ms and swing slowly, as queues do: each request is like its neighbours."""
    rng = np.random.default_rng(0)
    trials, n = 200, 4000
    swings = rng.normal(size=(2, trials, n))
    for at in range(1, n):
        swings[..., at] += 0.9 * swings[..., at - 1]
    covered = {"blocks": 0, "single": 0}
    for trial, (one, other) in enumerate(zip(*swings, strict=True)):
        for name, blocks in (("blocks", compare.BLOCKS), ("single", n))[: 2 if trial < 40 else 1]:
            found = compare.bootstrap(means_of(2 + one - other), n, trial, blocks=blocks, resamples=100)
            covered[name] += found.low <= 2 <= found.high
    assert covered["blocks"] >= 178, covered  # of 200; 190 would be right, but a block's edges cut neighbours apart
    assert covered["single"] <= 20, covered  # of 40


def test_students_percentile_is_that_of_the_tables() -> None:
    assert [round(compare.students(freedom), 3) for freedom in (20, 39, 1000)] == [2.086, 2.023, 1.962]


def test_a_policy_against_itself_differs_by_nothing(shared: dict[str, run.Played]) -> None:
    for name in compare.STATISTICS:
        assert compare.difference(name, shared["joint"], shared["joint"]).as_list() == [0, 0, 0]
        assert compare.ratio(name, shared["joint"], shared["joint"]).as_list() == [1, 1, 1]


# ---------------------------------------------------------------- calibration


def test_fit_finds_the_coefficients_that_made_the_times() -> None:
    truth = Physics(2e-3, 50e-6, 3e-8, 2e-4, 1e-6, 4e-3)
    samples: dict[tuple[float, ...], list[float]] = {}
    for n in (32, 128, 256, 448):
        terms = (1.0, n, n * (n + 1) / 2, 0.0, 0.0, 1.0)
        samples[terms] = [float(np.dot(terms, dataclasses.astuple(truth)))]
    for batch, context in itertools.product((1, 4, 8), (50, 400)):
        terms = (1.0, 0.0, 0.0, batch, batch * context, 0.0)
        samples[terms] = [float(np.dot(terms, dataclasses.astuple(truth)))]
    assert dataclasses.astuple(live.fit(samples)) == pytest.approx(dataclasses.astuple(truth), rel=1e-6)
    constant = {terms: [1e-2] for terms in samples}  # what falls with length in truth must not become negative
    assert min(dataclasses.astuple(live.fit(constant))) >= 0


def test_prompts_of_live_runs_share_what_their_tokens_share() -> None:
    ids = np.arange(100, 2000)
    one, other, *_ = traces.sessions(40, 10, np.random.default_rng(0), systems=1, system_tokens=64, turns=1.0)
    first, second = live.prompt(one, ids), live.prompt(other, ids)
    assert len(first) == one.prompt
    assert set(first) <= set(ids.tolist())
    assert first[:64] == second[:64]
    assert first[64:80] != second[64:80]
    assert live.prompt(one, ids, salt=1)[:16] != first[:16]


def test_by_hand_a_request_waits_for_the_step_that_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step takes 1 s, the first request one step; the second comes in its middle and begins at its end."""
    config = Config(str(build(tmp_path, "llama")), device="cpu", block_size=4, num_blocks=44, max_num_seqs=4)
    monkeypatch.setattr(by_hand, "step", lambda engine: (engine.step(), 1.0))
    first = Asked(at_s=0.0, session="a", system=0, shared=0, own=1, prompt=5, output=1, rank=0.0)
    trace = [first, dataclasses.replace(first, at_s=0.25, session="b", own=2)]
    found = by_hand.play(trace, run.Fixed([0, 0]), [RealEngine(config)], np.arange(1, 300))
    assert found.ttft_s.tolist() == [1.0, 1.75]


def test_real_engines_by_hand_find_the_prefixes_that_the_simulator_finds(tmp_path: Path) -> None:
    """So slowly that nothing depends on how long a step takes: the same hits, request by request."""
    config = Config(str(build(tmp_path, "llama")), device="cpu", block_size=4, num_blocks=44, max_num_seqs=4)
    trace = traces.sessions(
        40, 0.2, np.random.default_rng(0), systems=3, system_tokens=18, turns=2.0, longest=80, new_tokens="2-9",
        output_tokens="2-5",
    )  # fmt: skip
    two = run.Setting(workers=2, config=config, recur=False)
    engines = [RealEngine(config) for _ in range(2)]
    for name in ("round_robin", "joint"):
        real = by_hand.play(trace, run.policy(name, two), engines, np.arange(1, 300))
        said = run.play(trace, run.policy(name, two), two)
        assert real.worker.tolist() == said.worker.tolist()
        assert real.cached.tolist() == said.cached.tolist()
        assert real.cached.sum() > 0
        assert (real.e2e_s >= real.ttft_s).all()
    assert not any(engine.has_work for engine in engines)
