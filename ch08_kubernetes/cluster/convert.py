"""Objects of today for an API server of yesterday: only what it lacks is changed, and each change has a name.

Two ways lead to a loss. What the server would refuse is converted here, by what its discovery and its version say. What
it drops in silence, since it does not know the field, is found by comparing what was sent with what came back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from ch08_kubernetes.cluster.discovery import Server, group_of
from ch08_kubernetes.cluster.rest import Json

# (group, kind): versions with the same fields, the newest first, and what differs in meaning all the same.
SAME_FIELDS = {
    ("autoscaling", "HorizontalPodAutoscaler"): ["v2", "v2beta2"],
    ("policy", "PodDisruptionBudget"): ["v1", "v1beta1"],
    ("batch", "CronJob"): ["v1", "v1beta1"],
    ("discovery.k8s.io", "EndpointSlice"): ["v1", "v1beta1"],
}
BUILT_IN = ("", "apps", "batch")  # groups with pods in their objects
WRITE_ONLY = {"stringData"}  # of a Secret: it comes back as data
PRESERVE = "x-kubernetes-preserve-unknown-fields"
RULES = "x-kubernetes-validations"


def converted(body: Json, server: Server) -> tuple[Json, list[str]]:
    """A copy that the server takes, and what had to be changed, one line each."""
    body = copy.deepcopy(body)
    notes: list[str] = []
    version, kind = body["apiVersion"], body["kind"]
    if server.resource(version, kind) is None:
        group = group_of(version)
        for older in SAME_FIELDS.get((group, kind), []):
            if server.resource(f"{group}/{older}", kind):
                body["apiVersion"] = f"{group}/{older}"
                notes.append(f"{version} -> {group}/{older}")
                if kind == "PodDisruptionBudget" and body["spec"].get("selector") == {}:
                    notes.append("spec.selector: {} selects no pod in v1beta1, and all in v1")
                break
    if kind == "CustomResourceDefinition" and server.minor < 25:  # CEL rules are on from there
        notes += downgrade(body)
    if group_of(version) in BUILT_IN:  # a custom resource keeps the pods in it as they are
        for path, pod in pods(body, ()):
            notes += _older_pod(pod, server.minor, ".".join(path))
    return body, notes


def pods(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json]]:
    """Pod specs anywhere in an object, with the keys that lead to them."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield path, node
        for key, inner in node.items():
            yield from pods(inner, (*path, str(key)))


def _older_pod(pod: Json, minor: int, path: str) -> Iterator[str]:
    """Change handlers that an old server would drop and then miss: without one it refuses the whole object."""
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            where = f"{path}.{kind}[{index}]"
            for name in ("startupProbe", "readinessProbe", "livenessProbe"):
                if minor < 24 and (probe := container.get(name)) and "grpc" in probe:
                    probe["tcpSocket"] = {"port": probe.pop("grpc")["port"]}
                    yield f"{where}.{name}: grpc -> tcpSocket"
            for name, handler in (container.get("lifecycle") or {}).items():
                if minor < 30 and "sleep" in (handler or {}):
                    handler["exec"] = {"command": ["sleep", str(handler.pop("sleep")["seconds"])]}
                    yield f"{where}.lifecycle.{name}: sleep -> exec"


def dropped(sent: Any, came: Any, path: str = "") -> Iterator[str]:
    """The fields that were sent and did not come back. Those with an empty value are left out of answers anyway."""
    if isinstance(sent, dict):
        for key, value in sent.items():
            inner = f"{path}.{key}".lstrip(".")
            if key in WRITE_ONLY or inner == "status" or value in (None, "", 0, [], {}):
                continue
            if not isinstance(came, dict) or key not in came:
                yield inner
            else:
                yield from dropped(value, came[key], inner)
    elif isinstance(sent, list):
        for index, value in enumerate(sent):
            if not isinstance(came, list) or index >= len(came):
                yield f"{path}[{index}]"
            else:
                yield from dropped(value, came[index], f"{path}[{index}]")


def plural(kind: str) -> str:
    name = kind.lower()
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith(("s", "x", "ch")) else f"{name}s"


def definition(cut: Json) -> Json:
    """A CustomResourceDefinition from a published schema that was cut to what a check of fields needs (lint/crds).

    The format's own words come back: `integer or string`, `or null`, and for a pod's spec anything.
    """
    schema = _structural(copy.deepcopy(cut["schema"]))
    schema["properties"]["status"] = {"type": "object", PRESERVE: True}
    version = {"name": cut["version"], "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    version["subresources"] = {"status": {}}
    names = {"kind": cut["kind"], "plural": plural(cut["kind"]), "singular": cut["kind"].lower()}
    spec = {"group": cut["group"], "names": names, "scope": cut["scope"], "versions": [version]}
    metadata: Json = {"name": f"{names['plural']}.{cut['group']}"}
    if cut["group"].endswith((".k8s.io", ".kubernetes.io")):  # of those the server asks where they were reviewed
        metadata["annotations"] = {"api-approved.kubernetes.io": f"unapproved, a copy of {cut['source'].split()[0]}"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata,
        "spec": spec,
    }


def _structural(schema: Json) -> Json:
    def change(node: Json) -> None:
        if node.pop("x-pod-spec", False):
            node |= {"type": "object", PRESERVE: True}
        if node.get("additionalProperties") is False:
            del node["additionalProperties"]  # unknown fields are dropped in any case
        kinds = node.get("type")
        if isinstance(kinds, list):
            if "null" in kinds:
                node["nullable"] = True
            kinds = [kind for kind in kinds if kind != "null"]
            node["type"] = kinds[0]
            if len(kinds) > 1:
                del node["type"]
                node["x-kubernetes-int-or-string"] = True

    walk(schema, "", lambda node, _: change(node))
    return schema


def downgrade(body: Json) -> list[str]:
    """Take out of a CustomResourceDefinition what a server before CEL refuses; say what, and from how many places."""
    taken: dict[str, int] = {}

    def take(node: Json, key: str, what: str) -> None:
        del node[key]
        taken[what] = taken.get(what, 0) + 1

    def change(node: Json, path: str) -> None:
        if RULES in node:
            take(node, RULES, "CEL rules")
        if node.get("default", 0) in (None, ""):  # it reads both as null
            take(node, "default", "empty defaults")

    for version in body["spec"].get("versions", []):
        walk(version.get("schema", {}).get("openAPIV3Schema", {}), "", change)
    return [f"{what} taken out of {count} places of the schema" for what, count in taken.items()]


def walk(node: Any, path: str, change: Callable[[Json, str], None]) -> None:
    """Call `change` on each schema in a schema: of fields, of items, of alternatives."""
    if not isinstance(node, dict):
        return
    change(node, path)
    for name, inner in (node.get("properties") or {}).items():
        walk(inner, f"{path}.{name}", change)
    for key in ("items", "additionalProperties", "not"):
        walk(node.get(key), f"{path}[]", change)
    for key in ("allOf", "anyOf", "oneOf"):
        for inner in node.get(key) or []:
            walk(inner, path, change)
