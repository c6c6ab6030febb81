"""The kubelets of the fake nodes, in a few threads: they run no container, and report of each pod as if they did.

with FakeKubelet(cluster.client()) as kubelet:
    ...                          # pods that the scheduler gives to a fake node become Running and Ready (fates.py)
    kubelet.silence("h100-1")    # that node dies: its lease runs out, and the controllers do what they do then

A kubelet's duties towards the API server: the status of its pods, their end when they are deleted, and the node's own
heartbeat, which is a lease renewed every 10 s and its Ready condition (Kubernetes documentation, Nodes, Heartbeats).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster import fates, nodes
from ch08_kubernetes.cluster.keys import HOST
from ch08_kubernetes.cluster.logs import LogServer
from ch08_kubernetes.cluster.rest import STRATEGIC, Json, Watch, call, find, get

LEASE_S = 10
WATCH_S = 240


class FakeKubelet:
    """Plays the kubelets of the fake nodes until the block is left.

    Args:
        api: a client that may do everything.
        only: names of the nodes; all that add_nodes made, if None.
        ready_after_s: how long pods take from their start until they are ready (cold start).
        run_for_s: how long pods that end by themselves run.

    Raises:
        what went wrong in a thread, on leaving. Refusals and an API server that is away for a while are no error.
    """

    def __init__(
        self,
        api: ApiClient,
        only: Iterable[str] | None = None,
        *,
        ready_after_s: float = 0,
        run_for_s: float = 0,
        lease_s: float = LEASE_S,
    ) -> None:
        self.api, self.lease_s = api, lease_s
        self.only = None if only is None else set(only)
        self.ready_after_s, self.run_for_s = ready_after_s, run_for_s
        self._fake: dict[str, bool] = {}  # by node name: is it one of ours?
        self._dead: set[str] = set()
        self._planned: dict[str, tuple[str, bool]] = {}  # by pod uid: the fate, and whether it was told to stop
        self._turn: dict[str, int] = {}  # by pod uid: steps of an older plan are void
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count(1)
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._logs = LogServer(api)
        self._watch: Watch | None = None
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,))
            for run in (self._keep_beating, self._watch_pods, self._work)
        ]

    def __enter__(self) -> FakeKubelet:
        self._logs.__enter__()
        try:
            self._beat()
        except BaseException:
            self._logs.__exit__()
            raise
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._events.put(None)
        if watch := self._watch:
            watch.stop()
        for thread in self._threads:
            thread.join()
        self._logs.__exit__()
        if self._error:
            raise self._error

    def silence(self, node: str) -> None:
        """The node dies: no lease, no status from now on."""
        self._dead.add(node)

    def fail(self, node: str, message: str = "container runtime is down") -> None:
        """Its kubelet lives, and posts that the node is not ready."""
        self._post(node, nodes.conditions(False, "KubeletNotReady", message))

    def revive(self, node: str) -> None:
        self._dead.discard(node)
        self._post(node, nodes.conditions())
        self._renew(node)

    # The node's side.

    def _keep_beating(self) -> None:
        while not self._stopped.wait(self.lease_s):
            with contextlib.suppress(ApiException, HTTPError):  # the server is away, or a node was just removed
                self._beat()

    def _beat(self) -> None:
        for node in get(self.api, "/api/v1/nodes", labelSelector=nodes.FAKE)["items"]:
            name = node["metadata"]["name"]
            states = {c["type"]: c["status"] for c in node["status"].get("conditions", [])}
            if self._is_ours(name):
                if states.get("Ready") == "Unknown":  # it was taken for dead
                    self._post(name, nodes.conditions())
                self._renew(name)

    def _renew(self, node: str) -> None:
        renewed = {"renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
        path = f"{nodes.LEASES}/{node}"
        if find(self.api, path):
            call(self.api, "PATCH", path, {"spec": renewed})
        else:
            spec = {"holderIdentity": node, "leaseDurationSeconds": 40, **renewed}
            call(self.api, "POST", nodes.LEASES, {"metadata": {"name": node}, "spec": spec})

    def _post(self, node: str, conditions: list[Json]) -> None:
        self._patch(node, {"conditions": conditions})

    def _patch(self, node: str, status: Json) -> None:
        call(self.api, "PATCH", f"/api/v1/nodes/{node}/status", {"status": status}, patch=STRATEGIC)

    def _is_ours(self, node: str) -> bool:
        """Whether it is a living fake node that this one plays."""
        if node in self._dead or (self.only is not None and node not in self.only):
            return False
        if node not in self._fake:
            found = find(self.api, f"/api/v1/nodes/{node}")
            if found is None:
                return False
            self._fake[node] = nodes.FAKE in found["metadata"].get("labels", {})
            if self._fake[node]:  # where the API server is to ask for logs
                address = {"addresses": [{"type": "InternalIP", "address": HOST}]}
                self._patch(node, address | {"daemonEndpoints": {"kubeletEndpoint": {"Port": self._logs.port}}})
        return self._fake[node]

    # The pods' side.

    def _watch_pods(self) -> None:
        while not self._stopped.is_set():
            try:
                bound = {"fieldSelector": "spec.nodeName!="}
                listed = get(self.api, "/api/v1/pods", **bound)
                for pod in listed["items"]:
                    self._events.put(lambda pod=pod: self._see(pod))
                self._watch = Watch(self.api, "/api/v1/pods", listed["metadata"]["resourceVersion"], WATCH_S, **bound)
                if self._stopped.is_set():  # between the two
                    self._watch.stop()
                for kind, pod in self._watch:
                    if kind == "ERROR":
                        break  # the version is too old: list anew
                    if kind in ("ADDED", "MODIFIED"):
                        self._events.put(lambda pod=pod: self._see(pod))
                    elif kind == "DELETED":
                        self._events.put(lambda uid=pod["metadata"]["uid"]: self._forget(uid))
            except (HTTPError, ApiException, OSError):
                self._stopped.wait(0.5)  # the server is away, or the watch was stopped

    def _work(self) -> None:
        while not self._stopped.is_set():
            due_s = self._timers[0][0] - time.monotonic() if self._timers else None
            try:
                if due_s is not None and due_s <= 0:
                    raise queue.Empty
                action = self._events.get(timeout=due_s)
            except queue.Empty:
                action = heapq.heappop(self._timers)[2]
            try:
                if action:
                    action()
            except (ApiException, HTTPError) as error:
                status = getattr(error, "status", None)
                if status in (404, 409):
                    continue  # the pod is gone, or another of its name is there
                if status and status < 500 and status != 429:
                    raise
                self._later(1, action)  # the server is away

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self._error = error

    def _later(self, after_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + after_s, next(self._count), action))

    def _see(self, pod: Json) -> None:
        """A pod on some node is new or has changed: plan what becomes of it, if that is not planned."""
        meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
        uid, fate = meta["uid"], fates.annotations(pod).get(fates.FATE, "")
        stopping = "deletionTimestamp" in meta
        if self._planned.get(uid) == (fate, stopping) or not self._is_ours(spec["nodeName"]):
            return
        known = uid in self._planned
        self._planned[uid] = (fate, stopping)
        turn = self._turn[uid] = next(self._count)
        ended = status.get("phase") in ("Succeeded", "Failed")
        if stopping:
            if fate != fates.NEVER_STOPS:
                takes = 0.0 if ended else fates.seconds(pod, fates.STOPS_AFTER, 0)
                takes = min(takes, meta.get("deletionGracePeriodSeconds", 0))
                self._later(takes, lambda: self._remove(pod, turn))
        elif not ended:
            ip = status.get("podIP") or f"10.244.{turn // 250 % 256}.{turn % 250 + 1}"
            steps = fates.plan(pod, ip, self.ready_after_s, self.run_for_s)
            if not known and _is_ready(status):  # by an earlier kubelet of this node
                steps = [step for step in steps if step.status.get("phase") not in ("Pending", "Running")]
            if steps:
                self._later(steps[0].after_s, lambda: self._take(pod, turn, steps))

    def _take(self, pod: Json, turn: int, steps: list[fates.Step]) -> None:
        """The first of the steps, now; the next one when it is due, unless there is another plan by then."""
        uid = pod["metadata"]["uid"]
        if self._turn.get(uid) != turn or not self._is_ours(pod["spec"]["nodeName"]):
            return
        step, *rest = steps
        call(
            self.api,
            "PATCH",
            f"{_path(pod)}/status",
            {"metadata": {"uid": uid}, "status": step.status},
            patch=STRATEGIC,
        )
        if step.event:
            self._tell(pod, *step.event)
        if rest:
            self._later(rest[0].after_s, lambda: self._take(pod, turn, rest))

    def _remove(self, pod: Json, turn: int) -> None:
        uid = pod["metadata"]["uid"]
        if self._turn.get(uid) == turn and self._is_ours(pod["spec"]["nodeName"]):
            call(self.api, "DELETE", _path(pod), {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})

    def _forget(self, uid: str) -> None:
        self._planned.pop(uid, None)
        self._turn.pop(uid, None)

    def _tell(self, pod: Json, reason: str, message: str) -> None:
        meta, stamp = pod["metadata"], nodes.now()
        event = {
            "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", **{k: meta[k] for k in ("name", "namespace", "uid")}},
            "type": "Normal" if reason == "Started" else "Warning",
            "source": {"component": "kubelet", "host": pod["spec"]["nodeName"]},
            "reason": reason, "message": message, "firstTimestamp": stamp, "lastTimestamp": stamp, "count": 1,
        }  # fmt: skip
        try:
            call(self.api, "POST", f"/api/v1/namespaces/{meta['namespace']}/events", event)
        except ApiException as error:
            if error.status not in (403, 404):  # in a namespace that is being deleted nothing new may be written
                raise


def _path(pod: Json) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _is_ready(status: Json) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
