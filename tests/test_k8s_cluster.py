"""The local control plane of chapter 8, its fake nodes and their kubelets, and what an old server does not take."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from kubernetes.client import ApiClient

from ch08_kubernetes.cluster import __main__ as command
from ch08_kubernetes.cluster import build, convert, fates, target
from ch08_kubernetes.cluster.apply import Refused, apply, delete
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.nodes import A100, FLEET, GPU_TAINT, H100, Node, add_nodes, remove_nodes
from ch08_kubernetes.cluster.rest import MERGE, call, find, get
from common import process
from common.bootstrap import control_plane
from common.exercises import missing_for
from common.script import UserError

ROOT = Path(__file__).resolve().parent.parent
TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
CLI = [sys.executable, "-m", "ch08_kubernetes.cluster"]


def until(there: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := there()):
        assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s"
        time.sleep(0.05)
    return found


def pod(namespace: str, name: str = "pod", gpus: int = 0, on: str | None = None, **spec: Any) -> dict[str, Any]:
    container: dict[str, Any] = {"name": "main", "image": "image:1"}
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus}}
    where = {"nodeSelector": {"kubernetes.io/hostname": on}} if on else {}
    spec = {"containers": [container], "tolerations": [TOLERATION], **where, **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def condition(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in body["status"].get("conditions") or [] if c["type"] == kind), {})


@pytest.fixture
def api(cluster: LocalCluster) -> ApiClient:
    return cluster.client()


@pytest.fixture
def node(api: ApiClient) -> Iterator[Node]:
    """An H100 node for this test alone, in a zone of that name."""
    made = Node(name := f"h100-{uuid.uuid4().hex[:8]}", H100, 8, "192", "2000Gi", zone=name)
    add_nodes(api, [made])
    yield made
    remove_nodes(api, [made])


@pytest.fixture
def kubelet(api: ApiClient, node: Node) -> Iterator[FakeKubelet]:
    with FakeKubelet(api, [node.name]) as playing:
        yield playing


class Pods:
    """Reads the pods of one namespace."""

    def __init__(self, api: ApiClient, namespace: str) -> None:
        self.api, self.path = api, f"/api/v1/namespaces/{namespace}/pods"

    def get(self, name: str = "pod") -> dict[str, Any]:
        return get(self.api, f"{self.path}/{name}")

    def ready(self, name: str = "pod") -> bool:
        return condition(self.get(name), "Ready").get("status") == "True"

    def state(self, name: str = "pod") -> dict[str, Any]:
        """Of its container."""
        return (self.get(name)["status"].get("containerStatuses") or [{"state": {}}])[0]["state"]

    def why_unscheduled(self, name: str = "pod") -> str:
        return str(condition(self.get(name), "PodScheduled").get("message", ""))


@pytest.fixture
def pods(api: ApiClient, namespace: str) -> Pods:
    return Pods(api, namespace)


# Scheduling, and the life of a pod.


def test_a_gpu_pod_is_placed_by_the_scheduler_and_run_by_the_fake_kubelet(api, namespace, pods, node, kubelet):
    apply(api, pod(namespace, gpus=8, on=node.name))
    until(pods.ready, "pod ready")
    running = pods.get()
    assert running["spec"]["nodeName"] == node.name
    assert running["status"]["phase"] == "Running"
    apply(api, pod(namespace, "ninth", gpus=1, on=node.name))
    until(lambda: "Insufficient nvidia.com/gpu" in pods.why_unscheduled("ninth"), "the ninth GPU is refused")
    call(api, "DELETE", f"{pods.path}/pod")
    until(lambda: pods.ready("ninth"), "the ninth runs once the eight are free")


def test_without_a_toleration_a_pod_does_not_land_on_a_gpu_node(api, namespace, pods, node):
    apply(api, pod(namespace, on=node.name, tolerations=[]))
    until(lambda: "nvidia.com/gpu: present" in pods.why_unscheduled(), "refused by the taint")
    assert "nodeName" not in pods.get()["spec"]


def test_nodes_carry_the_labels_of_gpu_feature_discovery(api, node):
    seen = get(api, f"/api/v1/nodes/{node.name}")
    labels = seen["metadata"]["labels"]
    assert labels["nvidia.com/gpu.product"] == "NVIDIA-H100-80GB-HBM3"
    assert (labels["nvidia.com/gpu.count"], labels["nvidia.com/gpu.memory"]) == ("8", "81559")
    assert seen["spec"]["taints"] == [GPU_TAINT]
    assert seen["status"]["allocatable"]["nvidia.com/gpu"] == "8"
    assert condition(seen, "Ready")["status"] == "True"


def test_the_fleet_has_several_types_zones_and_racks():
    products = {n.gpu.product for n in FLEET if n.gpu}
    assert len(products) == 3
    assert sum(n.gpus for n in FLEET) == 52
    assert len({n.zone for n in FLEET}) == 2
    racks: dict[str, set[tuple[str, str]]] = {}
    for n in FLEET:
        racks.setdefault(n.rack, set()).add((n.zone, n.block))
    assert {rack: at for rack, at in racks.items() if len(at) > 1} in ({}, {"rack-5": racks["rack-5"]})


WAITS = {"ImagePullBackOff", "CreateContainerConfigError", "ContainerCreating"}


def test_each_fate_shows_as_a_kubelet_reports_it(api, namespace, pods, node, kubelet):
    made = {}
    for fate in [*fates.FATES, "Nonsense"]:
        for policy in ("Always", "Never"):
            name = f"{fate}-{policy}".lower()
            body = pod(namespace, name, on=node.name, restartPolicy=policy)
            body["metadata"]["annotations"] = {fates.FATE: fate}
            made[name] = body
    apply(api, list(made.values()))

    def phase(name: str, wanted: str) -> None:
        until(lambda: pods.get(name)["status"].get("phase") == wanted, f"{name} is {wanted}")

    for reason in WAITS:
        for policy in ("always", "never"):
            name = f"{reason.lower()}-{policy}"
            until(lambda n=name, r=reason: pods.state(n).get("waiting", {}).get("reason") == r, name)
            assert pods.get(name)["status"]["phase"] == "Pending"
    for fate, code in fates.ENDED.items():
        phase(f"{fate.lower()}-never", "Failed")
        ended = pods.state(f"{fate.lower()}-never")["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (code, "OOMKilled" if fate == "OOMKilled" else "Error")
        name = f"{fate.lower()}-always"
        until(lambda n=name: pods.state(n).get("waiting", {}).get("reason") == "CrashLoopBackOff", name)
        status = pods.get(name)["status"]["containerStatuses"][0]
        assert status["lastState"]["terminated"]["exitCode"] == code
        assert status["restartCount"] > 0
    for fate in fates.REFUSED:
        phase(f"{fate.lower()}-always", "Failed")
        assert pods.get(f"{fate.lower()}-always")["status"]["reason"] == fate
    for name in ("neverready-always", "neverready-never"):
        phase(name, "Running")
        assert not pods.ready(name)
    for name in ("runs-always", "runs-never", "neverstops-always"):
        until(lambda n=name: pods.ready(n), f"{name} is ready")
    said = until(lambda: pods.state("nonsense-always").get("waiting"), "an unknown fate is told")
    assert said["reason"] == "UnknownFate"
    assert "OOMKilled" in said["message"]
    events = get(api, f"/api/v1/namespaces/{namespace}/events")["items"]
    told = {(e["involvedObject"]["name"], e["reason"]) for e in events}
    assert {
        ("imagepullbackoff-always", "Failed"),
        ("oomkilled-always", "BackOff"),
        ("evicted-never", "Evicted"),
    } <= told


def test_a_running_pod_meets_the_fate_that_it_is_given_later(api, namespace, pods, node, kubelet):
    apply(api, pod(namespace, on=node.name))
    until(pods.ready, "pod ready")
    call(api, "PATCH", f"{pods.path}/pod", {"metadata": {"annotations": {fates.FATE: "OOMKilled"}}}, patch=MERGE)
    until(lambda: pods.state().get("waiting", {}).get("reason") == "CrashLoopBackOff", "it crashed")
    assert not pods.ready()


def test_readiness_waits_for_the_cold_start_and_deletion_for_the_stop(api, namespace, pods, node, kubelet):
    body = pod(namespace, on=node.name, terminationGracePeriodSeconds=600)
    body["metadata"]["annotations"] = {fates.READY_AFTER: "600", fates.STOPS_AFTER: "600"}
    apply(api, body)
    until(lambda: pods.get()["status"]["phase"] == "Running", "it has started")
    assert not pods.ready()
    call(api, "DELETE", f"{pods.path}/pod")
    other = pod(namespace, "other", on=node.name)
    apply(api, other)
    until(lambda: pods.ready("other"), "the kubelet goes on")
    call(api, "DELETE", f"{pods.path}/other")
    until(lambda: find(api, f"{pods.path}/other") is None, "the other is gone")
    assert "deletionTimestamp" in pods.get()["metadata"], "this one takes its time"


def test_a_job_completes(api, namespace, node, kubelet):
    template = {"spec": pod(namespace, on=node.name, restartPolicy="Never")["spec"]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job", "namespace": namespace}}
    apply(api, {**job, "spec": {"completions": 3, "parallelism": 3, "template": template}})
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs/job"
    until(lambda: condition(get(api, path), "Complete").get("status") == "True", "the job is complete")
    assert get(api, path)["status"]["succeeded"] == 3


def test_logs_are_what_the_annotation_says(cluster, api, namespace, pods, node, kubelet):
    body = pod(namespace, on=node.name)
    body["metadata"]["annotations"] = {fates.LOGS: "step 1\nstep 2\nCUDA out of memory\n"}
    apply(api, body)
    until(pods.ready, "pod ready")
    assert cluster.kubectl("logs", "pod", "-n", namespace, "--tail=2").stdout == "step 2\nCUDA out of memory\n"
    assert get_text(api, f"{pods.path}/pod/log") == "step 1\nstep 2\nCUDA out of memory\n"
    refused = cluster.kubectl("logs", "pod", "-n", namespace, user="reader")
    assert "forbidden" in refused.stderr


def get_text(api: ApiClient, path: str) -> str:
    answer = api.call_api(
        path, "GET", auth_settings=["BearerToken"], _preload_content=False, _return_http_data_only=True
    )
    return answer.data.decode()


def test_a_second_kubelet_takes_over_what_runs(api, namespace, pods, node):
    with FakeKubelet(api, [node.name]):
        apply(api, pod(namespace, on=node.name))
        until(pods.ready, "pod ready")
    before = pods.get()
    with FakeKubelet(api, [node.name]):
        apply(api, pod(namespace, "later", on=node.name))
        until(lambda: pods.ready("later"), "a later pod is ready")
        assert pods.get()["status"] == before["status"]
        call(api, "DELETE", f"{pods.path}/pod")
        until(lambda: find(api, f"{pods.path}/pod") is None, "it is deleted")


def test_a_kubelet_leaves_nodes_alone_that_are_not_its_own(api, namespace, pods, node):
    other = Node(f"other-{uuid.uuid4().hex[:8]}", A100, 8)
    add_nodes(api, [other])
    try:
        with FakeKubelet(api, [node.name]):
            apply(api, [pod(namespace, "theirs", on=other.name), pod(namespace, "ours", on=node.name)])
            until(lambda: pods.ready("ours"), "ours is ready")
            until(lambda: pods.get("theirs")["spec"].get("nodeName") == other.name, "theirs is placed")
            assert "startTime" not in pods.get("theirs")["status"]
    finally:
        remove_nodes(api, [other])


# The control plane itself.


@pytest.fixture
def needs_kube() -> None:
    if lacking := missing_for("kube"):
        pytest.skip(f"needs {lacking}")


def processes_in(folder: Path) -> list[int]:
    """Those that have their working folder in it."""
    found = []
    for each in psutil.process_iter():
        try:
            if Path(each.cwd()).is_relative_to(folder) and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each.pid)
        except (psutil.Error, OSError):
            pass
    return found


def test_a_dead_kubelet_makes_its_node_unreachable_beside_another_cluster(cluster, needs_kube, tmp_path):
    quick = {"node-monitor-grace-period": "3s", "node-monitor-period": "1s"}
    folder = tmp_path / "second"
    with LocalCluster(folder, controller_manager_options=quick) as second:
        api = second.client()
        add_nodes(api, [Node("dies", H100, 8), Node("lives", H100, 8)])
        assert find(cluster.client(), "/api/v1/nodes/dies") is None, "the first cluster knows nothing of it"
        with FakeKubelet(api, lease_s=0.5) as kubelet:
            kubelet.silence("dies")
            seen = until(lambda: unknown(get(api, "/api/v1/nodes/dies")), "its node is Unknown")
            assert condition(seen, "Ready")["reason"] == "NodeStatusUnknown"
            until(lambda: taints(api, "lives") == {"nvidia.com/gpu"}, "the other is not")
            kubelet.revive("dies")
            until(lambda: taints(api, "dies") == {"nvidia.com/gpu"}, "back without the taint")
            kubelet.fail("dies", "container runtime is down")
            until(lambda: "node.kubernetes.io/not-ready" in taints(api, "dies"), "not ready, by its own word")
        pids = processes_in(folder)
        assert len(pids) == 4
    assert not folder.exists()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert find(cluster.client(), "/api/v1/namespaces/default")


def unknown(node: dict[str, Any]) -> dict[str, Any] | None:
    tainted = {t["key"] for t in node["spec"].get("taints", [])}
    state = condition(node, "Ready")["status"]
    return node if state == "Unknown" and "node.kubernetes.io/unreachable" in tainted else None


def taints(api: ApiClient, name: str) -> set[str]:
    return {t["key"] for t in get(api, f"/api/v1/nodes/{name}")["spec"].get("taints", [])}


def test_pods_get_a_service_account_token_as_in_real_clusters(api, namespace, pods):
    apply(api, pod(namespace))
    mounts = pods.get()["spec"]["containers"][0]["volumeMounts"]
    assert mounts[0]["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"


class Aggregated(BaseHTTPRequestHandler):
    """Another API server, which tells who it was asked by."""

    def do_GET(self) -> None:
        resources = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "book.example/v1", "resources": []}
        body = json.dumps({**resources, "asked_by": self.headers["X-Remote-User"]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_other_api_servers_are_reached_through_this_one(cluster, api):
    keys = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    keys.load_cert_chain(cluster.folder / "tls.crt", cluster.folder / "tls.key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Aggregated)
    server.socket = keys.wrap_socket(server.socket, server_side=True)
    service = {"metadata": {"name": "aggregated", "namespace": "default"}, "apiVersion": "v1", "kind": "Service"}
    service["spec"] = {"type": "ExternalName", "externalName": "localhost"}
    registered = {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": "v1.book.example"},
    }
    registered["spec"] = {
        "group": "book.example", "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100,
        "insecureSkipTLSVerify": True,
        "service": {"name": "aggregated", "namespace": "default", "port": server.server_port},
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        apply(api, [service, registered])
        path = "/apis/apiregistration.k8s.io/v1/apiservices/v1.book.example"
        until(lambda: condition(get(api, path), "Available").get("status") == "True", "it is available")
        answer = until(lambda: find(api, "/apis/book.example/v1"), "it is reached")
        assert answer["asked_by"] == "admin"
    finally:
        delete(api, [service, registered])
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken_is_one_clear_line(cluster, tmp_path):
    with pytest.raises(UserError, match=f"port {cluster.port} cannot be taken .*; free it"):
        LocalCluster(tmp_path / "new", port=cluster.port).__enter__()
    assert not (tmp_path / "new").exists()


def test_a_wrong_option_is_told_in_the_servers_own_words(needs_kube, tmp_path):
    with pytest.raises(UserError, match="kube-apiserver has ended: unknown flag: --no-such-flag"):
        LocalCluster(tmp_path / "new", apiserver_options={"no-such-flag": 1}).__enter__()
    assert not (tmp_path / "new").exists()
    assert processes_in(tmp_path) == []


def test_a_folder_with_something_in_it_is_left_alone(needs_kube, tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        LocalCluster(tmp_path).__enter__()
    assert (tmp_path / "mine").read_text() == "kept"


def test_without_the_binaries_it_says_what_to_run(own_cache, tmp_path):
    with pytest.raises(UserError, match="not built; run make setup-kube"):
        LocalCluster(tmp_path / "new").__enter__()
    assert missing_for("kube") == "a Kubernetes control plane (make setup-kube)"


# Manifests of today on a server of yesterday.


def hpa(namespace: str) -> dict[str, Any]:
    metric = {
        "type": "Resource",
        "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}},
    }
    scale_down = {"stabilizationWindowSeconds": 60, "tolerance": "0.05"}
    return {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "hpa", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "d"}, "minReplicas": 1,
            "maxReplicas": 3, "metrics": [metric], "behavior": {"scaleDown": scale_down},
        },
    }  # fmt: skip


def test_versions_are_converted_only_where_the_server_lacks_them(api, namespace):
    report = apply(api, [hpa(namespace), pod(namespace)])
    name = f"HorizontalPodAutoscaler/{namespace}/hpa"
    assert report.done == {name: "created", f"Pod/{namespace}/pod": "created"}
    assert report.conversions == {name: ["autoscaling/v2 -> autoscaling/v2beta2"]}
    assert report.dropped == {name: ["spec.behavior.scaleDown.tolerance"]}
    assert "dropped: spec.behavior.scaleDown.tolerance" in str(report)
    assert apply(api, hpa(namespace)).done == {name: "unchanged"}


def test_a_budget_for_all_pods_is_told_to_mean_none(api, namespace):
    budget = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "b", "namespace": namespace},
    }
    report = apply(api, {**budget, "spec": {"minAvailable": 1, "selector": {}}})
    (notes,) = report.conversions.values()
    assert notes == ["policy/v1 -> policy/v1beta1", "spec.selector: {} selects no pod in v1beta1, and all in v1"]


def test_fields_that_the_server_drops_are_named_and_nothing_else(api, namespace):
    spec = pod(namespace)["spec"] | {
        "restartPolicy": "Never", "hostNetwork": False, "schedulingGates": [{"name": "book.example/wait"}],
        "initContainers": [{"name": "sidecar", "image": "i", "restartPolicy": "Always", "env": [{"name": "A", "value": ""}]}],
    }  # fmt: skip
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job", "namespace": namespace}}
    job["spec"] = {
        "completionMode": "Indexed", "completions": 2, "parallelism": 0, "ttlSecondsAfterFinished": 60,
        "template": {"spec": spec},
    }  # fmt: skip
    report = apply(api, job)
    assert report.dropped == {
        f"Job/{namespace}/job": [
            "spec.completionMode",
            "spec.template.spec.schedulingGates",
            "spec.template.spec.initContainers[0].restartPolicy",
        ]
    }
    assert report.conversions == {}


def test_handlers_that_the_server_lacks_become_others(api, namespace):
    body = pod(namespace)
    body["spec"]["containers"][0] |= {
        "readinessProbe": {"grpc": {"port": 8001}},
        "lifecycle": {"preStop": {"sleep": {"seconds": 7}}},
    }
    report = apply(api, body)
    assert report.conversions == {
        f"Pod/{namespace}/pod": [
            "spec.containers[0].readinessProbe: grpc -> tcpSocket",
            "spec.containers[0].lifecycle.preStop: sleep -> exec",
        ]
    }
    assert report.dropped == {}
    container = get(api, f"/api/v1/namespaces/{namespace}/pods/pod")["spec"]["containers"][0]
    assert container["readinessProbe"]["tcpSocket"] == {"port": 8001}
    assert container["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "7"]}}
    assert "grpc" in body["spec"]["containers"][0]["readinessProbe"], "the caller's object is untouched"


class Newer:
    """A server of today, as far as conversion asks."""

    minor = 35

    def resource(self, version: str, kind: str) -> object:
        return object()


def test_a_current_server_gets_everything_as_it_is(namespace):
    body = pod("n")
    body["spec"]["containers"][0] |= {
        "readinessProbe": {"grpc": {"port": 1}},
        "lifecycle": {"preStop": {"sleep": {"seconds": 7}}},
    }
    rule = {"openAPIV3Schema": {"type": "object", convert.RULES: [{"rule": "true"}]}}
    crd = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "c"}}
    crd["spec"] = {"versions": [{"name": "v1", "schema": rule}]}
    for each in (body, hpa("n"), crd):
        assert convert.converted(each, Newer()) == (each, [])  # type: ignore[arg-type]


def test_published_custom_resources_are_served_and_checked(api, namespace):
    topology = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Topology", "metadata": {"name": f"t-{namespace}"}}
    good = {**topology, "spec": {"levels": [{"nodeLabel": "kubernetes.io/hostname"}], "surplus": 1}}
    report = apply(api, good)
    assert report.done[f"Topology/t-{namespace}"] == "created"
    assert report.dropped == {f"Topology/t-{namespace}": ["spec.surplus"]}
    with pytest.raises(Refused, match=r"spec.levels in body should have at least 1 items") as refusal:
        apply(api, {**topology, "metadata": {"name": "bad"}, "spec": {"levels": []}})
    assert refusal.value.status == 422
    delete(api, good)


def test_a_cluster_of_ones_own_is_taught_nothing(cluster, nowhere, tmp_path):
    path = tmp_path / "object.json"
    body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "r"}, "spec": {}}
    path.write_text(json.dumps(body))
    said = told("apply", str(path), "--kubeconfig", str(cluster.kubeconfig))
    assert said == "the server (v1.20.2) has no RayCluster in ray.io/v1; install what defines it"


def test_a_published_definition_loses_what_the_server_refuses_and_says_so(api):
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {
        "a": {"type": "string", "nullable": True, "default": None, convert.RULES: [{"rule": "self != 'x'"}]}}}}}  # fmt: skip
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": "Thing", "plural": "things", "singular": "thing"}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.crd.example"},
    }
    crd["spec"] = {"group": "crd.example", "scope": "Namespaced", "names": names, "versions": [version]}
    report = apply(api, crd)
    (notes,) = report.conversions.values()
    assert notes == [
        "CEL rules taken out of the schema: 1",
        "empty defaults taken out of the schema: 1",
    ]
    delete(api, crd)


def test_a_dry_run_is_checked_and_keeps_nothing(api, namespace):
    report = apply(api, pod(namespace), dry_run=True)
    assert report.done == {f"Pod/{namespace}/pod": "created"}
    assert find(api, f"/api/v1/namespaces/{namespace}/pods/pod") is None
    with pytest.raises(Refused, match="containers: Required value"):
        apply(api, pod(namespace, containers=[]), dry_run=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            {"apiVersion": "book.example/v9", "kind": "Nothing", "metadata": {"name": "n"}},
            "has no Nothing in book.example/v9",
        ),
        ({"apiVersion": "v1", "kind": "Pod"}, "name None; each must be set"),
        (pod("not-there"), r'is refused \(404\): namespaces "not-there" not found'),
    ],
)
def test_what_cannot_be_applied_is_one_clear_line(api, body, said):
    with pytest.raises(UserError, match=said):
        apply(api, body)


# Which cluster is meant, and whether it can be used.


def told(*words: str) -> str:
    """What the command says when it fails."""
    with pytest.raises(UserError) as caught:
        command.main([*words])
    return str(caught.value)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cluster is pointed at, and none is up."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "nowhere"


def test_no_cluster_is_exit_2_and_one_line(nowhere):
    done = subprocess.run(
        [*CLI, "status", "--folder", str(nowhere)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert (
        done.stderr == "error: no cluster; start one with python -m ch08_kubernetes.cluster up, or pass --kubeconfig\n"
    )
    assert done.stdout == ""


def test_a_cluster_that_is_pointed_at_is_used_and_nothing_is_started(cluster, node, nowhere, capsys, monkeypatch):
    command.main(["up", "--kubeconfig", str(cluster.kubeconfig), "--folder", str(nowhere)])
    said = capsys.readouterr().out
    assert "Kubernetes v1.20.2 at https://127.0.0.1" in said
    assert "NVIDIA-H100-80GB-HBM3" in said
    assert "nothing was started" in said
    assert not nowhere.exists()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    command.main(["env"])
    assert capsys.readouterr().out == f"export KUBECONFIG={cluster.kubeconfig}\n"


def test_bad_credentials_and_missing_rights_are_told_apart(cluster, nowhere):
    expired = cluster.kubeconfig_of("expired")
    assert "does not accept the credentials (expired" in told("status", "--kubeconfig", str(expired))
    reader = cluster.kubeconfig_of("reader")
    assert 'forbids it: nodes is forbidden: User "reader"' in told("status", "--kubeconfig", str(reader))
    body = nowhere.with_name("pod.json")
    body.write_text(json.dumps(pod("kube-system")))
    said = told("apply", str(body), "--kubeconfig", str(reader))
    assert 'in the namespace "kube-system"' in said


def test_a_server_that_is_away_or_another_one_is_told(cluster, nowhere, tmp_path):
    content = json.loads(cluster.kubeconfig.read_text())
    away = tmp_path / "away"
    content["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    away.write_text(json.dumps(content))
    assert told("status", "--kubeconfig", str(away)).startswith(
        "no cluster answers at https://127.0.0.1:1 (connection refused); "
    )
    content["clusters"][0]["cluster"] = {"server": cluster.url}  # whose certificate no public authority has signed
    away.write_text(json.dumps(content))
    assert "a certificate that the kubeconfig does not trust" in told("status", "--kubeconfig", str(away))


@pytest.mark.parametrize(
    ("text", "context", "said"),
    [
        (None, None, "there is no kubeconfig"),
        ("a: [", None, "cannot be used"),
        ("{}", None, "cannot be used"),
        ("", None, "cannot be used"),
        (None, "other", "there is no kubeconfig"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_told(nowhere, tmp_path, text, context, said):
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    assert said in told("status", "--kubeconfig", str(path), *(["--context", context] if context else []))


def test_an_unknown_context_is_told(cluster, nowhere):
    assert "other" in told("status", "--kubeconfig", str(cluster.kubeconfig), "--context", "other")


# up and down.


def started(*words: str, env: dict[str, str] | None = None) -> process.Child:
    child = process.Child([*CLI, "up", *words], env=env)

    def ready() -> bool:
        assert child.process.poll() is None, "".join(child.err)
        return any("Ctrl-C ends it" in line for line in child.out)

    try:
        until(ready, "up is ready", 120)
    except BaseException:
        child.stop()
        raise
    return child


def test_up_serves_until_interrupted_and_leaves_nothing(needs_kube, nowhere, capsys):
    at = ["--folder", str(nowhere)]
    with started("--local", *at) as child:
        assert "is up already" in told("up", "--local", *at)
        command.main(["status", *at])
        said = capsys.readouterr().out
        assert "12 of 12 nodes ready" in said
        assert "32 x NVIDIA-H100-80GB-HBM3 on 4 nodes" in said
        pids = processes_in(nowhere)
        assert len(pids) == 4
        os.kill(child.process.pid, signal.SIGINT)
        child.process.wait(60)
        assert child.process.returncode == 130
        assert not nowhere.exists()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert list(nowhere.parent.iterdir()) == []


def test_up_that_is_killed_leaves_nothing_either(needs_kube, nowhere, capsys):
    at = ["--folder", str(nowhere)]
    command.main(["down", *at])
    assert capsys.readouterr().out == "no cluster of this checkout is up\n"
    with started("--local", "--no-nodes", *at) as child:
        pids = processes_in(nowhere)
        os.kill(child.process.pid, signal.SIGKILL)
        until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the servers are gone")
        until(lambda: not nowhere.exists(), "the folder is gone")


def test_what_a_dead_up_left_is_found_and_cleared_away(nowhere, capsys):
    nowhere.mkdir()
    stale = target.State(os.getpid(), 1.0, "local", "/nowhere/kubeconfig")  # our pid, but another process's time
    (nowhere / "state.json").write_text(json.dumps(vars(stale)))
    assert told("status", "--folder", str(nowhere)).startswith("no cluster; ")
    command.main(["down", "--folder", str(nowhere)])
    assert capsys.readouterr().out == "the cluster was dead; cleared away what it left\n"
    assert not nowhere.exists()


def test_a_folder_of_somebody_elses_is_left_alone(nowhere, capsys):
    nowhere.mkdir()
    (nowhere / "mine").write_text("kept")
    assert "no cluster wrote it" in told("up", "--local", "--folder", str(nowhere))
    command.main(["down", "--folder", str(nowhere)])
    assert capsys.readouterr().out == "no cluster of this checkout is up\n"
    assert (nowhere / "mine").read_text() == "kept"
    assert "cannot write to" in told("up", "--local", "--folder", str(nowhere / "mine" / "new"))


FAKE_KIND = """#!{python}
import pathlib, shutil, sys
log = pathlib.Path({log!r})
log.open("a").write(" ".join(sys.argv[1:3]) + "\\n")
if sys.argv[1] == "create":
    shutil.copy({kubeconfig!r}, sys.argv[sys.argv.index("--kubeconfig") + 1])
