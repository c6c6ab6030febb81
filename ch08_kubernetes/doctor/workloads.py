"""Rules for what makes pods: refusals by quotas and admission, jobs that failed, ranks that wait for each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

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
    text,
)
from ch08_kubernetes.doctor.filters import waiting
from ch08_kubernetes.doctor.findings import Finding

MAKERS = ("Job", "ReplicaSet", "StatefulSet", "DaemonSet", "JobSet")
REFUSALS = [  # cause, the server's words
    ("quota-exceeded", r"exceeded quota: (\S+), requested: (.+), used: (.+), limited: (.+)"),
    ("quota-needs-request", r"failed quota: (\S+): must specify ([\w./,:;\- ]+)"),
    ("limit-range", r"(?:maximum|minimum|max limit|min limit)[^,;]*? per (?:Container|Pod)[^\]]*"),
    ("webhook-unanswered", r"failed calling (?:admission )?webhook \"([^\"]+)\""),
    ("namespace-closed", r"because it is being terminated"),
    ("pod-security", r"violates PodSecurity \"([^\"]+)\": (.+)"),
    ("priority-class-missing", r"no PriorityClass with name (\S+) was found"),
    (
        "service-account-missing",
        r"serviceaccount \"?([\w.\-]+)\"? not found|error looking up service account \S+?/([\w.\-]+):",
    ),
]


def wanted(maker: Json) -> int:
    """How many pods it still wants at a time."""
    kind = maker.get("kind")
    if kind == "Job":
        if finished(maker) or at(maker, "spec", "suspend"):
            return 0
        at_once = at(maker, "spec", "parallelism")
        at_once = 1 if at_once is None else number(maker, "spec", "parallelism")
        total = at(maker, "spec", "completions")
        return (
            at_once
            if not isinstance(total, int)
            else min(at_once, max(0, total - number(maker, "status", "succeeded")))
        )
    if kind == "DaemonSet":
        return number(maker, "status", "desiredNumberScheduled")
    replicas = at(maker, "spec", "replicas")
    return replicas if isinstance(replicas, int) else 1


def finished(job: Json) -> bool:
    return any(condition(job, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def present(facts: Facts, maker: Json) -> list[Json]:
    """Its pods that count as one that it wants."""
    return [p for p in facts.pods_of[ref(maker)] if phase(p) in ("Pending", "Running", "")]


def refusals(facts: Facts) -> Iterator[Finding]:
    """A controller that may not make the pods that it wants: which rule of admission says no."""
    for kind in MAKERS:
        for maker in facts.all(kind):
            said = facts.said(maker, "FailedCreate")
            if said and len(present(facts, maker)) < wanted(maker):
                yield _refusal(facts, maker, said)


def _refusal(facts: Facts, maker: Json, said: str) -> Finding:
    cause, match = next(((c, m) for c, words in REFUSALS if (m := re.search(words, said))), ("refused", None))
    space, lacking = namespace(maker), wanted(maker) - len(present(facts, maker))
    parts = [part or "" for part in match.groups()] if match else []
    first = next(filter(None, parts), "")
    short = f"{lacking} of {wanted(maker)} pods are not made"
    if cause == "quota-exceeded":
        message = (
            f"{short}: quota {first} of namespace {space} is used up: asked {parts[1]}, used "
            f"{parts[2]}, limit {parts[3]}; {_users(facts, space)}"
        )
        fix = (
            f"kubectl -n {space} describe quota {first}; delete what is not needed, ask for less, or "
            f"kubectl -n {space} edit quota {first}"
        )
    elif cause == "quota-needs-request":
        message = f"{short}: quota {first} counts {parts[1]}, so each container must set it"
        fix = f"set it in the pod template of {ref(maker)}, or a LimitRange with defaults in {space}"
    elif cause == "limit-range":
        message = f"{short}: a LimitRange of namespace {space} forbids it: {match[0] if match else said}"
        fix = f"kubectl -n {space} describe limitrange; change resources in {ref(maker)}"
    elif cause == "webhook-unanswered":
        message = f"{short}: the admission webhook {first} does not answer"
        fix = (
            "see the pods behind the webhook's service (kubectl get "
            "validatingwebhookconfigurations,mutatingwebhookconfigurations)"
        )
    elif cause == "namespace-closed":
        message, fix = f"{short}: namespace {space} is being deleted", "use another namespace"
    elif cause == "pod-security":
        message = f"{short}: namespace {space} enforces Pod Security {first}: {parts[1][:200]}"
        fix = (
            f"correct the securityContext in {ref(maker)}, or: kubectl label ns {space} "
            "pod-security.kubernetes.io/enforce=... --overwrite"
        )
    elif cause == "priority-class-missing":
        message, fix = (
            f"{short}: there is no PriorityClass {first}",
            "kubectl apply -f ch08_kubernetes/scheduling/priorities.yaml, or correct priorityClassName",
        )
    elif cause == "service-account-missing":
        message, fix = (
            f"{short}: there is no ServiceAccount {first} in {space}",
            f"kubectl -n {space} create serviceaccount {first}",
        )
    else:
        message, fix = f"{short}: the API server refuses them", "correct what its words name"
    evidence = (f'event FailedCreate of {ref(maker)}: "{said}"',)
    hooks = _webhooks(facts, first) if cause == "webhook-unanswered" else ()
    return Finding(cause, (ref(maker),), message, evidence, fix, (f"Namespace/{space}", *hooks))


def _webhooks(facts: Facts, called: str) -> tuple[str, ...]:
    kinds = ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration")
    return tuple(
        ref(c)
        for kind in kinds
        for c in facts.all(kind)
        if any(text(h, "name") == called for h in listed(c, "webhooks"))
    )


def _users(facts: Facts, space: str, most: int = 4) -> str:
    """Who in a namespace has GPUs."""
    held: dict[str, int] = {}
    for pods in facts.held.values():
        for pod in pods:
            if namespace(pod) == space and (count := sum(v for k, v in requests(pod).items() if is_gpu(k))):
                held[owner(pod)] = held.get(owner(pod), 0) + int(count)
    first = sorted(held.items(), key=lambda item: (-item[1], item[0]))[:most]
    return "GPUs there are held by " + (", ".join(f"{who} ({count})" for who, count in first) or "nobody")


def failed_jobs(facts: Facts) -> Iterator[Finding]:
    """A Job that gave up, and which of its limits said so."""
    for job in facts.all("Job"):
        state = condition(job, "Failed")
        if state.get("status") != "True":
            continue
        reason = text(state, "reason")
        evidence = (f'{ref(job)} status.conditions[Failed]: {reason} "{text(state, "message")}"',)
        pods = tuple(ref(p) for p in facts.pods_of[ref(job)])
        again = f"kubectl -n {namespace(job)} delete job {name(job)}, and apply it again"
        if reason == "DeadlineExceeded":
            limit = number(job, "spec", "activeDeadlineSeconds")
            yield Finding(
                "deadline-exceeded",
                (ref(job),),
                f"stopped: activeDeadlineSeconds is {limit}, which counts from its start and waiting for nodes too",
                evidence,
                f"raise or leave out activeDeadlineSeconds; {again} (it resumes from its checkpoint)",
                pods,
            )
        elif reason == "PodFailurePolicy":
            yield Finding(
                "pod-failure-policy",
                (ref(job),),
                "stopped by its podFailurePolicy, at an exit code or condition that it names",
                evidence,
                again,
                pods,
            )
        else:
            tries = at(job, "spec", "backoffLimit")
            tries = 6 if tries is None else tries
            yield Finding(
                "backoff-limit",
                (ref(job),),
                f"gave up: more than {tries} pods failed (backoffLimit)",
                evidence,
                f"mend what fails its pods; {again}",
                pods,
            )


def preempted(facts: Facts) -> Iterator[Finding]:
    """Pods that had to go for others of a higher priority, and whose replacement still waits."""
    waits = {owner(pod) for pod in waiting(facts)}
    for about in sorted(facts.events):
        said = facts.said(about, "Preempted")
        pod = facts.get(about)
        if not said or not about.startswith("Pod/") or (pod and not at(pod, "metadata", "deletionTimestamp")):
            continue
        _, space, called = about.split("/", 2)
        own = owner(pod) if pod else next((o for o in sorted(waits) if _made(o, space, called)), about)
        if own in waits or own == about:
            yield Finding(
                "preempted",
                (about,),
                "was evicted for a pod of a higher priority",
                (f'event Preempted of {about}: "{said}"',),
                (
                    f"wait until GPUs are free (it resumes from its checkpoint), or give {own} a "
                    "priorityClassName as high: kubectl get priorityclasses"
                ),
                (),
                (f"Preempted/{own}",),
            )


def _made(maker: str, space: str, pod: str) -> bool:
    _, within, called = [*maker.split("/", 2), "", ""][:3]
    return within == space and re.fullmatch(rf"{re.escape(called)}-(\w+-)?\w+", pod) is not None


def queued(facts: Facts) -> Iterator[Finding]:
    """A Job that Kueue holds back, or that nobody will start."""
    for job in facts.all("Job"):
        queue = labels(job).get("kueue.x-k8s.io/queue-name")
        if not at(job, "spec", "suspend") or finished(job):
            continue
        evidence = (f"{ref(job)} spec.suspend: true",)
        load = next((w for w in facts.all("Workload") if owner(w) == ref(job)), None)
        reserved = condition(load, "QuotaReserved") if load else {}
        if not queue:
            yield Finding(
                "suspended",
                (ref(job),),
                "is suspended and has no queue: nobody starts it",
                evidence,
                f'kubectl -n {namespace(job)} patch job {name(job)} --type=merge -p \'{{"spec":{{"suspend":false}}}}\'',
            )
        elif not facts.has("LocalQueue", namespace(job), queue):
            yield Finding(
                "queue-missing",
                (ref(job),),
                f"waits in the queue {queue}, which namespace {namespace(job)} does not have",
                (*evidence, f"{ref(job)} labels[kueue.x-k8s.io/queue-name]: {queue}"),
                f"kubectl -n {namespace(job)} get localqueues; correct the label, or apply scheduling/kueue.yaml",
            )
        elif load and reserved.get("status") == "False":
            yield Finding(
                "no-queue-quota",
                (ref(job),),
                f"waits in the queue {queue} until there is quota for all of it",
                (f'{ref(load)} status.conditions[QuotaReserved]: "{text(reserved, "message")}"',),
                f"kubectl -n {namespace(job)} describe localqueue {queue}; wait, ask for less, or raise nominalQuota",
            )


def rollouts(facts: Facts) -> Iterator[Finding]:
    """A Deployment whose new pods do not come up in its time."""
    for each in facts.all("Deployment"):
        state = condition(each, "Progressing")
        if state.get("reason") == "ProgressDeadlineExceeded":
            sets = [r for r in facts.all("ReplicaSet") if owner(r) == ref(each)]
            needs = [ref(p) for r in sets for p in facts.pods_of[ref(r)]] + [ref(r) for r in sets]
            limit = number(each, "spec", "progressDeadlineSeconds") or 600
            yield Finding(
                "rollout-stuck",
                (ref(each),),
                f"the rollout did not get on for {limit} s (progressDeadlineSeconds)",
                (f'{ref(each)} status.conditions[Progressing]: "{text(state, "message")}"',),
                f"kubectl -n {namespace(each)} rollout undo deployment {name(each)}, or mend its pods",
                tuple(needs),
            )


RULES = [refusals, failed_jobs, preempted, queued, rollouts]
