"""Keep a cluster running in the foreground, and leave nothing when that ends, in whatever way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from kubernetes import client

from ch08_kubernetes.cluster.ending import folder_guard, interrupted_by_signals
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster, client_of, remove
from ch08_kubernetes.cluster.nodes import Node, add_nodes
from ch08_kubernetes.cluster.target import State, state
from common import process
from common.script import UserError

KIND_CONFIG = process.ROOT / "ch08_kubernetes" / "setup" / "kind.yaml"
KIND_TIMEOUT_S = 600


def provider() -> str:
    """kind where it is installed and Docker runs, else local."""
    if shutil.which("kind") and shutil.which("docker"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode == 0:
                return "kind"
    return "local"


@contextlib.contextmanager
def claimed(folder: Path, mine: State) -> Iterator[None]:
    """Own the folder of a running cluster, with the state in it, until the block is left.

    Raises:
        UserError: another `up` of this checkout has it. What a dead one left is cleared away.
    """
    if there := state(folder):
        if there.alive():
            raise UserError(
                f"a cluster of this checkout is up already (pid {there.pid}); use it: eval "
                '"$(python -m ch08_kubernetes.cluster env)", or end it: python -m ch08_kubernetes.cluster down'
            )
        print("clearing away what a cluster left that was killed", flush=True)
        remove(folder)
    elif folder.exists():
        raise UserError(f"{folder} is there, and no cluster wrote it; remove it, or name another --folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".cluster-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent} ({error.strerror}); name another --folder") from None
    write(beside, mine)
    try:
        beside.rename(folder)
    except OSError:
        remove(beside)
        raise UserError("another `up` of this checkout starts right now; use that one") from None
    with folder_guard(folder):
        yield


def write(folder: Path, mine: State) -> None:
    beside = folder / ".state.json"
    beside.write_text(json.dumps(asdict(mine)), encoding="utf-8")
    beside.rename(folder / "state.json")  # whole, or not there


@contextlib.contextmanager
def kind_cluster(folder: Path) -> Iterator[Path]:
    """A cluster in Docker; its kubeconfig. Its name is in the state of this checkout alone."""
    name, kubeconfig = f"book-{os.getpid()}", folder / "kind.kubeconfig"
    words = ["kind", "create", "cluster", "--name", name, "--config", str(KIND_CONFIG), "--wait", "180s"]
    with folder_guard(folder / "kind", "kind", "delete", "cluster", "--name", name):
        made = process.run([*words, "--kubeconfig", str(kubeconfig)], timeout_s=KIND_TIMEOUT_S, on_error=print)
        if made.returncode or made.timed_out:
            raise UserError(f"kind made no cluster ({made.reason(KIND_TIMEOUT_S)}); see docker ps, or pass --local")
        yield kubeconfig


def up(folder: Path, nodes: list[Node], port: int | None, only_local: bool) -> None:
    """Start a cluster with these fake nodes, and stay until SIGINT, SIGTERM or SIGHUP.

    Raises:
        UserError: it cannot be started, or one of its servers ends.
    """
    folder = folder.absolute()
    which = "local" if only_local else provider()
    mine = State(os.getpid(), psutil.Process().create_time(), which)
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupted_by_signals())
        stack.enter_context(claimed(folder, mine))
        began = time.monotonic()
        local = None
        if which == "kind":
            kubeconfig = stack.enter_context(kind_cluster(folder))
        else:
            local = stack.enter_context(LocalCluster(folder / "local", port=port))
            kubeconfig = local.kubeconfig
        api = client_of(kubeconfig)
        stack.enter_context(FakeKubelet(api))
        add_nodes(api, nodes)
        write(folder, replace(mine, kubeconfig=str(kubeconfig)))
        welcome(api, nodes, kubeconfig, which, time.monotonic() - began)
        while not (dead := local.dead() if local else ""):
            time.sleep(0.5)
        raise UserError(f"{dead}; start it again")


def welcome(api: client.ApiClient, nodes: list[Node], kubeconfig: Path, which: str, took_s: float) -> None:
    gpus = sum(node.gpus for node in nodes)
    print(f"a {which} cluster is ready after {took_s:.0f} s at {api.configuration.host}")
    print(f"it has {len(nodes)} fake nodes with {gpus} GPUs: the API server knows them, and no container runs")
    print(f"  export KUBECONFIG={kubeconfig}")
    print("  kubectl get nodes -L nvidia.com/gpu.product,nvidia.com/gpu.count,topology.kubernetes.io/rack")
    print("Ctrl-C ends it, or from another terminal: python -m ch08_kubernetes.cluster down", flush=True)


def down(folder: Path, timeout_s: float = 60) -> str:
    """End the `up` of this checkout, from another process; in words, what was done.

    Raises:
        UserError: it does not end in time.
    """
    there = state(folder)
    if there is None:
        return "no cluster of this checkout is up"
    if not there.alive():
        remove(folder)
        return "the cluster was dead; cleared away what it left"
    os.kill(there.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while there.alive() or folder.exists():
        if time.monotonic() > deadline:
            raise UserError(f"pid {there.pid} has not ended after {timeout_s:g} s; look at it, or kill it")
        time.sleep(0.1)
    return f"ended the {there.provider} cluster"
