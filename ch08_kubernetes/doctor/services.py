"""Rules for what pods are reached and scaled by: services, webhooks, aggregated APIs, autoscalers."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    condition,
    containers,
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
from ch08_kubernetes.doctor.findings import Finding
from ch08_kubernetes.doctor.infrastructure import matches
from ch08_kubernetes.doctor.placement import nearest


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
        behind = [p for p in inside if matches(selector, labels(p)) and phase(p) != "Succeeded"]
        templates = [labels(table(m, "spec", "template")) for m in makers if namespace(m) == space]
        if (
            not behind
            and inside
            and not any(matches(selector, t) for t in templates)
            and not any(matches(selector, labels(p)) for p in inside)
        ):
            key, value = next(iter(sorted(selector.items())))
            close = nearest(str(value), sorted({labels(p)[key] for p in inside if key in labels(p)}))
            needed = [p for p in inside if _looks_up(p, name(service))]
            users = (
                (
                    f"; {', '.join(sorted({owner(p) for p in needed}))} "
                    f"look{'s' if len({owner(p) for p in needed}) == 1 else ''} it up"
                )
                if needed
                else ""
            )
            headless = at(service, "spec", "clusterIP") == "None"
            yield Finding(
                "service-selector",
                (ref(service),),
                f"selects no pod: {key}={value}"
                + (f", where pods have {key}={close}" if close else "")
                + users
                + (": the rendezvous name never resolves" if headless and needed else ""),
                (
                    f"{ref(service)} spec.selector: {json.dumps(selector, sort_keys=True)}",
                    "no pod and no template in the namespace has these labels",
                ),
                (
                    f"kubectl -n {space} patch service {name(service)} --type=merge -p "
                    f'\'{{"spec":{{"selector":{{"{key}":"{close or "VALUE"}"}}}}}}\''
                ),
            )
        elif behind and not any(ready(p) for p in behind) and not at(service, "spec", "publishNotReadyAddresses"):
            yield Finding(
                "no-endpoints",
                (ref(service),),
                f"has no endpoint: none of its {len(behind)} pods is ready",
                (f"pods with {json.dumps(selector, sort_keys=True)}: none has the condition Ready",),
                "mend its pods; a headless service for a rendezvous needs publishNotReadyAddresses: true",
                tuple(ref(p) for p in behind) + tuple(sorted({owner(p) for p in behind})),
            )
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
                (
                    f"its pods are in the subdomain {domain}, and there is no headless service of that "
                    "name: their host names do not resolve"
                ),
                (f"{ref(job)} spec.template.spec.subdomain: {domain}",),
                (
                    f"kubectl -n {namespace(job)} create service clusterip {domain} --clusterip=None, "
                    "with the selector of its pods (training/base/service.yaml)"
                ),
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
                    yield Finding(
                        "webhook-down",
                        (ref(config),),
                        (
                            f"the webhook {text(hook, 'name')} asks the service {where}, which has no "
                            "endpoint; failurePolicy is Fail, so what it checks is refused"
                        ),
                        (
                            (
                                f"{ref(config)} webhooks[{text(hook, 'name')}].clientConfig.service: "
                                f"{where}; Endpoints/{where}: none"
                            ),
                        ),
                        (
                            f"kubectl -n {text(service, 'namespace')} get pods (start its controller); "
                            f"or kubectl delete {kind.lower()} {name(config)}"
                        ),
                    )


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
                (
                    f"kubectl -n {text(each, 'spec', 'service', 'namespace') or 'NAMESPACE'} get "
                    f"pods,endpoints {text(each, 'spec', 'service', 'name')}"
                ),
            )


def autoscalers(facts: Facts) -> Iterator[Finding]:
    """An autoscaler that has no metric, no target, or no room."""
    for hpa in facts.all("HorizontalPodAutoscaler"):
        states = {text(c, "type"): c for c in _conditions(hpa)}

        def said(kind: str, states: dict = states, hpa: Json = hpa) -> tuple[str, ...]:
            state = states[kind]
            return (
                (
                    f"{ref(hpa)} status.conditions[{kind}]: {state.get('status')} "
                    f'{text(state, "reason")} "{text(state, "message")}"'
                ),
            )

        scaled = table(hpa, "spec", "scaleTargetRef")
        target = f"{text(scaled, 'kind')}/{namespace(hpa)}/{text(scaled, 'name')}"
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
                else (
                    "kubectl get --raw /apis/custom.metrics.k8s.io/v1beta1 (install prometheus-adapter "
                    "or KEDA; autoscaling/)"
                )
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
                (
                    f"kubectl -n {namespace(hpa)} patch hpa {name(hpa)} --type=merge -p "
                    f'\'{{"spec":{{"maxReplicas":{2 * number(hpa, "spec", "maxReplicas")}}}}}\', if '
                    "there are GPUs for it"
                ),
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


RULES = [services, webhooks, api_services, autoscalers]
