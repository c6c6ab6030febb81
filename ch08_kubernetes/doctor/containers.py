"""Rules for pods that have a node: images, configuration, exits, probes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts, at, condition, containers, ended, listed, name, namespace, number, owner, phase, ready, ref, statuses, table,
    text, when,
)  # fmt: skip
from ch08_kubernetes.doctor.findings import Finding

PULL = ("ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName")
WITHOUT = r"(configmap|secret|references non-existent \w+ key|couldn't find key)"
BY_MESSAGE = [  # the first that matches decides
    ("registry-rate-limit", r"toomanyrequests|429 Too Many|rate limit"),
    ("registry-unreachable", r"no such host|i/o timeout|connection refused|dial tcp|TLS handshake|x509|timed? ?out|EOF"),
    ("image-pull-secret", r"unauthorized|authentication required|access denied|denied:|no basic auth|401|403|Forbidden|insufficient_scope"),
    ("image-not-found", r"not ?found|manifest unknown|name unknown|does not exist|404|no match for platform"),
]  # fmt: skip
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


def alive(facts: Facts) -> list[Json]:
    """Pods with a node that have not succeeded, and whose Job has not either."""
    found = []
    for pod in facts.all("Pod"):
        job = facts.get(owner(pod)) if owner(pod).startswith("Job/") else None
        if phase(pod) != "Succeeded" and not (job and condition(job, "Complete").get("status") == "True"):
            found.append(pod)
    return found


def _of(pod: Json, container: str) -> Json:
    every = containers(pod) + listed(pod, "spec", "initContainers")
    return next((c for c in every if c.get("name") == container), {})


def _secrets(facts: Facts, pod: Json) -> list[str]:
    account = facts.get(f"ServiceAccount/{namespace(pod)}/{text(pod, 'spec', 'serviceAccountName') or 'default'}")
    return [text(s, "name") for s in listed(pod, "spec", "imagePullSecrets") + listed(account, "imagePullSecrets")]


def images(facts: Facts) -> Iterator[Finding]:
    """An image that does not come: by the registry's words, a wrong name, a missing pull secret, or no way there."""
    for pod in alive(facts):
        for status in statuses(pod):
            waiting = table(status, "state", "waiting")
            if waiting.get("reason") not in PULL:
                continue
            image = text(status, "image") or text(_of(pod, text(status, "name")), "image")
            event = facts.said(pod, "Failed|ErrImagePull|InspectFailed", "(?i)pull|image")
            said = " ".join(filter(None, (text(waiting, "message"), event)))
            evidence = (f'{ref(pod)} status.containerStatuses[{text(status, "name")}].state.waiting: {waiting.get("reason")}', f'event Failed: "{event or said}"')  # fmt: skip
            cause = next((kind for kind, words in BY_MESSAGE if re.search(words, said, re.IGNORECASE)), "image-pull")
            if waiting.get("reason") == "InvalidImageName":
                cause = "image-name-invalid"
            where = f"in {owner(pod)}"
            secrets = _secrets(facts, pod)
            gone = [s for s in secrets if facts.knows("Secret") and not facts.has("Secret", namespace(pod), s)]
            make = f"kubectl -n {namespace(pod)} create secret docker-registry {(gone or ['regcred'])[0]} --docker-server={_registry(image)} ..."
            what, fix = {
                "image-name-invalid": (f"the image name {image!r} is malformed (capitals, a blank or a second colon)", f"{where}: image: REGISTRY/NAME:TAG"),
                "image-not-found": (f"the registry has no image {image}", f"{where}: correct the name or tag; try: crane ls {image.rpartition(':')[0] or image}"),
                "image-pull-secret": (
                    f"the registry wants a login for {image}, and " + (f"the pull secret {gone[0]} does not exist" if gone else "its pull secret is not accepted" if secrets else "the pod has no pull secret"),
                    make + ("" if gone else f"; {where}: imagePullSecrets: [{{name: {(secrets or ['regcred'])[0]}}}]"),
                ),
                "registry-unreachable": (f"the node cannot reach the registry of {image}", f"on the node {text(pod, 'spec', 'nodeName')}: curl -v https://{_registry(image)}/v2/ (DNS, proxy, firewall, certificate)"),
                "registry-rate-limit": (f"the registry of {image} limits how often this cluster may pull", f"pull with a login, or from a mirror: {where}: imagePullSecrets"),
                "image-pull": (f"the image {image} does not come", f"kubectl -n {namespace(pod)} describe pod {name(pod)}"),
            }[cause]  # fmt: skip
            yield Finding(cause, (ref(pod),), what, evidence, fix, _needs(facts, pod))


