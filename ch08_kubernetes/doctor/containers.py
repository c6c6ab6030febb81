"""Rules for pods that have a node: images, configuration, exits, probes."""

from __future__ import annotations

from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    condition,
    ended,
    listed,
    name,
    namespace,
    number,
    owner,
    phase,
    ready,
    ref,
    statuses,
    table,
    text,
    when,
)
from ch08_kubernetes.doctor.findings import Finding
from ch08_kubernetes.doctor.images import alive, causes, container_of

EXITS = {
    135: ("bus-error", "SIGBUS: a write to memory that its file system has no room for, as a full /dev/shm"),
    139: (
        "segfault",
        "SIGSEGV: native code read a wrong address (a mismatch of driver, CUDA, NCCL or extension builds)",
    ),
    134: ("aborted", "SIGABRT: native code gave up (an assertion, NCCL's watchdog, std::terminate)"),
    126: ("command-not-found", "the command cannot be executed"),
    127: ("command-not-found", "the command is not in the image"),
    128: ("command-not-found", "the container did not start"),
}


def exits(facts: Facts) -> Iterator[Finding]:
    """A container that ended badly and is not well again: why, by its exit code."""
    for pod in alive(facts):
        if phase(pod) == "Failed" and text(pod, "status", "reason") in ("Evicted", "UnexpectedAdmissionError"):
            continue
        if phase(pod) == "Failed" and _replaced(facts, pod):
            continue
        for status in statuses(pod):
            now, before = table(status, "state", "terminated"), table(status, "lastState", "terminated")
            last = now or before
            code = number(last, "exitCode")
            if not last or code == 0 or (ready(pod) and status.get("ready")):
                continue
            container = container_of(pod, text(status, "name"))
            cause, what, fix = _exit(facts, pod, container, code, text(last, "reason"))
            if cause == "liveness-kills":
                continue  # its own rule says more
            again = number(status, "restartCount")
            where = "state" if now else "lastState"
            evidence = (
                f"{ref(pod)} status.containerStatuses[{text(status, 'name')}].{where}.terminated: "
                f"{text(last, 'reason') or '?'}, exit code {code}; restarts: {again}"
            )
            yield Finding(cause, (ref(pod),), what, (evidence,), fix, causes(facts, pod))


def _replaced(facts: Facts, pod: Json) -> bool:
    """Whether its Job lives, and has as many healthy pods as it wants at a time."""
    job = facts.get(owner(pod)) if owner(pod).startswith("Job/") else None
    if not job or condition(job, "Failed").get("status") == "True":
        return False
    fine = [p for p in facts.pods_of[ref(job)] if phase(p) == "Succeeded" or ready(p)]
    return len(fine) >= (number(job, "spec", "parallelism") or 1)


def _exit(facts: Facts, pod: Json, container: Json, code: int, reason: str) -> tuple[str, str, str]:
    logs = f"kubectl -n {namespace(pod)} logs {name(pod)} -c {text(container, 'name')}"
    if number(pod, "status", "containerStatuses", 0, "restartCount"):
        logs += " --previous"
    limit = text(container, "resources", "limits", "memory") or "none: the node's memory"
    if reason == "OOMKilled":
        return (
            "oom-killed",
            (
                f"exit code {code}, OOMKilled: it used more memory than its limit ({limit}), which "
                "also counts what is in /dev/shm"
            ),
            f"in {owner(pod)}: resources.limits.memory above {limit}; or a smaller batch, fewer data workers",
        )
    if facts.said(pod, "Killing", "liveness|startup") or facts.said(pod, "Unhealthy", "Liveness|Startup"):
        return "liveness-kills", "", ""
    if code == 135:
        sized = [v for v in listed(pod, "spec", "volumes") if text(v, "emptyDir", "medium") == "Memory"]
        now = f"is {text(sized[0], 'emptyDir', 'sizeLimit') or 'unlimited'}" if sized else "has its default of 64 MiB"
        return (
            "bus-error",
            f"exit code 135, {EXITS[135][1]}; /dev/shm {now}",
            (
                "volumes: [{name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}]; volumeMounts: "
                "[{name: shm, mountPath: /dev/shm}]"
            ),
        )
    if code in EXITS:
        cause, what = EXITS[code]
        fix = (
            f"correct command in {owner(pod)}, or the image"
            if cause == "command-not-found"
            else f"{logs}; run with NCCL_DEBUG=INFO and PYTHONFAULTHANDLER=1"
        )
        return cause, f"exit code {code}, {what}", fix
    if code in (137, 143):
        return (
            "killed",
            (
                f"exit code {code}: killed from outside ({'SIGKILL' if code == 137 else 'SIGTERM'}), "
                "and not by its memory limit"
            ),
            f"kubectl -n {namespace(pod)} get events --field-selector involvedObject.name={name(pod)}; {logs}",
        )
    return "application-error", f"exit code {code}: the program itself ended with an error", logs


