"""The autoscalers' algorithms: worked examples of the documentation, and what must hold of any sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch08_kubernetes.autoscaling import simulate
from ch08_kubernetes.autoscaling.algorithms import (
    HPA,
    KEDA,
    Policy,
    Rules,
    jobs_to_start,
    pods_desired,
    total_desired,
    value_desired,
)
from ch08_kubernetes.cluster.apply import objects


def pods(*values: float) -> dict[str, float]:
    return {f"pod-{index}": value for index, value in enumerate(values)}


def test_the_ratio_scales_the_ready_pods_and_small_ones_change_nothing() -> None:
    assert pods_desired(1, pods(200), 100) == 2  # the documentation's: 200m against 100m doubles
    assert pods_desired(2, pods(50, 50), 100) == 1  # and 50m halves
    assert pods_desired(3, pods(109, 109, 109), 100) == 3  # 1.09: within the tolerance
    assert pods_desired(3, pods(110, 110, 110), 100) == 4  # 1.1 - 1 is more than 0.1 in floating point, there as here
    assert pods_desired(3, pods(90, 90, 90), 100) == 3
    assert pods_desired(10, pods(*[88] * 10), 100) == 9


def test_pods_without_a_metric_hold_back_both_ways() -> None:
    assert pods_desired(4, pods(20, 20), 100) == 1
    assert pods_desired(4, pods(20, 20), 100, missing=2) == 3  # (20 + 20 + 100 + 100) / 4 = 60 %
    assert pods_desired(3, pods(300), 100, missing=2) == 3  # (300 + 0 + 0) / 3 is the target
    assert pods_desired(3, pods(400), 100, missing=2) == 4
    assert pods_desired(2, pods(150), 100, missing=1) == 2  # more would turn into fewer
    with pytest.raises(ValueError, match="no metric"):
        pods_desired(2, {}, 100)


def test_pods_that_are_not_ready_count_as_idle_when_it_would_be_more() -> None:
    assert pods_desired(3, pods(300), 100) == 3
    assert pods_desired(3, pods(600), 100, unready=2) == 6
    assert pods_desired(3, pods(150), 100, unready=2) == 3
    assert pods_desired(3, pods(50), 100, unready=2) == 1  # fewer: they are left out


def test_totals_and_levels() -> None:
    assert total_desired(1, 12, 4) == 3
    assert total_desired(3, 13, 4) == 3  # 13 / 12 is within the tolerance
    assert total_desired(3, 14, 4) == 4
    assert total_desired(3, 0, 4) == 0  # the HPA's minimum comes after
    assert value_desired(4, 4, 0.96, 0.8) == 5
    assert value_desired(4, 3, 0.96, 0.8) == 4  # of ready pods
    assert value_desired(0, 0, 0.9, 0.8) == 2


def test_default_behaviour_doubles_or_adds_four_every_fifteen_seconds() -> None:
    hpa, seen, current = HPA(1, 100), [], 1
    for now in range(0, 61, 15):
        current = hpa.decide(now, current, [100])
        seen.append(current)
    assert seen == [5, 10, 20, 40, 80]


def test_a_policy_counts_from_the_start_of_its_period() -> None:
    hpa = HPA(1, 20, down=Rules(0, (Policy("Pods", 1, 10),)))
    seen, current = [], 5
    for now in (0, 4, 8, 12, 16, 24):
        current = hpa.decide(now, current, [1])
        seen.append(current)
    assert seen == [4, 4, 4, 3, 3, 2]


def test_min_takes_the_policy_that_changes_least_and_disabled_nothing() -> None:
    policies = (Policy("Pods", 4, 60), Policy("Percent", 10, 60))
    # The documentation's: of 80 replicas 10 % are 8; below 40 the four pods are more.
    assert HPA(1, 100, down=Rules(0, policies)).decide(0, 80, [10]) == 72
    assert HPA(1, 100, down=Rules(0, policies)).decide(0, 20, [10]) == 16
    assert HPA(1, 100, down=Rules(0, policies, "Min")).decide(0, 80, [10]) == 76
    assert HPA(1, 100, down=Rules(0, policies, "Disabled")).decide(0, 80, [10]) == 80


def test_a_sync_without_a_metric_changes_nothing_and_bounds_hold_without_one() -> None:
    assert HPA(1, 5).decide(0, 3, []) == 3
    assert HPA(2, 5).decide(0, 1, []) == 2
    assert HPA(2, 5).decide(0, 9, []) == 5
    assert HPA(1, 5).decide(0, 0, [4]) == 0  # off


windows = st.sampled_from([0, 3, 10, 40])
rules = st.builds(
    Rules,
    windows,
    st.lists(st.builds(Policy, st.sampled_from(["Pods", "Percent"]), st.integers(1, 150), st.integers(1, 60)),
             min_size=1, max_size=3),
    st.sampled_from(["Max", "Min"]),
)  # fmt: skip


@given(rules, rules, st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), max_size=40), st.integers(1, 30))
def test_bounds_windows_and_direction(up: Rules, down: Rules, steps: list[tuple[int, int]], current: int) -> None:
    hpa, now = HPA(2, 25, up, down), 0
    past: list[tuple[int, int]] = []
    for wait, recommended in steps:
        now += wait
        before, past = current, [*past, (now, recommended)]
        current = hpa.decide(now, before, [recommended])
        assert 2 <= current <= 25
        if 2 <= before <= 25:
            if current < before:  # never below the highest of the window: not earlier than that allows
                assert current >= min(max(n for t, n in past if t == now or t > now - down.window_s), 25)
            if current > before:
                assert current <= max(min(n for t, n in past if t == now or t > now - up.window_s), 2)


def test_keda_starts_the_first_and_stops_the_last() -> None:
    keda = KEDA(HPA(1, 8), activation=2, cooldown_s=300)
    assert keda.poll(0, 0, 2) == 0  # at the activation value is not above it
    assert keda.poll(30, 0, 3) == 1
    assert keda.poll(60, 5, 3) == 5  # from one up it is the HPA's
    assert keda.poll(330, 1, 0) == 1  # 300 s since it was last active, at 60 s: not yet
    assert keda.poll(360, 1, 0) == 1
    assert keda.poll(361, 1, 0) == 0
    assert KEDA(HPA(1, 8), minimum=1).poll(1e6, 1, 0) == 1


def test_scaled_job_strategies() -> None:
    # The documentation's table for `accurate`: maximum 3, one item a job, items leave the queue when taken.
    assert jobs_to_start(3, 1, 0, 0, 3, "accurate") == 3
    assert jobs_to_start(3, 1, 1, 0, 3, "accurate") == 2
    assert jobs_to_start(1, 1, 1, 0, 3, "accurate") == 1  # the running one has its own
    assert jobs_to_start(1, 1, 1, 0, 3, "default") == 0  # the queue still holds it
    assert jobs_to_start(2, 1, 1, 1, 5, "accurate") == 1  # a pending job will take one
    assert jobs_to_start(25, 10, 0, 0, 8, "accurate") == 3
    assert jobs_to_start(2, 1, 3, 0, 10, "eager") == 2
    assert jobs_to_start(20, 1, 3, 0, 10, "eager") == 7
    assert jobs_to_start(0, 1, 3, 0, 10) == 0


@given(st.integers(0, 100), st.integers(1, 9), st.integers(0, 10), st.data())
def test_jobs_never_exceed_their_maximum(queue: int, target: int, running: int, data: st.DataObject) -> None:
    pending = data.draw(st.integers(0, running))
    for strategy in ("default", "accurate", "eager"):
        assert running + jobs_to_start(queue, target, running, pending, 10, strategy) <= 10


def test_manifests_are_read() -> None:
    (custom,) = objects("ch08_kubernetes/autoscaling/hpa-custom.yaml")
    hpa = HPA.read(custom["spec"])
    assert (hpa.minimum, hpa.maximum, hpa.up.window_s, hpa.down.window_s) == (1, 8, 0, 900)
    assert hpa.down.policies == [Policy("Pods", 1, 300)]
    assert hpa.up.select == "Max"
    # A burst of 40 waiting requests: 1 -> 3 (two pods more) at once, and half a minute later nothing more.
    assert hpa.decide(0, 1, [total_desired(1, 40, 4)]) == 3
    assert hpa.decide(30, 3, [total_desired(3, 40, 4)]) == 3
    assert hpa.decide(61, 3, [total_desired(3, 40, 4)]) == 6


# ---------------------------------------------------------------- the simulation


@pytest.mark.parametrize(("pods", "slots", "rate"), [(1, 1, 0.075), (3, 2, 0.45)])
def test_a_fixed_number_of_pods_is_m_m_c(pods: int, slots: int, rate: float) -> None:
    """The mean wait of Erlang C: C(c, a) / (c / s - rate); and the share that waits at all is C."""
    service_s, end_s = 8.0, 100_000 / rate  # at 0.6 of what they can do: the mean of so many is 3 % off
    rng = np.random.default_rng(3)
    times = np.sort(rng.uniform(0, end_s, rng.poisson(rate * end_s)))
    world = simulate.World(slots, service_s, 0, np.random.default_rng(4))
    simulate.play(times, simulate.fixed(pods), world, pods, end_s + 3600)
    assert len(world.waits_s) == len(times)
    servers = pods * slots
    wait = simulate.erlang_c(servers, rate * service_s)
    assert np.mean(np.array(world.waits_s) > 0) == pytest.approx(wait, rel=0.05)
    assert np.mean(world.waits_s) == pytest.approx(wait / (servers / service_s - rate), rel=0.1)
    assert world.pod_seconds == pytest.approx(pods * world.now)


def test_pods_are_ready_after_a_cold_start_and_finish_what_they_serve() -> None:
    world = simulate.World(1, 1e-9, 60.0, np.random.default_rng(0))
    wanted = {0.0: 1, 15.0: 2, 90.0: 1}
    rows = simulate.play(np.array([10.0]), lambda now, w: wanted.get(now, len(w.pods)), world, 0, 120.0)
    assert [(second, ready) for second, ready, _ in rows] == [
        (0, 0), (15, 0), (30, 0), (45, 0), (60, 1), (75, 2), (90, 2), (105, 1), (120, 1),
    ]  # fmt: skip
    assert world.waits_s == [50.0]  # from its arrival until the first pod was ready
    assert (world.started, world.pod_seconds) == (2, 120 + 75)


def test_the_simulation_serves_all_and_zero_saves_hours_at_night(tmp_path: Path) -> None:
    words = ["--cold-start", "45", "--burst", "6", "--night", "0.001", "--run-dir"]
    first = simulate.main([*words, str(tmp_path / "a")])
    assert first == simulate.main([*words, str(tmp_path / "b")])
    assert first["unserved"] == 0
    assert first["keda_to_zero_45_gpu_hours"] < first["keda_45_gpu_hours"]
    assert first["keda_45_late"] < first["hpa_on_the_queue_45_late"]
    assert (tmp_path / "a" / "autoscaling.png").stat().st_size > 10_000
