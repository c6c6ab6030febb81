"""Rules for pods that no node takes: the scheduler's filters, asked one after the other until none is left.

The scheduler counts nodes by the first filter that each fails ("2 Insufficient nvidia.com/gpu, 3 had taint ..."). Here
the nodes that a pod may use at all are found first, and what these lack is the cause.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    condition,
    is_gpu,
    labels,
    listed,
    name,
    namespace,
    number,
    owner,
    phase,
    ref,
    requests,
    table,
    text,
)
from ch08_kubernetes.doctor.filters import CORDON, NODE_TAINTS, barriers, sees_no_gpu, selected, terms, waiting
from ch08_kubernetes.doctor.findings import Finding

UNSEEN_S = 60  # a scheduler that lives has looked at a pod by then


def verdict(facts: Facts, pod: Json) -> str:
    """The scheduler's words on a pod."""
    return text(condition(pod, "PodScheduled"), "message") or facts.said(pod, "FailedScheduling")


def pending(facts: Facts) -> Iterator[Finding]:
    """A pod that the scheduler refused: which of its filters leaves no node."""
    if not facts.knows("Node"):
        return
    for pod in waiting(facts):
        said = verdict(facts, pod)
        if not said:
            if (
                condition(pod, "PodScheduled").get("status") != "False"
                and _age(facts, pod) > UNSEEN_S
                and not at(pod, "spec", "schedulingGates")
            ):
                scheduler = text(pod, "spec", "schedulerName") or "default-scheduler"
                yield Finding(
                    "no-scheduler",
                    (ref(pod),),
                    f"no scheduler has looked at it: spec.schedulerName is {scheduler}",
                    (f"{ref(pod)} has no condition PodScheduled after {UNSEEN_S} s",),
                    f"kubectl -n kube-system get pods | grep {scheduler}   (start it, or correct spec.schedulerName)",
                )
            continue
        if not _waits_for_volume(said):
            yield _why(facts, pod, f'{ref(pod)} status.conditions[PodScheduled]: "{said}"')


def _waits_for_volume(said: str) -> bool:
    return "persistentvolumeclaim" in said.lower()


def _age(facts: Facts, pod: Json) -> float:
    return facts.age_s(at(pod, "metadata", "creationTimestamp"))


