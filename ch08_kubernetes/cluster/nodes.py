"""Fake GPU nodes: what the API server knows of a node, and no machine behind it.

The scheduler reads of a node its labels, taints, conditions and allocatable resources, and a device plugin is the one
that counts `nvidia.com/gpu` there: so pods are placed as they would be on the real fleet. Labels are those of GPU
feature discovery (NVIDIA/k8s-device-plugin, docs/gpu-feature-discovery) and the well-known ones of kubernetes.io.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

from ch08_kubernetes.cluster.rest import Json, call

FAKE = "book/fake-node"  # the label by which FakeKubelet knows its nodes
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@dataclass(frozen=True)
class Gpu:
    """A GPU type as GPU feature discovery labels it; memory in MiB as nvidia-smi shows it."""

    product: str
    memory_mib: int
    family: str
    compute: tuple[int, int]
    mig: bool


H100 = Gpu("NVIDIA-H100-80GB-HBM3", 81559, "hopper", (9, 0), True)
A100 = Gpu("NVIDIA-A100-SXM4-80GB", 81920, "ampere", (8, 0), True)
L4 = Gpu("NVIDIA-L4", 23034, "ada-lovelace", (8, 9), False)


@dataclass(frozen=True)
class Node:
    """A node as a cloud with these machines would show it.

    Attributes:
        gpu, gpus: their type and number; None and 0 for a node without.
        cpu, memory: allocatable, as Kubernetes quantities.
        zone, rack, block: topology labels; a rack is in a block, a block in a zone.
        rdma: network cards that pods may share, as the RDMA device plugin counts them.
        taints: None for the usual one, which keeps pods that want no GPU off a GPU node.
        labels, resources: further ones.
    """

    name: str
    gpu: Gpu | None = None
    gpus: int = 0
    cpu: str = "16"
    memory: str = "64Gi"
    zone: str = "zone-a"
    rack: str = "rack-1"
    block: str = "block-1"
    machine: str = "generic"
    rdma: int = 0
    taints: list[dict[str, str]] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, str] = field(default_factory=dict)

    def all_labels(self) -> dict[str, str]:
        found = {
            FAKE: "true",
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/arch": "amd64",
            "kubernetes.io/os": "linux",
            "node.kubernetes.io/instance-type": self.machine,
            "topology.kubernetes.io/region": "region-1",
            "topology.kubernetes.io/zone": self.zone,
            "topology.kubernetes.io/block": self.block,
            "topology.kubernetes.io/rack": self.rack,
        }
        if self.gpu:
            found |= {
                "feature.node.kubernetes.io/pci-10de.present": "true",
                "nvidia.com/gpu.present": "true",
                "nvidia.com/gpu.product": self.gpu.product,
                "nvidia.com/gpu.count": str(self.gpus),
                "nvidia.com/gpu.memory": str(self.gpu.memory_mib),
                "nvidia.com/gpu.family": self.gpu.family,
                "nvidia.com/gpu.compute.major": str(self.gpu.compute[0]),
                "nvidia.com/gpu.compute.minor": str(self.gpu.compute[1]),
                "nvidia.com/gpu.machine": self.machine,
                "nvidia.com/gpu.replicas": "1",
                "nvidia.com/gpu.sharing-strategy": "none",
                "nvidia.com/mig.capable": str(self.gpu.mig).lower(),
                "nvidia.com/mig.strategy": "single",
            }
        return found | dict(self.labels)

    def all_taints(self) -> list[dict[str, str]]:
        return self.taints if self.taints is not None else [GPU_TAINT] if self.gpus else []

    def all_resources(self) -> dict[str, str]:
        found = {"cpu": self.cpu, "memory": self.memory, "pods": "110", "ephemeral-storage": "500Gi"}
        found |= {"nvidia.com/gpu": str(self.gpus)} if self.gpu else {}
        found |= {"rdma/rdma_shared_device_a": str(self.rdma)} if self.rdma else {}
        return found | dict(self.resources)


def _hgx(number: int) -> Node:
    rack = (number + 1) // 2
    place = {"zone": "zone-a", "rack": f"rack-{rack}", "block": "block-1"}
    return Node(f"h100-{number}", H100, 8, "192", "2000Gi", **place, machine="HGX-H100", rdma=63)


# What `up` starts with: 52 GPUs of three types in two zones. The H100s share an RDMA fabric, two nodes a rack.
FLEET = [
    *(_hgx(number) for number in (1, 2, 3, 4)),
    *(Node(f"a100-{n}", A100, 8, "96", "1000Gi", "zone-b", "rack-3", "block-2", "HGX-A100") for n in (1, 2)),
    *(Node(f"l4-{n}", L4, 1, "16", "64Gi", "zone-b", "rack-4", "block-2", "L4-1") for n in (1, 2, 3, 4)),
    *(Node(f"cpu-{n}", zone=f"zone-{zone}", rack="rack-5", block="block-3") for n, zone in ((1, "a"), (2, "b"))),
]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def conditions(
    ready: bool = True, reason: str = "KubeletReady", message: str = "kubelet is posting ready status"
) -> list[Json]:
    """A node's conditions as a kubelet posts them."""
    fine = {
        "MemoryPressure": "KubeletHasSufficientMemory",
        "DiskPressure": "KubeletHasNoDiskPressure",
        "PIDPressure": "KubeletHasSufficientPID",
    }
    stamps = {"lastHeartbeatTime": now(), "lastTransitionTime": now()}
    found = [{"type": kind, "status": "False", "reason": said, **stamps} for kind, said in fine.items()]
    state = "True" if ready else "False"
    return [*found, {"type": "Ready", "status": state, "reason": reason, "message": message, **stamps}]


def add_nodes(api: ApiClient, nodes: Iterable[Node], *, kubelet_port: int | None = None) -> None:
    """Register them, ready to be scheduled on.

    They stay ready as long as the node lifecycle controller is patient (--node-monitor-grace-period) or a FakeKubelet
    renews their leases.

    Raises:
        ApiException: 409 if a node of that name exists.
    """
    for node in nodes:
        body = {"metadata": {"name": node.name, "labels": node.all_labels()}, "spec": {"taints": node.all_taints()}}
        call(api, "POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", **body})
        resources = node.all_resources()
        status = {"capacity": resources, "allocatable": resources, "conditions": conditions()}
        status["nodeInfo"] = {
            "kubeletVersion": "v1.20.2",
            "osImage": "none (fake)",
            "containerRuntimeVersion": "none://0",
        }
        call(api, "PATCH", f"/api/v1/nodes/{node.name}/status", {"status": status})
        # The server gave it node.kubernetes.io/not-ready at its creation. A controller would take that away in a while.
        call(api, "PATCH", f"/api/v1/nodes/{node.name}", {"spec": {"taints": node.all_taints()}})


def remove_nodes(api: ApiClient, nodes: Iterable[Node | str]) -> None:
    """Delete them and their leases, and their pods with them; no error for one that is not there."""
    for node in nodes:
        name = node if isinstance(node, str) else node.name
        pods = call(api, "GET", "/api/v1/pods", query={"fieldSelector": f"spec.nodeName={name}"})["items"]
        paths = [f"/api/v1/namespaces/{p['metadata']['namespace']}/pods/{p['metadata']['name']}" for p in pods]
        for path in (f"/api/v1/nodes/{name}", f"{LEASES}/{name}", *paths):
            try:
                call(api, "DELETE", path, query={"gracePeriodSeconds": 0})
            except ApiException as error:
                if error.status != 404:
                    raise
