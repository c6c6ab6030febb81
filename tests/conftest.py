"""Fixtures that the test files share, and an environment in which no test reaches for the network."""

from __future__ import annotations

import fcntl
import os
import shutil
import sysconfig
import tempfile
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ch06_vllm.servers import Server
    from ch08_kubernetes.cluster.local import LocalCluster

SCRATCH = Path(tempfile.mkdtemp(prefix="book-tests-"))
# Before anything imports the libraries that read them once. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # others need the core on which a thread would spin meanwhile
os.environ["HF_DATASETS_CACHE"] = str(SCRATCH / "datasets")
if os.environ.get("TEST_ON_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `make test` proves things on the CPU, also where there is a GPU
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # a test run that was itself started by a launcher is one process, not a rank
# One file for all workers of this run (pytest -n 2): they inherit the variable.
LOCK = Path(os.environ.setdefault("TEST_RUN_LOCK", str(SCRATCH / "lock")))
ENGINES = {"vllm_server", "vllm_server_tp2", "sglang_server"}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: it measures time; no other test runs meanwhile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that ask a shared engine come last: it stays up, and takes memory from which others would be measured.

    Of the rest, and of those, the largest file first, so that two workers end together.
    """
    sizes = Counter(item.path for item in items)
    asking = {path for path in sizes if any(name in path.read_text(encoding="utf-8") for name in ENGINES)}
    items.sort(key=lambda item: (item.path in asking, -sizes[item.path], item.path))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout's clock
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 Python sources of the standard library, 4,000 characters each: enough files to hold whole ones out."""
    folder = tmp_path_factory.mktemp("texts")
    sources = (path for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) if path.stat().st_size > 4000)
    for path, _ in zip(sources, range(60), strict=False):
        (folder / path.name).write_text(path.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    assert len(list(folder.iterdir())) == 60
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test alone. Tests that do not look into the cache share the user's, which is keyed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "modern-distributed-ai"


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache folder for this test run: throw-away corpora that several tests read."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of torchrun or Slurm is set."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="session")
def served_model() -> Path:
    """The model folder that the servers below have: nano, random bf16 weights, a tokenizer with a chat template."""
    from ch06_vllm.make_model import model_folder

    return model_folder()


def needs_vllm() -> None:
    from common.exercises import missing_for

    if lacking := missing_for("vllm"):
        pytest.skip(f"needs {lacking}")


@pytest.fixture(scope="session")
def vllm_server(served_model: Path) -> Iterator[Server]:
    """Real vLLM with one rank, started once for all tests. What they leave in its cache or counters, others see."""
    from ch06_vllm.servers import Server

    needs_vllm()
    # Without the last, JSON may hold blanks without end, and random weights write them.
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    options = {"kv-cache-memory-bytes": "512M", "structured-outputs-config": compact}
    with Server(served_model, "vllm", options) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_server_tp2(served_model: Path) -> Iterator[Server]:
    """The same with two ranks, tensor parallel."""
    from ch06_vllm.servers import Server

    needs_vllm()
    with Server(served_model, "vllm", {"kv-cache-memory-bytes": "256M", "tensor-parallel-size": 2}) as server:
        yield server


@pytest.fixture(scope="session")
def sglang_server(served_model: Path) -> Iterator[Server]:
    """Real SGLang with one rank, started once for all tests, as vllm_server."""
    from ch06_vllm.servers import Server
    from ch07_sglang_routing import sglang_engine  # noqa: F401
    from common.exercises import missing_for

    if lacking := missing_for("sglang"):
        pytest.skip(f"needs {lacking}")
    with Server(served_model, "sglang", {"constrained-json-disable-any-whitespace": True}) as server:
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A Kubernetes control plane without nodes. Tests share it: each has a namespace and fake nodes of its own."""
    from ch08_kubernetes.cluster.local import PATIENT, LocalCluster
    from common.exercises import missing_for

    if lacking := missing_for("kube"):
        pytest.skip(f"needs {lacking}")
    with LocalCluster(tmp_path_factory.mktemp("cluster"), controller_manager_options=PATIENT) as made:
        yield made


@pytest.fixture
def namespace(cluster: LocalCluster) -> Iterator[str]:
    """A namespace of the cluster for this test alone, in which pods can be made."""
    from ch08_kubernetes.cluster.apply import apply, delete

    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"test-{uuid.uuid4().hex[:8]}"}}
    apply(cluster.client(), body)
    yield body["metadata"]["name"]
    delete(cluster.client(), body)
