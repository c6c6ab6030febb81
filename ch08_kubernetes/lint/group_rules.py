"""What goes wrong between objects: selectors, disruption budgets, autoscalers, references, queues.

A rule gets the objects of one set (a folder, or what kustomize renders) and all that are checked in this run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ch08_kubernetes.lint.objects import Finding, Object, Pod, mapping, pods

Rule = Callable[[list[Object], list[Object]], Iterator[Finding]]
SCALED = ("Deployment", "StatefulSet", "LeaderWorkerSet")
LWS_NAME, LWS_INDEX = "leaderworkerset.sigs.k8s.io/name", "leaderworkerset.sigs.k8s.io/worker-index"


def matches(selector: dict[str, Any], labels: dict[str, Any]) -> bool:
    """A label selector (matchLabels and matchExpressions) against a pod's labels."""
    if any(labels.get(key) != value for key, value in mapping(selector.get("matchLabels")).items()):
        return False
    for term in selector.get("matchExpressions") or []:
        key, values = term.get("key"), term.get("values") or []
        held = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not held.get(term.get("operator"), False):
            return False
    return True


def labels_of(pod: Pod) -> dict[str, Any]:
    """A template's labels and those that its controller adds."""
    found = dict(pod.labels)
    owner = pod.owner
    if owner.kind == "LeaderWorkerSet":
        index = "0" if "leaderTemplate" in pod.path else "1"
        found |= {LWS_NAME: owner.name, LWS_INDEX: index}
    elif owner.kind == "Job":
        found |= {"batch.kubernetes.io/job-name": owner.name, "job-name": owner.name}
    elif owner.kind == "JobSet":
        found |= {"jobset.sigs.k8s.io/jobset-name": owner.name}
    elif owner.kind in ("RayCluster", "RayService", "RayJob"):
        found |= {"ray.io/node-type": "head" if "headGroupSpec" in pod.path else "worker"}
    return found


def everywhere(objects: list[Object]) -> list[Pod]:
    return [pod for owner in objects for pod in pods(owner)]


def selector(objects: list[Object], every: list[Object]) -> Iterator[Finding]:
    """A workload's selector must match its own template: the API server refuses it otherwise."""
    for owner in objects:
        if owner.kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
            for pod in pods(owner):
                if not matches(mapping(owner.spec.get("selector")), pod.labels):
                    yield owner.finding("selector", "the selector is not its template's labels; make them equal")
    for pod in everywhere(objects):
        for spread in pod.spec.get("topologySpreadConstraints") or []:
            if not matches(mapping(spread.get("labelSelector")), labels_of(pod)):
                yield pod.finding("selector", "a topologySpreadConstraint leaves out the pod itself; mend it")


def service(objects: list[Object], every: list[Object]) -> Iterator[Finding]:
    """A Service with pods behind it, and a name for each rank before it is ready."""
    found = everywhere(objects)
    services = [owner for owner in objects if owner.kind == "Service"]
    for owner in services:
        wanted = mapping(owner.spec.get("selector"))
        if not wanted:
            continue
        behind = [pod for pod in found if matches({"matchLabels": wanted}, labels_of(pod))]
        if not behind and found:
            yield owner.finding("service", "selects no pod that is defined beside it; mend its selector")
        ports = {str(p.get(k)) for pod in behind for c in pod.containers for p in c.get("ports") or []
                 for k in ("name", "containerPort")}  # fmt: skip
        for port in owner.spec.get("ports") or []:
            target = str(port.get("targetPort", port.get("port")))
            if ports and target not in ports:
                yield owner.finding("service", f"targetPort {target} is no port of the pods it selects; name one")
    for pod in found:
        domain = pod.spec.get("subdomain")
        if not domain or pod.owner.kind != "Job":
            continue
        headless = next((s for s in services if s.name == domain and s.spec.get("clusterIP") == "None"), None)
        if headless is None:
            yield pod.finding("service", f"ranks meet by name under {domain}, and no headless Service has it; add one")
        elif not headless.spec.get("publishNotReadyAddresses"):
            yield headless.finding("service", "ranks meet before they are ready; set publishNotReadyAddresses: true")


def least_replicas(owner: Object, every: list[Object]) -> int:
    """Replicas when load is low: what an autoscaler goes down to, else what is written."""
    for scaler in every:
        reference = mapping(scaler.spec.get("scaleTargetRef"))
        if reference.get("name") == owner.name and reference.get("kind", "Deployment") == owner.kind:
            key = "minReplicas" if scaler.kind == "HorizontalPodAutoscaler" else "minReplicaCount"
            return int(scaler.spec.get(key, 1 if key == "minReplicas" else 0))
    return int(owner.spec.get("replicas", 1))


