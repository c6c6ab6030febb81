"""Chapter 8: what the training manifests start is really run: a pod that leaves is replaced, and nothing is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ch08_kubernetes.training import as_processes
from common import process
from common.script import UserError

kustomize = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the weights that the overlay's script ends with on two ranks."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "ch03_ddp/train_ddp.py", "--preset", "nano",
               "--steps", "50", "--save-every", "10", "--out", str(out)]  # fmt: skip
    done = process.run(command, timeout_s=300, env={"OMP_NUM_THREADS": "1"})
    assert done.result is not None, done.stderr
    return str(done.result["weights_sha256"])


@kustomize
@pytest.mark.timeout(600)
@pytest.mark.parametrize("leaving", ["0", "1"])  # 0 keeps the rendezvous: then both pods are replaced
def test_a_pod_that_leaves_is_replaced_and_nothing_is_lost(tmp_path: Path, undisturbed: str, leaving: str) -> None:
    command = ["python", "-m", "ch08_kubernetes.training.as_processes", "--leave", leaving, "--run-dir", str(tmp_path)]
    done = process.run(command, timeout_s=400)
    assert done.result is not None, done.stderr
    codes = done.result["exit_codes"]
    # Not 0 before the last step: the Job would count the index as done.
    assert codes[leaving][0] == 143
    assert all(code for ended in codes.values() for code in ended[:-1])
    assert [ended[-1] for ended in codes.values()] == [0, 0]
    assert 10 <= done.result["resumed_at_step"] < 50
    assert done.result["weights_sha256"] == undisturbed


@kustomize
def test_an_overlay_is_read_with_its_environment(tmp_path: Path) -> None:
    pod = as_processes.job(as_processes.OVERLAY)
    places = as_processes.Places(pod, tmp_path, 1234)
    found = places.environment(pod, 1)
    assert found["RDZV_ENDPOINT"] == "127.0.0.1:1234"
    assert found["JOB_COMPLETION_INDEX"] == "1"
    assert found["POD_IP"] == "127.0.0.1"
    assert found["NCCL_SOCKET_IFNAME"] == "=lo"
    assert places.here("/checkpoints/train") == f"{tmp_path}/checkpoints/train"


@kustomize
def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\n", encoding="utf-8")
    with pytest.raises(UserError, match="makes 0 Jobs; name an overlay with one"):
        as_processes.job(tmp_path)
    with pytest.raises(UserError, match="the Job has the pods 0 to 1; take --leave 1"):
        as_processes.main(["--leave", "2", "--run-dir", str(tmp_path / "run")])


@pytest.mark.timeout(300)
def test_ranks_as_ray_tasks() -> None:
    command = ["python", "-m", "ch08_kubernetes.training.ray_launch", "--ranks", "2", "ch03_ddp/train_ddp.py"]
    done = process.run([*command, "--preset", "nano", "--steps", "3"], timeout_s=200)
    assert done.result is not None, done.stderr
    assert (done.result["world_size"], done.result["ranks_agree"], done.result["steps"]) == (2, True, 3)
    failed = process.run([*command, "--preset", "nanoo"], timeout_s=200)
    assert failed.returncode == 2
    # Whichever is the first.
    assert re.fullmatch(r"error: rank [01] ended with 2; see its lines above", failed.stderr.splitlines()[-1])
