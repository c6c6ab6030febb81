"""The doctor on faults that are planted on a real control plane, and its answers to users who may not see all."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ch08_kubernetes import plant
from ch08_kubernetes.cluster.apply import apply
from ch08_kubernetes.cluster.fates import FATE, LOGS
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.rest import call
from ch08_kubernetes.doctor import __main__ as command
from ch08_kubernetes.doctor import faults, planting, read
from ch08_kubernetes.doctor.diagnosis import diagnose
from ch08_kubernetes.doctor.findings import Finding, inside
from common.script import CheckFailed, UserError

ROOT = Path(__file__).resolve().parent.parent
EVERY = [faults.HEALTHY, *faults.FAULTS]
LOGGED = faults.Fault("logged", "application-error")
NCCL = "step 7\ntorch.distributed.DistBackendError: NCCL error in: ..., unhandled system error, NCCL version 2.27.3\n"


@pytest.fixture(scope="module")
def spaces() -> dict[str, str]:
    mark = uuid.uuid4().hex[:6]
    return {fault.name: f"{fault.name}-{mark}" for fault in [*EVERY, LOGGED]}


@pytest.fixture(scope="module")
def found(cluster: LocalCluster, spaces: dict[str, str]) -> Iterator[dict[str, list[Finding]]]:
    """All faults planted at once; what the doctor says of each, from one snapshot."""
    nodes = [f"{space}-{name}" for space in spaces.values() for name in ("n1", "n2")]
    with cluster.client() as api, FakeKubelet(api, nodes) as kubelet:
        planted = {spaces[f.name]: (f, *faults.plant(f, api, kubelet, spaces[f.name])) for f in EVERY}
        at, steps = faults.plant(LOGGED, api, kubelet, spaces["logged"])
        body = planting.pod("train", 1)
        body["metadata"]["annotations"] = {FATE: "CrashLoopBackOff", LOGS: NCCL}
        at.put(body)
        planted[at.space] = (LOGGED, at, steps)
        yield plant.grow(planted, timeout_s=200)
        for _, at, _ in planted.values():
            faults.uproot(at)


@pytest.mark.parametrize("fault", EVERY, ids=lambda fault: fault.name)
def test_names_the_cause_of_a_planted_fault_first(
    fault: faults.Fault, found: dict[str, list[Finding]], spaces: dict[str, str]
) -> None:
    space = spaces[fault.name]
    said = found[space]
    assert plant.named(fault, said, space), "\n".join(plant.lines(said)) or "it finds nothing"
    for finding in said:
        assert finding.evidence
        assert finding.fix
    assert [f.cause for f in said if not f.because] == [fault.cause] * bool(fault.cause)


def test_consequences_are_grouped_and_stand_below(found: dict[str, list[Finding]], spaces: dict[str, str]) -> None:
    root, *rest = found[spaces["deadlock"]]
    assert {about.rpartition("/")[2] for about in root.about} == {"first", "second"}
    waits = [finding for finding in rest if finding.cause == "no-free-gpus"]
    assert sum(len(finding.about) for finding in waits) == 2
    assert all(finding.because for finding in rest)
    (killed,) = found[spaces["memory"]]
    assert len(killed.about) == 2  # replicas


def test_the_rank_that_is_missing_is_named(found: dict[str, list[Finding]], spaces: dict[str, str]) -> None:
    hang = next(f for f in found[spaces["hang"]] if f.cause == "rendezvous-incomplete")
    assert "1 of 2 ranks run and wait in the rendezvous for rank" in hang.message
    quota = next(f for f in found[spaces["quota"]] if f.cause == "rendezvous-incomplete")
    assert "rank 8 (no pod)" in quota.message


def test_a_log_explains_an_exit_code(
    cluster: LocalCluster, found: dict[str, list[Finding]], spaces: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-n", spaces["logged"], "--kubeconfig", str(cluster.kubeconfig), "--json"]
    with pytest.raises(CheckFailed) as without:
        command.main(words)
    assert without.value.result["causes"] == ["application-error"]
    capsys.readouterr()
    with pytest.raises(CheckFailed):
        command.main([*words, "--logs"])
    first, second = json.loads(capsys.readouterr().out)
    assert (first["cause"], second["cause"]) == ("nccl-error", "application-error")
    assert "unhandled system error" in first["evidence"][0]


def test_one_object_with_its_causes(
    cluster: LocalCluster, found: dict[str, list[Finding]], spaces: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-n", spaces["hang"], "--kubeconfig", str(cluster.kubeconfig)]
    with pytest.raises(CheckFailed) as failed:
        command.main([*words, "--job", "train"])
    assert failed.value.result["causes"] == ["no-free-gpus"]
    assert "-> rendezvous-incomplete" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no pod nobody here"):
        command.main([*words, "--pod", "nobody"])
    dead = f"{spaces['dead-node']}-n1"
    with pytest.raises(CheckFailed) as failed:
        command.main([*words[2:], "--node", dead])
    assert failed.value.result["causes"] == ["node-silent"]


def test_a_saved_snapshot_says_the_same_and_has_no_secrets(
    cluster: LocalCluster, found: dict[str, list[Finding]], spaces: dict[str, str], tmp_path: Path
) -> None:
    space = spaces["label"]
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "key", "namespace": space},
        "stringData": {"token": "hush-hush"},
    }
    with cluster.client() as api:
        apply(api, secret)
    saved = tmp_path / "snapshot.json"
    with pytest.raises(CheckFailed) as live:
        command.main(["-n", space, "--save", str(saved), "--kubeconfig", str(cluster.kubeconfig)])
    objects = json.loads(saved.read_text())["items"]
    kept = next(o for o in objects if o["kind"] == "Secret" and o["metadata"]["name"] == "key")
    assert "data" not in kept
    assert "hush" not in saved.read_text()
    assert "aHVzaC1odXNo" not in saved.read_text()
    with pytest.raises(CheckFailed) as later:
        command.main(["--snapshot", str(saved), "--pod", "train"])
    assert "node-selector" in live.value.result["causes"]
    assert "node-selector" in later.value.result["causes"]


def test_a_user_who_may_not_read_all_is_told_what_and_gets_the_rest(
    cluster: LocalCluster, found: dict[str, list[Finding]], spaces: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    space = spaces["memory"]
    reader = str(cluster.kubeconfig_of("reader"))
    with pytest.raises(
        UserError, match=r"may not list pods in namespace .*forbidden.*nor anything else; ask for the role"
    ):
        command.main(["-n", space, "--kubeconfig", reader])
    rules = [{"apiGroups": ["", "batch", "apps"], "resources": ["pods", "events"], "verbs": ["list"]}]
    head = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "peek", "namespace": space}}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "peek"}
    with cluster.client() as api:
        path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{space}"
        call(api, "POST", f"{path}/roles", {**head, "kind": "Role", "rules": rules})
        subjects = [{"kind": "User", "name": "reader"}]
        call(
            api, "POST", f"{path}/rolebindings", {**head, "kind": "RoleBinding", "roleRef": role, "subjects": subjects}
        )
    with pytest.raises(CheckFailed) as failed:
        command.main(["-n", space, "--kubeconfig", reader])
    assert failed.value.result["causes"][0] == "oom-killed"
    said = capsys.readouterr().err
    assert "may not list nodes" in said
    assert f"may not list jobs in namespace {space}" in said
    assert 'cannot list resource "nodes"' in said
    assert "may not list pods" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kubeconfig", "{expired}"], "does not accept the credentials"),
        (["--kubeconfig", "{nowhere}"], "no cluster answers at"),
        (["--kubeconfig", "{admin}", "-n", "nobody"], "there is no namespace nobody"),
        (["--snapshot", "{missing}"], "cannot read"),
        (["--snapshot", "{empty}"], "holds no objects"),
    ],
)
def test_mistakes_are_one_line(cluster: LocalCluster, tmp_path: Path, words: list[str], says: str) -> None:
    nowhere = tmp_path / "nowhere.kubeconfig"
    nowhere.write_text(cluster.kubeconfig.read_text().replace(str(cluster.port), "1"))
    (tmp_path / "empty.json").write_text("[]")
    paths = {"expired": cluster.kubeconfig_of("expired"), "nowhere": nowhere, "admin": cluster.kubeconfig}
    paths |= {"missing": tmp_path / "missing.json", "empty": tmp_path / "empty.json"}
    given = [word.format(**paths) for word in words]
    run = subprocess.run(
        [sys.executable, "-m", "ch08_kubernetes.doctor", *given], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert says in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_pages_are_joined(
    cluster: LocalCluster, found: dict[str, list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster.client() as api:
        whole = read.listing(api, "Node", "nodes", ("api/v1",), None)
        monkeypatch.setattr(read, "PAGE", 7)
        paged = read.listing(api, "Node", "nodes", ("api/v1",), None)
    assert len(whole) > 14
    assert [n["metadata"]["name"] for n in paged] == [n["metadata"]["name"] for n in whole]
    assert {n["kind"] for n in paged} == {"Node"}


def test_nothing_is_wrong_with_nothing() -> None:
    assert diagnose([]) == []
    assert inside([], "default") == []
