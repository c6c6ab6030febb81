"""A Ray cluster of this process alone, the application on it, and what the exercises look at.

with cluster(cpus=4), deployed(Arguments(model="nano")) as url:
    requests.post(f"{url}/v1/completions", json={"model": "nano", "prompt": "def f("})
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import psutil

from common import process
from common.ranks import free_port
from common.script import UserError

if TYPE_CHECKING:
    from ch07_sglang_routing.ray_app import Arguments

APP, DEPLOYMENT = "llm", "Engine"
VARIABLES = {  # for Ray's own processes too
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "SPT_NOENV": "1",  # their titles would overwrite the variable by which they are found
}
OBJECT_STORE_BYTES = 80 * 2**20  # near the least that Ray takes: requests and answers do not go through it


@contextlib.contextmanager
def cluster(cpus: int = 4, address: str | None = None) -> Iterator[str]:
    """Ray on this host with ports of its own and a folder, which is what comes; both end with the block, and also when
    this process is killed.

    `cpus` are what replicas may ask for, whether the machine has so many or not. `address`: a cluster that runs,
    HOST:6379; it is left as it is.

    Raises:
        UserError: there is no cluster at the address, or Ray does not start.
    """
    if address:
        check_address(address)
    os.environ.update(VARIABLES)
    import ray
    from ray import serve  # noqa: F401 - it sets its logger's level

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    with own_processes() as folder:
        own: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": folder}
        own |= {"_node_ip_address": "127.0.0.1", "object_store_memory": OBJECT_STORE_BYTES}
        try:
            ray.init(
                address=address or "local", namespace="serve", log_to_driver=False, logging_level="error",
                **({} if address else own),
            )  # fmt: skip
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            what = f"the Ray cluster at {address} cannot be used" if address else "Ray does not start"
            raise UserError(f"{what} ({' '.join(str(error).split())[:160]}); see what `ray status` says") from None
        try:
            yield folder
        finally:
            ray.shutdown()


# As process.GUARD, and the folder goes with the processes that write there.
GUARD = f"""{process.GUARD}
import shutil
shutil.rmtree(sys.argv[3], ignore_errors=True)
"""


@contextlib.contextmanager
def own_processes() -> Iterator[str]:
    """A folder for what is started in the block. Both end with it, as with process.Child: Ray's agents and its files
    outlive a killed driver."""
    mark = f"RAY_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, mark, str(process.ROOT), folder],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.environ[mark] = "1"
        try:
            yield folder
        finally:
            del os.environ[mark]
            process.kill_marked(mark)
            guard.kill()
            guard.communicate()


def check_address(address: str) -> None:
    """Raises UserError if nothing listens there: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); give the head's HOST:6379, started by `ray start --head`"
        ) from None


@contextlib.contextmanager
def deployed(arguments: Arguments, timeout_s: float = 300, **options: Any) -> Iterator[str]:
    """The application on the cluster that is connected, and taken away again; its URL on this host.

    `options`: of the deployment, as autoscaling_config or num_replicas.

    Raises:
        UserError: it does not come up: what Serve says of it.
    """
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        deploy(arguments, timeout_s, **options)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(TimeoutError):  # Serve waits for 60 s; the cluster's end ends what is left
            serve.delete(APP)  # once its replicas have drained, for graceful_shutdown_timeout_s at most


def deploy(arguments: Arguments, timeout_s: float = 300, **options: Any) -> None:
    """Deploy the application, or change it while it runs: new replicas come, old ones drain. Raises as deployed."""
    from ray import serve

    from ch07_sglang_routing import ray_app

    app = ray_app.application(arguments, **options)
    serve.run_many([serve.RunTarget(app, name=APP)], wait_for_applications_running=False)
    asyncio.run(until(lambda: state() == "RUNNING", "the application runs", timeout_s))


def state() -> str:
    """NOT_STARTED, DEPLOYING, RUNNING or UNHEALTHY.

    Raises:
        UserError: it cannot be deployed; the last line of what Serve says.
    """
    from ray import serve

    app = serve.status().applications.get(APP)
    if app is None:
        return "NOT_STARTED"
    if app.status == "DEPLOY_FAILED":
        said = [each.message for each in app.deployments.values()] + [app.message]
        last = next((line.strip() for text in said for line in reversed(text.splitlines()) if "Error" in line), said[0])
        raise UserError(f"Serve cannot deploy the application ({last[:200]}); mend that, or see Ray's logs")
    return str(app.status.value)


def states() -> dict[str, int]:
    """How many of the application's replicas are STARTING, RUNNING and STOPPING."""
    from ray import serve

    app = serve.status().applications.get(APP)
    counts = app.deployments[DEPLOYMENT].replica_states if app and DEPLOYMENT in app.deployments else {}
    return {name: counts.get(name, 0) for name in ("STARTING", "RUNNING", "STOPPING")}


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
    """Until the condition holds. It may block for a moment: it is looked at in a thread.

    Raises:
        UserError: it does not in time; with the states of the replicas.
    """
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            seen = ", ".join(f"{count} {name}" for name, count in states().items())
            raise UserError(
                f"waited {timeout_s:g} s until {what}; replicas: {seen}. See whether the machine is busy, has the "
                "CPUs that they ask for, and whether more requests are in flight than target_ongoing_requests"
            )
        await asyncio.sleep(0.1)


def processes() -> list[psutil.Process]:
    """The replicas' processes, of a cluster that this process has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if child.cmdline()[0].startswith(f"ray::ServeReplica:{APP}:{DEPLOYMENT}"):
                found.append(child)
    return found
