"""Faults to plant on a cluster of fake nodes, and the cause that the doctor must name first: for classes and tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from kubernetes.client import ApiClient

from ch08_kubernetes.cluster import fates
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.nodes import H100, Node, remove_nodes
from ch08_kubernetes.cluster.rest import Json, call, get
from ch08_kubernetes.doctor.planting import (
    HOME,
    TOLERATION,
    Planter,
    Step,
    adds,
    claim,
    cordons,
    deletes,
    deployment,
    dies,
    headless,
    job,
    mounting,
    opens,
    pod,
    priority,
    puts,
    quota,
    running,
)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and the cause that the doctor must name first.

    Attributes:
        then: consequences that it must name too.
        says: words that stand in the first finding.
        steps: after the objects are there, called again and again, each until it returns True.
    """

    name: str
    cause: str
    nodes: list[Node] = field(default_factory=lambda: [Node("n1", H100, 8, "96", "1000Gi")])
    objects: list[Json] = field(default_factory=list)
    then: tuple[str, ...] = ()
    says: str = ""
    steps: tuple[Step, ...] = ()


LIMITS = {
    "apiVersion": "v1",
    "kind": "LimitRange",
    "metadata": {"name": "containers"},
    "spec": {"limits": [{"type": "Container", "max": {"memory": "64Gi"}}]},
}
HOOK = {
    "apiVersion": "admissionregistration.k8s.io/v1",
    "kind": "ValidatingWebhookConfiguration",
    "metadata": {"name": "%s"},
    "webhooks": [
        {
            "name": "pods.gate.example.com",
            "failurePolicy": "Fail",
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "timeoutSeconds": 1,
            "clientConfig": {"service": {"namespace": "%s", "name": "gate"}},
            "namespaceSelector": {"matchLabels": {HOME: "%s"}},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        }
    ],
}
BUDGET = {
    "apiVersion": "policy/v1",
    "kind": "PodDisruptionBudget",
    "metadata": {"name": "serve"},
    "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "serve"}}},
}
SCALER = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "serve"},
    "spec": {
        "minReplicas": 1,
        "maxReplicas": 3,
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "serve"},
        "metrics": [
            {
                "type": "Resource",
                "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}},
            }
        ],
    },
}
BIG = Node("n1", H100, 8, "96", "1000Gi")
SECOND = replace(BIG, name="n2")
KEPT = {"key": "book/kept", "value": "second", "effect": "NoSchedule"}  # until its own gang has it

