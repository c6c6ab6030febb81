"""GPUs of a cluster: free and used, by node, type, zone and team, and the largest request that still fits.

You learn   that allocatable minus requests is all that the scheduler knows of a GPU, and that GPUs free in sum are not
            GPUs free on one node
Laptop      python -m ch08_kubernetes.cluster up, in another terminal: python -m ch08_kubernetes.inventory
            python -m ch08_kubernetes.inventory --demo        (starts a cluster, fills it, checks every figure)
Cluster     python -m ch08_kubernetes.inventory [--json] [--watch]     (needs to list nodes and pods)
You see     a row a node, sums by type, team and zone, what waits, and RESULT
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster import target
from ch08_kubernetes.cluster.rest import Json, as_user_error
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    condition,
    is_gpu,
    labels,
    listed,
    name,
    namespace,
    owner,
    requests,
)
from ch08_kubernetes.doctor.filters import CORDON, waiting
from ch08_kubernetes.doctor.read import KINDS, listing
from common import script

QUEUE = "kueue.x-k8s.io/queue-name"
NEEDED = ("Node", "Pod", "Namespace", "Job")


@dataclass(frozen=True)
class Row:
    """One GPU resource of one node: whole GPUs (nvidia.com/gpu), slices (nvidia.com/mig-1g.10gb), or shared ones.

    Attributes:
        capacity, allocatable: as the kubelet says; sick devices are in the first only.
        used: requests of the pods there, running or not yet.
        shares: containers that time-slicing or MPS lets on one GPU; 1 without.
        open: the scheduler may send pods here: ready, and not cordoned.
    """

    node: str
    product: str
    resource: str
    zone: str
    capacity: int
    allocatable: int
    used: int
    shares: int
    open: bool

    @property
    def free(self) -> int:
        return max(0, self.allocatable - self.used) if self.open else 0


def rows(facts: Facts) -> list[Row]:
    """By type and node name."""
    found = []
    for node in facts.all("Node"):
        marks, offered, free = labels(node), facts.allocatable(node), facts.free(node)
        cordoned = at(node, "spec", "unschedulable") or any(
            t.get("key") == CORDON for t in listed(node, "spec", "taints")
        )
        for resource, value in sorted(offered.items()):
            if is_gpu(resource):
                capacity = int(facts.capacity(node).get(resource, value))
                replicas = marks.get("nvidia.com/gpu.replicas", "1") if "mig-" not in resource else "1"
                found.append(
                    Row(
                        name(node),
                        marks.get("nvidia.com/gpu.product", "unknown"),
                        resource,
                        marks.get("topology.kubernetes.io/zone", "-"),
                        capacity,
                        int(value),
                        int(value - free[resource]),
                        max(1, int(replicas)) if replicas.isdigit() else 1,
                        condition(node, "Ready").get("status") == "True" and not cordoned,
                    )
                )
    return sorted(found, key=lambda row: (row.product, row.resource, row.node))


def team(facts: Facts, pod: Json) -> str:
    """Whose a pod is: a label `team` or Kueue's queue, of the pod, its job or its namespace; else the namespace."""
    for body in (pod, facts.get(owner(pod)), facts.get(f"Namespace/{namespace(pod)}")):
        for key in ("team", QUEUE):
            if body and (found := labels(body).get(key)):
                return found
    return namespace(pod)


def gpus(pod: Json) -> int:
    return int(sum(value for key, value in requests(pod).items() if is_gpu(key)))


def summary(facts: Facts) -> dict[str, Any]:
    """The figures: totals, by type, team and zone.

    largest_fit is the most GPUs that one pod can get now, by type; fragmented are those free beyond it on other nodes.
    """
    found = rows(facts)
    by_type: dict[str, dict[str, int]] = {}
    for row in found:
        key = row.product if row.resource == "nvidia.com/gpu" else f"{row.product} {row.resource.partition('/')[2]}"
        each = by_type.setdefault(key, Counter())  # type: ignore[arg-type]
        each["nodes"] += 1
        for part in ("allocatable", "used", "free"):
            each[part] += getattr(row, part)
        each["sick"] += row.capacity - row.allocatable
        each["largest_fit"] = max(each["largest_fit"], row.free)
        each["whole_nodes_free"] += row.open and row.free == row.allocatable > 0
    zones: Counter[str] = Counter()
    for row in found:
        zones[row.zone] += row.free
    teams: Counter[str] = Counter()
    for pods in facts.held.values():
        for pod in pods:
            if count := gpus(pod):
                teams[team(facts, pod)] += count
    pending = Counter(team(facts, pod) for pod in waiting(facts) for _ in range(gpus(pod)))
    total = {part: sum(getattr(row, part) for row in found) for part in ("allocatable", "used", "free")}
    return {
        "gpus": total["allocatable"],
        **{part: total[part] for part in ("used", "free")},
        "closed": sum(row.allocatable - row.used for row in found if not row.open),
        "pending": sum(pending.values()),
        "largest_fit": max((row.free for row in found), default=0),
        "by_type": {key: dict(value) for key, value in by_type.items()},
        "free_by_zone": dict(sorted(zones.items())),
        "used_by_team": dict(sorted(teams.items())),
        "pending_by_team": dict(sorted(pending.items())),
    }