def budget_s(container: Json) -> tuple[int, str]:
    """Seconds that probes give a container to come up, and by which field. 0 if none can kill it."""
    for kind, otherwise in (("startupProbe", 3), ("livenessProbe", 3)):
        if at(container, kind) is not None:
            probe = table(container, kind)
            each = number(probe, "periodSeconds") or 10
            tries = number(probe, "failureThreshold") or otherwise
            return number(probe, "initialDelaySeconds") + each * tries, kind
    return 0, ""


def probes(facts: Facts) -> Iterator[Finding]:
    """Killed by its own probe while it starts, or running and never ready."""
    for pod in alive(facts):
        if ended(pod) or ready(pod) or at(pod, "metadata", "deletionTimestamp"):
            continue
        for status in statuses(pod):
            container = container_of(pod, text(status, "name"))
            killed = facts.said(pod, "Killing", "liveness probe|startup probe") or facts.said(
                pod, "Unhealthy", "Liveness|Startup"
            )
            last = table(status, "lastState", "terminated")
            if killed and (number(status, "restartCount") or last):
                seconds, field = budget_s(container)
                lived = int((when(last.get("finishedAt")) - when(last.get("startedAt"))).total_seconds()) if last else 0
                tries = -(-max(600, 3 * seconds) // 10)
                message = (
                    f"its {field or 'probe'} kills it while it starts: it has {seconds} s to come up "
                    f"(initialDelaySeconds + periodSeconds x failureThreshold), and lived {lived} s"
                )
                yield Finding(
                    "liveness-kills",
                    (ref(pod),),
                    message,
                    (f'event of {ref(pod)}: "{killed}"; restarts: {number(status, "restartCount")}',),
                    (
                        f"in {owner(pod)}: startupProbe: {{httpGet: ..., periodSeconds: 10, "
                        f"failureThreshold: {tries}}}   ({tries * 10} s; more than the model takes to "
                        "load)"
                    ),
                    causes(facts, pod),
                )
            elif table(status, "state", "running") and (said := facts.said(pod, "Unhealthy", "Readiness")):
                probe = table(container, "readinessProbe")
                path = text(probe, "httpGet", "path") or "its check"
                yield Finding(
                    "readiness-fails",
                    (ref(pod),),
                    f"runs and does not become ready: {path} does not answer as its readinessProbe wants",
                    (f'event Unhealthy of {ref(pod)}: "{said}"',),
                    (
                        f"kubectl -n {namespace(pod)} logs {name(pod)}; correct path and port of "
                        f"readinessProbe in {owner(pod)}"
                    ),
                    causes(facts, pod),
                )


def refused_by_node(facts: Facts) -> Iterator[Finding]:
    """Evicted, or refused by the kubelet that it was given to."""
    for pod in alive(facts):
        reason, said = text(pod, "status", "reason"), text(pod, "status", "message")
        evidence = (f'{ref(pod)} status.reason: {reason}, "{said}"',)
        if phase(pod) == "Failed" and reason == "Evicted":
            what = next((w for w in ("ephemeral-storage", "memory", "pids", "inodes") if w in said), "a resource")
            fix = {
                "ephemeral-storage": "write to a volume, or set resources.limits.ephemeral-storage to what it needs",
                "memory": "set resources.requests.memory to what it uses",
            }.get(what, "see the node's conditions")
            yield Finding(
                "evicted",
                (ref(pod),),
                f"evicted: its node ran low on {what}",
                evidence,
                f"in {owner(pod)}: {fix}",
                (*causes(facts, pod), f"Pressure/{text(pod, 'spec', 'nodeName')}"),
            )
        elif phase(pod) == "Failed" and reason in ("UnexpectedAdmissionError", "OutOfnvidia.com/gpu"):
            yield Finding(
                "device-unavailable",
                (ref(pod),),
                (
                    "the kubelet could not give it the devices that the scheduler counted: the device "
                    "plugin restarted or a GPU is sick"
                ),
                evidence,
                (
                    f"kubectl -n {namespace(pod)} delete pod {name(pod)}; kubectl describe node "
                    f"{text(pod, 'spec', 'nodeName')} (allocatable nvidia.com/gpu)"
                ),
                causes(facts, pod),
            )


RULES = [exits, probes, refused_by_node]
