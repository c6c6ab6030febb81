"""The data model of one machine: GPUs, NICs, NUMA nodes and the link between any two devices.

Link kinds are those of `nvidia-smi topo -m`, from the fastest to the slowest path:

    NV#    a bonded set of # NVLinks (GPU to GPU, directly or through an NVSwitch)
    PIX    at most one PCIe bridge
    PXB    several PCIe bridges, but not the host bridge
    PHB    through a PCIe host bridge (the CPU's root complex)
    NODE   between host bridges of one NUMA node
    SYS    between NUMA nodes, over the CPUs' own interconnect (UPI, Infinity Fabric)
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from common.script import UserError

PCIE_RANK = {"PIX": 5, "PXB": 4, "PHB": 3, "NODE": 2, "SYS": 1}
NVLINK_RANK = 100
NIC_KINDS = ("infiniband", "roce", "efa", "ethernet", "virtual")
RDMA_KINDS = ("infiniband", "roce", "efa")


def link_rank(kind: str | None) -> int:
    """A number that grows with the quality of the path: NV# above all PCIe paths, 0 for an unknown one."""
    if kind is None:
        return 0
    return NVLINK_RANK + nvlinks(kind) if nvlinks(kind) else PCIE_RANK[kind]


def nvlinks(kind: str | None) -> int:
    """How many NVLinks are bonded in this link: 18 for NV18, 0 for a PCIe path."""
    return int(kind[2:]) if kind and kind.startswith("NV") else 0


def is_link_kind(text: str) -> bool:
    return text in PCIE_RANK or re.fullmatch(r"NV[1-9]\d?", text) is not None


@dataclass(frozen=True)
class Gpu:
    """One GPU. `cpus` are the cores next to it; `numa_node` is the node of those cores, not of the GPU's own memory."""

    index: int
    name: str | None = None
    memory_mib: int | None = None
    pci: str | None = None
    numa_node: int | None = None
    cpus: tuple[int, ...] = ()
    nvlinks_active: int | None = None
    nvlinks_total: int | None = None

    @property
    def label(self) -> str:
        return f"GPU{self.index}"


@dataclass(frozen=True)
class Nic:
    """One network device: an RDMA device (mlx5_0) or, without RDMA, a network interface (eth0).

    kind        infiniband, roce (RDMA over Ethernet), efa, ethernet, or virtual (a paravirtual interface of a VM)
    rate_gbps   what the port runs at now, in Gb/s; `rate_text` is how the kernel words it, with lanes and speed
    netdev      the interface behind an RDMA device (its IP side), with that interface's `mtu` in bytes
    roce_v2_gid the first GID index of type RoCE v2 with an IPv4 address, else the first of that type
    """

    name: str
    kind: str = "ethernet"
    rate_gbps: float | None = None
    state: str = "unknown"  # active, down or unknown
    pci: str | None = None
    numa_node: int | None = None
    port: int | None = None
    rate_text: str | None = None
    link_layer: str | None = None
    driver: str | None = None
    netdev: str | None = None
    mtu: int | None = None
    roce_v2_gid: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None

    @property
    def label(self) -> str:
        return self.name

    @property
    def rdma(self) -> bool:
        return self.kind in RDMA_KINDS


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node; `distances` are the kernel's relative costs (10 = local). Without CPUs it is memory only (CXL)."""

    id: int
    cpus: tuple[int, ...] = ()
    memory_mib: int | None = None
    distances: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cpu:
    model: str | None
    architecture: str | None
    cpus: int  # logical
    cores: int  # physical, where lscpu tells; else the logical count
    threads_per_core: int | None = None
    sockets: int | None = None


@dataclass
class Machine:
    """What detection found. `sources` says for each source "ok" or "not available: why"."""

    name: str
    cpu: Cpu | None = None
    gpus: list[Gpu] = field(default_factory=list)
    nics: list[Nic] = field(default_factory=list)
    numa_nodes: list[NumaNode] = field(default_factory=list)
    links: dict[tuple[str, str], str] = field(default_factory=dict)
    nvswitch: bool | None = None  # None: cannot be told from what was readable
    gpudirect: str | None = None  # nvidia_peermem, nv_peer_mem, efa_nv_peermem, dmabuf or None
    socket_interface: str | None = None  # the interface of the default route
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def link(self, a: str, b: str) -> str | None:
        """The link kind between two device labels (GPU0, mlx5_1), None if unknown."""
        return "X" if a == b else self.links.get((a, b), self.links.get((b, a)))

    def gpu_links(self) -> dict[tuple[int, int], str]:
        """Link kind by pair of GPU indexes (i < j), known pairs only."""
        labels = [(gpu.index, gpu.label) for gpu in self.gpus]
        pairs = [(i, j, self.link(a, b)) for n, (i, a) in enumerate(labels) for j, b in labels[n + 1 :]]
        return {(i, j): kind for i, j, kind in pairs if kind}

    @property
    def nvlink_pairs(self) -> int:
        return sum(1 for kind in self.gpu_links().values() if nvlinks(kind))

    def numa_of(self, node: int | None) -> NumaNode | None:
        return next((numa for numa in self.numa_nodes if numa.id == node), None)

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        data["links"] = [[a, b, kind] for (a, b), kind in self.links.items()]
        data["nvswitch"] = self.nvswitch
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """The inverse of `to_json`. Raises UserError for anything else."""
        try:
            data = json.loads(text)
            machine = cls(**{**data, "cpu": _build(Cpu, data["cpu"]) if data["cpu"] else None})
            machine.gpus = [_build(Gpu, item) for item in data["gpus"]]
            machine.nics = [_build(Nic, item) for item in data["nics"]]
            machine.numa_nodes = [_build(NumaNode, item) for item in data["numa_nodes"]]
            machine.links = {(a, b): kind for a, b, kind in data["links"]}
            known = {gpu.label for gpu in machine.gpus} | {nic.label for nic in machine.nics}
            for (a, b), kind in machine.links.items():
                if not (a in known and b in known and is_link_kind(kind)):
                    raise ValueError(f"link {a}-{b} {kind}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"not a topology.json of this version ({error}); write it again with --record") from None
        return machine


def _build(kind: type[Any], data: dict[str, Any]) -> Any:
    """A dataclass from its JSON object: lists become tuples, keys of `distances` numbers again."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if "distances" in values:
        values["distances"] = {int(node): cost for node, cost in values["distances"].items()}
    return kind(**values)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format, `0-3,8,10-11`, as sorted numbers. Raises ValueError."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        found = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if not found:
            if not text.strip():
                return ()
            raise ValueError(f"{text.strip()[:40]!r} is not a CPU list")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"{part!r} counts backwards")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def cpu_ranges(cpus: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive runs of sorted CPU numbers as (first, last)."""
    ranges: list[tuple[int, int]] = []
    for cpu in cpus:
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], cpu)
        else:
            ranges.append((cpu, cpu))
    return ranges


def format_cpu_list(cpus: tuple[int, ...]) -> str:
    """The inverse of `parse_cpu_list`."""
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in cpu_ranges(cpus))
