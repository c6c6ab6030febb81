"""Where pods land: cases on the real scheduler, each with fake nodes and a namespace of its own.

A case is a function of a cluster that returns (what must come out, what came out), as values to show and to compare.
show.py prints them, the tests compare them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.nodes import A100, H100, L4, Node
from ch08_kubernetes.cluster.rest import Json, call, find, get
from ch08_kubernetes.scheduling import gang_scheduler
from ch08_kubernetes.scheduling.scene import HERE, Scene, evict, kubelet, pod, second_scheduler, until

Case = Callable[[LocalCluster], tuple[object, object]]


def labels(cluster: LocalCluster) -> tuple[object, object]:
    """A node selector on the product that GPU feature discovery wrote."""
    with Scene(cluster, "labels", [Node("label-l4", L4, 8), Node("label-h100", H100, 8)]) as scene:
        scene.put(pod("train-0", "labels", 1, nodeSelector={"nvidia.com/gpu.product": H100.product}))
        return {"train-0": "label-h100"}, scene.placed(1)


def placement(cluster: LocalCluster) -> tuple[object, object]:
    """placement.yaml itself: 80 GB or more, and both pods in one rack."""
    nodes = [
        Node("place-l4", L4, 8, rack="r1"), Node("place-a100", A100, 1, rack="r2"),
        Node("place-h100-1", H100, 1, rack="r3"), Node("place-h100-2", H100, 1, rack="r3"),
    ]  # fmt: skip
    with Scene(cluster, "team-vision", nodes) as scene:
        apply(scene.api, [HERE / "quotas.yaml", HERE / "placement.yaml"])
        return {"place-h100-1", "place-h100-2"}, set(scene.placed(2).values())


def no_toleration(cluster: LocalCluster) -> tuple[object, object]:
    """The taint on GPU nodes keeps off who does not say that it may be there."""
    with Scene(cluster, "taints", [Node("taint-h100", H100, 8)]) as scene:
        scene.put(pod("train-0", "taints", 1, tolerates=False))
        return "pending: taint", "pending: taint" if "taint" in scene.why_not("train-0") else scene.why_not("train-0")


def no_gpu_wanted(cluster: LocalCluster) -> tuple[object, object]:
    """And so pods that want no GPU go elsewhere, though the GPU node has room."""
    with Scene(cluster, "plain", [Node("plain-h100", H100, 8), Node("plain-cpu")]) as scene:
        scene.put(*(pod(f"web-{n}", "plain", tolerates=False) for n in range(4)))
        return {"plain-cpu": 4}, dict(Counter(scene.placed(4).values()))


def quota(cluster: LocalCluster) -> tuple[object, object]:
    """quotas.yaml: of nine pods with a GPU eight are made, and the ninth is refused."""
    with Scene(cluster, "team-vision", []) as scene:
        apply(scene.api, HERE / "quotas.yaml")
        nine = pod("x", "team-vision", 1)["spec"] | {"restartPolicy": "Never"}
        meta = {"name": "nine", "namespace": "team-vision"}
        spec = {"parallelism": 9, "completions": 9, "template": {"spec": nine}}
        apply(scene.api, {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec})

        def refused() -> bool:
            events = get(scene.api, "/api/v1/namespaces/team-vision/events")["items"]
            return any(e["reason"] == "FailedCreate" and "exceeded quota: gpus" in e["message"] for e in events)

        until(refused, "the quota's refusal")
        return (8, True), (len(scene.pods()), refused())


def limit_range(cluster: LocalCluster) -> tuple[object, object]:
    """quotas.yaml: no container of nine GPUs, no pod at the priority that evicts others, a memory limit for all."""
    with Scene(cluster, "team-vision", []) as scene:
        apply(scene.api, HERE / "quotas.yaml")
        large = scene.refusal(pod("large", "team-vision", 9))
        urgent = scene.refusal(pod("urgent", "team-vision", 1, priorityClassName="serving"))
        scene.put(pod("fine", "team-vision", 1))
        given = get(scene.api, f"{scene.path}/fine")["spec"]["containers"][0]["resources"]["limits"]["memory"]
        found = ("maximum nvidia.com/gpu" in large, "exceeded quota: no-serving-priority" in urgent, given)
        return (True, True, "4Gi"), found


def preemption(cluster: LocalCluster) -> tuple[object, object]:
    """priorities.yaml: serving takes the experiment's place, not training's; an experiment takes nobody's."""
    with Scene(cluster, "priorities", [Node("prio-h100", H100, 8)]) as scene, kubelet(scene):
        scene.put(pod("training-0", "priorities", 4, priorityClassName="training"))
        scene.put(pod("experiment-0", "priorities", 4, priorityClassName="experiment"))
        scene.placed(2)
        scene.put(pod("experiment-1", "priorities", 4, priorityClassName="experiment"))
        waits = scene.why_not("experiment-1")
        scene.put(pod("serving-0", "priorities", 4, priorityClassName="serving"))
        until(lambda: bool(scene.where().get("serving-0")), "serving's place")
        expected = {"training-0": "prio-h100", "experiment-1": "", "serving-0": "prio-h100"}
        return (expected, True), (scene.where(), "Insufficient nvidia.com/gpu" in waits)