def _registry(image: str) -> str:
    first = image.split("/", 1)[0]
    return first if "/" in image and ("." in first or ":" in first) else "docker.io"


def _needs(facts: Facts, pod: Json) -> tuple[str, ...]:
    node = text(pod, "spec", "nodeName")
    return (f"Node/{node}", ref(pod), *(f"PersistentVolumeClaim/{namespace(pod)}/{c}" for c in claims(pod)))


def claims(pod: Json) -> list[str]:
    found = [text(v, "persistentVolumeClaim", "claimName") for v in listed(pod, "spec", "volumes")]
    return [claim for claim in found if claim]


def configuration(facts: Facts) -> Iterator[Finding]:
    """A ConfigMap or Secret that is not there, a volume that cannot be mounted, a container that cannot be made."""
    for pod in alive(facts):
        if ended(pod) or not text(pod, "spec", "nodeName"):
            continue
        for status in statuses(pod):
            waiting = table(status, "state", "waiting")
            reason, said = text(waiting, "reason"), text(waiting, "message")
            evidence = (
                f'{ref(pod)} status.containerStatuses[{text(status, "name")}].state.waiting: {reason} "{said}"',
            )
            if reason == "CreateContainerConfigError":
                yield Finding("missing-config", (ref(pod),), f"its container cannot be configured: {said}", evidence, _make(pod, said), _needs(facts, pod))  # fmt: skip
            elif reason in ("CreateContainerError", "RunContainerError", "StartError"):
                lacks = re.search(r"no such file|executable file not found|permission denied", said)
                cause = "command-not-found" if lacks else "container-create"
                yield Finding(cause, (ref(pod),), f"its container does not start: {said[:200]}", evidence, f"correct command and args in {owner(pod)}, or the image", _needs(facts, pod))  # fmt: skip
            elif reason in ("ContainerCreating", "PodInitializing"):
                said = facts.said(pod, "FailedMount|FailedAttachVolume")
                if said:
                    cause = "volume-multi-attach" if "Multi-Attach" in said else "missing-config" if re.search(r"(configmap|secret) \"?[^ ]+ not found", said) else "mount-failed"  # fmt: skip
                    fix = {"volume-multi-attach": "delete the pod that holds it on another node, or take a ReadWriteMany storage class",
                        "missing-config": _make(pod, said), "mount-failed": f"kubectl -n {namespace(pod)} describe pod {name(pod)}; see the CSI driver's pods and the server that it mounts from"}[cause]  # fmt: skip
                    yield Finding(cause, (ref(pod),), f"a volume cannot be mounted: {said[:200]}", (f'event FailedMount of {ref(pod)}: "{said}"',), fix, _needs(facts, pod))  # fmt: skip
                    break


def _make(pod: Json, said: str) -> str:
    found = re.search(r"(secret|configmap) \"?([\w.\-/]+)\"?", said, re.IGNORECASE)
    if not found:
        return f"kubectl -n {namespace(pod)} describe pod {name(pod)}; create what it names"
    kind, called = found[1].lower(), found[2].rpartition("/")[2]
    how = "create secret generic" if kind == "secret" else "create configmap"
    return f"kubectl -n {namespace(pod)} {how} {called} --from-literal=KEY=VALUE"


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
            container = _of(pod, text(status, "name"))
            cause, what, fix = _exit(facts, pod, container, code, text(last, "reason"))
            if cause == "liveness-kills":
                continue  # its own rule says more
            again = number(status, "restartCount")
            where = "state" if now else "lastState"
            evidence = f"{ref(pod)} status.containerStatuses[{text(status, 'name')}].{where}.terminated: {text(last, 'reason') or '?'}, exit code {code}; restarts: {again}"  # fmt: skip
            yield Finding(cause, (ref(pod),), what, (evidence,), fix, _needs(facts, pod))


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
        return "oom-killed", f"exit code {code}, OOMKilled: it used more memory than its limit ({limit}), which also counts what is in /dev/shm", \
            f"in {owner(pod)}: resources.limits.memory above {limit}; or a smaller batch, fewer data workers"  # fmt: skip
    if facts.said(pod, "Killing", "liveness|startup") or facts.said(pod, "Unhealthy", "Liveness|Startup"):
        return "liveness-kills", "", ""
    if code == 135:
        sized = [v for v in listed(pod, "spec", "volumes") if text(v, "emptyDir", "medium") == "Memory"]
        now = f"is {text(sized[0], 'emptyDir', 'sizeLimit') or 'unlimited'}" if sized else "has its default of 64 MiB"
        return "bus-error", f"exit code 135, {EXITS[135][1]}; /dev/shm {now}", \
            "volumes: [{name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}]; volumeMounts: [{name: shm, mountPath: /dev/shm}]"  # fmt: skip
    if code in EXITS:
        cause, what = EXITS[code]
        fix = f"correct command in {owner(pod)}, or the image" if cause == "command-not-found" else f"{logs}; run with NCCL_DEBUG=INFO and PYTHONFAULTHANDLER=1"  # fmt: skip
        return cause, f"exit code {code}, {what}", fix
    if code in (137, 143):
        return "killed", f"exit code {code}: killed from outside ({'SIGKILL' if code == 137 else 'SIGTERM'}), and not by its memory limit", \
            f"kubectl -n {namespace(pod)} get events --field-selector involvedObject.name={name(pod)}; {logs}"  # fmt: skip
    return "application-error", f"exit code {code}: the program itself ended with an error", logs


