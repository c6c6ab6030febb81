"""How faults are planted: objects for a namespace and for nodes of its own, and the steps that go wrong."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kubernetes.client import ApiClient

from ch08_kubernetes.cluster import fates
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.nodes import Node, add_nodes, conditions
from ch08_kubernetes.cluster.rest import STRATEGIC, Json, call, get
from common.script import UserError

TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


HOME = "book/fault"  # the label by which a fault's pods find its nodes


Step = Callable[["Planter"], bool]


@dataclass
class Planter:
    """Where a fault is planted: its namespace, and the nodes that are its own."""

    api: ApiClient
    kubelet: FakeKubelet
    space: str

    def pods(self) -> list[Json]:
        return get(self.api, f"/api/v1/namespaces/{self.space}/pods")["items"]  # type: ignore[no-any-return]

    def put(self, *objects: Json) -> None:
        apply(self.api, [self._homed(body) for body in objects], namespace=self.space)

    def add(self, *nodes: Node) -> None:
        add_nodes(self.api, [self.own(node) for node in nodes])

    def own(self, node: Node) -> Node:
        return replace(node, name=f"{self.space}-{node.name}", labels={**node.labels, HOME: self.space})

    def patch_node(self, name: str, body: Json, part: str = "") -> None:
        call(self.api, "PATCH", f"/api/v1/nodes/{self.space}-{name}{part}", body, patch=STRATEGIC)

    def _homed(self, body: Any) -> Any:
        """A copy whose pods run on the fault's own nodes alone; %s in strings is the namespace."""
        if isinstance(body, dict):
            made = {key: self._homed(value) for key, value in body.items()}
            if "containers" in made and "schedulerName" not in made:
                made["nodeSelector"] = {HOME: self.space, **made.get("nodeSelector", {})}
            return made
        if isinstance(body, list):
            return [self._homed(item) for item in body]
        return body.replace("%s", self.space) if isinstance(body, str) else body


def spec(
    gpus: int = 0, *, memory: str = "", env: dict[str, str] | None = None, tolerate: bool = True, **more: Any
) -> Json:
    limits: Json = ({"nvidia.com/gpu": gpus} if gpus else {}) | ({"memory": memory} if memory else {})
    container: Json = {"name": "main", "image": "registry.example.com/train:1", "resources": {"limits": limits}}
    container["env"] = [{"name": key, "value": value} for key, value in (env or {}).items()]
    return {"containers": [container], **({"tolerations": [TOLERATION]} if tolerate else {}), **more}


def pod(name: str, gpus: int = 0, fate: str = fates.RUNS, finalizers: list[str] | None = None, **more: Any) -> Json:
    meta: Json = {"name": name, "annotations": {fates.FATE: fate}, "labels": {"app": name}}
    meta |= {"finalizers": finalizers} if finalizers else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec(gpus, **more)}


def job(name: str, gpus: int, pods: int, fate: str = fates.RUNS, *, limits: Json | None = None, **more: Any) -> Json:
    env = {"NNODES": str(pods), "RDZV_ENDPOINT": f"{name}-0.{name}:29400"} if pods > 1 else {}
    meta = {"labels": {"app": name}, "annotations": {fates.FATE: fate}}
    template = {"metadata": meta, "spec": spec(gpus, env=env, restartPolicy="Never", **more)}
    how = {
        "completions": pods,
        "parallelism": pods,
        "completionMode": "Indexed",
        "template": template,
        **(limits or {}),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": how}


def deployment(name: str, replicas: int, gpus: int = 0, fate: str = fates.RUNS, **more: Any) -> Json:
    template = {"metadata": {"labels": {"app": name}, "annotations": {fates.FATE: fate}}, "spec": spec(gpus, **more)}
    made = {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": made}


def headless(name: str, app: str) -> Json:
    made = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": app}, "ports": [{"port": 29400}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": made}


def priority(name: str, value: int, policy: str = "PreemptLowerPriority") -> Json:
    head = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}}
    return head | {"value": value, "preemptionPolicy": policy}


def running(count: int) -> Step:
    """Until so many pods are ready."""

    def there(at: Planter) -> bool:
        states = [{c["type"]: c["status"] for c in p["status"].get("conditions", [])} for p in at.pods()]
        return sum(state.get("Ready") == "True" for state in states) >= count

    return there


def puts(*objects: Json) -> Step:
    return lambda at: at.put(*objects) or True  # type: ignore[func-returns-value]


def adds(*nodes: Node) -> Step:
    return lambda at: at.add(*nodes) or True  # type: ignore[func-returns-value]


def deletes(name: str) -> Step:
    def delete(at: Planter) -> bool:
        call(at.api, "DELETE", f"/api/v1/namespaces/{at.space}/pods/{name}", {"gracePeriodSeconds": 1})
        return True

    return delete


def cordons(name: str) -> Step:
    return lambda at: at.patch_node(name, {"spec": {"unschedulable": True}}) or True  # type: ignore[func-returns-value]


def opens(name: str) -> Step:
    """Takes the taints away."""

    def open_(at: Planter) -> bool:
        call(at.api, "PATCH", f"/api/v1/nodes/{at.space}-{name}", {"spec": {"taints": None}})
        return True

    return open_


def dies(name: str) -> Step:
    """What the node controller says when a kubelet has been silent for its grace period."""

    def silence(at: Planter) -> bool:
        at.kubelet.silence(f"{at.space}-{name}")
        states = conditions(False, "NodeStatusUnknown", "Kubelet stopped posting node status.")
        states[-1] |= {"status": "Unknown"}
        at.patch_node(name, {"status": {"conditions": states}}, "/status")
        return True

    return silence


def quota(**hard: str) -> Json:
    limits = {key.replace("_", "."): value for key, value in hard.items()} or {"requests.nvidia.com/gpu": "8"}
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus"}, "spec": {"hard": limits}}


def claim(name: str, storage_class: str | None = None) -> Json:
    made: Json = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    made |= {"storageClassName": storage_class} if storage_class else {}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": made}


def mounting(name: str, of: str) -> Json:
    return pod(name, volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": of}}])


def put_and_wait(
    api: ApiClient,
    space: str,
    marks: dict[str, str],
    objects: list[Json],
    *,
    placed: int,
    refused: int = 0,
    timeout_s: float = 60,
) -> None:
    """Apply objects in a namespace with these labels, until the scheduler has placed and refused so many pods.

    Raises:
        UserError: it has not, in time.
    """
    head: Json = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": marks}}
    apply(api, [head, *objects], namespace=space)
    deadline = time.monotonic() + timeout_s
    while True:
        states = Counter(
            c["status"]
            for pod in get(api, f"/api/v1/namespaces/{space}/pods")["items"]
            for c in pod["status"].get("conditions", [])
            if c["type"] == "PodScheduled"
        )
        if states["True"] == placed and states["False"] == refused:
            return
        if time.monotonic() > deadline:
            raise UserError(f"{dict(states)} pods of {space} are placed after {timeout_s:g} s; see the scheduler's log")
        time.sleep(0.05)
