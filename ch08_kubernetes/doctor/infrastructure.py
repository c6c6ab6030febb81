"""Rules for what pods stand on: nodes, volumes, services, webhooks, budgets, autoscalers, namespaces."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.containers import claims
from ch08_kubernetes.doctor.facts import (
    Facts, at, condition, containers, labels, listed, name, namespace, number, owner, phase, ready, ref, table, text,
)  # fmt: skip
from ch08_kubernetes.doctor.findings import Finding
from ch08_kubernetes.doctor.placement import CORDON, nearest, waiting

PATIENCE_S = 30  # after which something that ends should have ended
PRESSURES = {"MemoryPressure": "memory", "DiskPressure": "disk", "PIDPressure": "process ids"}
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def nodes(facts: Facts) -> Iterator[Finding]:
    """A node whose kubelet is silent, or says that it is not well."""
    for node in facts.all("Node"):
        state = condition(node, "Ready")
        evidence = f'{ref(node)} status.conditions[Ready]: {state.get("status")} {text(state, "reason")} "{text(state, "message")}"'
        if state.get("status") == "Unknown":
            silent = int(facts.age_s(state.get("lastHeartbeatTime"))) if state.get("lastHeartbeatTime") else 0
            yield Finding("node-silent", (ref(node),), f"its kubelet says nothing, the last time {silent} s ago: the machine is off, cut off, or hung", (evidence,),
                f"reach it ({name(node)}): systemctl status kubelet; if it is lost: kubectl delete node {name(node)}, which frees its pods")  # fmt: skip
        elif state.get("status") == "False":
            yield Finding(
                "node-not-ready",
                (ref(node),),
                f"its kubelet says that it is not ready: {text(state, 'message')}",
                (evidence,),
                f"on {name(node)}: journalctl -u kubelet; systemctl status containerd",
            )
        for kind, what in PRESSURES.items():
            state = condition(node, kind)
            if state.get("status") == "True":
                yield Finding(
                    "node-pressure",
                    (ref(node),),
                    f"runs low on {what}; the kubelet evicts pods and the scheduler sends none",
                    (f'{ref(node)} status.conditions[{kind}]: True "{text(state, "message")}"',),
                    f"on {name(node)}: free {what} (images: crictl rmi --prune); set requests and limits of the pods there",
                )


def on_dead_nodes(facts: Facts) -> Iterator[Finding]:
    """Pods that sit on a node which does not answer, or that exist on none."""
    for node in facts.all("Node"):
        if condition(node, "Ready").get("status") != "Unknown":
            continue
        pods = [p for p in facts.held.get(name(node), []) if not owner(p).startswith("DaemonSet/")]
        if pods:
            yield Finding("pods-on-dead-node", tuple(ref(p) for p in pods), f"cannot be reached on {name(node)}, and their state there is not known", (f"spec.nodeName: {name(node)}",),
                f"if the machine is off for certain: kubectl delete node {name(node)}, or kubectl delete pod NAME --force --grace-period=0", (ref(node),))  # fmt: skip


def terminating(facts: Facts) -> Iterator[Finding]:
    """Pods that should be gone by now."""
    for pod in facts.all("Pod"):
        due = at(pod, "metadata", "deletionTimestamp")
        node = facts.get(f"Node/{text(pod, 'spec', 'nodeName')}")
        if not due or facts.age_s(due) < PATIENCE_S or (node and condition(node, "Ready").get("status") == "Unknown"):
            continue
        evidence = (
            f"{ref(pod)} metadata.deletionTimestamp is {facts.age_s(due):.0f} s ago, finalizers: {at(pod, 'metadata', 'finalizers') or 'none'}",
        )
        if finalizers := at(pod, "metadata", "finalizers"):
            yield Finding("terminating-finalizer", (ref(pod),), f"is deleted, and held by the finalizer {', '.join(map(str, finalizers))}: its controller does not take it off", evidence,
                f"see that controller; if it is gone: kubectl -n {namespace(pod)} patch pod {name(pod)} --type=merge -p '{{\"metadata\":{{\"finalizers\":null}}}}'")  # fmt: skip
        else:
            yield Finding("terminating-stuck", (ref(pod),), "is deleted, and its kubelet does not end it (a process in an uninterruptible wait, a volume that cannot be unmounted)", evidence,
                f"on {text(pod, 'spec', 'nodeName') or 'its node'}: crictl ps; journalctl -u kubelet; at last kubectl -n {namespace(pod)} delete pod {name(pod)} --force --grace-period=0", (f"Node/{text(pod, 'spec', 'nodeName')}",))  # fmt: skip


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
                    f"apply a PersistentVolumeClaim {claim} in {namespace(pod)} (training/base/checkpoints.yaml), or correct claimName",
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
                        f"kubectl get storageclass; delete the claim and apply it with storageClassName: {close or 'NAME'}",
                    )
                elif used is None and wants is None:
                    yield Finding(
                        "no-storage-class",
                        about,
                        f"the claim {claim} names no storage class, and the cluster has no default one",
                        proof,
                        f'kubectl patch storageclass NAME -p \'{{"metadata":{{"annotations":{{"{DEFAULT_CLASS}":"true"}}}}}}\'',
                    )
                elif (
                    used is None or at(used, "volumeBindingMode") != "WaitForFirstConsumer" or said.startswith("failed")
                ):
                    yield Finding(
                        "volume-not-provisioned",
                        about,
                        f"the claim {claim} is bound to no volume: its provisioner {text(used, 'provisioner') or 'is none, and no volume fits'} made none",
                        proof,
                        f"kubectl -n {namespace(pod)} describe pvc {claim}; see the pods of its CSI driver, and its accessModes",
                    )


def _matches(selector: Json, marks: dict[str, str]) -> bool:
    return bool(selector) and all(marks.get(key) == str(value) for key, value in selector.items())


def services(facts: Facts) -> Iterator[Finding]:
    """A service that no pod is behind: names that are looked up lead nowhere, and a rendezvous never begins."""
    makers = [
        body for kind in ("Deployment", "StatefulSet", "Job", "ReplicaSet", "DaemonSet") for body in facts.all(kind)
    ]
    for service in facts.all("Service"):
        selector = table(service, "spec", "selector")
        space = namespace(service)
        if not selector or at(service, "spec", "type") == "ExternalName":
            continue
        inside = [p for p in facts.all("Pod") if namespace(p) == space]
        behind = [p for p in inside if _matches(selector, labels(p)) and phase(p) != "Succeeded"]
        templates = [labels(table(m, "spec", "template")) for m in makers if namespace(m) == space]
        if (
            not behind
            and inside
            and not any(_matches(selector, t) for t in templates)
            and not any(_matches(selector, labels(p)) for p in inside)
        ):
            key, value = next(iter(sorted(selector.items())))
            close = nearest(str(value), sorted({labels(p)[key] for p in inside if key in labels(p)}))
            needed = [p for p in inside if _looks_up(p, name(service))]
            users = (
                f"; {', '.join(sorted({owner(p) for p in needed}))} look{'s' if len({owner(p) for p in needed}) == 1 else ''} it up"
                if needed
                else ""
            )
            headless = at(service, "spec", "clusterIP") == "None"
            yield Finding("service-selector", (ref(service),), f"selects no pod: {key}={value}" + (f", where pods have {key}={close}" if close else "") + users + (": the rendezvous name never resolves" if headless and needed else ""),
                (f"{ref(service)} spec.selector: {json.dumps(selector, sort_keys=True)}", "no pod and no template in the namespace has these labels"),
                f"kubectl -n {space} patch service {name(service)} --type=merge -p '{{\"spec\":{{\"selector\":{{\"{key}\":\"{close or 'VALUE'}\"}}}}}}'")  # fmt: skip
        elif behind and not any(ready(p) for p in behind) and not at(service, "spec", "publishNotReadyAddresses"):
            yield Finding("no-endpoints", (ref(service),), f"has no endpoint: none of its {len(behind)} pods is ready", (f"pods with {json.dumps(selector, sort_keys=True)}: none has the condition Ready",),
                "mend its pods; a headless service for a rendezvous needs publishNotReadyAddresses: true", tuple(ref(p) for p in behind) + tuple(sorted({owner(p) for p in behind})))  # fmt: skip
    for job in facts.all("Job"):
        domain = text(job, "spec", "template", "spec", "subdomain")
        if (
            domain
            and number(job, "status", "active")
            and facts.knows("Service")
            and not facts.has("Service", namespace(job), domain)
        ):
            yield Finding(
                "service-missing",
                (ref(job),),
                f"its pods are in the subdomain {domain}, and there is no headless service of that name: their host names do not resolve",
                (f"{ref(job)} spec.template.spec.subdomain: {domain}",),
                f"kubectl -n {namespace(job)} create service clusterip {domain} --clusterip=None, with the selector of its pods (training/base/service.yaml)",
            )


def _looks_up(pod: Json, service: str) -> bool:
    values = [text(v, "value").partition(":")[0].split(".") for c in containers(pod) for v in listed(c, "env")]
    return text(pod, "spec", "subdomain") == service or any(
        service in parts[:2] for parts in values if len(parts) > 0 and parts[0]
    )


def webhooks(facts: Facts) -> Iterator[Finding]:
    """Admission that asks a service without endpoints, and refuses while that does not answer."""
    if not facts.knows("Endpoints"):
        return
    for kind in ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration"):
        for config in facts.all(kind):
            for hook in listed(config, "webhooks"):
                service = table(hook, "clientConfig", "service")
                where = f"{text(service, 'namespace')}/{text(service, 'name')}"
                if service and hook.get("failurePolicy") != "Ignore" and not _answers(facts, where):
                    yield Finding("webhook-down", (ref(config),), f"the webhook {text(hook, 'name')} asks the service {where}, which has no endpoint; failurePolicy is Fail, so what it checks is refused",
                        (f"{ref(config)} webhooks[{text(hook, 'name')}].clientConfig.service: {where}; Endpoints/{where}: none",),
                        f"kubectl -n {text(service, 'namespace')} get pods (start its controller); or kubectl delete {kind.lower()} {name(config)}")  # fmt: skip


def _answers(facts: Facts, where: str) -> bool:
    return any(listed(s, "addresses") for s in listed(facts.get(f"Endpoints/{where}"), "subsets"))


def api_services(facts: Facts) -> Iterator[Finding]:
    """An aggregated API that does not answer, as that of custom metrics."""
    for each in facts.all("APIService"):
        state = condition(each, "Available")
        if state.get("status") == "False":
            yield Finding(
                "apiservice-down",
                (ref(each),),
                f"the API {name(each)} is not served: {text(state, 'reason')}",
                (f'{ref(each)} status.conditions[Available]: False "{text(state, "message")}"',),
                f"kubectl -n {text(each, 'spec', 'service', 'namespace') or 'NAMESPACE'} get pods,endpoints {text(each, 'spec', 'service', 'name')}",
            )


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
            f"remove what it waits for (kubectl api-resources --verbs=list --namespaced -o name | xargs -n1 kubectl get -n {name(space)}): mostly finalizers",
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
                if namespace(p) == namespace(budget) and _matches(selector, labels(p))
            ]
            if pods:
                healthy, least = number(budget, "status", "currentHealthy"), number(budget, "status", "desiredHealthy")
                never = number(budget, "status", "expectedPods") <= least
                fix = (
                    f"kubectl -n {namespace(budget)} scale {owner(pods[0]).split('/')[0].lower()} with one replica more, or maxUnavailable: 1"
                    if never
                    else "mend its pods that are not ready, then drain again"
                )
                others = [
                    p for p in facts.all("Pod") if namespace(p) == namespace(budget) and _matches(selector, labels(p))
                ]
                yield Finding("pdb-blocks-drain", (ref(budget), ref(node)), f"{name(node)} is cordoned, and {len(pods)} pod{'s' if len(pods) > 1 else ''} on it may not be evicted: {healthy} healthy, {least} must be" + (", which is all of them" if never else ""),
                    (f"{ref(budget)} status.disruptionsAllowed: 0, currentHealthy: {healthy}, desiredHealthy: {least}",), fix, tuple(ref(p) for p in others if not ready(p)))  # fmt: skip


def autoscalers(facts: Facts) -> Iterator[Finding]:
    """An autoscaler that has no metric, no target, or no room."""
    for hpa in facts.all("HorizontalPodAutoscaler"):
        states = {text(c, "type"): c for c in _conditions(hpa)}

        def said(kind: str, states: dict = states, hpa: Json = hpa) -> tuple[str, ...]:
            state = states[kind]
            return (
                f'{ref(hpa)} status.conditions[{kind}]: {state.get("status")} {text(state, "reason")} "{text(state, "message")}"',
            )

        target = f"{text(hpa, 'spec', 'scaleTargetRef', 'kind')}/{namespace(hpa)}/{text(hpa, 'spec', 'scaleTargetRef', 'name')}"
        active, able, limited = (table(states, kind) for kind in ("ScalingActive", "AbleToScale", "ScalingLimited"))
        if able.get("status") == "False" and text(able, "reason") == "FailedGetScale":
            yield Finding(
                "hpa-no-target",
                (ref(hpa),),
                f"what it is to scale cannot be read: {target}",
                said("AbleToScale"),
                f"correct spec.scaleTargetRef of {ref(hpa)}",
            )
        elif active.get("status") == "False" and text(active, "reason").startswith(("FailedGet", "InvalidMetric")):
            fix = (
                "metrics of CPU and memory: install metrics-server, and set resources.requests"
                if "Resource" in text(active, "reason")
                else "kubectl get --raw /apis/custom.metrics.k8s.io/v1beta1 (install prometheus-adapter or KEDA; autoscaling/)"
            )
            apis = tuple(ref(a) for a in facts.all("APIService"))
            yield Finding(
                "hpa-no-metrics",
                (ref(hpa),),
                f"gets no metric, and does not scale {target}",
                said("ScalingActive"),
                fix,
                (*apis, target, *(ref(p) for p in facts.all("Pod") if _of(facts, p) == target)),
            )
        elif limited.get("status") == "True" and text(limited, "reason") == "TooManyReplicas":
            yield Finding(
                "hpa-at-maximum",
                (ref(hpa),),
                f"wants more than its maxReplicas of {number(hpa, 'spec', 'maxReplicas')} for {target}",
                said("ScalingLimited"),
                f'kubectl -n {namespace(hpa)} patch hpa {name(hpa)} --type=merge -p \'{{"spec":{{"maxReplicas":{2 * number(hpa, "spec", "maxReplicas")}}}}}\', if there are GPUs for it',
            )


def _of(facts: Facts, pod: Json) -> str:
    """The Deployment that a pod is of, through its ReplicaSet."""
    maker = facts.get(owner(pod))
    return owner(maker) if maker else owner(pod)


def _conditions(hpa: Json) -> list[Json]:
    """autoscaling/v1 has them as JSON in an annotation."""
    noted = text(hpa, "metadata", "annotations", "autoscaling.alpha.kubernetes.io/conditions")
    try:
        return listed(hpa, "status", "conditions") or listed({"c": json.loads(noted)}, "c")
    except ValueError:
        return []


RULES = [nodes, on_dead_nodes, terminating, volumes, services, webhooks, api_services, namespaces, budgets, autoscalers]