def budget_s(container: Json) -> tuple[int, str]:
    """Seconds that probes give a container to come up, and by which field. 0 if none can kill it."""
    for kind, otherwise in (("startupProbe", 3), ("livenessProbe", 3)):
        if probe := table(container, kind):
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
            container = _of(pod, text(status, "name"))
            killed = facts.said(pod, "Killing", "liveness probe|startup probe") or facts.said(
                pod, "Unhealthy", "Liveness|Startup"
            )
            last = table(status, "lastState", "terminated")
            if killed and (number(status, "restartCount") or last):
                seconds, field = budget_s(container)
                lived = int((when(last.get("finishedAt")) - when(last.get("startedAt"))).total_seconds()) if last else 0
                tries = -(-max(600, 3 * seconds) // 10)
                message = f"its {field or 'probe'} kills it while it starts: it has {seconds} s to come up (initialDelaySeconds + periodSeconds x failureThreshold), and lived {lived} s"  # fmt: skip
                yield Finding("liveness-kills", (ref(pod),), message, (f'event of {ref(pod)}: "{killed}"; restarts: {number(status, "restartCount")}',),
                    f"in {owner(pod)}: startupProbe: {{httpGet: ..., periodSeconds: 10, failureThreshold: {tries}}}   ({tries * 10} s; more than the model takes to load)", _needs(facts, pod))  # fmt: skip
            elif table(status, "state", "running") and (said := facts.said(pod, "Unhealthy", "Readiness")):
                probe = table(container, "readinessProbe")
                path = text(probe, "httpGet", "path") or "its check"
                yield Finding("readiness-fails", (ref(pod),), f"runs and does not become ready: {path} does not answer as its readinessProbe wants",
                    (f'event Unhealthy of {ref(pod)}: "{said}"',),
                    f"kubectl -n {namespace(pod)} logs {name(pod)}; correct path and port of readinessProbe in {owner(pod)}", _needs(facts, pod))  # fmt: skip


def refused_by_node(facts: Facts) -> Iterator[Finding]:
    """Evicted, or refused by the kubelet that it was given to."""
    for pod in alive(facts):
        reason, said = text(pod, "status", "reason"), text(pod, "status", "message")
        evidence = (f'{ref(pod)} status.reason: {reason}, "{said}"',)
        if phase(pod) == "Failed" and reason == "Evicted":
            what = next((w for w in ("ephemeral-storage", "memory", "pids", "inodes") if w in said), "a resource")
            fix = {"ephemeral-storage": "write to a volume, or set resources.limits.ephemeral-storage to what it needs",
                "memory": "set resources.requests.memory to what it uses"}.get(what, "see the node's conditions")  # fmt: skip
            yield Finding(
                "evicted",
                (ref(pod),),
                f"evicted: its node ran low on {what}",
                evidence,
                f"in {owner(pod)}: {fix}",
                _needs(facts, pod),
            )
        elif phase(pod) == "Failed" and reason in ("UnexpectedAdmissionError", "OutOfnvidia.com/gpu"):
            yield Finding("device-unavailable", (ref(pod),), "the kubelet could not give it the devices that the scheduler counted: the device plugin restarted or a GPU is sick", evidence,
                f"kubectl -n {namespace(pod)} delete pod {name(pod)}; kubectl describe node {text(pod, 'spec', 'nodeName')} (allocatable nvidia.com/gpu)", _needs(facts, pod))  # fmt: skip


RULES = [images, configuration, exits, probes, refused_by_node]
