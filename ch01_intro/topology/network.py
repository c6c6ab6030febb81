"""What a host's network means for distributed training: findings with a verdict, and the ring all-reduce formula.

Sources: the NICs of `Machine`, and kernel files below a root (sysfs.FILES). The MTU of RoCE follows the kernel's
iboe_get_mtu (include/rdma/ib_addr.h); counters are described in Documentation/ABI/stable/sysfs-class-infiniband.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import sysfs
from .advise import assign_nics, usable_nics
from .model import Machine, Nic

OK, ATTENTION, ABSENT = "ok", "attention", "absent"
ROCE_HEADERS = 96  # bytes that the kernel sets aside of an Ethernet MTU: GRH, UDP, BTH, XRC, atomic header, ICRC
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """`verdict` is ok, attention (works, but look at it) or absent; `consequence` is what it means for training."""

    topic: str
    verdict: str
    found: str
    consequence: str


def ring_allreduce_seconds(gradient_bytes: float, nodes: int, gbps: float) -> float:
    """The time on the wire of a ring all-reduce: each node sends and receives 2 (N-1)/N times the gradient.

    A lower bound: no latency, no protocol overhead, links always full in both directions; `gbps` in 10^9 bit/s.
    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    """
    return 2 * (nodes - 1) / nodes * gradient_bytes * 8 / (gbps * 1e9)


def node_gbps(machine: Machine) -> float | None:
    """Gb/s of one node towards the others: the NICs that the GPUs use together, or the fastest one without GPUs."""
    nics = {nic.name: nic for nic in assign_nics(machine).values()} if machine.gpus else {}
    if nics:
        rates = [nic.rate_gbps for nic in nics.values()]
        return sum(rate for rate in rates if rate) if all(rates) else None
    return max((nic.rate_gbps for nic in usable_nics(machine) if nic.rate_gbps), default=None)


def rdma_mtu(ethernet_mtu: int) -> int:
    """The RDMA payload of one packet on RoCE, for an Ethernet MTU: 1500 gives 1024, 4192 and above gives 4096."""
    return max((size for size in (256, 512, 1024, 2048, 4096) if size <= ethernet_mtu - ROCE_HEADERS), default=0)


def fabric(machine: Machine) -> str:
    """The best kind of network that is up: infiniband, roce, efa, ethernet, virtual or none."""
    up = {nic.kind for nic in machine.nics if nic.state != "down"}
    return next((kind for kind in ("infiniband", "roce", "efa", "ethernet", "virtual") if kind in up), "none")


def findings(machine: Machine, root: Path) -> list[Finding]:
    """All findings for a machine whose kernel files lie below `root`."""
    rdma = [nic for nic in machine.nics if nic.rdma]
    found: list[Finding | None] = [_rdma_port(nic, root) for nic in rdma]
    if not rdma:
        text = "no device in /sys/class/infiniband"
        found.append(Finding("RDMA", ABSENT, text, "NCCL and gloo use TCP sockets: the CPUs copy every byte"))
    for nic in (nic for nic in rdma if nic.kind == "roce"):
        found += [*_roce(nic), *_congestion(nic, root)]
    found += [_interface(nic) for nic in machine.nics if not nic.rdma]
    found += [_gpudirect(machine, rdma), _memlock(root, rdma), _hugepages(root, rdma)]
    if rdma and not machine.gpus:
        found.append(Finding("backend", ATTENTION, "RDMA without GPUs", "gloo runs over TCP and leaves RDMA unused"))
    return [finding for finding in found if finding]


def _rdma_port(nic: Nic, root: Path) -> Finding:
    rate = nic.rate_text or (f"{nic.rate_gbps:g} Gb/s" if nic.rate_gbps else "rate unknown")
    text = f"{nic.kind}, {rate}, {nic.state}"
    if nic.state == "down":
        return Finding(nic.name, ATTENTION, text, "NCCL skips this port, so its GPUs share another NIC")
    if nic.state == "unknown":
        return Finding(nic.name, ATTENTION, text, "seen in the GPU matrix only: run ibstat to learn its state and rate")
    downs = sysfs.read(_port(nic, root) / "counters/link_downed")
    if downs and downs.isdigit() and int(downs) > 0:
        text += f", went down {downs} times"
        return Finding(nic.name, ATTENTION, text, "a link that goes down in training aborts NCCL: check cable and port")
    consequence = {
        "infiniband": "lossless by credits: the NIC moves memory to memory, no CPU copies, no tuning of PFC",
        "roce": "RDMA in UDP packets: as fast as InfiniBand while the switches lose no packet",
        "efa": "RDMA-like transport of AWS: NCCL needs the aws-ofi-nccl plugin, else it falls back to TCP",
    }[nic.kind]
    return Finding(nic.name, OK, text, consequence)


def _port(nic: Nic, root: Path) -> Path:
    return root / "sys/class/infiniband" / nic.name / "ports" / str(nic.port or 1)


def _roce(nic: Nic) -> Iterator[Finding]:
    if nic.state == "down":
        return
    if nic.roce_v2_gid is None:
        text = "no GID of type RoCE v2"
        yield Finding(f"{nic.name} GID", ATTENTION, text, "give the interface an IP address: RoCE v1 is not routed")
    else:
        index = nic.roce_v2_gid
        text = f"RoCE v2 at GID index {index}"
        yield Finding(f"{nic.name} GID", OK, text, f"NCCL before 2.21 needs NCCL_IB_GID_INDEX={index}, later finds it")
    if nic.mtu is not None:
        size = rdma_mtu(nic.mtu)
        text = f"MTU {nic.mtu}, so RDMA packets of {size}"
        if size < 4096:
            yield Finding(f"{nic.name} MTU", ATTENTION, text, "more packets for the same bytes: set 9000, switches too")
        else:
            yield Finding(f"{nic.name} MTU", OK, text, "the largest RDMA packet fits")


def _congestion(nic: Nic, root: Path) -> Iterator[Finding]:
    """Hints at PFC and ECN: what the port's counters say since boot. The switches' side cannot be read from a host."""
    counters = _port(nic, root) / "hw_counters"
    marked = sysfs.read(counters / "np_ecn_marked_roce_packets")
    lost = sysfs.read(counters / "out_of_sequence")
    topic = f"{nic.name} PFC/ECN"
    if nic.state == "down" or (marked is None and lost is None):
        return
    text = f"{lost or '?'} packets out of sequence, {marked or '?'} marked by ECN since boot"
    if lost and lost.isdigit() and int(lost) > 0:
        yield Finding(topic, ATTENTION, text, "packets were lost: RoCE then resends; check PFC and ECN on the switches")
    elif marked and marked.isdigit() and int(marked) > 0:
        yield Finding(topic, OK, text, "ECN marks arrive and nothing was lost: congestion control works")
    else:
        yield Finding(topic, OK, text, "no congestion seen yet: that says nothing about PFC under load")


def _interface(nic: Nic) -> Finding:
    rate = f"{nic.rate_gbps:g} Gb/s" if nic.rate_gbps else "rate not told by the driver"
    text = f"{nic.kind}, {rate}, {nic.state}" + (f", MTU {nic.mtu}" if nic.mtu else "")
    if nic.state == "down":
        return Finding(nic.name, ABSENT, text, "not in use")
    if not nic.rate_gbps:
        return Finding(nic.name, ATTENTION, text, "measure it between two hosts (iperf3) before planning with it")
    if nic.rate_gbps < 25:
        return Finding(nic.name, ATTENTION, text, "enough for rendezvous, data and checkpoints; slow for gradients")
    return Finding(nic.name, OK, text, "TCP at this rate takes several CPU cores: pin them away from the data loaders")


def _gpudirect(machine: Machine, rdma: list[Nic]) -> Finding:
    topic = "GPUDirect RDMA"
    if not machine.gpus or not rdma:
        what = "no GPU" if not machine.gpus else "no RDMA device"
        return Finding(topic, ABSENT, what, "needs both a GPU and an RDMA device")
    if machine.gpudirect is None:
        text = "no peer-memory module, no DMA-BUF"
        return Finding(
            topic, ATTENTION, text, "data passes through host memory between GPU and NIC: load nvidia_peermem"
        )
    if machine.gpudirect == "dmabuf":
        text = "DMA-BUF by kernel and driver version"
        return Finding(topic, OK, text, "the NIC reads GPU memory itself; NCCL_DEBUG=INFO shows GDRDMA when it is used")
    return Finding(
        topic, OK, machine.gpudirect, "the NIC reads and writes GPU memory itself, host memory is not touched"
    )


def _memlock(root: Path, rdma: list[Nic]) -> Finding | None:
    limits = re.search(r"Max locked memory\s+(\S+)", sysfs.read(root / "proc/self/limits") or "")
    if not limits:
        return None
    unlimited = limits[1] == "unlimited"
    text = "unlimited" if unlimited else f"{int(limits[1]) / 2**20:g} MiB" if limits[1].isdigit() else limits[1]
    if unlimited:
        return Finding("memlock", OK, text, "buffers can be registered with the NIC")
    if not rdma:
        return Finding("memlock", OK, text, "matters only with RDMA, which pins its buffers")
    return Finding("memlock", ATTENTION, text, "registering buffers can fail: set ulimit -l unlimited (also in Slurm)")


def _hugepages(root: Path, rdma: list[Nic]) -> Finding | None:
    pages = re.search(r"HugePages_Total:\s+(\d+)", sysfs.read(root / "proc/meminfo") or "")
    if not pages:
        return None
    text = f"{pages[1]} reserved"
    if int(pages[1]):
        return Finding("huge pages", OK, text, "fewer page-table entries for registered memory")
    if any(nic.kind == "efa" for nic in rdma):
        return Finding("huge pages", ATTENTION, text, "the EFA provider keeps its buffers in them: reserve some")
    return Finding("huge pages", ABSENT, text, "optional: none are needed for NCCL")
