"""A snapshot of a cluster, asked by the rules: objects by kind, their events, and what pods request of nodes.

Objects are plain JSON, and any field may be missing: an answer is then empty, and a rule has nothing to say.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.lint.objects import quantity
from common.script import UserError

GPU = "nvidia.com/gpu"
GPU_NAMES = re.compile(r"(nvidia\.com/(gpu|mig-)|amd\.com/gpu|gpu\.intel\.com/)")
RANK_KEYS = ("batch.kubernetes.io/job-completion-index", "leaderworkerset.sigs.k8s.io/worker-index")
MEETING = ("NNODES", "WORLD_SIZE", "MASTER_ADDR", "RDZV_ENDPOINT", "PET_NNODES", "PET_RDZV_ENDPOINT")
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def at(node: Any, *path: str | int) -> Any:
    """What lies under these keys; None if there is nothing."""
    for key in path:
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            return None
    return node


def table(node: Any, *path: str | int) -> Json:
    found = at(node, *path)
    return found if isinstance(found, dict) else {}


def listed(node: Any, *path: str | int) -> list[Json]:
    """The objects in a list; those that are none are left out."""
    found = at(node, *path)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def text(node: Any, *path: str | int) -> str:
    found = at(node, *path)
    return "" if found is None else str(found)


def number(node: Any, *path: str | int) -> int:
    found = at(node, *path)
    return found if isinstance(found, int) else 0


def amount(value: Any) -> Decimal:
    """A quantity; 0 if it is none."""
    try:
        return quantity(value)
    except UserError:
        return Decimal(0)


def when(value: Any) -> datetime:
    try:
        found = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        return LONG_AGO
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ref(body: Json) -> str:
    """Kind/namespace/name, or Kind/name."""
    meta = table(body, "metadata")
    return "/".join(filter(None, (text(body, "kind") or "?", text(meta, "namespace"), text(meta, "name") or "?")))


def name(body: Json) -> str:
    return text(body, "metadata", "name")


def namespace(body: Json) -> str:
    return text(body, "metadata", "namespace")


def labels(body: Json) -> dict[str, str]:
    return {key: str(value) for key, value in table(body, "metadata", "labels").items()}


def condition(body: Json, kind: str) -> Json:
    return next((c for c in listed(body, "status", "conditions") if c.get("type") == kind), {})


def containers(pod: Json) -> list[Json]:
    return listed(pod, "spec", "containers")


def statuses(pod: Json) -> list[Json]:
    return listed(pod, "status", "initContainerStatuses") + listed(pod, "status", "containerStatuses")


def phase(pod: Json) -> str:
    return text(pod, "status", "phase")


def ready(pod: Json) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def ended(pod: Json) -> bool:
    return phase(pod) in ("Succeeded", "Failed")


def owner(body: Json) -> str:
    """Kind/namespace/name of what controls it; itself if nothing does."""
    for each in listed(body, "metadata", "ownerReferences"):
        if each.get("controller") or each.get("kind"):
            return "/".join((text(each, "kind"), namespace(body), text(each, "name")))
    return ref(body)


def is_gpu(resource: str) -> bool:
    return GPU_NAMES.match(resource) is not None


def requests(pod: Json) -> dict[str, Decimal]:
    """What the scheduler counts for a pod: its containers together, or an init container if that wants more.

    Source: Kubernetes documentation, Init Containers, Resource sharing within containers, and Sidecar Containers.
    """

    def of(container: Json) -> dict[str, Decimal]:
        said = {**table(container, "resources", "limits"), **table(container, "resources", "requests")}
        return {key: amount(value) for key, value in said.items()}

    total: dict[str, Decimal] = defaultdict(Decimal)
    sidecars: dict[str, Decimal] = defaultdict(Decimal)
    most: dict[str, Decimal] = defaultdict(Decimal)
    for init in listed(pod, "spec", "initContainers"):
        for key, value in of(init).items():
            if init.get("restartPolicy") == "Always":
                sidecars[key] += value
                most[key] = max(most[key], sidecars[key])
            else:
                most[key] = max(most[key], sidecars[key] + value)
    for container in containers(pod):
        for key, value in of(container).items():
            total[key] += value
    return {
        key: max(total[key] + sidecars[key], most[key]) + amount(table(pod, "spec", "overhead").get(key, 0))
        for key in {*total, *most}
    }


class Facts:
    """What is known of a cluster.

    Args:
        objects: as `kubectl get -o json` prints them, with their kind.
        now: when they were so; the latest time that any of them names, if None.
        logs: last lines of containers, by Pod/namespace/name.
    """

    def __init__(
        self, objects: Iterable[Json], now: datetime | None = None, logs: Mapping[str, str] | None = None
    ) -> None:
        of: dict[str, dict[str, Json]] = defaultdict(dict)
        for body in objects:
            if isinstance(body, dict):
                of[text(body, "kind")][ref(body)] = body
        self._of = {kind: dict(sorted(found.items())) for kind, found in of.items()}
        self.logs = dict(logs or {})
        self.now = now or max((when(stamp) for stamp in _stamps(list(of.values()))), default=LONG_AGO)
        self.events: dict[str, list[Json]] = defaultdict(list)  # by what they are about, the oldest first
        for event in sorted(self.all("Event"), key=lambda e: (seen(e), ref(e))):
            self.events[ref({**table(event, "involvedObject"), "metadata": table(event, "involvedObject")})].append(
                event
            )
        self.held: dict[str, list[Json]] = defaultdict(list)  # pods by the node that they take room on
        for pod in self.all("Pod"):
            if text(pod, "spec", "nodeName") and not ended(pod):
                self.held[text(pod, "spec", "nodeName")].append(pod)
        self.pods_of: dict[str, list[Json]] = defaultdict(list)  # by their controller
        for pod in self.all("Pod"):
            self.pods_of[owner(pod)].append(pod)

    def all(self, kind: str) -> list[Json]:
        return list(self._of.get(kind, {}).values())

    def get(self, reference: str) -> Json | None:
        return self._of.get(reference.split("/", 1)[0], {}).get(reference)

    def has(self, kind: str, within: str, called: str) -> bool:
        return self.get("/".join(filter(None, (kind, within, called)))) is not None

    def knows(self, kind: str) -> bool:
        """Whether any object of the kind is there: if none, perhaps it was not read."""
        return kind in self._of

    def said(self, body: Json | str, reason: str, words: str = "") -> str:
        """The message of the newest event of this reason (a regular expression), "" if there is none."""
        about = body if isinstance(body, str) else ref(body)
        for event in reversed(self.events.get(about, [])):
            message = text(event, "message")
            if re.fullmatch(reason, text(event, "reason")) and re.search(words, message):
                return message
        return ""

    def age_s(self, stamp: Any) -> float:
        return (self.now - when(stamp)) / timedelta(seconds=1)

    def allocatable(self, node: Json) -> dict[str, Decimal]:
        return {key: amount(value) for key, value in table(node, "status", "allocatable").items()}

    def capacity(self, node: Json) -> dict[str, Decimal]:
        return {key: amount(value) for key, value in table(node, "status", "capacity").items()}

    def free(self, node: Json) -> dict[str, Decimal]:
        left = self.allocatable(node)
        for pod in self.held.get(name(node), []):
            for key, value in requests(pod).items():
                if key in left:
                    left[key] -= value
        if "pods" in left:
            left["pods"] -= len(self.held.get(name(node), []))
        return left


def seen(event: Json) -> datetime:
    stamps = (event.get("lastTimestamp"), at(event, "series", "lastObservedTime"), event.get("eventTime"))
    return max(when(stamp) for stamp in (*stamps, at(event, "metadata", "creationTimestamp")))


def rank(pod: Json) -> str:
    """Which rank of its job a pod is; "" where nothing says so."""
    for key in RANK_KEYS:
        found = text(pod, "metadata", "annotations", key) or labels(pod).get(key, "")
        if found:
            return found
    return ""


def meets_others(template: Json) -> bool:
    """Whether its processes wait for those of other pods: the variables of a rendezvous are set."""
    return any(text(variable, "name") in MEETING for c in containers(template) for variable in listed(c, "env"))


def _stamps(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        for key, inner in node.items():
            if isinstance(inner, str) and key.endswith(("Time", "Timestamp", "At")) and key != "deletionTimestamp":
                yield inner
            else:
                yield from _stamps(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _stamps(inner)
