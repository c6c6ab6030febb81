"""The doctor's rules on snapshots that a fake cluster does not make, and what holds for any snapshot."""

from __future__ import annotations

import copy
import random
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch08_kubernetes.cluster.nodes import GPU_TAINT, H100, Node, conditions
from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor import planting
from ch08_kubernetes.doctor.containers import budget_s
from ch08_kubernetes.doctor.diagnosis import diagnose
from ch08_kubernetes.doctor.facts import Facts, amount, requests
from ch08_kubernetes.doctor.filters import barriers, selected
from ch08_kubernetes.doctor.findings import ORDER, Finding, lines, ordered

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
EARLIER, AGO = "2026-11-27T11:00:00Z", "2026-11-27T11:58:00Z"


def named(kind: str, name: str, space: str = "ns", labels: Json | None = None, **parts: Any) -> Json:
    meta: Json = {"name": name, "creationTimestamp": EARLIER, "labels": labels or {}}
    meta |= {"namespace": space} if space else {}
    return {"kind": kind, "metadata": meta | parts.pop("meta", {}), **parts}


def node(name: str = "n1", ready: str = "True", gpus: int = 8, **spec: Any) -> Json:
    made = Node(name, H100, gpus, "96", "1000Gi")
    states = conditions()
    states[-1] |= {"status": ready, "lastHeartbeatTime": EARLIER}
    status = {"capacity": made.all_resources(), "allocatable": made.all_resources(), "conditions": states}
    return named("Node", name, "", made.all_labels(), spec={"taints": [GPU_TAINT], **spec}, status=status)


def pod(name: str = "p", state: Json | None = None, *, on: str = "n1", phase: str = "Running", ready: bool = False,
        last: Json | None = None, restarts: int = 0, gpus: int = 0, meta: Json | None = None, said: str = "", **spec: Any) -> Json:  # fmt: skip
    container = {"name": "main", "restartCount": restarts, "ready": ready, "image": "registry.example.com/train:1"}
    container |= {"state": state or {"running": {"startedAt": EARLIER}}} | (
        {"lastState": {"terminated": last}} if last else {}
    )
    states = [{"type": "Ready", "status": str(ready)}]
    states += (
        []
        if on
        else [
            {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": said or "0/1 nodes are available",
            }
        ]
    )
    body = planting.spec(gpus, **spec) | ({"nodeName": on} if on else {})
    status = {"phase": phase, "conditions": states, "containerStatuses": [container] if on else []}
    return named("Pod", name, labels={"app": name}, spec=body, status=status, meta=meta or {})


def event(about: str, reason: str, message: str) -> Json:
    kind, *rest = about.split("/")
    involved = {"kind": kind, "name": rest[-1], "namespace": rest[0] if len(rest) > 1 else None}
    return named(
        "Event",
        f"{rest[-1]}.{abs(hash((about, reason, message)))}",
        involvedObject=involved,
        reason=reason,
        message=message,
        lastTimestamp=AGO,
    )


def waits(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, "message": message}}


def ended(code: int, reason: str = "Error", seconds: int = 30) -> Json:
    return {
        "exitCode": code,
        "reason": reason,
        "startedAt": "2026-11-27T11:00:00Z",
        "finishedAt": f"2026-11-27T11:00:{seconds:02}Z",
    }


def of(kind: str, name: str) -> Json:
    return {"ownerReferences": [{"kind": kind, "name": name, "controller": True}]}


def job(
    name: str = "train", parallelism: int = 1, states: list[Json] | None = None, labels: Json | None = None, **spec: Any
) -> Json:
    template = {"metadata": {"labels": {"app": name}}, "spec": planting.spec(0)}
    body = {"parallelism": parallelism, "completions": parallelism, "template": template, **spec}
    return named("Job", name, labels=labels, spec=body, status={"conditions": states or [], "active": parallelism})


def pulling(message: str, reason: str = "ImagePullBackOff", **more: Any) -> list[Json]:
    return [
        node(),
        pod("p", waits(reason, "Back-off pulling image"), phase="Pending", **more),
        event("Pod/ns/p", "Failed", f"Failed to pull image: {message}"),
    ]


def crashed(code: int, reason: str = "Error", **more: Any) -> list[Json]:
    return [node(), pod("p", waits("CrashLoopBackOff"), last=ended(code, reason), restarts=3, **more)]