def bin_packing(cluster: LocalCluster) -> tuple[object, object]:
    """scheduler-config.yaml: pods of two GPUs fill a node before the next; by default they spread."""
    nodes = [Node(f"pack-{n}", H100, 8, "192", "2000Gi") for n in range(2)]
    with Scene(cluster, "packing", nodes) as scene, second_scheduler(cluster) as profile:
        for n in range(4):  # one after another: each sees the ones before
            scene.put(pod(f"pack-{n}", "packing", 2, cpus=24, schedulerName=profile))
            scene.placed(n + 1)
        packed = sorted(Counter(scene.where().values()).values())
    with Scene(cluster, "spreading", nodes) as scene:
        for n in range(4):
            scene.put(pod(f"spread-{n}", "spreading", 2, cpus=24))
            scene.placed(n + 1)
        spread = sorted(Counter(scene.where().values()).values())
    return ([4], [2, 2]), (packed, spread)


def zones(cluster: LocalCluster) -> tuple[object, object]:
    """Topology spread: no zone has two replicas more than another, though one zone has three times the GPUs."""
    nodes = [Node(f"zone-a-{n}", L4, 4, zone="a") for n in range(3)] + [Node("zone-b-0", L4, 4, zone="b")]
    rule = {
        "maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "server"}},
    }  # fmt: skip
    with Scene(cluster, "zones", nodes) as scene:
        scene.put(*(pod(f"server-{n}", "zones", 1, topologySpreadConstraints=[rule]) for n in range(6)))
        found = Counter(name.split("-")[1] for name in scene.placed(6).values())
    return {"a": 3, "b": 3}, dict(found)


def gang(cluster: LocalCluster) -> tuple[object, object]:
    """Two jobs of two nodes each on three nodes: by default neither starts; in gangs one does, then the other."""
    nodes = [Node(f"gang-{n}", H100, 8) for n in range(3)]

    def job(name: str, namespace: str, **more: object) -> list[Json]:
        bodies = [pod(f"{name}-{n}", namespace, 8, **more) for n in range(2)]
        for body in bodies:
            body["metadata"]["labels"][gang_scheduler.GANG] = name
            body["metadata"]["annotations"] = {gang_scheduler.SIZE: "2"}
        return bodies

    with Scene(cluster, "half", nodes) as scene:
        for first, second in zip(job("one", "half"), job("two", "half"), strict=True):
            scene.put(first)
            scene.put(second)
        by_default = Counter(name.split("-")[0] for name, node in scene.placed(3).items() if node)
    with Scene(cluster, "whole", nodes) as scene, gang_scheduler.GangScheduler(cluster.client(), every_s=0.2):
        scene.put(*job("one", "whole", schedulerName=gang_scheduler.NAME))
        scene.placed(2)
        scene.put(*job("two", "whole", schedulerName=gang_scheduler.NAME))
        until(lambda: len(scene.where()) == 4, "the second job")
        waits = gang_scheduler.one_pass(scene.api)
        first = {name for name, node in scene.where().items() if node}
        for name in first:
            call(scene.api, "DELETE", f"{scene.path}/{name}", query={"gracePeriodSeconds": 0})
        until(lambda: all(scene.where().get(f"two-{n}") for n in range(2)), "the second job's start")
        then = {name for name, node in scene.where().items() if node}
    found = (sorted(by_default.values()), first, waits.get("whole/two"), then)
    return ([1, 2], {"one-0", "one-1"}, "waits: its 2 pods do not fit together", {"two-0", "two-1"}), found


def drain(cluster: LocalCluster) -> tuple[object, object]:
    """A disruption budget of one: the second replica goes only when the first is back, elsewhere."""
    nodes = [Node("drain-0", L4, 1), Node("drain-1", L4, 1), Node("drain-2", L4, 1)]
    template = {"metadata": {"labels": {"app": "server"}}, "spec": pod("server-0", "drain", 1)["spec"]}
    selector = {"matchLabels": {"app": "server"}}
    meta = {"name": "server", "namespace": "drain"}
    server = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta,
              "spec": {"replicas": 2, "selector": selector, "template": template}}  # fmt: skip
    budget = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta,
              "spec": {"minAvailable": 1, "selector": selector}}  # fmt: skip
    with Scene(cluster, "drain", nodes) as scene, kubelet(scene):
        apply(scene.api, [server, budget])

        def allowed() -> int:
            for version in ("v1", "v1beta1"):
                if found := find(scene.api, f"/apis/policy/{version}/namespaces/drain/poddisruptionbudgets/server"):
                    return int(found.get("status", {}).get("disruptionsAllowed", 0))
            return 0

        until(lambda: allowed() == 1, "two replicas that are ready")
        first, second = sorted(scene.where())
        was = scene.where()
        # The third node is not free yet: what goes first has to come back before the next may go.
        call(scene.api, "PATCH", "/api/v1/nodes/drain-2", {"spec": {"unschedulable": True}})
        call(scene.api, "PATCH", f"/api/v1/nodes/{was[first]}", {"spec": {"unschedulable": True}})
        went = evict(scene, first)
        until(lambda: allowed() == 0, "the budget's count")
        kept = evict(scene, second)
        free = next(node.name for node in nodes if node.name not in was.values())
        call(scene.api, "PATCH", f"/api/v1/nodes/{free}", {"spec": {"unschedulable": False}})
        until(lambda: allowed() == 1, "the first replica's return")
        then = evict(scene, second)
    return ("gone", "refused by the budget", "gone"), (went, kept, then)


CASES: dict[str, Case] = {
    "by label": labels, "by memory, one rack": placement, "no toleration": no_toleration,
    "no GPU wanted": no_gpu_wanted, "quota": quota, "limits": limit_range, "preemption": preemption,
    "bin packing": bin_packing, "zones": zones, "gang": gang, "drain": drain,
}  # fmt: skip
