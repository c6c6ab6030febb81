"""Rules for what pods stand on: nodes, volumes, services, webhooks, budgets, autoscalers, namespaces."""

from __future__ import annotations

from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    condition,
    labels,
    listed,
    name,
    namespace,
    number,
    owner,
    phase,
    ready,
    ref,
    table,
    text,
)
from ch08_kubernetes.doctor.filters import CORDON, waiting
from ch08_kubernetes.doctor.findings import Finding
from ch08_kubernetes.doctor.images import claims
from ch08_kubernetes.doctor.placement import nearest

PATIENCE_S = 30  # after which something that ends should have ended
PRESSURES = {"MemoryPressure": "memory", "DiskPressure": "disk", "PIDPressure": "process ids"}
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def nodes(facts: Facts) -> Iterator[Finding]:
    """A node whose kubelet is silent, or says that it is not well."""
    for node in facts.all("Node"):
        state = condition(node, "Ready")
        evidence = (
            f"{ref(node)} status.conditions[Ready]: {state.get('status')} {text(state, 'reason')} "
            f'"{text(state, "message")}"'
        )
        if state.get("status") == "Unknown":
            silent = int(facts.age_s(state.get("lastHeartbeatTime"))) if state.get("lastHeartbeatTime") else 0
            yield Finding(
                "node-silent",
                (ref(node),),
                f"its kubelet says nothing, the last time {silent} s ago: the machine is off, cut off, or hung",
                (evidence,),
                (
                    f"reach it ({name(node)}): systemctl status kubelet; if it is lost: kubectl delete "
                    f"node {name(node)}, which frees its pods"
                ),
                gives=(f"Lost/{name(node)}",),
            )
        elif state.get("status") == "False":
            yield Finding(
                "node-not-ready",
                (ref(node),),
                f"its kubelet says that it is not ready: {text(state, 'message')}",
                (evidence,),
                f"on {name(node)}: journalctl -u kubelet; systemctl status containerd",
                gives=(f"Lost/{name(node)}",),
            )
        for kind, what in PRESSURES.items():
            state = condition(node, kind)
            if state.get("status") == "True":
                yield Finding(
                    "node-pressure",
                    (ref(node),),
                    f"runs low on {what}; the kubelet evicts pods and the scheduler sends none",
                    (f'{ref(node)} status.conditions[{kind}]: True "{text(state, "message")}"',),
                    (
                        f"on {name(node)}: free {what} (images: crictl rmi --prune); set requests and "
                        "limits of the pods there"
                    ),
                    gives=(f"Pressure/{name(node)}",),
                )


def on_dead_nodes(facts: Facts) -> Iterator[Finding]:
    """Pods that sit on a node which does not answer, or that exist on none."""
    for node in facts.all("Node"):
        if condition(node, "Ready").get("status") != "Unknown":
            continue
        pods = [p for p in facts.held.get(name(node), []) if not owner(p).startswith("DaemonSet/")]
        if pods:
            yield Finding(
                "pods-on-dead-node",
                tuple(ref(p) for p in pods),
                f"cannot be reached on {name(node)}, and their state there is not known",
                (f"spec.nodeName: {name(node)}",),
                (
                    f"if the machine is off for certain: kubectl delete node {name(node)}, or kubectl "
                    "delete pod NAME --force --grace-period=0"
                ),
                (ref(node),),
            )


def terminating(facts: Facts) -> Iterator[Finding]:
    """Pods that should be gone by now."""
    for pod in facts.all("Pod"):
        due = at(pod, "metadata", "deletionTimestamp")
        node = facts.get(f"Node/{text(pod, 'spec', 'nodeName')}")
        if not due or facts.age_s(due) < PATIENCE_S or (node and condition(node, "Ready").get("status") == "Unknown"):
            continue
        evidence = (
            (
                f"{ref(pod)} metadata.deletionTimestamp is {facts.age_s(due):.0f} s ago, finalizers: "
                f"{at(pod, 'metadata', 'finalizers') or 'none'}"
            ),
        )
        if finalizers := at(pod, "metadata", "finalizers"):
            yield Finding(
                "terminating-finalizer",
                (ref(pod),),
                (
                    f"is deleted, and held by the finalizer {', '.join(map(str, finalizers))}: its "
                    "controller does not take it off"
                ),
                evidence,
                (
                    f"see that controller; if it is gone: kubectl -n {namespace(pod)} patch pod "
                    f'{name(pod)} --type=merge -p \'{{"metadata":{{"finalizers":null}}}}\''
                ),
            )
        else:
            yield Finding(
                "terminating-stuck",
                (ref(pod),),
                (
                    "is deleted, and its kubelet does not end it (a process in an uninterruptible "
                    "wait, a volume that cannot be unmounted)"
                ),
                evidence,
                (
                    f"on {text(pod, 'spec', 'nodeName') or 'its node'}: crictl ps; journalctl -u "
                    f"kubelet; at last kubectl -n {namespace(pod)} delete pod {name(pod)} --force "
                    "--grace-period=0"
                ),
                (f"Lost/{text(pod, 'spec', 'nodeName')}",),
            )


