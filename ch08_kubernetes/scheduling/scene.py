"""A stage for a case: fake nodes and a namespace, pods put there, and what the scheduler and the server say of them."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import yaml
from kubernetes.client.exceptions import ApiException

from ch08_kubernetes.cluster import build
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster, Server
from ch08_kubernetes.cluster.nodes import Node, add_nodes, remove_nodes
from ch08_kubernetes.cluster.rest import Json, call, find, get, reason_of
from common.ranks import free_port
from common.script import UserError

HERE = Path(__file__).parent
PATIENCE_S = 90.0
TOLERATES = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition.

    Raises:
        UserError: it does not come.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise UserError(
                f"{what} did not come in {PATIENCE_S:g} s; see the pods' events, or whether the machine is busy"
            )
        time.sleep(0.1)


def pod(name: str, namespace: str, gpus: int = 0, *, cpus: int = 1, tolerates: bool = True, **spec: object) -> Json:
    container: Json = {"name": "main", "image": "example.com/none", "resources": {"requests": {"cpu": str(cpus)}}}
    if gpus:
        container["resources"]["limits"] = {"nvidia.com/gpu": str(gpus)}
    meta: Json = {"name": name, "namespace": namespace, "labels": {"app": name.rpartition("-")[0] or name}}
    found = {"containers": [container], "terminationGracePeriodSeconds": 1, **spec}
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": meta,
        "spec": found | ({"tolerations": TOLERATES} if tolerates else {}),
    }  # fmt: skip


class Scene:
    """Fake nodes and a namespace, gone when the block is left."""

    def __init__(self, cluster: LocalCluster, name: str, nodes: Iterable[Node]) -> None:
        self.cluster, self.namespace, self.nodes = cluster, name, list(nodes)
        self.api = cluster.client()
        self.path = f"/api/v1/namespaces/{name}/pods"

    def __enter__(self) -> Scene:
        until(lambda: find(self.api, f"/api/v1/namespaces/{self.namespace}") is None, "the end of an earlier case")
        apply(self.api, HERE / "priorities.yaml")
        apply(self.api, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        add_nodes(self.api, self.nodes)
        return self

    def __exit__(self, *_: object) -> None:
        remove_nodes(self.api, self.nodes)
        with contextlib.suppress(ApiException):
            call(self.api, "DELETE", f"/api/v1/namespaces/{self.namespace}")
        self.api.close()

    def pods(self) -> list[Json]:
        return get(self.api, self.path)["items"]  # type: ignore[no-any-return]

    def where(self) -> dict[str, str]:
        """The node of each pod that is there, "" while it has none."""
        return {p["metadata"]["name"]: p["spec"].get("nodeName", "") for p in self.pods()}

    def put(self, *bodies: Json) -> None:
        for body in bodies:
            call(self.api, "POST", self.path, body)

    def why_not(self, name: str) -> str:
        """The scheduler's reason, once it has looked at this pod in vain."""

        def reason() -> str:
            conditions = get(self.api, f"{self.path}/{name}")["status"].get("conditions") or []
            return next((c["message"] for c in conditions if c.get("reason") == "Unschedulable"), "")

        until(lambda: bool(reason()), f"the scheduler's verdict on {name}")
        return reason()

    def placed(self, number: int) -> dict[str, str]:
        until(lambda: sum(map(bool, self.where().values())) >= number, f"a place for {number} pods")
        return self.where()

    def refusal(self, body: Json) -> str:
        """The server's words; "" if it takes the pod."""
        try:
            call(self.api, "POST", self.path, body)
        except ApiException as error:
            return reason_of(error)
        return ""


def evict(scene: Scene, name: str) -> str:
    """As `kubectl drain` asks: the server says no while the budget is used up."""
    meta = {"name": name, "namespace": scene.namespace}
    version = "v1" if find(scene.api, "/apis/policy/v1") else "v1beta1"
    body = {"apiVersion": f"policy/{version}", "kind": "Eviction", "metadata": meta}
    try:
        call(scene.api, "POST", f"{scene.path}/{name}/eviction", body)
    except ApiException as error:
        if error.status != 429:
            raise
        return "refused by the budget"
    return "gone"


@contextlib.contextmanager
def kubelet(scene: Scene) -> Iterator[None]:
    with scene.cluster.client() as api, FakeKubelet(api, [node.name for node in scene.nodes]):
        yield


@contextlib.contextmanager
def second_scheduler(cluster: LocalCluster) -> Iterator[str]:
    """scheduler-config.yaml's second profile, in a scheduler of its own beside the cluster's; the profile's name."""
    config = older_config(yaml.safe_load((HERE / "scheduler-config.yaml").read_text(encoding="utf-8")))
    profiles = [profile for profile in config["profiles"] if profile["schedulerName"] != "default-scheduler"]
    config |= {"profiles": profiles, "clientConnection": {"kubeconfig": str(cluster.kubeconfig)},
               "leaderElection": {"leaderElect": False}}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        flags = {"config": path, "secure-port": free_port(), "port": 0, "cert-dir": folder}
        flags |= {f"{what}-kubeconfig": cluster.kubeconfig for what in ("authentication", "authorization")}
        command = [str(build.binary("kube-scheduler")), *(f"--{name}={value}" for name, value in flags.items())]
        with Server(command, cwd=Path(folder)):
            yield profiles[0]["schedulerName"]


def older_config(config: Json) -> Json:
    """The scheduler's configuration for v1.20: kubescheduler.config.k8s.io/v1 -> v1beta1.

    There the plugin NodeResourcesFit only filters; its strategy MostAllocated is a plugin, NodeResourcesMostAllocated.
    """
    profiles = []
    for profile in config["profiles"]:
        found = {"schedulerName": profile["schedulerName"]}
        for one in profile.get("pluginConfig", []):
            strategy = one["args"]["scoringStrategy"]
            name = f"NodeResources{strategy['type']}"
            others = {"NodeResourcesLeastAllocated", "NodeResourcesBalancedAllocation"} - {name}
            found["plugins"] = {
                "score": {"enabled": [{"name": name, "weight": 10}], "disabled": [{"name": n} for n in sorted(others)]}
            }
            found["pluginConfig"] = [{"name": name, "args": {"resources": strategy["resources"]}}]
        profiles.append(found)
    return {"apiVersion": "kubescheduler.config.k8s.io/v1beta1", "kind": config["kind"], "profiles": profiles}