def _why(facts: Facts, pod: Json, evidence: str) -> Finding:
    """The first filter that no node passes."""
    nodes = facts.all("Node")
    wanted = {key: value for key, value in requests(pod).items() if value}
    gpus = {key: value for key, value in wanted.items() if is_gpu(key)}
    chosen = [node for node in nodes if selected(pod, node)]
    needs = [f"Preempted/{owner(pod)}", f"Deadlock/{owner(pod)}"]

    def finding(cause: str, message: str, fix: str, more: list[str] | None = None) -> Finding:
        return Finding(cause, (ref(pod),), message, (evidence,), fix, tuple(needs + (more or [])))

    if not chosen:
        return _no_label(pod, nodes, finding)
    having = [node for node in chosen if all(facts.allocatable(node).get(key, 0) > 0 for key in gpus)]
    if not having:
        asked = ", ".join(gpus)
        blind = [ref(node) for node in chosen if sees_no_gpu(node)]
        if blind:
            return finding(
                "no-gpu-node",
                f"asks for {asked}, which no node that it may use offers: the device plugin counts none there",
                "kubectl get pods -A | grep device-plugin   (it must run on each GPU node)",
                blind,
            )
        offered = sorted({key for node in nodes for key in facts.allocatable(node) if is_gpu(key)})
        return finding(
            "node-selector",
            (
                f"asks for {asked}; the nodes that its nodeSelector and affinity allow have none "
                f"(offered in this cluster: {', '.join(offered) or 'no GPU'})"
            ),
            f"correct the resource's name or the nodeSelector of {owner(pod)}",
        )
    open_to = [node for node in having if not barriers(pod, node)]
    if not open_to:
        return _tainted(pod, having, finding)
    free = {name(node): facts.free(node) for node in open_to}
    short = [
        key for key, value in wanted.items() if not any(facts.allocatable(n).get(key, 0) >= value for n in open_to)
    ]
    if short:
        key = short[0]
        largest = max(facts.allocatable(node).get(key, Decimal(0)) for node in open_to)
        return finding(
            "larger-than-node",
            (
                f"asks for {show(wanted[key], key)} {key} in one pod; the largest node that it may use "
                f"has {show(largest, key)}"
            ),
            (
                f"ask for at most {show(largest, key)} {key} a pod, and spread over more pods "
                f"({owner(pod)}: completions, parallelism, NNODES)"
            ),
        )
    scarce = [key for key, value in wanted.items() if not any(free[name(n)].get(key, 0) >= value for n in open_to)]
    blind = [ref(node) for node in chosen if gpus and sees_no_gpu(node)]
    shut = {name(n): (ref(n), barriers(pod, n)) for n in having if n not in open_to}
    hurt = [reference for reference, taints in shut.values() if any(t.get("key") in NODE_TAINTS for t in taints)]
    if scarce:
        key = next((each for each in scarce if is_gpu(each)), scarce[0])
        per_node = {at_node: left.get(key, Decimal(0)) for at_node, left in free.items()}
        has = ", ".join(f"{left} on {at_node}" for at_node, left in _summary(per_node, key))
        total = sum(per_node.values())
        message = f"asks for {show(wanted[key], key)} {key}; free where it may run: {has}"
        message += f"; held by {holders(facts, open_to, key)}"
        if is_gpu(key) and total >= wanted[key]:
            return finding(
                "fragmented-gpus",
                f"{message}; {show(total, key)} in sum, and not on one node",
                (
                    f"ask for at most {show(max(per_node.values()), key)} a pod, or free a node "
                    "(kubectl drain) and pack pods (MostAllocated)"
                ),
                blind + hurt,
            )
        if outside := [at_node for at_node, (_, taints) in shut.items() if taints]:
            message += f"; shut by taints: {', '.join(outside)}"
        cause = "no-free-gpus" if is_gpu(key) else "no-free-room"
        fix = "wait, delete one of the holders, give the pod a higher priorityClassName, or add a node"
        job = facts.get(owner(pod)) or {}
        together = wanted[key] * number(job, "spec", "parallelism")
        room = sum((facts.allocatable(node).get(key, Decimal(0)) for node in open_to), Decimal(0))
        if together > room:  # waiting will not help
            message += f"; {ref(job)} wants {show(together, key)} together, and these nodes have {show(room, key)}"
            fix = f"fewer pods in {ref(job)} (parallelism, completions, NNODES), or more nodes"
        return finding(
            cause,
            message,
            fix,
            blind + hurt,
        )
    if re.search(r"pod affinity|anti-affinity|topology spread", evidence):
        return finding(
            "pod-placement",
            "nodes have room, and pod affinity, anti-affinity or topology spread forbids them",
            (
                f"relax affinity or topologySpreadConstraints of {owner(pod)} (preferred..., "
                "whenUnsatisfiable: ScheduleAnyway), or add nodes in another domain"
            ),
        )
    return finding(
        "unschedulable",
        "the scheduler refuses it, for a reason that its own words name",
        f"kubectl -n {namespace(pod)} describe pod {name(pod)}",
    )


def _summary(per_node: dict[str, Decimal], key: str, most: int = 6) -> list[tuple[str, str]]:
    first = sorted(per_node.items(), key=lambda item: (-item[1], item[0]))
    shown = [(show(left, key), at_node) for at_node, left in first[:most]]
    if len(first) > most:
        rest = first[most:]
        shown.append((show(sum((left for _, left in rest), Decimal(0)), key), f"{len(rest)} more nodes"))
    return [(at_node, left) for left, at_node in shown]


def show(value: Decimal, resource: str) -> str:
    """GPUs and cores as numbers, memory in GiB."""
    if resource in ("memory", "ephemeral-storage") or resource.startswith("hugepages-"):
        return f"{float(value) / 2**30:.4g} GiB"
    return f"{float(value):g}"