def budget(objects: list[Object], every: list[Object]) -> Iterator[Finding]:
    """A disruption budget that protects something, and lets a node be drained all the same."""
    found = everywhere(objects)
    for owner in (o for o in objects if o.kind == "PodDisruptionBudget"):
        covered = [pod for pod in found if matches(mapping(owner.spec.get("selector")), labels_of(pod))]
        if not covered:
            if found:
                yield owner.finding("pdb", "selects no pod that is defined beside it; mend its selector")
            continue
        lowest, most = owner.spec.get("minAvailable"), owner.spec.get("maxUnavailable")
        if str(most) in ("0", "0%") or str(lowest) == "100%":
            yield owner.finding("pdb", "allows no eviction: no node can be drained; allow one")
        pod = covered[0]
        if pod.owner.kind not in SCALED:
            continue
        replicas = least_replicas(pod.owner, every)
        group = mapping(pod.owner.spec.get("leaderWorkerTemplate"))
        size = int(group.get("size", 1)) if group else 1
        leaders = all(labels_of(p).get(LWS_INDEX) == "0" for p in covered)
        units = replicas if leaders else replicas * size
        step = 1 if leaders else size
        if isinstance(lowest, int) and lowest > units - 1:
            yield owner.finding(
                "pdb", f"keeps {lowest} of {units} pods: no node can be drained; lower minAvailable or add replicas"
            )
        elif size > 1 and not leaders and isinstance(lowest, int) and (lowest > units - step or lowest % size):
            yield owner.finding(
                "pdb", f"minAvailable {lowest} counts pods, and a group of {size} dies whole with one of them; "
                f"select the leaders only ({LWS_INDEX}: \"0\") or keep a multiple of {size}",
            )  # fmt: skip


def autoscaler(objects: list[Object], every: list[Object]) -> Iterator[Finding]:
    """One autoscaler a workload, and nothing else that sets its replicas."""
    claimed: dict[tuple[str, str], Object] = {}
    for scaler in objects:
        if scaler.kind not in ("HorizontalPodAutoscaler", "ScaledObject"):
            continue
        reference = mapping(scaler.spec.get("scaleTargetRef"))
        target = (str(reference.get("kind", "Deployment")), str(reference.get("name")))
        if target in claimed:
            other = claimed[target]
            yield scaler.finding(
                "autoscaler",
                f"{other.kind}/{other.name} scales {'/'.join(target)} too; keep one of them",
            )
        claimed[target] = scaler
        if any(o.kind == target[0] for o in every) and not any((o.kind, o.name) == target for o in every):
            yield scaler.finding("autoscaler", f"its target {'/'.join(target)} is not defined; mend scaleTargetRef")
        for owner in every:
            if (owner.kind, owner.name) == target and "replicas" in owner.spec:
                yield owner.finding("autoscaler", f"{scaler.name} sets replicas, as does each apply; leave them out")


def references(objects: list[Object], every: list[Object]) -> Iterator[Finding]:
    """Names that must exist beside the pod: volume claims, config maps, priority classes (if any is defined)."""
    defined = {(o.kind, o.name) for o in every}
    kinds = {kind for kind, _ in defined}
    for pod in everywhere(objects):
        used = [("PersistentVolumeClaim", mapping(v.get("persistentVolumeClaim")).get("claimName"))
                for v in pod.spec.get("volumes") or []]  # fmt: skip
        used += [("ConfigMap", mapping(v.get("configMap")).get("name")) for v in pod.spec.get("volumes") or []]
        if "PriorityClass" in kinds:
            used.append(("PriorityClass", pod.spec.get("priorityClassName")))
        for kind, name in used:
            if name and (kind, name) not in defined and not str(name).startswith("system-"):
                yield pod.finding("reference", f"uses the {kind} {name}, which is not defined beside it; add it")


def queues(objects: list[Object], every: list[Object]) -> Iterator[Finding]:
    """Kueue: queues that exist, flavours that exist, and no borrowing without a cohort to borrow from."""
    names = {(o.kind, o.name) for o in every}
    for owner in objects:
        if owner.kind == "LocalQueue" and ("ClusterQueue", owner.spec.get("clusterQueue")) not in names:
            yield owner.finding("queue", f"its ClusterQueue {owner.spec.get('clusterQueue')} is not defined; add it")
        if owner.kind != "ClusterQueue":
            continue
        for group in owner.spec.get("resourceGroups") or []:
            for flavor in group.get("flavors") or []:
                if ("ResourceFlavor", flavor.get("name")) not in names:
                    yield owner.finding("queue", f"its ResourceFlavor {flavor.get('name')} is not defined; add it")
                held = {r.get("name") for r in flavor.get("resources") or []}
                if held != set(group.get("coveredResources") or []):
                    yield owner.finding("queue", f"flavor {flavor.get('name')} lacks a resource; give each a quota")
                limits = [r for r in flavor.get("resources") or [] if "borrowingLimit" in r or "lendingLimit" in r]
                if limits and not owner.spec.get("cohortName"):
                    yield owner.finding("queue", "a limit of borrowing means nothing alone; set cohortName")


RULES: dict[str, Rule] = {
    "selector": selector, "service": service, "pdb": budget, "autoscaler": autoscaler, "reference": references,
    "queue": queues,
}  # fmt: skip
