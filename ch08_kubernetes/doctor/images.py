"""Rules for images that do not come, and for containers that cannot be configured."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    condition,
    containers,
    ended,
    listed,
    name,
    namespace,
    owner,
    phase,
    ref,
    statuses,
    table,
    text,
)
from ch08_kubernetes.doctor.findings import Finding

PULL = ("ImagePullBackOff", "ErrImagePull", "ErrImageNeverPull", "InvalidImageName")


BY_MESSAGE = [  # the first that matches decides
    ("registry-rate-limit", r"toomanyrequests|429 Too Many|rate limit"),
    (
        "registry-unreachable",
        r"no such host|i/o timeout|connection refused|dial tcp|TLS handshake|x509|timed? ?out|EOF",
    ),
    (
        "image-pull-secret",
        (
            r"unauthorized|authentication required|access denied|denied:|no basic "
            r"auth|401|403|Forbidden|insufficient_scope"
        ),
    ),
    ("image-not-found", r"not ?found|manifest unknown|name unknown|does not exist|404|no match for platform"),
]


def alive(facts: Facts) -> list[Json]:
    """Pods with a node that have not succeeded, and whose Job has not either."""
    found = []
    for pod in facts.all("Pod"):
        job = facts.get(owner(pod)) if owner(pod).startswith("Job/") else None
        if phase(pod) != "Succeeded" and not (job and condition(job, "Complete").get("status") == "True"):
            found.append(pod)
    return found


def container_of(pod: Json, container: str) -> Json:
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
            image = text(status, "image") or text(container_of(pod, text(status, "name")), "image")
            event = facts.said(pod, "Failed|ErrImagePull|InspectFailed", "(?i)pull|image")
            said = " ".join(filter(None, (text(waiting, "message"), event)))
            evidence = (
                f"{ref(pod)} status.containerStatuses[{text(status, 'name')}].state.waiting: {waiting.get('reason')}",
                f'event Failed: "{event or said}"',
            )
            cause = next((kind for kind, words in BY_MESSAGE if re.search(words, said, re.IGNORECASE)), "image-pull")
            if waiting.get("reason") == "InvalidImageName":
                cause = "image-name-invalid"
            where = f"in {owner(pod)}"
            secrets = _secrets(facts, pod)
            gone = [s for s in secrets if facts.knows("Secret") and not facts.has("Secret", namespace(pod), s)]
            make = (
                f"kubectl -n {namespace(pod)} create secret docker-registry {(gone or ['regcred'])[0]} "
                f"--docker-server={_registry(image)} ..."
            )
            what, fix = {
                "image-name-invalid": (
                    f"the image name {image!r} is malformed (capitals, a blank or a second colon)",
                    f"{where}: image: REGISTRY/NAME:TAG",
                ),
                "image-not-found": (
                    f"the registry has no image {image}",
                    f"{where}: correct the name or tag; try: crane ls {image.rpartition(':')[0] or image}",
                ),
                "image-pull-secret": (
                    f"the registry wants a login for {image}, and "
                    + (
                        f"the pull secret {gone[0]} does not exist"
                        if gone
                        else "its pull secret is not accepted"
                        if secrets
                        else "the pod has no pull secret"
                    ),
                    make + ("" if gone else f"; {where}: imagePullSecrets: [{{name: {(secrets or ['regcred'])[0]}}}]"),
                ),
                "registry-unreachable": (
                    f"the node cannot reach the registry of {image}",
                    (
                        f"on the node {text(pod, 'spec', 'nodeName')}: curl -v "
                        f"https://{_registry(image)}/v2/ (DNS, proxy, firewall, certificate)"
                    ),
                ),
                "registry-rate-limit": (
                    f"the registry of {image} limits how often this cluster may pull",
                    f"pull with a login, or from a mirror: {where}: imagePullSecrets",
                ),
                "image-pull": (
                    f"the image {image} does not come",
                    f"kubectl -n {namespace(pod)} describe pod {name(pod)}",
                ),
            }[cause]
            yield Finding(cause, (ref(pod),), what, evidence, fix, causes(facts, pod))


def _registry(image: str) -> str:
    first = image.split("/", 1)[0]
    return first if "/" in image and ("." in first or ":" in first) else "docker.io"


def causes(facts: Facts, pod: Json) -> tuple[str, ...]:
    node = text(pod, "spec", "nodeName")
    return (f"Lost/{node}", ref(pod), *(f"PersistentVolumeClaim/{namespace(pod)}/{c}" for c in claims(pod)))


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
                yield Finding(
                    "missing-config",
                    (ref(pod),),
                    f"its container cannot be configured: {said}",
                    evidence,
                    _make(pod, said),
                    causes(facts, pod),
                )
            elif reason in ("CreateContainerError", "RunContainerError", "StartError"):
                lacks = re.search(r"no such file|executable file not found|permission denied", said)
                cause = "command-not-found" if lacks else "container-create"
                yield Finding(
                    cause,
                    (ref(pod),),
                    f"its container does not start: {said[:200]}",
                    evidence,
                    f"correct command and args in {owner(pod)}, or the image",
                    causes(facts, pod),
                )
            elif reason in ("ContainerCreating", "PodInitializing"):
                said = facts.said(pod, "FailedMount|FailedAttachVolume")
                if said:
                    cause = (
                        "volume-multi-attach"
                        if "Multi-Attach" in said
                        else "missing-config"
                        if re.search(r"(configmap|secret) \"?[^ ]+ not found", said)
                        else "mount-failed"
                    )
                    fix = {
                        "volume-multi-attach": (
                            "delete the pod that holds it on another node, or take a ReadWriteMany storage class"
                        ),
                        "missing-config": _make(pod, said),
                        "mount-failed": (
                            f"kubectl -n {namespace(pod)} describe pod {name(pod)}; see the CSI "
                            "driver's pods and the server that it mounts from"
                        ),
                    }[cause]
                    yield Finding(
                        cause,
                        (ref(pod),),
                        f"a volume cannot be mounted: {said[:200]}",
                        (f'event FailedMount of {ref(pod)}: "{said}"',),
                        fix,
                        causes(facts, pod),
                    )
                    break


def _make(pod: Json, said: str) -> str:
    found = re.search(r"(secret|configmap) \"?([\w.\-/]+)\"?", said, re.IGNORECASE)
    if not found:
        return f"kubectl -n {namespace(pod)} describe pod {name(pod)}; create what it names"
    kind, called = found[1].lower(), found[2].rpartition("/")[2]
    how = "create secret generic" if kind == "secret" else "create configmap"
    return f"kubectl -n {namespace(pod)} {how} {called} --from-literal=KEY=VALUE"


RULES = [images, configuration]
