"""The life of two jobs on a local cluster: one ends, one asks for a node more than there are."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient

from ch08_kubernetes import job_logs, job_spec, jobs
from ch08_kubernetes.cluster import fates
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.nodes import FLEET, add_nodes
from ch08_kubernetes.cluster.rest import Json

SPACE = "training"
VOLUME = {  # which the overlays' claim is bound to: the local cluster provisions none
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "metadata": {"name": "checkpoints"},
    "spec": {
        "capacity": {"storage": "20Ti"},
        "accessModes": ["ReadWriteMany", "ReadWriteOnce"],
        "nfs": {"server": "192.0.2.10", "path": "/checkpoints"},
    },
}


def fated(objects: list[Json], notes: dict[str, str]) -> list[Json]:
    """Annotations by which the fake kubelet knows what becomes of the pods."""
    for body in objects:
        if body["kind"] == "Job":
            body["spec"]["template"]["metadata"].setdefault("annotations", {}).update(notes)
        if body["kind"] == "PersistentVolumeClaim":
            body["spec"]["storageClassName"] = ""  # a volume that is there, and no class
    return objects


def run(api: ApiClient, wish: job_spec.Wish, notes: dict[str, str], **watching: Any) -> dict[str, Any]:
    print(
        f"\n$ jobs submit --overlay 8xh100 --name {wish.name} --nodes {wish.nodes}; jobs watch {wish.name}", flush=True
    )
    for line in jobs.submit(api, fated(job_spec.made("8xh100", wish), notes)):
        print(line, flush=True)
    return jobs.watch(api, SPACE, wish.name, timeout_s=120, every_s=0.2, **watching)


def demo() -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobs-")))
        cluster = stack.enter_context(LocalCluster(folder / "cluster"))
        api = stack.enter_context(cluster.client())
        add_nodes(api, FLEET)
        apply(api, VOLUME)
        stack.enter_context(FakeKubelet(api))
        printed = "joined world_size=16\nstep 50 loss 3.21\n"
        first = job_spec.Wish("pretrain", SPACE, nodes=2, team="speech")
        ends = run(api, first, {fates.RUN_FOR: "2", fates.LOGS: printed})
        print("\n$ jobs logs pretrain", flush=True)
        logged = job_logs.logs(api, SPACE, "pretrain", follow=False, tail=None, out=sys.stdout)
        second = job_spec.Wish("bigger", SPACE, nodes=5, team="speech")
        waits = run(api, second, {fates.FATE: fates.RUNS}, stuck_s=3, until_stuck=True)
        print("\n$ jobs list; jobs cancel bigger", *jobs.listing(api, SPACE), sep="\n", flush=True)
        print(jobs.cancel(api, SPACE, "bigger"))
        return {
            "completed": ends["completed"],
            "ranks_logged": logged["pods"],
            "lines": logged["lines"],
            "second_waits_for": waits["causes"][0],
            "second_shows": waits["causes"][-1],
        }
