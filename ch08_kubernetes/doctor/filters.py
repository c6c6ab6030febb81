"""What the scheduler's filters say of a pod and a node: labels, taints, GPUs."""

from __future__ import annotations

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    amount,
    at,
    is_gpu,
    labels,
    listed,
    name,
    phase,
    table,
    text,
)

NODE_TAINTS = {
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/memory-pressure",
    "node.kubernetes.io/disk-pressure",
    "node.kubernetes.io/pid-pressure",
}


CORDON = "node.kubernetes.io/unschedulable"


def waiting(facts: Facts) -> list[Json]:
    """Pods that have no node and are not being deleted."""
    return [
        pod
        for pod in facts.all("Pod")
        if phase(pod) in ("Pending", "")
        and not text(pod, "spec", "nodeName")
        and not at(pod, "metadata", "deletionTimestamp")
    ]


def sees_no_gpu(node: Json) -> bool:
    """By its labels it has GPUs; by what its kubelet offers it has none, whole or sliced."""
    marks = labels(node)
    has = (
        marks.get("feature.node.kubernetes.io/pci-10de.present") == "true"
        or marks.get("nvidia.com/gpu.present") == "true"
    )
    has = has or amount(marks.get("nvidia.com/gpu.count", 0)) > 0
    return has and not any(
        is_gpu(key) and amount(value) > 0 for key, value in table(node, "status", "allocatable").items()
    )


def barriers(pod: Json, node: Json) -> list[Json]:
    """The taints (a cordon is one) that keep the pod off the node."""
    taints = [taint for taint in listed(node, "spec", "taints") if taint.get("effect") in ("NoSchedule", "NoExecute")]
    if at(node, "spec", "unschedulable") and not any(t.get("key") == CORDON for t in taints):
        taints.append({"key": CORDON, "effect": "NoSchedule"})
    return [taint for taint in taints if not any(_tolerates(t, taint) for t in listed(pod, "spec", "tolerations"))]


def _tolerates(toleration: Json, taint: Json) -> bool:
    """Source: Kubernetes documentation, Taints and Tolerations."""
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    exists = toleration.get("operator") == "Exists"
    if not toleration.get("key"):
        return exists
    same = toleration.get("key") == taint.get("key")
    return same and (exists or (toleration.get("value") or "") == (taint.get("value") or ""))


def terms(pod: Json) -> list[Json]:
    path = ("spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
    return listed(pod, *path)


def selected(pod: Json, node: Json) -> bool:
    """Whether nodeSelector and required node affinity allow the node."""
    marks = labels(node)
    if any(marks.get(key) != str(value) for key, value in table(pod, "spec", "nodeSelector").items()):
        return False
    wanted = terms(pod)
    return not wanted or any(_meets(term, node) for term in wanted)


def _meets(term: Json, node: Json) -> bool:
    """An empty term selects no node."""
    fields = {"metadata.name": name(node)}
    if not (listed(term, "matchExpressions") or listed(term, "matchFields")):
        return False
    return all(_holds(each, labels(node)) for each in listed(term, "matchExpressions")) and all(
        _holds(each, fields) for each in listed(term, "matchFields")
    )


def _holds(rule: Json, marks: dict[str, str]) -> bool:
    key, operator = text(rule, "key"), text(rule, "operator")
    values = [str(value) for value in at(rule, "values") or []]
    if operator in ("In", "NotIn"):
        return (marks.get(key) in values) == (operator == "In")
    if operator in ("Exists", "DoesNotExist"):
        return (key in marks) == (operator == "Exists")
    try:
        value, bound = int(marks[key]), int(values[0])
    except (KeyError, ValueError, IndexError):
        return False
    return value > bound if operator == "Gt" else value < bound