"""


@pytest.mark.parametrize("ending", ["down", "killed"])
def test_with_docker_kind_is_used_and_its_cluster_deleted(cluster, nowhere, tmp_path, capsys, ending):
    """Stand-ins for the two programs; what kind would have made is the tests' own cluster."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    scripts = {
        "docker": f"#!{sys.executable}\n",
        "kind": FAKE_KIND.format(python=sys.executable, log=str(log), kubeconfig=str(cluster.kubeconfig)),
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    with started("--no-nodes", "--folder", str(nowhere), env=path) as child:
        assert any("a kind cluster is ready" in line for line in child.out)
        if ending == "down":
            command.main(["down", "--folder", str(nowhere)])
            assert capsys.readouterr().out == "ended the kind cluster\n"
            assert not nowhere.exists()
        else:
            os.kill(child.process.pid, signal.SIGKILL)
            until(lambda: "delete cluster" in log.read_text(), "kind was told to delete it")
            until(lambda: not nowhere.exists(), "the folder is gone")
    assert log.read_text().splitlines() == ["create cluster", "delete cluster"]


# Building.


@pytest.fixture
def recipe(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Build by another recipe, into an empty cache; its text to where it will be built."""

    def use(text: str) -> Path:
        path = tmp_path / "recipe.sh"
        path.write_text(text)
        monkeypatch.setattr(build, "RECIPE", path)
        monkeypatch.setattr(build, "debian_mirror", lambda: "http://127.0.0.1:1/debian")
        return control_plane()

    return use


def test_two_builders_make_it_once_and_leave_only_what_is_built(recipe, tmp_path):
    target_folder = recipe(f"mkdir bin; sleep 0.3; echo built >> {tmp_path}/count; touch bin/etcd")
    stale = target_folder.with_name(f".{target_folder.name}.partial")
    (stale / "deep").mkdir(parents=True)  # of a build whose machine went down
    threads = [threading.Thread(target=build.main) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "count").read_text() == "built\n"
    assert build.built()
    assert sorted(p.name for p in target_folder.parent.iterdir()) == sorted(
        [target_folder.name, f".{target_folder.name}.lock"]
    )


KILLED_BUILD = """
from pathlib import Path
from ch08_kubernetes.cluster import build
build.RECIPE, build.debian_mirror = Path({recipe!r}), lambda: "http://127.0.0.1:1/debian"
build.main()
"""


def test_a_build_that_is_killed_leaves_nothing(recipe, tmp_path):
    target_folder = recipe("touch begun; exec sleep 3600")
    beside = target_folder.with_name(f".{target_folder.name}.partial")
    program = KILLED_BUILD.format(recipe=str(tmp_path / "recipe.sh"))
    with process.Child([sys.executable, "-c", program]) as child:
        until((beside / "begun").exists, "it is building")
        (pid,) = processes_in(beside)
        os.kill(child.process.pid, signal.SIGKILL)
        until(lambda: not beside.exists() and not psutil.pid_exists(pid), "folder and process are gone")
    assert not build.built()


def test_a_build_that_fails_leaves_a_log_and_nothing_built(recipe, capsys):
    target_folder = recipe("echo half > half; echo 'E: the archive is away' >&2; exit 100")
    assert build.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the control plane could not be built (exit 100: E: the archive is away); see ")
    assert "E: the archive is away" in target_folder.with_name(f"{target_folder.name}.log").read_text()
    assert not build.built()
    assert not target_folder.with_name(f".{target_folder.name}.partial").exists()


@pytest.mark.parametrize(
    ("release", "missing", "listed", "said"),
    [
        ({"ID": "ubuntu", "PRETTY_NAME": "Ubuntu 24.04"}, None, "", "this is Ubuntu 24.04; run a cluster with kind"),
        ({"ID": "debian"}, "dpkg-source", "", "the build needs dpkg-dev; run apt-get install dpkg-dev"),
        ({"ID": "debian", "VERSION_CODENAME": "bookworm"}, None, "http://x/ sid main\n", "no mirror of Debian"),
    ],
)
def test_where_it_cannot_be_built_it_says_what_to_do(monkeypatch, release, missing, listed, said):
    monkeypatch.setattr(build.platform, "freedesktop_os_release", lambda: release)
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build.shutil, "which", lambda tool: None if tool == missing else f"/usr/bin/{tool}")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, listed))
    with pytest.raises(UserError, match=said):
        build.debian_mirror()


def test_the_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.main() == 2
    assert "cannot write the cache" in capsys.readouterr().err


def test_a_namespace_that_is_deleted_with_its_pods_does_not_end_the_kubelet(api):
    """While it goes no event may be written there; the pods go all the same, and others are still played."""
    add_nodes(api, [Node("going", cpu="64")])
    try:
        with FakeKubelet(api, ["going"]) as kubelet:
            apply(api, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "going"}})
            for number in range(10):
                call(api, "POST", "/api/v1/namespaces/going/pods", pod("going", f"p-{number}"))
            call(api, "DELETE", "/api/v1/namespaces/going")
            until(lambda: find(api, "/api/v1/namespaces/going") is None, "the end of the namespace")
            assert kubelet._error is None
    finally:
        remove_nodes(api, ["going"])