def volumes(facts: Facts) -> Iterator[Finding]:
    """Pods that wait for a volume claim: not there, without a class, or not provisioned."""
    classes = facts.all("StorageClass")
    default = [c for c in classes if text(c, "metadata", "annotations", DEFAULT_CLASS) == "true"]
    for pod in waiting(facts):
        for claim in claims(pod):
            volume = facts.get(f"PersistentVolumeClaim/{namespace(pod)}/{claim}")
            evidence = (
                f'{ref(pod)} status.conditions[PodScheduled]: "{text(condition(pod, "PodScheduled"), "message")}"',
            )
            if volume is None:
                yield Finding(
                    "volume-claim-missing",
                    (ref(pod),),
                    f"mounts the claim {claim}, which namespace {namespace(pod)} does not have",
                    (*evidence, f"{ref(pod)} spec.volumes[].persistentVolumeClaim.claimName: {claim}"),
                    (
                        f"apply a PersistentVolumeClaim {claim} in {namespace(pod)} "
                        "(training/base/checkpoints.yaml), or correct claimName"
                    ),
                )
            elif phase(volume) == "Pending":
                wants = at(volume, "spec", "storageClassName")
                used = next((c for c in classes if name(c) == wants), None) if wants else next(iter(default), None)
                state = f"{ref(volume)} status.phase: Pending, spec.storageClassName: {wants!r}"
                said = facts.said(volume, "ProvisioningFailed|FailedBinding|ExternalProvisioning|WaitForFirstConsumer")
                about = (ref(pod), ref(volume))
                proof = (state, *([f'event of {ref(volume)}: "{said}"'] if said else []))
                if wants and used is None:
                    close = nearest(str(wants), [name(c) for c in classes])
                    yield Finding(
                        "storage-class-missing",
                        about,
                        f"the claim {claim} wants the storage class {wants}, which is not there"
                        + (f" (there is {close})" if close else ""),
                        proof,
                        (
                            "kubectl get storageclass; delete the claim and apply it with "
                            f"storageClassName: {close or 'NAME'}"
                        ),
                    )
                elif used is None and wants is None:
                    yield Finding(
                        "no-storage-class",
                        about,
                        f"the claim {claim} names no storage class, and the cluster has no default one",
                        proof,
                        (
                            "kubectl patch storageclass NAME -p "
                            f'\'{{"metadata":{{"annotations":{{"{DEFAULT_CLASS}":"true"}}}}}}\''
                        ),
                    )
                elif (
                    used is None or at(used, "volumeBindingMode") != "WaitForFirstConsumer" or said.startswith("failed")
                ):
                    yield Finding(
                        "volume-not-provisioned",
                        about,
                        (
                            f"the claim {claim} is bound to no volume: its provisioner "
                            f"{text(used, 'provisioner') or 'is none, and no volume fits'} made none"
                        ),
                        proof,
                        (
                            f"kubectl -n {namespace(pod)} describe pvc {claim}; see the pods of its "
                            "CSI driver, and its accessModes"
                        ),
                    )


def matches(selector: Json, marks: dict[str, str]) -> bool:
    return bool(selector) and all(marks.get(key) == str(value) for key, value in selector.items())


def namespaces(facts: Facts) -> Iterator[Finding]:
    """A namespace that is being deleted and does not go away."""
    for space in facts.all("Namespace"):
        due = at(space, "metadata", "deletionTimestamp")
        if phase(space) != "Terminating" or facts.age_s(due) < PATIENCE_S:
            continue
        kinds = (
            "NamespaceFinalizersRemaining",
            "NamespaceContentRemaining",
            "NamespaceDeletionDiscoveryFailure",
            "NamespaceDeletionContentFailure",
        )
        left = [
            f'{ref(space)} status.conditions[{k}]: "{text(condition(space, k), "message")}"'
            for k in kinds
            if condition(space, k).get("status") == "True"
        ]
        apis = tuple(ref(a) for a in facts.all("APIService"))
        yield Finding(
            "namespace-terminating",
            (ref(space),),
            f"is being deleted for {facts.age_s(due):.0f} s and refuses new objects until it is gone",
            tuple(left) or (f"{ref(space)} status.phase: Terminating",),
            (
                "remove what it waits for (kubectl api-resources --verbs=list --namespaced -o name | "
                f"xargs -n1 kubectl get -n {name(space)}): mostly finalizers"
            ),
            apis,
        )


def budgets(facts: Facts) -> Iterator[Finding]:
    """A cordoned node that a PodDisruptionBudget keeps from being drained."""
    cordoned = [
        n
        for n in facts.all("Node")
        if at(n, "spec", "unschedulable") or any(t.get("key") == CORDON for t in listed(n, "spec", "taints"))
    ]
    for budget in facts.all("PodDisruptionBudget"):
        if number(budget, "status", "disruptionsAllowed") or not number(budget, "status", "expectedPods"):
            continue
        selector = table(budget, "spec", "selector", "matchLabels")
        for node in cordoned:
            pods = [
                p
                for p in facts.held.get(name(node), [])
                if namespace(p) == namespace(budget) and matches(selector, labels(p))
            ]
            if pods:
                healthy, least = number(budget, "status", "currentHealthy"), number(budget, "status", "desiredHealthy")
                never = number(budget, "status", "expectedPods") <= least
                fix = (
                    (
                        f"kubectl -n {namespace(budget)} scale {owner(pods[0]).split('/')[0].lower()} "
                        "with one replica more, or maxUnavailable: 1"
                    )
                    if never
                    else "mend its pods that are not ready, then drain again"
                )
                others = [
                    p for p in facts.all("Pod") if namespace(p) == namespace(budget) and matches(selector, labels(p))
                ]
                yield Finding(
                    "pdb-blocks-drain",
                    (ref(budget), ref(node)),
                    (
                        f"{name(node)} is cordoned, and {len(pods)} pod{'s' if len(pods) > 1 else ''} "
                        f"on it may not be evicted: {healthy} healthy, {least} must be"
                    )
                    + (", which is all of them" if never else ""),
                    (
                        (
                            f"{ref(budget)} status.disruptionsAllowed: 0, currentHealthy: {healthy}, "
                            f"desiredHealthy: {least}"
                        ),
                    ),
                    fix,
                    tuple(ref(p) for p in others if not ready(p)),
                )


RULES = [nodes, on_dead_nodes, terminating, volumes, namespaces, budgets]