def holders(facts: Facts, nodes: list[Json], key: str, most: int = 4) -> str:
    """Who has the resource on these nodes, the largest first."""
    held: Counter[str] = Counter()
    for node in nodes:
        for pod in facts.held.get(name(node), []):
            if value := requests(pod).get(key):
                held[owner(pod)] += float(value)  # type: ignore[assignment]
    first = sorted(held.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{who} ({show(Decimal(value), key)})" for who, value in first[:most]]
    return ", ".join(shown + ([f"{len(first) - most} more"] if len(first) > most else [])) or "nobody"


def _asked(pod: Json) -> list[tuple[str, list[str]]]:
    """(label, values) that a pod wants of a node."""
    found = [(key, [str(value)]) for key, value in sorted(table(pod, "spec", "nodeSelector").items())]
    for term in terms(pod):
        rules = [r for r in listed(term, "matchExpressions") if r.get("operator") in ("In", "Exists", "Gt", "Lt")]
        found += [(text(rule, "key"), [str(v) for v in at(rule, "values") or []]) for rule in rules]
    return found


def _no_label(pod: Json, nodes: list[Json], finding) -> Finding:  # type: ignore[no-untyped-def]
    for key, values in _asked(pod):
        there = sorted({labels(node)[key] for node in nodes if key in labels(node)})
        if not there and key.startswith(("nvidia.com/", "feature.node.kubernetes.io/")):
            return finding(
                "gpu-labels-missing",
                f"wants a node with the label {key}, which no node has: GPU feature discovery has not labelled them",
                (
                    "kubectl get pods -A | grep -E 'gpu-feature-discovery|node-feature-discovery'   "
                    "(install or repair it, setup/)"
                ),
            )
        if not there:
            close = nearest(key, sorted({k for node in nodes for k in labels(node)}))
            return finding(
                "node-selector",
                f"wants a node with the label {key}, which no node has"
                + (f"; the nearest is {close}" if close else ""),
                (
                    f"kubectl label node NAME {key}={values[0] if values else 'VALUE'}, or correct the "
                    f"nodeSelector of {owner(pod)}"
                ),
            )
        if values and not set(values) & set(there):
            close = nearest(values[0], there)
            return finding(
                "node-selector",
                (
                    f"wants a node with {key}={'|'.join(values)}; no node has that value, the nearest "
                    f"is {close} (there are {', '.join(there[:6])})"
                ),
                f"in {owner(pod)}: nodeSelector {key}: {close}",
            )
    asked = ", ".join(f"{key}={'|'.join(values)}" for key, values in _asked(pod))
    return finding(
        "node-selector",
        f"wants a node with {asked}; each is there, and no node has them together",
        f"kubectl get nodes -L {','.join(key for key, _ in _asked(pod))}   (leave one of them out in {owner(pod)})",
    )


def nearest(value: str, there: list[str]) -> str:
    """The string that most likely was meant: it contains this one, or looks like it."""
    containing = [each for each in there if value.lower() in each.lower() or each.lower() in value.lower()]
    return next(iter(containing or difflib.get_close_matches(value, there, 1, 0.0)), "")


def _tainted(pod: Json, nodes: list[Json], finding) -> Finding:  # type: ignore[no-untyped-def]
    taints = [(node, taint) for node in nodes for taint in barriers(pod, node)]
    names = sorted({name(node) for node, _ in taints})
    sick = sorted({ref(node) for node, taint in taints if taint.get("key") in NODE_TAINTS})
    own = [taint for _, taint in taints if taint.get("key") not in NODE_TAINTS and taint.get("key") != CORDON]
    where = (
        f"{len(names)} node{'s' if len(names) > 1 else ''} that it could use "
        f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
    )
    if own:
        (key, value, effect), _ = Counter(
            (text(t, "key"), text(t, "value"), text(t, "effect")) for t in own
        ).most_common(1)[0]
        shown = f"{key}={value}:{effect}" if value else f"{key}:{effect}"
        match = f"operator: Equal, value: {value}" if value else "operator: Exists"
        return finding(
            "untolerated-taint",
            f"does not tolerate the taint {shown} of the {where}",
            f"in the pod's spec: tolerations: [{{key: {key}, {match}, effect: {effect}}}]",
            sick,
        )
    if sick:
        return finding("unschedulable", f"the {where} are not well", "see the node's own finding", sick)
    return finding(
        "nodes-cordoned",
        f"the {where} are cordoned: kubectl drain or cordon closed them",
        f"kubectl uncordon {names[0]}",
    )


def blind_nodes(facts: Facts) -> Iterator[Finding]:
    """A node that by its labels has GPUs and offers none."""
    for node in facts.all("Node"):
        if not sees_no_gpu(node) or condition(node, "Ready").get("status") == "Unknown":
            continue
        plugins = [
            p for p in facts.all("Pod") if "device-plugin" in name(p) and text(p, "spec", "nodeName") == name(node)
        ]
        state = (
            f"its device plugin {name(plugins[0])} is {phase(plugins[0])}, not ready"
            if plugins
            else "no device plugin runs there"
        )
        capacity = table(node, "status", "capacity").get("nvidia.com/gpu", "missing")
        yield Finding(
            "gpu-not-seen",
            (ref(node),),
            f"the machine has GPUs (labels), and the kubelet offers none: {state}",
            (
                (
                    f"{ref(node)} status.capacity[nvidia.com/gpu] is {capacity}, labels "
                    f"nvidia.com/gpu.count={labels(node).get('nvidia.com/gpu.count', '?')}"
                ),
            ),
            (
                "kubectl get pods -A -o wide | grep device-plugin; kubectl logs of it; on the node: "
                "nvidia-smi, and containerd's runtime class nvidia"
            ),
            tuple(ref(p) for p in plugins),
        )


RULES = [pending, blind_nodes]
