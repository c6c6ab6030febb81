"""The HPA at work: a real controller scales a Deployment from one pod to three and back, on an engine's queue.

You learn   how a figure of yours reaches the HPA (custom metrics API, by aggregation), what it computes of it at each
            sync, and what a cold start, a stabilization window and a policy do to the answer
Laptop      python -m ch08_kubernetes.autoscaling.hpa_live                        (make setup-kube first)
            ... --source engine: the queue of a real engine of chapter 6 under load, and not a made-up one
Cluster     kubectl apply -f ch08_kubernetes/autoscaling/hpa-custom.yaml, with prometheus-adapter in this server's place
You see     at each sync the queue, how many pods are there and ready, what the controller wants, and what algorithms.py
            computes from the same figures: they must be equal

The control plane is real, the pods are fake: they take --cold-start-s until they are ready, and serve nobody. With
--source engine one engine answers for all of them, so the queue ends when the load does, not because pods came.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kubernetes.client import ApiClient

from ch06_vllm.scrape import scrape
from ch08_kubernetes.autoscaling.algorithms import HPA, pods_desired
from ch08_kubernetes.autoscaling.custom_metrics import MetricsServer
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.nodes import L4, Node, add_nodes
from ch08_kubernetes.cluster.rest import Json, get
from common import script

NAMESPACE, NAME, METRIC = "hpa-live", "engine", "vllm_waiting_requests"
TARGET = 4  # waiting requests a pod
# Odd where the syncs are even: no time falls together with the edge of a window.
SYNC_S, WINDOW_S, PERIOD_S = 2, 5, 3


@dataclass
class Sync:
    """One sync of the controller: what it was told, and what came of it.

    queue: waiting requests; pods, running: spec.replicas, and pods that have a metric. computed, controller: desired.
    """

    at_s: float
    queue: float
    pods: int
    running: int
    computed: int
    controller: int | None = None


def manifests() -> list[Json]:
    """The Deployment and its HPA, as in hpa-custom.yaml, with seconds for minutes."""
    labels = {"app": NAME}
    container = {
        "name": "vllm",
        "image": "vllm/vllm-openai:v0.32.0",
        "resources": {"limits": {"nvidia.com/gpu": 1}},
    }
    pod = {
        "containers": [container],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "terminationGracePeriodSeconds": 0,
    }
    metric = {"metric": {"name": METRIC}, "target": {"type": "AverageValue", "averageValue": str(TARGET)}}
    down = {
        "stabilizationWindowSeconds": WINDOW_S,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": PERIOD_S}],
    }
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": NAME, "namespace": NAMESPACE},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME},
                "minReplicas": 1,
                "maxReplicas": 3,
                "metrics": [{"type": "Pods", "pods": metric}],
                "behavior": {"scaleDown": down},
            },
        },
    ]


class Recorder:
    """Answers the controller, and computes of each answer what it should do.

    A sync asks once. When the next one asks, the status tells what the one before has decided.
    """

    def __init__(self, api: ApiClient, spec: Json, queue: Callable[[], float]) -> None:
        self.api, self.queue = api, queue
        self.hpa = HPA.read(spec)
        self.syncs: list[Sync] = []
        self.changed = threading.Condition()
        self.started = time.monotonic()

    def of_pods(self, namespace: str, metric: str, selector: str) -> dict[str, float]:
        """Of each running pod its share of the queue."""
        if (namespace, metric) != (NAMESPACE, METRIC):
            raise KeyError(metric)
        base = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}"
        status = get(self.api, f"/apis/autoscaling/v1/namespaces/{NAMESPACE}/horizontalpodautoscalers/{NAME}")["status"]
        replicas = get(self.api, base)["spec"]["replicas"]
        listed = get(self.api, f"/api/v1/namespaces/{NAMESPACE}/pods", labelSelector=selector)["items"]
        living = [pod for pod in listed if "deletionTimestamp" not in pod["metadata"]]
        running = [pod["metadata"]["name"] for pod in living if pod["status"].get("phase") == "Running"]
        with self.changed:
            if self.syncs:
                self.syncs[-1].controller = status.get("desiredReplicas")
            waiting = self.queue()
            # As quantities: the controller is told in thousandths.
            shares = {name: round(waiting / len(running), 3) for name in running}
            now = time.monotonic() - self.started
            proposals = [pods_desired(replicas, shares, TARGET, unready=len(living) - len(running))] if shares else []
            computed = self.hpa.decide(now, replicas, proposals)
            self.syncs.append(Sync(now, waiting, replicas, len(running), computed))
            self.changed.notify_all()
            return shares

    def wait(self, there: Callable[[list[Sync]], bool], what: str, timeout_s: float) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: there(self.known()), timeout_s):
                seen = ", ".join(str(sync.controller) for sync in self.known()) or "no sync at all"
                raise script.UserError(f"{what} after {timeout_s:g} s ({seen}); see kubectl describe hpa")

    def known(self) -> list[Sync]:
        """Those whose outcome is known."""
        return [sync for sync in self.syncs if sync.controller is not None]


class Synthetic:
    """A queue that is as long as it is told to be."""

    def __init__(self) -> None:
        self.length = 0.0

    def __call__(self) -> float:
        return self.length

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        self.length = 14.0
        yield
        self.length = 0.0


class Engine:
    """The queue of a real engine, and requests that keep it filled: two run at a time, the others wait."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def __call__(self) -> float:
        return scrape(self.url)["vllm:num_requests_waiting"]

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        body = {"model": self.model, "prompt": "def f(", "max_tokens": 100, "ignore_eos": True}
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                request = urllib.request.Request(
                    f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                urllib.request.urlopen(request, timeout=120).read()

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@contextlib.contextmanager
def source(name: str) -> Iterator[Synthetic | Engine]:
    if name == "synthetic":
        yield Synthetic()
        return
    from ch06_vllm.make_model import model_folder
    from ch06_vllm.servers import Server

    with Server(model_folder(), "ours", {"max-num-seqs": 2}) as server:
        yield Engine(server.url, server.model)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--source", choices=("synthetic", "engine"), default="synthetic", help="of the queue")
    parser.add_argument("--cold-start-s", type=script.positive, default=3, help="from a pod's start until it is ready")
    parser.add_argument("--timeout-s", type=script.positive, default=120, help="for each of the ways up and down")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    sync = {"horizontal-pod-autoscaler-sync-period": f"{SYNC_S}s"}
    with (
        tempfile.TemporaryDirectory() as folder,
        source(args.source) as queue,
        LocalCluster(Path(folder) / "cluster", controller_manager_options=sync) as cluster,
    ):
        api = cluster.client()
        add_nodes(api, [Node(f"l4-{number}", L4, 1) for number in (1, 2, 3)])
        *first, hpa = manifests()
        recorder = Recorder(cluster.client(), hpa["spec"], queue)
        with FakeKubelet(api, ready_after_s=args.cold_start_s), MetricsServer(recorder.of_pods) as server:
            apply(api, first)
            server.register(api, NAMESPACE)
            print(apply(api, hpa))
            with queue.load():
                recorder.wait(lambda syncs: syncs[-1:] != [] and syncs[-1].pods == 3, "not three pods", args.timeout_s)
            recorder.wait(lambda syncs: syncs[-1:] != [] and syncs[-1].pods == 1, "not one pod again", args.timeout_s)
            seen = recorder.known()
    print(f"\n{'s':>5} {'queue':>6} {'pods':>5} {'running':>8} {'controller':>11} {'computed':>9}")
    for each in seen:
        run.log(**vars(each))
        print(f"{each.at_s - seen[0].at_s:5.1f} {each.queue:6.0f} {each.pods:5} {each.running:8}"
              f" {each.controller or 0:11} {each.computed:9}")  # fmt: skip
    path = [
        seen[0].pods,
        *(after.pods for before, after in itertools.pairwise(seen) if after.pods != before.pods),
    ]
    down = [s for s in seen if s.queue == 0]
    first_less = next((s.at_s for s in down if s.controller is not None and s.controller < 3), math.nan)
    return {
        "source": args.source,
        "path": path,
        "peak": max(path),
        "last": path[-1],
        "syncs": len(seen),
        "disagreements": sum(s.controller != s.computed for s in seen),
        "queue_peak": max(s.queue for s in seen),
        "scale_down_after_s": first_less - down[0].at_s if down else math.nan,
    }


if __name__ == "__main__":
    script.run(main)