def report(facts: Facts) -> Iterator[str]:
    found, sums = rows(facts), summary(facts)
    if not found:
        yield "no node offers GPUs"
        return
    yield f"{'node':20} {'type':26} {'resource':16} {'zone':8} {'allocatable':>11} {'used':>5} {'free':>5}"
    for row in found:
        shared = f" ({row.shares} shares a GPU)" if row.shares > 1 else ""
        sick = f" ({row.capacity - row.allocatable} sick)" if row.capacity > row.allocatable else ""
        state = "" if row.open else " closed"
        short = row.resource.partition("/")[2]
        yield (
            f"{row.node:20} {row.product:26} {short:16} {row.zone:8} {row.allocatable:>11} {row.used:>5} "
            f"{row.free:>5}{state}{sick}{shared}"
        )
    yield ""
    yield f"{'type':36} {'nodes':>5} {'used':>5} {'free':>5} {'largest request':>15} {'whole nodes free':>16}"
    for key, each in sums["by_type"].items():
        fits, whole = each["largest_fit"], each["whole_nodes_free"]
        yield f"{key:36} {each['nodes']:>5} {each['used']:>5} {each['free']:>5} {fits:>15} {whole:>16}"
    yield ""
    for title, part in (
        ("team used", "used_by_team"),
        ("team waits for", "pending_by_team"),
        ("zone free", "free_by_zone"),
    ):
        shown = ", ".join(f"{key} {value}" for key, value in sums[part].items()) or "nobody"
        yield f"{title:15} {shown}"


def read(api: ApiClient) -> Facts:
    """
    Raises:
        UserError: no server answers, or the user may not list nodes and pods.
    """
    kinds = [each for each in KINDS if each[0] in NEEDED]
    try:
        objects: list[Json] = []
        for kind, plural, versions, _ in kinds:
            try:
                objects += listing(api, kind, plural, versions, None)
            except ApiException as error:
                if error.status != 403 or kind in ("Node", "Pod"):
                    raise
        return Facts(objects)
    except (ApiException, HTTPError, OSError) as error:
        raise as_user_error(error, api.configuration.host) from None


def parse_args(argv: list[str] | None):  # type: ignore[no-untyped-def]
    made = script.parser(__doc__)
    made.add_argument("--json", action="store_true", help="rows and sums as JSON instead of tables")
    made.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    made.add_argument("--every-s", type=script.positive, default=5, help="of --watch")
    made.add_argument("--demo", action="store_true", help="on a local cluster with a known placement")
    target.add_flags(made)
    return made.parse_args(argv)


def show(api: ApiClient, args: Any) -> dict[str, Any]:
    facts = read(api)
    if args.json:
        print(json.dumps({"rows": [asdict(r) | {"free": r.free} for r in rows(facts)], **summary(facts)}, indent=1))
    else:
        if args.watch and sys.stdout.isatty():
            print("\033[H\033[J", end="")
        print("\n".join(report(facts)), flush=True)
    return summary(facts)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.demo:
        return demo(args)
    with target.connect(args).api as api:
        result = show(api, args)
        with contextlib.suppress(KeyboardInterrupt):
            while args.watch:
                time.sleep(args.every_s)
                result = show(api, args)
    return result


def demo(args: Any) -> dict[str, Any]:
    """The fleet with a training job of 16 GPUs, a server of 1 and a cordoned node; figures are known beforehand."""
    from ch08_kubernetes.cluster.local import LocalCluster
    from ch08_kubernetes.cluster.nodes import FLEET, H100, L4, add_nodes
    from ch08_kubernetes.cluster.rest import call
    from ch08_kubernetes.doctor.planting import deployment, job, put_and_wait

    h100, l4 = ({"nodeSelector": {"nvidia.com/gpu.product": product}} for product in (H100.product, L4.product))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="inventory-"))
        api = stack.enter_context(stack.enter_context(LocalCluster(Path(folder) / "cluster")).client())
        add_nodes(api, FLEET)
        call(api, "PATCH", "/api/v1/nodes/a100-2", {"spec": {"unschedulable": True}})
        put_and_wait(api, "speech", {"team": "speech"}, [job("pretrain", 6, 2, **h100)], placed=2)
        put_and_wait(api, "web", {}, [deployment("serve", 1, 1, **l4)], placed=1)
        put_and_wait(api, "web", {}, [job("late", 16, 1)], placed=1, refused=1)
        return show(api, args)


if __name__ == "__main__":
    script.run(main)