PROBED = {
    "containers": [
        {
            "name": "main",
            "image": "vllm",
            "livenessProbe": {"initialDelaySeconds": 10, "periodSeconds": 5, "failureThreshold": 4},
        }
    ]
}
INDEX = "batch.kubernetes.io/job-completion-index"
SHM = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]
CLAIM = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
UNBOUND = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."


def claim(storage_class: str | None = None) -> Json:
    return named("PersistentVolumeClaim", "data", spec={"storageClassName": storage_class}, status={"phase": "Pending"})


def scaler(**states: tuple[str, str]) -> Json:
    listed = [
        {"type": kind, "status": status, "reason": reason, "message": "said so"}
        for kind, (status, reason) in states.items()
    ]
    target = {"kind": "Deployment", "name": "serve"}
    return named(
        "HorizontalPodAutoscaler",
        "serve",
        spec={"scaleTargetRef": target, "maxReplicas": 4},
        status={"conditions": listed},
    )


def failed(reason: str) -> list[Json]:
    return [{"type": "Failed", "status": "True", "reason": reason, "message": "said so"}]


API_DOWN = named(
    "APIService",
    "v1beta1.custom.metrics.k8s.io",
    "",
    status={"conditions": [{"type": "Available", "status": "False", "reason": "MissingEndpoints"}]},
)
DYING = named("Namespace", "ns", "", meta={"deletionTimestamp": EARLIER}, status={"phase": "Terminating"})
REFUSED = 'Error creating: pods "train-x" is forbidden: '
# name: (objects, causes in order, words in the first message or fix)
CASES: dict[str, tuple[list[Json], list[str], str]] = {
    "pull without secret": (pulling("unauthorized: authentication required"), ["image-pull-secret"], "the pod has no pull secret"),
    "pull with a secret that is not there": (
        [*pulling("pull access denied", imagePullSecrets=[{"name": "reg"}]), named("Secret", "other")], ["image-pull-secret"], "the pull secret reg does not exist"),
    "pull with a wrong secret": (
        [*pulling("403 Forbidden", imagePullSecrets=[{"name": "reg"}]), named("Secret", "reg")], ["image-pull-secret"], "is not accepted"),
    "registry away": (pulling('Get "https://registry.example.com/v2/": dial tcp: lookup registry.example.com: no such host'), ["registry-unreachable"], "cannot reach the registry"),
    "registry counts": (pulling("toomanyrequests: You have reached your pull rate limit"), ["registry-rate-limit"], ""),
    "image is not there": (pulling("manifest unknown: manifest tagged by \"1\" is not found"), ["image-not-found"], "has no image registry.example.com/train:1"),
    "image has no name": ([node(), pod("p", waits("InvalidImageName"), phase="Pending")], ["image-name-invalid"], "malformed"),
    "shm by default": (crashed(135), ["bus-error"], "default of 64 MiB"),
    "shm too small": (crashed(135, volumes=SHM), ["bus-error"], "/dev/shm is 1Gi"),
    "segfault": (crashed(139), ["segfault"], "SIGSEGV"),
    "abort": (crashed(134), ["aborted"], ""),
    "killed": (crashed(137), ["killed"], "not by its memory limit"),
    "out of memory": (crashed(137, "OOMKilled"), ["oom-killed"], "OOMKilled"),
    "no command": (crashed(127), ["command-not-found"], "not in the image"),
    "slow model": (
        [node(), pod("p", waits("CrashLoopBackOff"), last=ended(137), restarts=4, **PROBED), event("Pod/ns/p", "Killing", "Container main failed liveness probe, will be restarted")],
        ["liveness-kills"], "it has 30 s to come up"),
    "config of a volume": ([node(), pod("p", waits("ContainerCreating"), phase="Pending"), event("Pod/ns/p", "FailedMount", 'MountVolume.SetUp failed for volume "c" : configmap "recipe" not found')], ["missing-config"], "create configmap recipe"),
    "volume elsewhere": ([node(), pod("p", waits("ContainerCreating"), phase="Pending"), event("Pod/ns/p", "FailedAttachVolume", "Multi-Attach error for volume pvc-1")], ["volume-multi-attach"], ""),
    "kubelet says no": ([node(ready="False")], ["node-not-ready"], ""),
    "dead node": ([node(ready="Unknown"), pod("p", ready=True)], ["node-silent", "pods-on-dead-node"], "3600 s ago"),
    "metrics api": ([API_DOWN, scaler(ScalingActive=("False", "FailedGetPodsMetric"))], ["apiservice-down", "hpa-no-metrics"], ""),
    "no metrics server": ([scaler(ScalingActive=("False", "FailedGetResourceMetric"))], ["hpa-no-metrics"], "metrics-server"),
    "scaler at its end": ([scaler(ScalingLimited=("True", "TooManyReplicas"))], ["hpa-at-maximum"], "maxReplicas of 4"),
    "scaler of nothing": ([scaler(AbleToScale=("False", "FailedGetScale"))], ["hpa-no-target"], "Deployment/ns/serve"),
    "namespace ends": ([DYING, job(), event("Job/ns/train", "FailedCreate", REFUSED + "unable to create new content in namespace ns because it is being terminated")], ["namespace-terminating", "namespace-closed"], ""),
    "no queue": ([job(suspend=True, labels={"kueue.x-k8s.io/queue-name": "gpus"})], ["queue-missing"], "queue gpus"),
    "queue is full": ([job(suspend=True, labels={"kueue.x-k8s.io/queue-name": "gpus"}), named("LocalQueue", "gpus"), named("Workload", "w", meta=of("Job", "train"), status={"conditions": [{"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota"}]})], ["no-queue-quota"], ""),
    "suspended": ([job(suspend=True)], ["suspended"], "nobody starts it"),
    "pod security": ([job(), event("Job/ns/train", "FailedCreate", REFUSED + 'violates PodSecurity "restricted:latest": runAsNonRoot != true')], ["pod-security"], "runAsNonRoot"),
    "account": ([job(), event("Job/ns/train", "FailedCreate", REFUSED + 'error looking up service account ns/trainer: serviceaccount "trainer" not found')], ["service-account-missing"], "trainer"),
    "quota needs": ([job(), event("Job/ns/train", "FailedCreate", REFUSED + "failed quota: gpus: must specify limits.memory")], ["quota-needs-request"], "limits.memory"),
    "other refusal": ([job(), event("Job/ns/train", "FailedCreate", "Error creating: something new")], ["refused"], ""),
    "no label of discovery": ([named("Node", "n1", "", {}, status={"allocatable": {"nvidia.com/gpu": "8"}}), pod(on="", phase="Pending", gpus=1, nodeSelector={"nvidia.com/gpu.product": "x"})], ["gpu-labels-missing"], "GPU feature discovery"),
    "labels not together": ([node(), node("n2") | {"metadata": {"name": "n2", "labels": {"pool": "b"}}}, pod(on="", phase="Pending", nodeSelector={"pool": "b", "nvidia.com/gpu.present": "true"})], ["node-selector"], "no node has them together"),
    "no provisioner": ([node(), claim("fast"), named("StorageClass", "fast", "", provisioner="nfs.example.com"), pod(on="", phase="Pending", said=UNBOUND, volumes=CLAIM)], ["volume-not-provisioned"], "nfs.example.com made none"),
    "affinity of pods": ([node(), pod(on="", phase="Pending", said="0/1 nodes are available: 1 node(s) didn't match pod affinity/anti-affinity.")], ["pod-placement"], ""),
    "room for memory": ([node(), pod("big", ready=True, memory="900Gi"), pod(on="", phase="Pending", memory="200Gi")], ["no-free-room"], "free where it may run: 100 GiB on n1"),
    "domain without service": ([named("Service", "other", spec={}), job(template={"spec": planting.spec(0, subdomain="train")})], ["service-missing"], ""),
    "no endpoint": ([node(), named("Service", "p", spec={"selector": {"app": "p"}}), pod("p"), event("Pod/ns/p", "Unhealthy", "Readiness probe failed: connection refused")], ["readiness-fails", "no-endpoints"], ""),
    "rollout": ([node(), named("Deployment", "d", status={"conditions": [{"type": "Progressing", "reason": "ProgressDeadlineExceeded", "status": "False"}]}), named("ReplicaSet", "d-1", meta=of("Deployment", "d"), spec={"replicas": 1}), *crashed(1, meta=of("ReplicaSet", "d-1"))[1:]], ["application-error", "rollout-stuck"], ""),
    "rank 1 crashes": ([node(), job(parallelism=2, completionMode="Indexed"), pod("train-0", ready=True, meta=of("Job", "train") | {"annotations": {INDEX: "0"}}), pod("train-1", waits("CrashLoopBackOff"), last=ended(139), meta=of("Job", "train") | {"annotations": {INDEX: "1"}})], ["segfault", "rendezvous-incomplete"], ""),
    "failure policy": ([job(states=failed("PodFailurePolicy"))], ["pod-failure-policy"], ""),
    "pressure evicts": ([named("Node", "n1", "", {}) | {"status": {"conditions": [{"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": "True"}]}}, pod("p", phase="Failed") | {"status": {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."}}], ["node-pressure", "evicted"], ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_names_cause_then_consequence(case: str) -> None:
    objects, causes, words = CASES[case]
    found = diagnose(objects, NOW)
    assert [finding.cause for finding in found] == causes, "\n".join(lines(found))
    assert words in f"{found[0].message} {found[0].fix}"
    assert [finding.depth for finding in found] == list(range(len(causes)))


def test_healthy_states_are_no_findings() -> None:
    """What looks odd and is fine: done pods, retried ones, a cordon, a claim that waits for its pod, a suspended wait."""
    lazy = named("StorageClass", "fast", "", volumeBindingMode="WaitForFirstConsumer")
    done = job(states=[{"type": "Complete", "status": "True"}])
    retried = pod("train-a", {"terminated": ended(1)}, phase="Failed", meta=of("Job", "train"))
    objects = [
        node(unschedulable=True), done, retried, claim("fast"), lazy, pod("ok", ready=True, restarts=2, last=ended(1)),
        named("PodDisruptionBudget", "b", status={"disruptionsAllowed": 1, "expectedPods": 2}),
        named("Service", "idle", spec={"selector": {"app": "ok"}}), scaler(ScalingLimited=("True", "TooFewReplicas")),
        pod("new", on="", phase="Pending", meta={"creationTimestamp": "2026-11-27T11:59:59Z"}) | {"status": {"phase": "Pending"}},
    ]  # fmt: skip
    assert diagnose(objects, NOW) == []


def test_who_holds_gpus_and_where_they_are_free() -> None:
    held = [pod("a", ready=True, gpus=5), pod("b", ready=True, gpus=2)]
    (found,) = diagnose([node(), *held, pod("late", on="", phase="Pending", gpus=2)], NOW)
    assert "free where it may run: 1 on n1; held by Pod/ns/a (5), Pod/ns/b (2)" in found.message


@pytest.mark.parametrize(
    ("probes", "budget"),
    [
        ({}, (0, "")),
        (
            {"livenessProbe": {"initialDelaySeconds": 10, "periodSeconds": 5, "failureThreshold": 4}},
            (30, "livenessProbe"),
        ),
        ({"livenessProbe": {}}, (30, "livenessProbe")),
        (
            {"startupProbe": {"periodSeconds": 10, "failureThreshold": 60}, "livenessProbe": {"periodSeconds": 5}},
            (600, "startupProbe"),
        ),
    ],
)
def test_seconds_to_come_up(probes: Json, budget: tuple[int, str]) -> None:
    assert budget_s(probes) == budget


def test_requests_of_a_pod_are_counted_as_the_scheduler_does() -> None:
    def container(gpus: int, **more: Any) -> Json:
        return {"resources": {"limits": {"nvidia.com/gpu": gpus}}, **more}

    body = {
        "spec": {
            "containers": [container(1), container(2)],
            "initContainers": [container(1, restartPolicy="Always"), container(2), container(8)],
        }
    }
    assert requests(body)["nvidia.com/gpu"] == 9  # the last init container, beside the sidecar
    assert (
        requests({"spec": {"containers": [container(1)], "initContainers": [container(1, restartPolicy="Always")]}})[
            "nvidia.com/gpu"
        ]
        == 2
    )
    assert amount("64Gi") == 64 * 2**30
    assert amount("nonsense") == Decimal(0)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["80000"]}, True),
        ({"key": "nvidia.com/gpu.memory", "operator": "Lt", "values": ["80000"]}, False),
        ({"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-L4"]}, False),
        ({"key": "nvidia.com/gpu.product", "operator": "NotIn", "values": ["NVIDIA-L4"]}, True),
        ({"key": "spot", "operator": "DoesNotExist"}, True),
        ({"key": "spot", "operator": "Exists"}, False),
    ],
)
def test_node_affinity(rule: Json, fits: bool) -> None:
    terms = {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    assert selected(pod(affinity=affinity), node()) is fits


@pytest.mark.parametrize(
    ("toleration", "kept_off"),
    [
        ({"operator": "Exists"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, False),
        ({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}, False),
        ({"key": "nvidia.com/gpu", "value": "absent"}, True),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, True),
        ({"key": "other", "operator": "Exists"}, True),
    ],
)
def test_tolerations(toleration: Json, kept_off: bool) -> None:
    assert bool(barriers({"spec": {"tolerations": [toleration]}}, node())) is kept_off


def test_a_finding_has_one_place_and_its_cause_before_it() -> None:
    root = Finding("node-silent", ("Node/n1",), "a", ("e",), "f")
    child = Finding("pods-on-dead-node", ("Pod/ns/p",), "b", ("e",), "f", ("Node/n1",))
    grand = Finding("rendezvous-incomplete", ("Job/ns/j",), "c", ("e",), "f", ("Pod/ns/p",))
    other = Finding("no-free-gpus", ("Pod/ns/q",), "d", ("e",), "f")
    for seed in range(6):
        mixed = [root, child, grand, other, child]
        random.Random(seed).shuffle(mixed)
        assert [(f.cause, f.because, f.depth) for f in ordered(mixed)] == [
            ("node-silent", "", 0), ("pods-on-dead-node", "node-silent", 1),
            ("rendezvous-incomplete", "pods-on-dead-node", 2), ("no-free-gpus", "", 0),
        ]  # fmt: skip
    assert len(ORDER) == len(set(ORDER))


LOGS = {
    "nccl-error": "RuntimeError: NCCL error in: x.cpp:1, unhandled system error",
    "cuda-out-of-memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
    "address-in-use": "RuntimeError: The server socket has failed to listen on any local network address. EADDRINUSE",
    "rendezvous-timeout": "torch.distributed.elastic.rendezvous.api.RendezvousTimeoutError",
    "name-not-resolved": "socket.gaierror: [Errno -2] Name or service not known",
    "cuda-driver": "RuntimeError: Found no NVIDIA driver on your system.",
}


@pytest.mark.parametrize("cause", LOGS)
def test_signatures_in_logs_explain_the_exit(cause: str) -> None:
    found = diagnose(crashed(1), NOW, {"Pod/ns/p": f"starting\n{LOGS[cause]}\nbye"})
    assert [finding.cause for finding in found] == [cause, "application-error"]
    assert [finding.cause for finding in diagnose(crashed(1), NOW, {"Pod/ns/p": "starting\nbye"})] == [
        "application-error"
    ]


def _every() -> list[Json]:
    """All cases' objects, each in a namespace of its own, on nodes of its own."""
    found = []
    for number, (objects, *_) in enumerate(CASES.values()):
        for body in copy.deepcopy(objects):
            meta = body["metadata"]
            meta["namespace" if "namespace" in meta else "name"] += f"-{number}"
            if body.get("spec", {}).get("nodeName"):
                body["spec"]["nodeName"] += f"-{number}"
            if involved := body.get("involvedObject"):
                involved["namespace"] = f"{involved['namespace']}-{number}" if involved["namespace"] else None
            found.append(body)
    return found


EVERY = _every()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_order_of_objects_does_not_matter(seed: int) -> None:
    mixed = list(EVERY)
    random.Random(seed).shuffle(mixed)
    assert diagnose(mixed, NOW) == diagnose(EVERY, NOW)


def _cut(node: Any, chance: random.Random) -> Any:
    """A copy with fields left out, or null, at random."""
    if isinstance(node, dict):
        kept = {key: value for key, value in node.items() if key == "kind" or chance.random() > 0.08}
        return {
            key: None if key != "kind" and chance.random() < 0.04 else _cut(value, chance)
            for key, value in kept.items()
        }
    return [_cut(item, chance) for item in node] if isinstance(node, list) else node


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_missing_fields_never_break_it(seed: int) -> None:
    found = diagnose([_cut(body, random.Random(f"{seed}/{i}")) for i, body in enumerate(EVERY)])
    assert "\n".join(lines(found)) or not found


def test_the_time_of_a_snapshot_is_that_of_its_newest_stamp() -> None:
    assert Facts([pod("p"), event("Pod/ns/p", "Any", "x")]).now == datetime(2026, 11, 27, 11, 58, tzinfo=UTC)
