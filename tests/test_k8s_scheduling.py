"""Chapter 8: the real scheduler with fake GPU nodes, and the gang scheduler's rules held against all that is possible."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch08_kubernetes.scheduling import gang_scheduler
from ch08_kubernetes.scheduling.cases import CASES
from ch08_kubernetes.scheduling.gang_scheduler import (
    GANG,
    SIZE,
    Gang,
    free_on,
    gangs,
    may_run,
    place,
)
from ch08_kubernetes.scheduling.scene import Scene, pod
from ch08_kubernetes.scheduling.show import main
from common.script import UserError

if TYPE_CHECKING:
    from ch08_kubernetes.cluster.local import LocalCluster

Json = dict[str, Any]
GPU = "nvidia.com/gpu"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "-") for name in CASES])
def test_pods_land_where_they_should(case: Any, cluster: LocalCluster) -> None:
    expected, found = case(cluster)
    assert found == expected


def test_the_gang_scheduler_names_what_is_wrong_with_a_gang(cluster: LocalCluster) -> None:
    with Scene(cluster, "gang-alone", []) as scene:
        body = pod("one-0", "gang-alone", 1, schedulerName=gang_scheduler.NAME)
        body["metadata"]["labels"][GANG] = "one"
        scene.put(body)
        assert gang_scheduler.one_pass(scene.api) == {
            "gang-alone/one": f"waits: its pods need the annotation {SIZE}, all the same number"
        }
    with Scene(cluster, "gang-short", []) as scene:
        body = pod("one-0", "gang-short", 1, schedulerName=gang_scheduler.NAME)
        body["metadata"] |= {"labels": {GANG: "one"}, "annotations": {SIZE: "2"}}
        scene.put(body)
        assert gang_scheduler.one_pass(scene.api)["gang-short/one"] == "waits: 1 of 2 pods exist"


def test_an_unknown_case_is_named() -> None:
    with pytest.raises(UserError, match="there is no case 'nowhere'; take some of by label, "):
        main(["nowhere"])


# ---------------------------------------------------------------- the gang scheduler's rules


def a_node(name: str, gpus: int, **more: Any) -> Json:
    return {
        "metadata": {"name": name, "labels": more.get("labels", {})},
        "spec": {"taints": more.get("taints", [])},
        "status": {
            "allocatable": {GPU: str(gpus), "cpu": "64", "pods": "110"},
            "conditions": [{"type": "Ready", "status": more.get("ready", "True")}],
        },
    }


def a_pod(number: int, gpus: int, **spec: Any) -> Json:
    body = pod(f"p-{number}", "x", gpus, **spec)
    body["metadata"] |= {"uid": f"uid-{number}", "creationTimestamp": f"2026-01-01T00:00:{number:02}Z"}
    return body | {"status": {}}


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 5))
def test_a_gang_of_equal_pods_is_placed_if_and_only_if_it_fits(free: list[int], each: int, size: int) -> None:
    nodes = [a_node(f"n{n}", gpus) for n, gpus in enumerate(free)]
    pods = [a_pod(number, each) for number in range(size)]
    placed = place(pods, nodes, free_on(nodes, []))
    assert (placed is not None) == (sum(gpus // each for gpus in free) >= size)
    if placed:
        taken = [sum(each for where in placed.values() if where == f"n{n}") for n in range(len(free))]
        assert all(used <= gpus for used, gpus in zip(taken, free, strict=True))
        assert len(placed) == size


@given(st.lists(st.integers(0, 8), min_size=1, max_size=3), st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_what_is_placed_fits_and_what_fits_nowhere_is_not_placed(free: list[int], wanted: list[int]) -> None:
    nodes = [a_node(f"n{n}", gpus) for n, gpus in enumerate(free)]
    placed = place([a_pod(n, gpus) for n, gpus in enumerate(wanted)], nodes, free_on(nodes, []))
    ways = itertools.product(range(len(free)), repeat=len(wanted))
    fits = any(all(sum(w for w, at in zip(wanted, way, strict=True) if at == n) <= free[n] for n in range(len(free)))
               for way in ways)  # fmt: skip
    if placed:
        assert fits
        for n, gpus in enumerate(free):
            assert sum(w for i, w in enumerate(wanted) if placed[f"uid-{i}"] == f"n{n}") <= gpus


def test_free_is_what_running_pods_leave() -> None:
    runs, ended = a_pod(1, 3), a_pod(2, 4)
    for body, phase in ((runs, "Running"), (ended, "Succeeded")):
        body["spec"]["nodeName"], body["status"] = "n", {"phase": phase}
    assert free_on([a_node("n", 8)], [runs, ended, a_pod(3, 1)])["n"] == {GPU: 5, "cpu": 63, "pods": 109}


def test_a_sidecar_counts_and_a_pod_is_one_of_the_nodes_pods() -> None:
    body = a_pod(1, 2)
    body["spec"]["containers"].append({"name": "side", "resources": {"requests": {"cpu": "500m"}}})
    fetch = {"name": "fetch", "resources": {"requests": {"cpu": "4", "memory": "1Gi"}}}
    body["spec"]["initContainers"] = [fetch]
    assert gang_scheduler.wanted(body) == {GPU: 2, "cpu": 4, "memory": 2**30, "pods": 1}
    body["spec"]["initContainers"] = [fetch | {"restartPolicy": "Always"}]
    assert gang_scheduler.wanted(body) == {GPU: 2, "cpu": 5.5, "memory": 2**30, "pods": 1}


@pytest.mark.parametrize(
    ("toleration", "holds"),
    [
        ({"key": GPU, "operator": "Exists"}, True),
        ({"key": GPU, "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": GPU, "operator": "Exists", "effect": "NoExecute"}, False),
        ({"operator": "Exists"}, True),
        ({"key": GPU, "value": "present"}, True),
        ({"key": GPU, "value": "absent"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations(toleration: Json, holds: bool) -> None:
    node = a_node("n", 8, taints=[{"key": GPU, "value": "present", "effect": "NoSchedule"}])
    assert may_run(a_pod(1, 1, tolerates=False, tolerations=[toleration]), node) == holds


@pytest.mark.parametrize(
    ("term", "holds"),
    [
        ({"operator": "In", "values": ["a", "b"]}, True), ({"operator": "In", "values": ["b"]}, False),
        ({"operator": "NotIn", "values": ["b"]}, True), ({"operator": "Exists"}, True),
        ({"operator": "DoesNotExist"}, False), ({"operator": "Gt", "values": ["8"]}, False), (None, False),
    ],
)  # fmt: skip
def test_node_selector_terms(term: Json | None, holds: bool) -> None:
    terms = [{"matchExpressions": [{"key": "zone", **term}]} if term else {}]  # an empty one selects nothing
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
    assert may_run(a_pod(1, 1, affinity=affinity), a_node("n", 8, labels={"zone": "a"})) == holds


def test_a_node_that_is_not_ready_or_closed_or_tainted_is_none() -> None:
    body = a_pod(1, 1, tolerates=False)
    assert may_run(body, a_node("n", 8))
    assert not may_run(body, a_node("n", 8, ready="Unknown"))
    assert not may_run(body, a_node("n", 8, taints=[{"key": GPU, "effect": "NoSchedule"}]))
    closed = a_node("n", 8)
    closed["spec"]["unschedulable"] = True
    assert not may_run(body, closed)
    body["spec"]["nodeSelector"] = {"product": "H100"}
    assert not may_run(body, a_node("n", 8, labels={"product": "L4"}))


def test_gangs_take_turns_by_priority_then_age() -> None:
    pods = [a_pod(n, 1, schedulerName=gang_scheduler.NAME, priority=priority) for n, priority in enumerate((0, 0, 5))]
    for body, name in zip(pods, ("old", "young", "urgent"), strict=True):
        body["metadata"] |= {"labels": {GANG: name}, "annotations": {SIZE: "1"}}
    found: list[Gang] = gangs(reversed(pods))
    assert [one.name for one in found] == ["urgent", "old", "young"]
