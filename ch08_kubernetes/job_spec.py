"""A training job's manifests, from an overlay of training/overlays and what a user asks for."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ch08_kubernetes.cluster.apply import objects
from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import GPU, containers, listed, table
from common.script import UserError

OVERLAYS = Path(__file__).parent / "training" / "overlays"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")  # of a Job whose pods add "-INDEX" to it, and of its Service
OLD = "train"  # what the overlays call it
TOLERATION = {"key": GPU, "operator": "Exists", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Wish:
    """What differs from the overlay; None leaves it.

    Attributes:
        nodes: pods, one a node.
        gpus: GPUs, and so ranks, of each pod; 0 for CPUs, where a pod is one rank.
        command: the training script and its arguments.
    """

    name: str = OLD
    namespace: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    image: str | None = None
    team: str | None = None
    command: list[str] = field(default_factory=list)


def overlays() -> list[str]:
    return sorted(path.name for path in OVERLAYS.iterdir() if (path / "kustomization.yaml").is_file())


def made(overlay: str, wish: Wish) -> list[Json]:
    """The overlay's objects, changed as wished.

    Raises:
        UserError: there is no such overlay, or a name that Kubernetes does not take.
    """
    if overlay not in overlays():
        raise UserError(f"there is no overlay {overlay!r}; known are {', '.join(overlays())}")
    for what, value in (("name", wish.name), ("namespace", wish.namespace), ("team", wish.team)):
        if value is not None and not NAME.fullmatch(value):
            raise UserError(
                f"the {what} {value!r} is none for Kubernetes; take small letters, digits and '-', at most 52"
            )
    return [changed(body, wish) for body in objects(OVERLAYS / overlay)]


def changed(body: Json, wish: Wish) -> Json:
    """A copy of one object."""
    body = copy.deepcopy(body)
    meta = body["metadata"]
    if wish.namespace:
        if body["kind"] == "Namespace":
            meta["name"] = wish.namespace
        elif "namespace" in meta:
            meta["namespace"] = wish.namespace
    if body["kind"] in ("Job", "Service") and meta["name"] == OLD:
        body = _renamed(body, wish.name)
    if body["kind"] == "Job":
        _shape(body, wish)
    return body


def _renamed(body: Json, called: str) -> Json:
    """The name in all places where it stands for the job: its pods' label, their domain, the rendezvous."""

    def walk(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            if node.get("name") in ("RDZV_ENDPOINT", "RDZV_ID"):
                return {**node, "value": node["value"].replace(OLD, called)}
            return {k: walk(v, k) for k, v in node.items()}
        if isinstance(node, list):
            return [walk(item) for item in node]
        return called if node == OLD and key in ("app", "subdomain") else node

    body = walk(body)
    body["metadata"]["name"] = called
    return body  # type: ignore[no-any-return]


def _shape(job: Json, wish: Wish) -> None:
    template = job["spec"]["template"]
    pod, container = template["spec"], containers(template)[0]
    if wish.nodes is not None:
        job["spec"] |= {"completions": wish.nodes, "parallelism": wish.nodes}
        _set(container, "NNODES", str(wish.nodes))
    if wish.gpus is not None:
        limits = container.setdefault("resources", {}).setdefault("limits", {})
        limits.pop(GPU, None)
        table(container, "resources", "requests").pop(GPU, None)
        if wish.gpus:
            limits[GPU] = wish.gpus
            if not any(t.get("key") == GPU for t in listed(pod, "tolerations")):
                pod["tolerations"] = [*listed(pod, "tolerations"), TOLERATION]
        _set(container, "NPROC_PER_NODE", str(wish.gpus or 1))
    if wish.image:
        container["image"] = wish.image
    if wish.command:
        container["args"] = wish.command
    else:  # two jobs never write into one folder of the claim
        container["args"] = [
            str(word).replace(f"/checkpoints/{OLD}", f"/checkpoints/{wish.name}") for word in container["args"]
        ]
    if wish.team:
        for meta in (job["metadata"], template["metadata"]):
            meta.setdefault("labels", {})["team"] = wish.team


def _set(container: Json, variable: str, value: str) -> None:
    others = [each for each in listed(container, "env") if each.get("name") != variable]
    container["env"] = [{"name": variable, "value": value}, *others]
