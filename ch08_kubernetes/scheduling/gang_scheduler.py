"""A gang scheduler in the open: all pods of a group get a node, or none does.

You learn   why two half-placed jobs wait for each other for ever, and the rule that ends it: bind only what fits whole
Laptop      python -m ch08_kubernetes.scheduling.gang_scheduler --kubeconfig FILE      (or KUBECONFIG; Ctrl-C ends it)
GPU node    the same against k3s
Cluster     the same, from outside or in a pod; Kueue (gang.yaml) does it by admission and knows queues and quotas
You see     a line for each gang: bound, or what it waits for

A pod is in a gang by `schedulerName: gang`, the label `book/gang: NAME` and the annotation `book/gang-size: "N"`. Each
pass looks at what is free, takes gangs by priority and age, places all pods of one on paper (`place`) and binds them
only if the paper holds all N. It looks at taints, node selectors, required node affinity and resources; the other rules
of kube-scheduler are for pods that it places.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster import target
from ch08_kubernetes.cluster.rest import Json, as_user_error, call, get
from ch08_kubernetes.doctor.facts import amount, condition, requests
from ch08_kubernetes.doctor.filters import barriers, selected
from common import script

NAME = "gang"
GANG, SIZE = "book/gang", "book/gang-size"
Amounts = Mapping[str, Decimal]


def wanted(pod: Json) -> Counter[str]:
    """What the scheduler counts for a pod, itself included."""
    return Counter(requests(pod)) + Counter({"pods": Decimal(1)})


def may_run(pod: Json, node: Json) -> bool:
    """By all but resources: the node is ready and open, its taints are tolerated, its labels are those asked for."""
    return condition(node, "Ready").get("status") == "True" and not barriers(pod, node) and selected(pod, node)


def place(pods: Iterable[Json], nodes: Iterable[Json], free: Mapping[str, Amounts]) -> dict[str, str] | None:
    """A node for each pod (by uid), or None if one has none. First fit, the largest pod first, the fullest node first.

    Whole nodes so stay free for the next gang. First fit may miss a packing that exists; for pods of one size, as the
    ranks of a job are, it does not.
    """
    left = {name: Counter(amounts) for name, amounts in free.items()}
    found: dict[str, str] = {}
    for pod in sorted(pods, key=lambda pod: -wanted(pod)["nvidia.com/gpu"]):
        needs = wanted(pod)
        fitting = [
            node["metadata"]["name"]
            for node in nodes
            if may_run(pod, node) and all(left[node["metadata"]["name"]][n] >= amount for n, amount in needs.items())
        ]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda name: (left[name]["nvidia.com/gpu"], left[name]["cpu"], name))
        left[chosen].subtract(needs)
        found[pod["metadata"]["uid"]] = chosen
    return found


def free_on(nodes: Iterable[Json], pods: Iterable[Json]) -> dict[str, Counter[str]]:
    """Allocatable less what pods that are bound and have not ended asked for."""
    free = {
        node["metadata"]["name"]: Counter({n: amount(v) for n, v in node["status"].get("allocatable", {}).items()})
        for node in nodes
    }
    for pod in pods:
        where = pod["spec"].get("nodeName")
        if where in free and pod["status"].get("phase") not in ("Succeeded", "Failed"):
            free[where].subtract(wanted(pod))
    return free


@dataclass(frozen=True)
class Gang:
    """Pods of one namespace with the same label; `size` is how many it must be, 0 if its pods do not say the same."""

    namespace: str
    name: str
    size: int
    pods: tuple[Json, ...]

    @property
    def turn(self) -> tuple[Any, ...]:
        """Higher priority first, then the one that has waited longest."""
        first = min(pod["metadata"]["creationTimestamp"] for pod in self.pods)
        return -max(pod["spec"].get("priority", 0) for pod in self.pods), first, self.name


def gangs(pods: Iterable[Json]) -> list[Gang]:
    """Those with pods that wait for this scheduler, in their turn."""
    members: dict[tuple[str, str], list[Json]] = defaultdict(list)
    for pod in pods:
        meta = pod["metadata"]
        waits = pod["spec"].get("schedulerName") == NAME and not pod["spec"].get("nodeName")
        if waits and "deletionTimestamp" not in meta and GANG in meta.get("labels", {}):
            members[meta["namespace"], meta["labels"][GANG]].append(pod)
    found = []
    for (namespace, name), waiting in members.items():
        said = {pod["metadata"].get("annotations", {}).get(SIZE, "") for pod in waiting}
        size = said.pop() if len(said) == 1 else ""
        found.append(Gang(namespace, name, int(size) if size.isdecimal() else 0, tuple(waiting)))
    return sorted(found, key=lambda gang: gang.turn)


def bound_already(gang: Gang, pods: Iterable[Json]) -> int:
    """Members that have a node and have not ended: of a gang that lost a pod, those that still run."""
    return sum(
        pod["metadata"].get("labels", {}).get(GANG) == gang.name
        and pod["metadata"]["namespace"] == gang.namespace
        and bool(pod["spec"].get("nodeName"))
        and pod["status"].get("phase") not in ("Succeeded", "Failed")
        for pod in pods
    )


def bind(api: ApiClient, pod: Json, node: str) -> None:
    meta = pod["metadata"]
    path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}/binding"
    target = {"apiVersion": "v1", "kind": "Node", "name": node}
    name = {"name": meta["name"], "uid": meta["uid"]}  # not a later pod of that name
    call(api, "POST", path, {"apiVersion": "v1", "kind": "Binding", "metadata": name, "target": target})


def one_pass(api: ApiClient) -> dict[str, str]:
    """Bind what fits whole; of each waiting gang, `namespace/name`, what became of it."""
    nodes, pods = get(api, "/api/v1/nodes")["items"], get(api, "/api/v1/pods")["items"]
    said: dict[str, str] = {}
    free = free_on(nodes, pods)
    for gang in gangs(pods):
        title = f"{gang.namespace}/{gang.name}"
        if not gang.size:
            said[title] = f"waits: its pods need the annotation {SIZE}, all the same number"
            continue
        there = len(gang.pods) + bound_already(gang, pods)
        if there < gang.size:
            said[title] = f"waits: {there} of {gang.size} pods exist"
            continue
        placed = place(gang.pods, nodes, free)
        if placed is None:
            said[title] = f"waits: its {len(gang.pods)} pods do not fit together"
            continue
        for pod in gang.pods:
            where = placed[pod["metadata"]["uid"]]
            try:
                bind(api, pod, where)
            except ApiException as error:
                if error.status not in (404, 409):
                    raise
                continue  # deleted meanwhile
            free[where].subtract(wanted(pod))
        said[title] = f"bound: {', '.join(sorted(placed.values()))}"
    return said


class GangScheduler:
    """Passes in a thread, as a context manager.

    Raises:
        what ended the thread, on leaving.
    """

    def __init__(self, api: ApiClient, every_s: float = 1.0) -> None:
        self.api, self.every_s = api, every_s
        self._stopped, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> GangScheduler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                one_pass(self.api)
                self._stopped.wait(self.every_s)
        except BaseException as error:
            self._error = error


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    target.add_flags(parser)
    parser.add_argument("--every", type=script.positive, default=1.0, help="s between passes")
    parser.add_argument("--passes", type=script.at_least(1), help="end after so many")
    args = parser.parse_args(argv)
    found = target.connect(args)
    before: dict[str, str] = {}
    passes = bound = 0
    try:
        while args.passes is None or passes < args.passes:
            if passes:
                time.sleep(args.every)
            said = one_pass(found.api)
            for title, what in said.items():
                if before.get(title) != what:
                    print(f"{title}: {what}", flush=True)
            bound += sum(what.startswith("bound") for what in said.values())
            before, passes = said, passes + 1
    except (ApiException, HTTPError) as error:
        raise as_user_error(error, found.url) from None
    return {"passes": passes, "bound": bound, "waiting": sum(what.startswith("waits") for what in before.values())}


if __name__ == "__main__":
    script.run(main)