HEALTHY = Fault(
    "healthy",
    "",
    objects=[headless("train", "train"), job("train", 4, 2), deployment("serve", 1), BUDGET],
    steps=(running(3),),
)
FAULTS = [
    Fault(
        "no-gpus",
        "no-free-gpus",
        objects=[pod("holder", 8)],
        says="held by Pod/%s/holder (8)",
        steps=(running(1), puts(pod("late", 4))),
    ),
    Fault(
        "taint",
        "untolerated-taint",
        objects=[pod("train", 1, tolerate=False)],
        says="nvidia.com/gpu=present:NoSchedule",
    ),
    Fault(
        "label",
        "node-selector",
        objects=[pod("train", 1, nodeSelector={"nvidia.com/gpu.product": "H100"})],
        says="the nearest is NVIDIA-H100-80GB-HBM3",
    ),
    Fault(
        "blind-node",
        "gpu-not-seen",
        [Node("n1", H100, 0)],
        [pod("train", 1)],
        then=("no-gpu-node",),
        says="no device plugin",
    ),
    Fault("sixteen", "larger-than-node", objects=[pod("train", 16)], says="the largest node that it may use has 8"),
    Fault(
        "fragments",
        "fragmented-gpus",
        [BIG, SECOND],
        [pod("a", 6), pod("b", 6)],
        says="4 in sum",
        steps=(running(2), puts(pod("train", 4))),
    ),
    Fault(
        "quota",
        "quota-exceeded",
        [BIG, SECOND],
        [quota(), job("train", 1, 9)],
        says="used requests.nvidia.com/gpu=8",
        then=("rendezvous-incomplete",),
    ),
    Fault(
        "limit-range",
        "limit-range",
        objects=[LIMITS, job("train", 1, 1, memory="128Gi")],
        says="maximum memory usage per Container is 64Gi",
    ),
    Fault("image", "image-not-found", objects=[pod("serve", 1, "ImagePullBackOff")]),
    Fault(
        "secret",
        "missing-config",
        objects=[pod("serve", 1, "CreateContainerConfigError")],
        says='secret "main" not found',
    ),
    Fault(
        "memory", "oom-killed", objects=[deployment("serve", 2, 1, "OOMKilled", memory="16Gi")], says="its limit (16Gi)"
    ),
    Fault("crash", "application-error", objects=[deployment("serve", 1, 1, "CrashLoopBackOff")], says="exit code 1"),
    Fault("claim", "volume-claim-missing", objects=[mounting("train", "checkpoints")]),
    Fault("no-class", "no-storage-class", objects=[claim("checkpoints"), mounting("train", "checkpoints")]),
    Fault("class", "storage-class-missing", objects=[claim("checkpoints", "fast"), mounting("train", "checkpoints")]),
    Fault(
        "hang",
        "no-free-gpus",
        objects=[headless("train", "train"), job("train", 8, 2)],
        then=("rendezvous-incomplete",),
        says="held by Job/%s/train (8)",
    ),
    Fault(
        "rendezvous",
        "service-selector",
        objects=[headless("train", "trian"), job("train", 4, 2)],
        says="the rendezvous name never resolves",
    ),
    Fault(
        "deadlock",
        "gang-deadlock",
        objects=[job("first", 8, 2)],
        then=("no-free-gpus", "rendezvous-incomplete"),
        says="1 of 2 pods",
        steps=(
            running(1),
            adds(replace(SECOND, taints=[KEPT])),
            puts(job("second", 8, 2, tolerations=[TOLERATION, {"key": "book/kept", "operator": "Exists"}])),
            running(2),
            opens("n2"),
        ),
    ),
    Fault("readiness", "readiness-fails", objects=[deployment("serve", 1, 1, fates.NEVER_READY)]),
    Fault(
        "dead-node",
        "node-silent",
        objects=[pod("serve", 1)],
        then=("pods-on-dead-node",),
        steps=(running(1), dies("n1")),
    ),
    Fault(
        "preempted",
        "preempted",
        objects=[priority("%s", 1000), job("low", 8, 1)],
        then=("no-free-gpus",),
        steps=(running(1), puts(pod("high", 8, priorityClassName="%s"))),
    ),
    Fault(
        "backoff",
        "application-error",
        objects=[job("train", 1, 1, "Error", limits={"backoffLimit": 0})],
        then=("backoff-limit",),
    ),
    Fault("deadline", "deadline-exceeded", objects=[job("train", 1, 1, limits={"activeDeadlineSeconds": 1})]),
    Fault("evicted", "evicted", objects=[pod("train", 1, "Evicted")], says="ephemeral-storage"),
    Fault("device", "device-unavailable", objects=[pod("train", 1, "UnexpectedAdmissionError")]),
    Fault("drain", "pdb-blocks-drain", objects=[deployment("serve", 1), BUDGET], steps=(running(1), cordons("n1"))),
    Fault("hpa", "hpa-no-metrics", objects=[deployment("serve", 1), SCALER]),
    Fault("cordon", "nodes-cordoned", steps=(cordons("n1"), puts(pod("train", 1)))),
    Fault(
        "finalizer",
        "terminating-finalizer",
        objects=[pod("train", 1, finalizers=["example.com/held"])],
        steps=(running(1), deletes("train")),
    ),
    Fault(
        "stuck", "terminating-stuck", objects=[pod("train", 1, fates.NEVER_STOPS)], steps=(running(1), deletes("train"))
    ),
    Fault("webhook", "webhook-down", objects=[HOOK], then=("webhook-unanswered",), steps=(puts(job("train", 1, 1)),)),
    Fault(
        "priority", "priority-class-missing", objects=[job("train", 1, 1, priorityClassName="urgent")], says="urgent"
    ),
    Fault("scheduler", "no-scheduler", objects=[pod("train", 1, schedulerName="mine")], says="mine"),
]


def plant(fault: Fault, api: ApiClient, kubelet: FakeKubelet, space: str) -> tuple[Planter, list[Step]]:
    """Plant a fault in a namespace of its own; the steps that are still to be taken."""
    at = Planter(api, kubelet, space)
    apply(api, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": {HOME: space}}})
    at.add(*fault.nodes)
    at.put(*fault.objects)
    return at, list(fault.steps)


def uproot(at: Planter) -> None:
    """Take away what a fault has outside of its namespace, finalizers, and begin the namespace's own end."""
    hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    for path in (hooks, "/apis/scheduling.k8s.io/v1/priorityclasses"):
        if any(item["metadata"]["name"] == at.space for item in get(at.api, path)["items"]):
            call(at.api, "DELETE", f"{path}/{at.space}")
    for each in at.pods():
        if each["metadata"].get("finalizers"):
            path = f"/api/v1/namespaces/{at.space}/pods/{each['metadata']['name']}"
            call(at.api, "PATCH", path, {"metadata": {"finalizers": None}})
    nodes = get(at.api, "/api/v1/nodes", labelSelector=f"{HOME}={at.space}")["items"]
    call(at.api, "DELETE", f"/api/v1/namespaces/{at.space}")
    remove_nodes(at.api, [node["metadata"]["name"] for node in nodes])


def soon() -> datetime:
    """Two minutes from now: what is only a fault when it lasts is not waited for."""
    return datetime.fromtimestamp(datetime.now(UTC).timestamp() + 120, UTC)
