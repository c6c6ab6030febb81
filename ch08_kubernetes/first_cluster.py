"""A first cluster with GPUs: is it there, does it give out GPUs, and what does it say when it cannot?

You learn   what makes a node a GPU node (a resource, labels, a taint), what a pod must say to get there, and where to
            read why a pod waits
Laptop      python -m ch08_kubernetes.first_cluster                           (make setup-kube first)
GPU node    setup/k3s-gpu.sh makes it a cluster; then as on one
Cluster     python -m ch08_kubernetes.first_cluster --kubeconfig ~/.kube/config --image YOUR_IMAGE
You see     the nodes and their GPUs; setup/verify-gpu.yaml placed and done; the same pod without its toleration, and
            one that wants more GPUs than any node has, both waiting with the scheduler's own reason

On a laptop the control plane is real and the 52 GPUs are fake: the pod is placed as it would be, and nothing runs in
it. On a cluster of yours it does run, and multiplies two matrices on the GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster import target
from ch08_kubernetes.cluster.apply import apply, delete, objects
from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.nodes import FLEET, add_nodes
from ch08_kubernetes.cluster.rest import Json, as_user_error, get
from common import script

VERIFY = Path(__file__).parent / "setup" / "verify-gpu.yaml"
GPU = "nvidia.com/gpu"


@contextlib.contextmanager
def cluster(args: argparse.Namespace) -> Iterator[ApiClient]:
    """The reader's, if one is named or up; else one on this machine, with fake nodes, for as long as this runs."""
    running = target.state()
    if not args.local and (target.pointed_at(args) or (running and running.alive())):
        yield target.connect(args).api
        return
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder) / "cluster") as local:
        api = local.client()
        add_nodes(api, FLEET)
        with FakeKubelet(api):
            yield api


def gpu_nodes(api: ApiClient) -> list[Json]:
    """Nodes that offer GPUs.

    Raises:
        UserError: there is none.
    """
    nodes = get(api, "/api/v1/nodes")["items"]
    found = [node for node in nodes if int(node["status"].get("allocatable", {}).get(GPU, 0))]
    if not found:
        raise script.UserError(
            f"none of {len(nodes)} nodes offers {GPU}; install the GPU Operator or setup/device-plugin.yaml"
        )
    return found


def pods(namespace: str, image: str | None) -> dict[str, Json]:
    """verify-gpu.yaml's pod, and two that cannot be placed: as other people write them."""
    (verify,) = objects(VERIFY)
    verify["metadata"]["namespace"] = namespace
    if image:
        verify["spec"]["containers"][0]["image"] = image
    intolerant, greedy = copy.deepcopy(verify), copy.deepcopy(verify)
    intolerant["metadata"]["name"] = "no-toleration"
    del intolerant["spec"]["tolerations"]
    greedy["metadata"]["name"] = "too-many"
    greedy["spec"]["containers"][0]["resources"]["limits"][GPU] = 1000
    return {"verify": verify, "intolerant": intolerant, "greedy": greedy}


def wait(there: Callable[[], Any], what: str, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := there()):
        if time.monotonic() > deadline:
            raise script.UserError(f"{what} after {timeout_s:g} s; see kubectl describe, or raise --timeout-s")
        time.sleep(0.1)
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    target.add_flags(parser)
    parser.add_argument("--local", action="store_true", help="a cluster of its own, whatever KUBECONFIG says")
    parser.add_argument("--image", help="with torch for CUDA in it, if not the manifest's own (images/Dockerfile)")
    parser.add_argument(
        "--timeout-s", type=script.positive, default=300, help="until when the pods must be placed and done"
    )
    args = parser.parse_args(argv)
    script.start(__file__, args)
    with cluster(args) as api:
        try:
            return show(api, args.image, args.timeout_s)
        except (ApiException, HTTPError) as error:
            raise as_user_error(error, api.configuration.host) from None


def show(api: ApiClient, image: str | None, timeout_s: float) -> dict:
    version, nodes = get(api, "/version")["gitVersion"], gpu_nodes(api)
    gpus: Counter[str] = Counter()
    for node in nodes:
        meta, count = node["metadata"], int(node["status"]["allocatable"][GPU])
        product = meta["labels"].get("nvidia.com/gpu.product", "unlabelled")
        gpus[product] += count
        taints = ", ".join(f"{t['key']}:{t['effect']}" for t in node["spec"].get("taints", []))
        print(f"{meta['name']:10} {count:>2} x {product:24} taints: {taints}")
    namespace = f"first-{uuid.uuid4().hex[:6]}"
    home = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    asked = pods(namespace, image)

    def read(which: str) -> Json:
        return get(api, f"/api/v1/namespaces/{namespace}/pods/{asked[which]['metadata']['name']}")

    def fortune(which: str) -> str:
        """Where it is placed, or why it is not; empty while the scheduler has not looked yet."""
        seen = read(which)
        if node := seen["spec"].get("nodeName"):
            return f"it does not, it is on {node}: that node has no taint, or this cluster adds tolerations"
        conditions = seen["status"].get("conditions") or []
        return next((c.get("message", "") for c in conditions if c["type"] == "PodScheduled"), "")

    def phase() -> str:
        seen = str(read("verify")["status"].get("phase"))
        if seen == "Failed":
            raise script.UserError(f"{VERIFY.name} failed; see kubectl -n {namespace} logs verify-gpu")
        return seen

    apply(api, home)
    try:
        apply(api, list(asked.values()))
        wait(lambda: phase() == "Succeeded", f"{VERIFY.name} is not done", timeout_s)
        placed = read("verify")["spec"]["nodeName"]
        print(f"{VERIFY.name} ran on {placed}: Succeeded")
        waits = {
            which: wait(lambda w=which: fortune(w), f"nothing is said of {which}", timeout_s)
            for which in ("intolerant", "greedy")
        }
        for which, why in waits.items():
            print(f"{asked[which]['metadata']['name']} waits: {why}")
    finally:
        delete(api, home)
    return {
        "server": version,
        "gpu_nodes": len(nodes),
        "gpus": sum(gpus.values()),
        "gpu_types": len(gpus),
        "verified": True,
        "refused_by_taint": GPU in waits["intolerant"] and "taint" in waits["intolerant"],
        "refused_by_capacity": f"Insufficient {GPU}" in waits["greedy"],
    }


if __name__ == "__main__":
    script.run(main)
