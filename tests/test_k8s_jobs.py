"""GPU inventory against a known placement, and jobs: their manifests, their life, the merged logs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from ch08_kubernetes import inventory, job_demo, job_logs, job_spec, jobs
from ch08_kubernetes.cluster import fates
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.nodes import H100, L4, Node, add_nodes, remove_nodes
from ch08_kubernetes.cluster.rest import Json, call
from ch08_kubernetes.doctor.facts import Facts
from ch08_kubernetes.doctor.facts import namespace as space_of
from ch08_kubernetes.doctor.gangs import ranks
from ch08_kubernetes.doctor.planting import deployment, job, put_and_wait
from ch08_kubernetes.lint import __main__ as lint
from common.script import CheckFailed, UserError

ROOT = Path(__file__).resolve().parent.parent
HOME = "book/test"


@pytest.fixture
def mark() -> str:
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def fleet(cluster: LocalCluster, mark: str) -> Iterator[list[Node]]:
    """Two H100 nodes, one of which has a sick GPU, one cut into MIG slices, and an L4 that four share."""
    sliced = {"nvidia.com/gpu": "0", "nvidia.com/mig-1g.10gb": "7"}
    shared = {"nvidia.com/gpu.replicas": "4", "nvidia.com/gpu.sharing-strategy": "time-slicing"}
    where = {"zone": f"{mark}-a"}
    made = [
        Node(f"{mark}-h1", H100, 8, "96", "1000Gi", **where, labels={HOME: mark}),
        Node(f"{mark}-h2", H100, 8, "96", "1000Gi", **where, labels={HOME: mark}),
        Node(f"{mark}-mig", H100, 1, "96", "1000Gi", **where, labels={HOME: mark}, resources=sliced),
        Node(f"{mark}-l4", L4, 4, zone=f"{mark}-b", labels={HOME: mark, **shared}),
    ]
    with cluster.client() as api:
        add_nodes(api, made)
        call(api, "PATCH", f"/api/v1/nodes/{mark}-h2/status", {"status": {"allocatable": {"nvidia.com/gpu": "7"}}})
        yield made
        remove_nodes(api, made)


def only(facts: Facts, mark: str) -> Facts:
    """What one test has made, of a cluster that tests share."""
    kinds = [o for kind in inventory.NEEDED for o in facts.all(kind)]
    return Facts(o for o in kinds if mark in o["metadata"]["name"] or mark in space_of(o))


def test_inventory_agrees_with_a_known_placement(
    cluster: LocalCluster, fleet: list[Node], mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    on = {"nodeSelector": {HOME: mark}}
    h100 = {"nodeSelector": {HOME: mark, "nvidia.com/gpu.product": H100.product}}
    l4 = {"nodeSelector": {HOME: mark, "nvidia.com/gpu.product": L4.product}}
    labelled = deployment("serve", 3, 1, **l4)
    labelled["spec"]["template"]["metadata"]["labels"]["team"] = "web"
    with cluster.client() as api:
        put_and_wait(api, f"{mark}-speech", {"team": "speech"}, [job("pretrain", 6, 2, **h100)], placed=2)
        put_and_wait(api, f"{mark}-other", {}, [labelled], placed=3)
        put_and_wait(api, f"{mark}-late", {}, [job("late", 5, 1, **on)], placed=0, refused=1)
        call(api, "PATCH", f"/api/v1/nodes/{mark}-l4", {"spec": {"unschedulable": True}})
        facts = only(inventory.read(api), mark)
    rows = {(row.node.removeprefix(f"{mark}-"), row.resource.partition("/")[2]): row for row in inventory.rows(facts)}
    assert {key: (r.capacity, r.allocatable, r.used, r.free, r.shares, r.open) for key, r in rows.items()} == {
        ("h1", "gpu"): (8, 8, 6, 2, 1, True),
        ("h2", "gpu"): (8, 7, 6, 1, 1, True),
        ("mig", "gpu"): (0, 0, 0, 0, 1, True),
        ("mig", "mig-1g.10gb"): (7, 7, 0, 7, 1, True),
        ("l4", "gpu"): (4, 4, 3, 0, 4, False),
    }
    sums = inventory.summary(facts)
    assert sums["by_type"][H100.product] == {
        "nodes": 3, "allocatable": 15, "used": 12, "free": 3, "sick": 1, "largest_fit": 2, "whole_nodes_free": 0,
    }  # fmt: skip
    assert sums["by_type"][f"{H100.product} mig-1g.10gb"]["largest_fit"] == 7
    assert sums["used_by_team"] == {"speech": 12, "web": 3}
    assert sums["pending_by_team"] == {f"{mark}-late": 5}
    assert sums["free_by_zone"] == {f"{mark}-a": 10, f"{mark}-b": 0}
    assert (sums["used"], sums["closed"], sums["pending"]) == (15, 1, 5)
    text = "\n".join(inventory.report(facts))
    assert "(1 sick)" in text
    assert "(4 shares a GPU)" in text
    result = inventory.main(["--json", "--kubeconfig", str(cluster.kubeconfig)])
    printed = json.loads(capsys.readouterr().out)
    assert printed["used"] == result["used"] >= 15
    assert {row["node"] for row in printed["rows"]} >= {node.name for node in fleet}


def test_inventory_of_a_user_without_rights(cluster: LocalCluster) -> None:
    with pytest.raises(UserError, match=r'cannot list resource "pods".*ask for that right'):
        inventory.main(["--kubeconfig", str(cluster.kubeconfig_of("reader"))])


@pytest.mark.parametrize("overlay", job_spec.overlays())
def test_a_changed_overlay_is_still_right(overlay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The linter, which knows what objects need of each other, finds nothing in what is submitted."""
    words = ["--overlay", overlay, "--name", "llama", "-n", "lab", "--nodes", "3", "--gpus", "4", "--team", "speech"]
    command = ["ch04_fsdp/train_fsdp.py", "--preset", "1b", "--out", "/checkpoints/llama", "--resume", "auto"]
    jobs.main(["submit", *words, "--image", "registry.example.com/mine:7", "--dry-run", "--", *command])
    printed = capsys.readouterr().out
    objects = {body["kind"]: body for body in yaml.safe_load_all(printed)}
    body = objects["Job"]
    pod = body["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert (body["metadata"]["name"], body["metadata"]["namespace"]) == ("llama", "lab")
    assert (body["spec"]["completions"], body["spec"]["parallelism"], env["NNODES"]) == (3, 3, "3")
    assert (container["resources"]["limits"]["nvidia.com/gpu"], env["NPROC_PER_NODE"]) == (4, "4")
    assert (env["RDZV_ENDPOINT"], pod["subdomain"]) == ("llama-0.llama:29400", "llama")
    assert (container["args"], container["image"]) == (command, "registry.example.com/mine:7")
    assert body["spec"]["template"]["metadata"]["labels"]["team"] == "speech"
    assert objects["Service"]["metadata"]["name"] == "llama"
    assert objects["Service"]["spec"]["selector"].items() <= body["spec"]["template"]["metadata"]["labels"].items()
    assert objects["Namespace"]["metadata"]["name"] == "lab"
    assert len([each for each in container["env"] if each["name"] == "NNODES"]) == 1
    (tmp_path / "job.yaml").write_text(printed)
    _, findings = lint.check([tmp_path / "job.yaml"])
    assert [str(finding) for finding in findings] == []


def test_without_wishes_the_overlay_is_as_it_was() -> None:
    from ch08_kubernetes.cluster.apply import objects

    assert job_spec.made("8xh100", job_spec.Wish()) == objects(job_spec.OVERLAYS / "8xh100")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["submit", "--overlay", "9xh100", "--dry-run"], "there is no overlay '9xh100'; known are"),
        (["submit", "--name", "My_Job", "--dry-run"], "the name 'My_Job' is none"),
        (["submit", "--nodes", "0", "--dry-run"], "0 is below 1"),
        (["watch", "nobody", "-n", "default"], "there is no job nobody in namespace default"),
        (["logs", "nobody", "-n", "default"], "there is no job nobody"),
        (["cancel", "nobody", "-n", "default"], "there is no job nobody"),
    ],
)
def test_mistakes(cluster: LocalCluster, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        jobs.main([*words, "--kubeconfig", str(cluster.kubeconfig)])


def wished(space: str, mark: str, notes: dict[str, str], **more: Any) -> list[Json]:
    """The 8xh100 overlay on a test's own nodes, with its claim bound to a volume of its own."""
    objects = job_demo.fated(job_spec.made("8xh100", job_spec.Wish(namespace=space, nodes=2, **more)), notes)
    for body in objects:
        if body["kind"] == "Job":
            body["spec"]["template"]["spec"]["nodeSelector"][HOME] = mark
    volume = {**job_demo.VOLUME, "metadata": {"name": mark}}
    volume["spec"] = {**volume["spec"], "claimRef": {"namespace": space, "name": "checkpoints"}}
    return [volume, *objects]


@pytest.fixture
def pair(cluster: LocalCluster, mark: str) -> Iterator[FakeKubelet]:
    """Two nodes of eight H100, and their kubelets."""
    nodes = [Node(f"{mark}-{n}", H100, 8, "192", "2000Gi", labels={HOME: mark}) for n in (1, 2)]
    with cluster.client() as api:
        add_nodes(api, nodes)
        with FakeKubelet(api, [node.name for node in nodes]) as kubelet:
            yield kubelet
        remove_nodes(api, nodes)
        call(api, "DELETE", f"/api/v1/persistentvolumes/{mark}")


def test_the_life_of_a_job_that_completes(
    cluster: LocalCluster, pair: FakeKubelet, namespace: str, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.client() as api:
        said = "\n".join(jobs.submit(api, wished(namespace, mark, {fates.LOGS: "one\ntwo\nthree\n"}, team="speech")))
        assert "dropped: spec.completionMode" in said
        assert "this server has no Indexed Jobs" in said
        ended = jobs.watch(api, namespace, "train", timeout_s=120, every_s=0.1)
        assert (ended["completed"], ended["succeeded"], ended["exit_codes"]) == (True, 2, [0])
        with pytest.raises(UserError, match=r"job train is in namespace .* already"):
            list(jobs.submit(api, wished(namespace, mark, {})))
    config = ["-n", namespace, "--kubeconfig", str(cluster.kubeconfig)]
    capsys.readouterr()
    assert jobs.main(["logs", "train", "--tail", "2", *config])["lines"] == 4
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == ["[rank 0] three", "[rank 0] two", "[rank 1] three", "[rank 1] two"]
    assert jobs.main(["list", *config]) == {"jobs": 1}
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row == [namespace, "train", "speech", "2", "16", "0", "2", "0", "Complete"]
    assert jobs.main(["cancel", "train", *config]) == {"cancelled": "train"}
    assert jobs.main(["list", *config]) == {"jobs": 0}


def test_a_job_that_fails_ends_with_1_and_without_terminal_codes(
    cluster: LocalCluster, pair: FakeKubelet, namespace: str, mark: str
) -> None:
    objects = wished(namespace, mark, {fates.FATE: "Error"})
    next(body for body in objects if body["kind"] == "Job")["spec"]["backoffLimit"] = 0
    with cluster.client() as api:
        list(jobs.submit(api, objects))
    words = ["watch", "train", "-n", namespace, "--kubeconfig", str(cluster.kubeconfig), "--timeout-s", "100"]
    run = subprocess.run(
        [sys.executable, "-m", "ch08_kubernetes.jobs", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1] == "failed: job train failed: BackoffLimitExceeded"
    assert "\x1b" not in run.stdout
    assert json.loads(run.stdout.splitlines()[-1].removeprefix("RESULT "))["exit_codes"] == [1]


def test_a_job_that_is_stuck_is_explained_and_has_a_time_limit(
    cluster: LocalCluster, pair: FakeKubelet, namespace: str, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.client() as api:
        objects = wished(namespace, mark, {fates.FATE: fates.RUNS})
        job = next(body for body in objects if body["kind"] == "Job")
        job["spec"] |= {"completions": 3, "parallelism": 3}
        list(jobs.submit(api, objects))
        found = jobs.watch(api, namespace, "train", stuck_s=0.5, timeout_s=120, every_s=0.1, until_stuck=True)
        while found["causes"] != ["no-free-gpus", "rendezvous-incomplete"]:  # it may be stuck earlier, on its way there
            found = jobs.watch(api, namespace, "train", stuck_s=0.5, timeout_s=120, every_s=0.1, until_stuck=True)
        printed = capsys.readouterr().out
        assert "waiting for rank" in printed
        assert "wants 24 together, and these nodes have 16" in printed
        with pytest.raises(UserError, match=r"has not ended after 0.1 s"):
            jobs.watch(api, namespace, "train", timeout_s=0.1, every_s=0.1)


class FakeServer:
    """An API server with one Indexed job, as v1.20 has none. Logs are served line by line, as `lines` come."""

    def __init__(self) -> None:
        self.pods: list[Json] = []
        self.finished = False
        self.gates: dict[str, threading.Event] = {}
        handler = self._handler()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def pod(self, name: str, rank: int, created: str, phase: str = "Running") -> None:
        notes = {"batch.kubernetes.io/job-completion-index": str(rank)}
        meta = {"name": name, "namespace": "lab", "annotations": notes, "creationTimestamp": created}
        spec = {"containers": [{"name": "main"}]}
        self.gates[name] = threading.Event()
        self.pods.append({"metadata": meta, "spec": spec, "status": {"phase": phase}})

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.endswith("/log"):
                    name = path.split("/")[-2]
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(f"{name} starts\n".encode())
                    self.wfile.flush()
                    assert outer.gates[name].wait(60)
                    self.wfile.write(f"{name} ends".encode())  # without a line end, as a killed process leaves it
                    return
                if path.endswith("/pods"):
                    body: Json = {"items": outer.pods}
                else:
                    states = [{"type": "Complete", "status": "True"}] if outer.finished else []
                    spec = {"completionMode": "Indexed", "completions": 2, "parallelism": 2}
                    meta = {"name": "train", "namespace": "lab", "uid": "u"}
                    body = {"metadata": meta, "spec": spec, "status": {"conditions": states, "succeeded": 2}}
                sent = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


class Seen(io.StringIO):
    """What was printed; calls `then` when a line comes, the first time."""

    def __init__(self, steps: dict[str, Any]) -> None:
        super().__init__()
        self.steps = steps

    def write(self, text: str) -> int:
        for words, then in list(self.steps.items()):
            if words in text:
                del self.steps[words]
                then()
        return super().write(text)


def test_logs_follow_all_ranks_and_a_pod_that_comes_later() -> None:
    """Rank 0 ends only after rank 1 was replaced and its new pod has printed: nothing waits for a log's end."""
    fake = FakeServer()
    fake.pod("train-0-a", 0, "2026-11-27T10:00:00Z")
    fake.pod("train-1-a", 1, "2026-11-27T10:00:00Z")

    def replace() -> None:
        fake.gates["train-1-a"].set()
        fake.pod("train-1-b", 1, "2026-11-27T10:05:00Z")

    def finish() -> None:
        fake.finished = True
        for gate in fake.gates.values():
            gate.set()

    fake.thread.start()
    try:
        settings = client.Configuration()
        settings.host, settings.proxy = f"http://127.0.0.1:{fake.server.server_port}", None
        out = Seen({"train-1-a starts": replace, "train-1-b starts": finish})
        with client.ApiClient(settings) as api:
            result = job_logs.logs(api, "lab", "train", follow=True, tail=None, out=out, every_s=0.05)
    finally:
        fake.server.shutdown()
        fake.thread.join()
        fake.server.server_close()
    lines = out.getvalue().splitlines()
    assert sorted(lines) == sorted(
        [
            f"[rank {rank}] train-{rank}-{pod} {what}"
            for rank, pod in ((0, "a"), (1, "a"), (1, "b"))
            for what in ("starts", "ends")
        ]
    )
    assert (result["completed"], result["pods"], result["lines"]) == (True, 3, 6)


def test_ranks_of_an_indexed_job_are_its_newest_pods() -> None:
    fake = FakeServer()
    fake.server.server_close()
    fake.pod("train-1-a", 1, "2026-11-27T10:00:00Z", "Failed")
    fake.pod("train-0-a", 0, "2026-11-27T10:00:00Z")
    fake.pod("train-1-b", 1, "2026-11-27T10:05:00Z", "Pending")
    job = {"spec": {"completionMode": "Indexed", "completions": 3, "parallelism": 3}}
    assert {rank: pod["metadata"]["name"] for rank, pod in ranks(job, fake.pods).items()} == {
        0: "train-0-a",
        1: "train-1-b",
    }
    assert (
        jobs.progress(job, fake.pods)
        == "pods: 1 Failed, 1 Pending, 1 Running; waiting for rank 1 (Pending), 2 (no pod)"
    )
    assert ranks({"spec": {}}, []) == {}


def test_a_failed_job_raises_what_becomes_exit_code_1() -> None:
    with pytest.raises(CheckFailed, match="job train failed: DeadlineExceeded"):
        jobs.ended({"job": "train", "reason": "DeadlineExceeded"})
    assert jobs.ended({"job": "train", "reason": "", "completed": True})["completed"]
